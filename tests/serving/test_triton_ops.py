"""The rivals of the GPU benchmarks, Triton kernels of vLLM and SGLang, compute what they are timed for."""

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


@pytest.mark.parametrize("rival, ways", [("vllm", 3), ("sglang", 4)])
def test_the_rival_is_right(rival, ways):
    """One linear, a packed projection, one with a gap; decode with a row of the base model, and two sizes of prefill.

    ``ways``: over the three, SGLang's large chunks for the largest alone.
    """
    command = [sys.executable, Path(__file__).with_name("interpreted.py"), rival]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 3 * ways
    assert max(max(of) for of in errors.values()) <= numerics.lora_frobenius(torch.float16), errors
