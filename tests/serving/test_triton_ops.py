"""vLLM's Triton kernels, a baseline of the GPU benchmarks, compute what they are timed for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2l_engine.testing import numerics

pytestmark = pytest.mark.serving
ROOT = Path(__file__).parents[2]


def test_the_baseline_is_right():
    """One linear, a packed projection, one with a gap; decode with a row of the base model, and two sizes of prefill."""
    command = [sys.executable, Path(__file__).with_name("interpreted.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 9
    assert max(max(of) for of in errors.values()) <= numerics.lora_frobenius(torch.float16), errors
