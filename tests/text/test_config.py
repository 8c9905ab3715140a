"""Encoder configurations out of files: blocks of checkpoints, Sakana arguments, sentence-transformers folders."""

import json
import math
import shutil

import pytest
import torch

from t2l_engine import ConfigError, DocumentEncoderConfig, EncoderConfig, TextEncoder
from t2l_engine.files.text import from_json, to_json
from t2l_engine.hypernetwork.folder import sakana_encoder_config
from t2l_engine.testing.numerics import EMBEDDING_FROBENIUS, relative_frobenius
from t2l_engine.text.config import OneHotConfig, encoder_config_from_json

READS = DocumentEncoderConfig("tiny", "layers", layers=(0, 1), max_chunk_tokens=128, max_examples=2)


@pytest.mark.parametrize(
    "config", [EncoderConfig("minilm", "mean", dtype="bfloat16"), OneHotConfig(("a", "b")), READS], ids=lambda c: c.name
)
def test_block_of_a_checkpoint(config):
    block = json.loads(json.dumps(to_json(config)))
    assert encoder_config_from_json(block, "here") == config
    with pytest.raises(ConfigError, match="here: unknown field 'surprise'"):
        encoder_config_from_json(block | {"surprise": 1}, "here")


@pytest.mark.parametrize(
    "block",
    [
        None,
        [],
        "minilm",
        {"name": "x", "layers": [0], "queries": 3},
        {"name": ["one-hot"]},
        {"name": "one-hot", "pooling": "mean"},
        {},
    ],
)
def test_what_is_no_block(block):
    with pytest.raises(ConfigError, match="^here: "):
        encoder_config_from_json(block, "here")


WRONG = {
    "name": ["", None], "pooling": ["max", None], "max_length": [0, 2.0], "full_stop": ["yes"], "dtype": ["int8"],
    "template": ["Query: ", 3, ["{text}"]],
}  # fmt: skip


@pytest.mark.parametrize(("config", "field", "value", "message"), [
    *((EncoderConfig("minilm", "mean"), field, value, "expected") for field in WRONG for value in WRONG[field]),
    *(
        (OneHotConfig(("a", "b")), "tasks", value, message)
        for value, message in (
            ([], "expected a non-empty list"),
            ("ab", "expected a non-empty list"),
            (["a", ""], "expected non-empty strings, got ''"),
            (["a", 3], "expected non-empty strings, got 3"),
            (["b", "a", "b"], "expected distinct names, got 'b' 2 times"),
            (["x" * 10_000] * 2, "expected distinct names"),
        )
    ),
    (OneHotConfig(("a", "b")), "name", "minilm", "expected 'one-hot', got 'minilm'"),
    (READS, "name", "", "expected a non-empty string"),
    *((READS, "layers", value, "expected 1 to 16 increasing numbers from 0") for value in ((), (2, 1), 3, (-1, 0), (True,))),
    (READS, "max_chunk_tokens", 0, "expected a positive integer"),
    (READS, "max_examples", -1, "expected 0 or more"),
    (READS, "dtype", "int8", "expected one of"),
], ids=lambda v: str(v)[:30])  # fmt: skip
def test_values(config, field, value, message):
    with pytest.raises(ConfigError, match=f"here: encoder.{field}: {message}") as caught:
        from_json(type(config), to_json(config) | {field: value}, "here")
    assert len(str(caught.value)) < 300


# --- Sakana arguments ---------------------------------------------------------------------------------------------

SFR = "Instruct: Retrieve semantically similar text.\nQuery: {text}"
BASE = {"model_dir": "owner/base-model/", "train_ds_names": ["a", "b"]}


@pytest.mark.parametrize(("args", "expected"), [
    ({"emb_model": "Alibaba-NLP/gte-large-en-v1.5"}, EncoderConfig("Alibaba-NLP/gte-large-en-v1.5", "cls", 8192)),
    (
        {"emb_model": "Salesforce/SFR-Embedding-2_R", "use_one_hot_task_emb": None},
        EncoderConfig("Salesforce/SFR-Embedding-2_R", "last", 8192, template=SFR, dtype="bfloat16"),
    ),
    ({"emb_model": ""}, EncoderConfig("owner/base-model", "last", 8192, dtype="bfloat16")),
    ({}, EncoderConfig("owner/base-model", "last", 8192, dtype="bfloat16")),
    ({"emb_model": "x/gte", "use_one_hot_task_emb": False}, EncoderConfig("x/gte", "cls", 8192)),
    ({"emb_model": "x/gte", "use_one_hot_task_emb": True}, OneHotConfig(("a", "b"))),
], ids=lambda v: str(v)[:40])  # fmt: skip
def test_rules_of_sakana(args, expected):
    assert sakana_encoder_config(BASE | args, "args.yaml") == expected


