"""Finds and loads the native library ``_C`` (tensor ops through torch's stable ABI)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DISABLE_VARIABLE = "T2L_DISABLE_NATIVE"


def library_path() -> Path:
    """Where the native library lies when it was built."""
    return Path(__file__).resolve().parent / "_C.so"


def load() -> bool:
    """Load the native library over the plain-torch ops; True when native kernels are registered.

    Absent library: False (the package is a complete, slow engine).  ``T2L_DISABLE_NATIVE=1``: False.  A library that is
    present but does not load raises ``ImportError``: it never falls back silently.
    """
    value = os.environ.get(DISABLE_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ImportError(f"{DISABLE_VARIABLE}: expected 0 or 1, got {value!r}")
    path = library_path()
    if value == "1" or not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        raise ImportError(
            f"t2l_engine: {path.name} is present but does not load with torch {torch.__version__}: {error}\n"
            f"Rebuild it (pip install .), or set {DISABLE_VARIABLE}=1 to run the plain-torch reference."
        ) from error
    return True
