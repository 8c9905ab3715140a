"""Outputs of the CUDA kernels: the op tests against float64, beside the emulator, and under compute-sanitizer."""

import os
import subprocess
import sys

import pytest
import torch

from bench.kernels import KernelError, find
from t2l_engine.ops import native
from t2l_engine.testing.cases import HYPER_CASES, placed
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


# --- beside the emulator ---------------------------------------------------------------------------------------------


def of_these_sources(library):
    """Whether ``library`` was built from the sources of this tree, wherever that was."""
    command = [sys.executable, str(backends.ROOT / "cmake" / "source_digest.py")]
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"t2l_sources:{digest}".encode() in library.read_bytes()


@pytest.mark.cuda
def test_beside_the_emulator(gpu, tmp_path):
    file, library = tmp_path / "emulator.pt", backends.emulator_library()
    command = [*OUTPUTS, "--out", str(file), "--backend", "emu"]
    if library.exists() and of_these_sources(library):
        command += ["--library", str(library)]
    subprocess.run(command, env=os.environ | OF_THIS_TREE | {native.DISABLE_VARIABLE: "1"}, check=True)
    assert kernel_outputs.differing(kernel_outputs.compute(gpu), torch.load(file, weights_only=True)) == {}


def test_a_difference_is_noticed():
    few = kernel_outputs.compute(torch.device("cpu"), few=True)
    ops = {"lora_add_", "lora_delta", "lora_backward_", "lora_add_group_", "hypernet_heads"}
    assert {name.split(", ")[0] for name in few} >= ops
    other = {name: [t.clone() for t in tensors] for name, tensors in few.items()}
    assert kernel_outputs.differing(few, other) == {}
    broken = (
        "lora_add_, mixed_rows",
        "lora_backward_, ragged",
        "lora_add_group_, qkv",
        "hypernet_trunk, L",
        "hypernet_heads, L",
    )
    for name in broken:
        other[name][0][..., 1] += 1
    assert kernel_outputs.differing(few, other).keys() == set(broken)
    del other["lora_delta, ragged"]
    with pytest.raises(ValueError, match="lora_delta, ragged"):
        kernel_outputs.differing(few, other)


def test_operands_keep_their_strides(monkeypatch):
    case = next(c for c in HYPER_CASES if c.name == "L")
    right = case.make_heads(kernel_outputs.SEED)["latent"]

    def call(arguments):
        there = placed(arguments, torch.device("meta"))["latent"]
        assert (there.stride(), there.storage_offset()) == (right.stride(), right.storage_offset())
        return []

    monkeypatch.setattr(kernel_outputs, "table", lambda few: {"case": (case.make_heads, call)})
    assert not right.is_contiguous() and kernel_outputs.compute(torch.device("cpu")) == {"case": []}


# --- compute-sanitizer -----------------------------------------------------------------------------------------------


def sanitized(program, tool, out):
    """Run the few cases under ``tool``: fails where it reports errors, or where the cases do not end; skips where it does
    not know the device."""
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", "9"]
    command += [*OUTPUTS, "--few", "--backend", "cuda", "--out", str(out)]
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


FAKE_SANITIZER = """#!/bin/sh
case "$2 $*" in
racecheck*) echo "========= Error: Device not supported. See the documentation"; exit 1 ;;
synccheck*) echo "========= ERROR SUMMARY: 3 errors"; exit 9 ;;
initcheck*) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
memcheck*--report-api-errors\\ no*) ;;
*) exit 2 ;;
esac
for word; do [ "$last" = --out ] && : > "$word"; last=$word; done
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_what_a_sanitizer_says_is_believed(tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_SANITIZER)
    program.chmod(0o755)
    sanitized(str(program), "memcheck", tmp_path / "memcheck.pt")
    with pytest.raises(pytest.skip.Exception, match=UNSUPPORTED):
        sanitized(str(program), "racecheck", tmp_path / "racecheck.pt")
    with pytest.raises(AssertionError, match="3 errors"):
        sanitized(str(program), "synccheck", tmp_path / "synccheck.pt")
    with pytest.raises(AssertionError, match="no outputs"):
        sanitized(str(program), "initcheck", tmp_path / "initcheck.pt")
