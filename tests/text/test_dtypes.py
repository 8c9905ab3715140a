"""The dtype of language models where none is stated."""

from __future__ import annotations

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.text import dtypes, packaged


@pytest.fixture(params=[("float32", 130.0, 16.0), ("bfloat16", 130.0, 130.0), ("bfloat16", 130.0, 400.0)])
def machine(request, monkeypatch):
    """A machine with the given rates; the name of its dtype."""
    name, float32, bfloat16 = request.param
    monkeypatch.setattr(dtypes, "gflops", lambda: {"float32": float32, "bfloat16": bfloat16})
    return getattr(torch, name)


def test_rates_are_measured_once():
    rates = dtypes.gflops()
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0
    assert dtypes.gflops() is rates
    assert dtypes.preferred() == (torch.bfloat16 if rates["bfloat16"] >= rates["float32"] else torch.float32)


def test_models_run_in_the_faster_dtype(machine):
    assert dtypes.preferred() == machine
    model, _ = packaged.load()
    assert model.dtype == machine
    assert dtypes.preferred("cuda") == torch.bfloat16


def test_a_stated_dtype_is_kept(machine):
    model, _ = packaged.load(torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_readers_run_in_the_faster_dtype_with_the_same_weights(machine):
    reads = t2l.DocumentEncoderConfig("smollm2-135m", "last", 2, prefix="", suffix="", dtype="bfloat16")
    reader = t2l.DocumentEncoder.from_config(reads)
    assert reader.model.dtype == machine and reader.config.dtype == "bfloat16"
    stated = t2l.DocumentEncoder.from_config(reads, dtype=torch.bfloat16)
    assert stated.model.dtype == torch.bfloat16
    for name, weight in stated.weights().items():
        assert torch.equal(weight.float(), reader.weights()[name].float()), name


def test_what_is_stated_in_float32_stays_so(machine):
    assert dtypes.of(t2l.EncoderConfig("minilm", "mean", 256)) == torch.float32