@pytest.mark.parametrize(("args", "message"), [
    ({"emb_model": "some/other"}, "emb_model: expected a 'gte' or 'SFR' model or none, .* got 'some/other'"),
    ({"emb_model": "o" * 100_000}, "emb_model: expected a 'gte'"),
    ({"emb_model": ["gte"]}, r"emb_model: expected a string, got \['gte'\]"),
    ({"emb_model": "", "model_dir": None}, "model_dir: expected the base model.*got None"),
    ({"emb_model": "", "model_dir": "/"}, "model_dir: expected the base model.*got '/'"),
    ({"use_one_hot_task_emb": "yes"}, "use_one_hot_task_emb: expected true or false, got 'yes'"),
    ({"use_one_hot_task_emb": True, "train_ds_names": None}, "train_ds_names: encoder.tasks: expected a non-empty list"),
    ({"use_one_hot_task_emb": True, "train_ds_names": ["a", {}]}, "train_ds_names: encoder.tasks: expected non-empty"),
], ids=lambda v: str(v)[:40])  # fmt: skip
def test_arguments_that_say_no_encoder(args, message):
    with pytest.raises(ConfigError, match=f"^args.yaml: {message}") as caught:
        sakana_encoder_config(BASE | args, "args.yaml")
    assert len(str(caught.value)) < 400


# --- sentence-transformers folders ---------------------------------------------------------------------------------

FLAGS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}


def module(name, path):
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{name}"}


