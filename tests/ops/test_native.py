"""Which kernels run: those of the backend, under every instruction set of this CPU."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from t2l_engine import ops
from t2l_engine.ops import native
from tests.ops.kernel_cases import LARGE, at_least, is_native, kernel_case, needs_native


def test_native_kernels_run(backend):
    """A run that silently used the fallback fails here."""
    if backend == "cpu" and os.environ.get(native.DISABLE_VARIABLE) == "1":
        pytest.skip("the reference was asked for")
    for name in ops.NATIVE_OPS:
        assert is_native(name), name
    with pytest.raises(ValueError, match="name: expected one of"):
        ops.has_kernel("nothing", "CPU")


def passed(output: str) -> int:
    """How many tests a run of pytest says that passed."""
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


ISAS = native.about()["instruction_sets"] if ops.NATIVE else {"available": [], "chosen": ""}


def needs_cpu_kernels(backend):
    needs_native("instruction sets are the native library's")
    if backend != "cpu":
        pytest.skip("instruction sets are the CPU kernels'")


def under(isa, probe):
    """A Python process that runs ``probe`` with T2L_ISA."""
    return subprocess.run([sys.executable, "-c", probe], env=os.environ | {"T2L_ISA": isa}, capture_output=True, text=True)


#: Not every instruction set's: what the CPU kernels leave to torch, shapes of real models, and many calls of one kernel.
SLOW_OR_BY_TORCH = (*LARGE, "encoder", "fp16", "fp64", "do_not_depend")


@pytest.mark.parametrize("without", [SLOW_OR_BY_TORCH, pytest.param((), marks=pytest.mark.slow)], ids=["small", "all"])
@pytest.mark.parametrize("isa", [isa for isa in ISAS["available"] if isa != ISAS["chosen"]])
def test_instruction_sets(backend, isa, without):
    """The kernel cases under every other instruction set of this CPU, one process each."""
    needs_cpu_kernels(backend)
    if os.environ.get("T2L_ISA"):
        pytest.skip("an instruction set was asked for")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel_case", str(Path(__file__).parent)]
    command += ["-k", " and ".join(f"not {word}" for word in without)] if without else []
    run = subprocess.run(command, env=os.environ | {"T2L_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and passed(run.stdout) >= at_least(*without), run.stdout[-2000:]


@kernel_case
def test_the_instruction_set_that_was_asked_for(backend):
    """In the processes of the test above too."""
    needs_cpu_kernels(backend)
    if not os.environ.get("T2L_ISA") or not ops.NATIVE:
        pytest.skip("no instruction set was asked for, or not of the package's own library")
    assert ISAS["chosen"] == os.environ["T2L_ISA"]


def test_an_unknown_instruction_set(backend):
    """Every call that runs a CPU kernel says so, before and after the library was asked about itself."""
    needs_cpu_kernels(backend)
    probe = """
from t2l_engine import ops
from t2l_engine.ops import native
from t2l_engine.testing.cases import LORA_CASES

def error():
    try:
        ops.lora_add_(**LORA_CASES[4].make())
    except RuntimeError as found:
        return str(found)

before = error()
native.about()
assert error() == before
print(before)
"""
    run = under("mmx", probe)
    expected = "T2L_ISA: expected generic, avx2, avx512, avx512_bf16, avx512_bf16_wide, amx, amx_model, neon or"
    assert run.returncode == 0 and expected in run.stdout and "got 'mmx'" in run.stdout, run.stderr


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="tiles are x86's, and Linux grants them"
)
def test_another_instruction_set_does_not_ask_for_tiles(backend):
    """Nor does the import of the ops, beyond what torch and numpy do.  What Linux grants, a process keeps; bit 18 of
    ARCH_GET_XCOMP_PERM says whether it was asked."""
    needs_cpu_kernels(backend)
    if "amx" not in ISAS["available"]:
        pytest.skip("this CPU has no tiles to be asked for")
    probe = """
import ctypes
import numpy, torch

def granted():
    found = ctypes.c_ulong(0)
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(found))
    return found.value >> 18 & 1

start = granted()
from t2l_engine import ops
from t2l_engine.testing.cases import LORA_CASES
imported = granted()
case = LORA_CASES[4].make()
before = granted()
ops.lora_add_(**case)
print(start, imported, before, granted())
"""
    start, imported, before, after = under("generic", probe).stdout.split()
    assert start == imported and before == after
    assert under("amx", probe).stdout.split()[3] == "1"
