"""What the tests of serving share: settings of a store of their own, and the checkpoint of the paper's
architecture, loaded once."""

import dataclasses
import shutil

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.hypernetwork.folder import BUNDLED
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.vllm.settings import Settings
from tests.hypernetwork.test_doc_to_lora import GOLDEN, NAMES, TEMPLATE


@pytest.fixture
def settings(tmp_path):
    """Settings of that checkpoint, by default in disk mode; keywords replace fields."""

    def make(**changes):
        environment = {"CHECKPOINT": "smollm2-135m-paper", "STORE": str(tmp_path / "store"), "MODE": "disk"}
        environment = {f"T2L_VLLM_{name}": value for name, value in environment.items()}
        return dataclasses.replace(Settings.from_environment(environment), **changes)

    return make


@pytest.fixture(scope="session")
def bundled():
    return Checkpoint.load("smollm2-135m-paper", "smollm2-135m-paper")


@pytest.fixture(scope="session")
def changed(tmp_path_factory):
    """Folder of another checkpoint for the same model."""
    net = t2l.HyperNetwork.from_pretrained(BUNDLED / "smollm2-135m-paper")
    with torch.no_grad():
        next(iter(net.heads.values())).weight.mul_(2)
    folder = tmp_path_factory.mktemp("changed")
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reads_documents(tmp_path, left_tokenizer):
    """Folder of a tiny checkpoint that reads documents in chunks of 4 tokens; a chunk, and the bias, has rank 4."""
    base, folder = tmp_path / "base", tmp_path / "documents"
    shutil.copytree(GOLDEN / NAMES[0] / "base", base)
    left_tokenizer.chat_template = TEMPLATE
    left_tokenizer.save_pretrained(base)
    engine = t2l.TextToLoRA.from_pretrained(GOLDEN / NAMES[0], encoder=base)
    engine.encoder.config = dataclasses.replace(engine.encoder.config, max_chunk_tokens=4)
    engine.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loaded(monkeypatch, bundled):
    """Generators get the checkpoint that is loaded already, with nothing in its encoder's cache."""
    bundled.engine.encoder._cache.clear()
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: bundled)
    return bundled