@pytest.fixture
def write(tmp_path):
    """Factory of folders of a tiny random BERT; ``files``: path in the folder -> JSON value, None removes the file."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    def make(files, transformer=""):
        folder = tmp_path / "model"
        inner = folder / transformer
        inner.mkdir(parents=True)
        (inner / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh:", "##.")))
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(vocab_size=20, max_position_embeddings=64, initializer_range=0.3, **sizes)).save_pretrained(
            inner
        )
        BertTokenizerFast.from_pretrained(inner, model_max_length=48).save_pretrained(inner)
        standard = {
            "modules.json": [module("Transformer", transformer), module("Pooling", "1_Pooling")],
            "1_Pooling/config.json": FLAGS | {"pooling_mode_mean_tokens": True},
            f"{transformer}/sentence_bert_config.json".lstrip("/"): {"max_seq_length": 32, "do_lower_case": False},
        }
        for name, value in (standard | files).items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if value is not None:
                path.write_text(json.dumps(value))
        return folder

    return make


@pytest.mark.parametrize(("pooling", "expected"), [
    (FLAGS | {"pooling_mode_mean_tokens": True}, "mean"),
    (FLAGS | {"pooling_mode_cls_token": True}, "cls"),
    (FLAGS | {"pooling_mode_lasttoken": True}, "last"),
    ({"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ({"pooling_mode": ["cls"]}, "cls"),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_folder(write, pooling, expected):
    modules = [module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]
    folder = write({"1_Pooling/config.json": pooling, "modules.json": modules})
    assert EncoderConfig.from_sentence_transformers(folder) == EncoderConfig(str(folder), expected, 32)
    enc = TextEncoder.from_pretrained(str(folder))
    hidden = enc.model(**enc.tokenizer(["a b 3"], return_tensors="pt")).last_hidden_state[0]
    pooled = {"cls": hidden[0], "mean": hidden.mean(dim=0), "last": hidden[-1]}[expected]
    got = enc.encode(["a b 3"])[0]
    assert relative_frobenius(got, pooled / pooled.norm() * math.sqrt(32)) <= EMBEDDING_FROBENIUS


def test_folder_with_a_transformer_folder_in_it(write):
    folder = write({}, transformer="0_Transformer")
    config = EncoderConfig.from_sentence_transformers(folder)
    assert config == EncoderConfig(str(folder / "0_Transformer"), "mean", 32)
    assert TextEncoder.from_pretrained(str(folder)).encode(["a"]).shape == (1, 32)


def test_length_of_a_folder(write):
    """What the folder says, else what its tokenizer says, else what the model has."""
    folder = write({"sentence_bert_config.json": {"max_seq_length": None}})
    length = lambda: EncoderConfig.from_sentence_transformers(folder).max_length  # noqa: E731
    assert length() == 48
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 20}')
    assert length() == 20
    (folder / "sentence_roberta_config.json").unlink()
    assert length() == 48
    (folder / "tokenizer_config.json").write_text("{}")
    assert length() == 64


def test_default_prompt(write):
    prompts = {"prompts": {"query": "a: ", "none": ""}, "default_prompt_name": "query"}
    folder = write({"config_sentence_transformers.json": prompts})
    assert EncoderConfig.from_sentence_transformers(folder).template == "a: {text}"
    assert TextEncoder.from_pretrained(str(folder)).prepare([" b "]) == ["a: b"]
    for other in ({"default_prompt_name": None}, {"default_prompt_name": "none"}):
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts | other))
        assert EncoderConfig.from_sentence_transformers(folder).template is None


@pytest.mark.parametrize(("files", "message"), [
    ({"modules.json": {}}, "modules.json: expected a JSON list, got dict"),
    ({"modules.json": ["Transformer"]}, "modules.json: expected objects with .* got 'Transformer'"),
    ({"modules.json": [module("Transformer", "")]}, "expected Transformer, Pooling and perhaps Normalize"),
    ({"modules.json": [module("Dense", "")]}, "module 'sentence_transformers.models.Dense': expected Transformer"),
    ({"modules.json": [{"path": "", "type": "own_code.Transformer"}]}, "module 'own_code.Transformer': expected"),
    ({"modules.json": [module("Transformer", "..")]}, "path '..': expected a folder inside"),
    ({"modules.json": [module("Transformer", "/")]}, "path '/': expected a folder inside"),
    ({"modules.json": [module("Transformer", "a/../../b")]}, "path 'a/../../b': expected a folder inside"),
    ({"modules.json": [module("Transformer", "\0")]}, "expected objects with strings"),
    ({"modules.json": [module("Transformer", "x" * 300)]}, "path 'x*.*x': expected a folder inside"),
    ({"1_Pooling/config.json": FLAGS}, r"1_Pooling.config.json: expected one pooling mode, got \[\]"),
    ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, r"expected one pooling mode, got \['cls', 'mean'\]"),
    ({"1_Pooling/config.json": FLAGS | {"pooling_mode_max_tokens": True}}, "pooling 'max' is not supported"),
    ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "pooling 'weightedmean' is not supported"),
    ({"1_Pooling/config.json": {"pooling_mode": {}}}, "expected one pooling mode, got {}"),
    ({"sentence_bert_config.json": {"max_seq_length": "9" * 1000}}, "max_length: expected a positive integer"),
    ({"sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": True}}, "do_lower_case: expected false"),
    ({"config_sentence_transformers.json": {"default_prompt_name": "x"}}, "default_prompt_name: .* got 'x': None"),
    (
        {
            "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False},
            "config_sentence_transformers.json": {"default_prompt_name": "x", "prompts": {"x": "a"}},
        },
        "include_prompt: .* not supported",
    ),
], ids=lambda v: str(v)[:50])  # fmt: skip
def test_folders_that_say_something_else(write, files, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TextEncoder.from_pretrained(str(write(files)))
    assert len(str(caught.value)) < 600


def test_files_that_are_missing(write, tmp_path):
    """Or that a link leads to, out of the folder or nowhere."""
    with pytest.raises(FileNotFoundError, match="modules.json: not found"):
        EncoderConfig.from_sentence_transformers(tmp_path)
    folder = write({"1_Pooling/config.json": None, "modules.json": None})
    with pytest.raises(ValueError, match="expected 'minilm', a local sentence-transformers folder or an EncoderConfig"):
        TextEncoder.from_pretrained(str(folder))
    (folder / "modules.json").write_text(json.dumps([module("Transformer", ""), module("Pooling", "1_Pooling")]))
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        TextEncoder.from_pretrained(str(folder))
    for to in (tmp_path, "1_Pooling"):
        shutil.rmtree(folder / "1_Pooling") if to == tmp_path else (folder / "1_Pooling").unlink()
        (folder / "1_Pooling").symlink_to(to)
        with pytest.raises(ConfigError, match="path '1_Pooling': expected a folder inside"):
            EncoderConfig.from_sentence_transformers(folder)
