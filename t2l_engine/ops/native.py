"""Finds and loads the native library ``_C`` (tensor ops through torch's stable ABI)."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

DISABLE_VARIABLE = "T2L_DISABLE_NATIVE"
#: The oldest release whose stable ABI has all that the library asks for.
OLDEST_TORCH = (2, 11)


def library_path() -> Path:
    """Where the native library lies when it was built."""
    return Path(__file__).resolve().parents[1] / "_C.so"


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
            f"t2l_engine: {path} is present but does not load: {_reason(error)}\n"
            "Install the wheel again (pip install --force-reinstall --no-deps FILE), build anew (make setup in a clone), or "
            f"set {DISABLE_VARIABLE}=1 to run the plain-torch reference.",
            name="t2l_engine._C",
            path=str(path),
        ) from error
    return True


def _reason(error: Exception) -> str:
    """Why torch could not load the library, in terms of what a user can change."""
    found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
        return f"expected torch {'.'.join(map(str, OLDEST_TORCH))} or later, got {torch.__version__}"
    why = error.__cause__ or error  # the loader's own words, which torch puts behind a sentence of its own
    return f"{why} (torch {torch.__version__}, {platform.system()} on {platform.machine()})"


def about() -> dict[str, Any] | None:
    """What the loaded library says of itself; None where none is loaded.

    ``build``: ``version``, ``build_type``, ``compiler`` and ``cuda`` (what the CUDA kernels were compiled for, "none").
    ``instruction_sets``: ``available`` on this CPU, plainest first; ``chosen``, None where ``T2L_ISA`` is unusable; and
    ``error``, which then says why.
    """
    if str(library_path()) not in torch.ops.loaded_libraries:
        return None
    ask = ctypes.CDLL(str(library_path())).t2l_about
    ask.restype = ctypes.c_char_p
    return json.loads(ask())
