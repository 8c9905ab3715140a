"""What the tests of serving share: settings of a store of their own, and the bundled checkpoint, loaded once."""

import dataclasses

import pytest

from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.vllm.settings import Settings


@pytest.fixture
def settings(tmp_path):
    """Settings of the bundled checkpoint, by default in disk mode; keywords replace fields."""

    def make(**changes):
        environment = {"T2L_VLLM_CHECKPOINT": "smollm2-135m", "T2L_VLLM_STORE": str(tmp_path / "store")}
        return dataclasses.replace(Settings.from_environment(environment), **changes)

    return make


@pytest.fixture(scope="session")
def bundled():
    return Checkpoint.load("smollm2-135m", "smollm2-135m")


@pytest.fixture
def loaded(monkeypatch, bundled):
    """Generators get the checkpoint that is loaded already, with nothing in its encoder's cache."""
    bundled.engine.encoder._cache.clear()
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: bundled)
    return bundled
