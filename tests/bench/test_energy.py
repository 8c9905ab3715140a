"""Energy on a GPU, over an NVML that is made up: what is read, what is divided by what, what is refused."""

import sys
import types

import pytest
import torch

from bench.harness import BenchError, Context
from bench.suites import energy
from bench.timing import Dry
from t2l_engine import ops
from t2l_engine.lora import layer


@pytest.fixture
def nvml(monkeypatch):
    """A card that takes 5 J between two readings."""
    millijoules, cards = iter(range(0, 1_000_000, 5000)), {"GPU-7": "card"}
    fake = types.SimpleNamespace(NVMLError=KeyError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=cards.__getitem__)
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda card: next(millijoules)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid=7))
    monkeypatch.setattr(energy, "SECONDS", 0.0)
    monkeypatch.setattr(energy, "REPLAYS", 2)


def test_energy_is_that_of_one_adapter_and_of_one_token(nvml):
    tasks = energy.plan(Context.of("tiny", 1, Dry()))
    made = [one for task in tasks for one in task.run()]
    cases = ["tiny L bfloat16, 1 description", "tiny L bfloat16, 2 descriptions"]
    assert [one["case"] for one in made] == [*cases, *(f"decode step, 2 rows, {n} adapters" for n in (0, 2))]
    # Two replays of two copies of a hypernetwork, or of a step of two rows.
    assert [(one["unit"], one["made"]) for one in made] == [("adapter", 4), ("adapter", 8), ("token", 4), ("token", 4)]
    assert all(one["mj_each"] == 5000 / one["made"] and one["watts"] > 0 for one in made)


@pytest.mark.parametrize("room, name", [(ops, "hypernet_heads_out_"), (layer, "lora_add_op")])
def test_what_is_wrong_is_not_measured(nvml, monkeypatch, room, name):
    monkeypatch.setattr(room, name, lambda *_, **__: None)
    with pytest.raises(BenchError, match="error .* beyond"):
        for task in energy.plan(Context.of("tiny", 1, Dry())):
            list(task.run())


def test_what_cannot_be_measured_is_refused(nvml, monkeypatch):
    with pytest.raises(BenchError, match="^energy: expected device 'cuda', got 'cpu'"):
        energy.plan(Context.of("tiny", 1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid=8))
    with pytest.raises(BenchError, match="^energy: NVML: 'GPU-8'"):
        energy.counter()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BenchError, match="^energy: expected the package nvidia-ml-py, found none"):
        energy.counter()
