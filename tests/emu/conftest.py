"""Tests of the CUDA kernels without a device: ``pytest -m emu`` builds the emulator and runs them."""

import ctypes

import pytest

from tests import backends


@pytest.fixture(scope="session")
def emulator_library(request):
    """The library that runs this process's ops, with the types of its C functions; built where --library is not given."""
    if request.config.getoption("--backend") != "emu":
        pytest.skip("for a process with --backend emu; test_emulated_ops.py starts them")
    library = ctypes.CDLL(str(request.config.getoption("--library") or backends.build_emulator()))
    library.t2l_emu_counter.restype = library.t2l_emu_last_launch.restype = ctypes.c_int64
    library.t2l_emu_set_stream.argtypes = (ctypes.c_void_p,)
    return library


@pytest.fixture
def emulator(emulator_library):
    """The emulator by its C functions; counters at zero, SMs, clusters and shared memory of an H100."""
    emulator_library.t2l_emu_reset_counters()
    emulator_library.t2l_emu_set_num_sms(132)
    emulator_library.t2l_emu_set_max_cluster(8)
    emulator_library.t2l_emu_set_shared_bytes(227 * 1024)
    return emulator_library
