"""On a card (``pytest -m cuda``): the op tests over the CUDA kernels, then graphs and streams."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cuda
OPS = Path(__file__).with_name("ops")


@pytest.fixture(autouse=True)
def card():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no card")


def test_ops():
    """A process of its own: there the default device is the card."""
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "cuda", str(OPS)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]


def test_graphs_and_streams(tmp_path):
    from bench.gpu import checks
    from bench.gpu.context import Context, Part
    from bench.gpu.timing import Cuda

    part = Part(tmp_path / "part.json")
    checks.run(Context(Cuda(), part, 120.0))
    assert not part.data.get("failed") and all(check["passed"] for check in part.data["checks"]), part.data
