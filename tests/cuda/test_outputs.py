"""Outputs of the CUDA kernels: the op tests against float64, and the kernels under compute-sanitizer."""

import os
import subprocess
import sys

import pytest

from bench.kernels import KernelError, find
from tests import backends
from tests.cuda import kernel_outputs

OUTPUTS = (sys.executable, kernel_outputs.__file__)
OF_THIS_TREE = {"PYTHONPATH": str(backends.ROOT)}
#: Tool -> its options.  Calls of the API that fail are torch's own questions, not errors of kernels.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": (), "initcheck": ()}
#: Every tensor an allocation of its own: what lies beyond one belongs to no other.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
UNSUPPORTED = "Device not supported"


@pytest.mark.cuda
def test_ops(gpu):
    """A process of its own: there the default device is the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "cuda", "tests/ops"]
    run = subprocess.run(command, cwd=backends.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]


# --- compute-sanitizer -----------------------------------------------------------------------------------------------


def sanitized(program, tool, out):
    """Run the few cases under ``tool``: fails where it reports errors, or where the cases do not end; skips where it does
    not know the device."""
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "9"]
    command += [*OUTPUTS, str(out)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, env=os.environ | OF_THIS_TREE | NO_CACHE, **streams)
    if UNSUPPORTED in run.stdout:
        pytest.skip(f"{tool}: {UNSUPPORTED}")
    assert run.returncode == 0, run.stdout[-5000:]
    assert out.exists(), f"the cases gave no outputs: {run.stdout[-5000:]}"  # a tool that ran nothing finds nothing


@pytest.mark.cuda
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(gpu, tmp_path, tool):
    try:
        program = find("compute-sanitizer")
    except KernelError as absent:
        pytest.skip(str(absent))
    sanitized(program, tool, tmp_path / "outputs.pt")
