"""Finds and loads the native library ``_C``, which registers tensor ops through torch's stable ABI."""

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
#: The oldest release whose stable ABI has everything that the library uses.
OLDEST_TORCH = (2, 11)


def library_path() -> Path:
    """Path of the native library, which need not exist."""
    return Path(__file__).resolve().parents[1] / "_C.so"


def is_disabled() -> bool:
    """Whether ``T2L_DISABLE_NATIVE=1`` is set; ImportError for a value that it cannot have."""
    value = os.environ.get(DISABLE_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ImportError(f"{DISABLE_VARIABLE}: expected 0 or 1, got {value!r}", name="t2l_engine._C")
    return value == "1"


def load() -> bool:
    """Load the native library over the plain-torch ops; returns whether native kernels are registered.

    False if there is no library (the package is complete without, but slower) or ``T2L_DISABLE_NATIVE=1`` is set.  Raises
    ImportError for a library that exists but does not load, and for another value of the variable.
    """
    path = library_path()
    if is_disabled() or not path.exists():
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
    """Why torch could not load the library, in terms of versions that a user can change."""
    found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
        return f"expected torch {'.'.join(map(str, OLDEST_TORCH))} or later, got {torch.__version__}"
    why = error.__cause__ or error  # the loader's message; torch's own adds nothing
    return f"{why} (torch {torch.__version__}, {platform.system()} on {platform.machine()})"


def about() -> dict[str, Any] | None:
    """Build and CPU facts of the loaded library; None if none is loaded.

    ``build``: ``version``, ``build_type``, ``compiler`` and ``cuda`` (nvcc's version and the architectures of the CUDA
    kernels, or "none").  ``instruction_sets``: ``available`` on this CPU; ``chosen``, None if ``T2L_ISA``
    is unusable; ``why`` that one; and ``error``, the reason where none is.
    """
    return json.loads(_call_for_text("t2l_about") or "null") if is_loaded() else None


def isa_error() -> str | None:
    """Why ``T2L_ISA`` is unusable, None where it is not; of the loaded library.

    Unlike :func:`about`, this does not ask the system for AMX tiles unless AMX is chosen.
    """
    return _call_for_text("t2l_isa_error")


def is_loaded() -> bool:
    """Whether the native library is loaded."""
    return os.path.realpath(library_path()) in torch.ops.loaded_libraries  # as torch names them


def _call_for_text(function: str) -> str | None:
    """What a C function of the library without arguments returns."""
    call = getattr(ctypes.CDLL(str(library_path())), function)
    call.restype = ctypes.c_char_p
    text: bytes | None = call()
    return None if text is None else text.decode()
