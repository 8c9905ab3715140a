"""On a card (``pytest -m cuda``): what a run does there is what it does on the CPU, to rounding."""

import pytest
import torch
from accelerate.state import AcceleratorState

from t2l_engine.research.training import loop, lora, reconstruction, sft
from t2l_engine.testing import numerics
from tests.research.training import small_runs

pytestmark = pytest.mark.cuda


@pytest.fixture
def on():
    """Factory of accelerators for one device after another, which a process does not do outside tests."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no card")

    def make(device):
        AcceleratorState._reset_state(reset_partial_state=True)
        return loop.accelerator(device)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["sft", "lora", "reconstruction"])
def test_a_card_does_what_the_cpu_does(base_model, tasks, tmp_path, on, kind):
    curves = []
    for device in ("cpu", "cuda"):
        out, accelerator = tmp_path / device, on(device)
        if kind == "sft":
            sft.train(small_runs.sft(base_model), tasks, out, accelerator=accelerator)
        elif kind == "lora":
            lora.train(small_runs.lora(base_model), tasks, out, accelerator=accelerator)
            out = out / lora.WAVES / "000"
        else:
            small_runs.library(tmp_path / "library")
            reconstruction.train(small_runs.reconstruction(), tmp_path / "library", out, accelerator=accelerator)
        curves.append(small_runs.losses(out))
    assert curves[1] == pytest.approx(curves[0], rel=numerics.TRAINED_FROBENIUS)
