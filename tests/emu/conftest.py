"""Tests of the CUDA kernels without a device: ``pytest -m emu`` builds the emulator and runs them."""

import ctypes
from pathlib import Path

import pytest

from t2l_engine.testing import backends


@pytest.fixture
def emulator(request):
    """The emulator that runs this process's ops, by its C functions; counters at zero, and as many multiprocessors as an
    H100 has."""
    if request.config.getoption("--backend") != "emu":
        pytest.skip("for a process with --backend emu; test_emulated_ops.py starts them")
    path: Path | None = request.config.getoption("--emulator")
    library = ctypes.CDLL(str(path or backends.build_emulator()))
    library.t2l_emu_counter.restype = library.t2l_emu_last_launch.restype = ctypes.c_int64
    library.t2l_emu_set_stream.argtypes = (ctypes.c_void_p,)
    library.t2l_emu_reset_counters()
    library.t2l_emu_set_multiprocessors(132)
    return library
