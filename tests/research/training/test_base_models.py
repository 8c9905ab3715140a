"""Frozen models: how they are loaded, where their linears are, and a real step on those unlike Llama."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import context, sft
from t2l_engine.research.training.sampling import Shard
from t2l_engine.text import base_model as base_models
from tests.research.training import small_runs

#: Family -> (what its tiny configuration needs, linears, where these are, their features).
LINEARS = {
    "Llama": (
        {}, ("q_proj", "k_proj", "down_proj"),
        ("model.layers.{layer}.self_attn.q_proj", "model.layers.{layer}.self_attn.k_proj",
         "model.layers.{layer}.mlp.down_proj"),
        ((64, 64), (64, 32), (96, 64)),
    ),
    "GPT2": (
        {}, ("c_attn", "c_fc"), ("transformer.h.{layer}.attn.c_attn", "transformer.h.{layer}.mlp.c_fc"),
        ((64, 192), (64, 256)),
    ),
    "OPT": (
        {"ffn_dim": 96, "word_embed_proj_dim": 64}, ("fc1", "v_proj"),
        ("model.decoder.layers.{layer}.fc1", "model.decoder.layers.{layer}.self_attn.v_proj"), ((64, 96), (64, 64)),
    ),
    "Phi3": (
        {}, ("v_proj", "q_proj", "up_proj", "qkv_proj"),
        ("model.layers.{layer}.self_attn.v_proj", "model.layers.{layer}.self_attn.q_proj",
         "model.layers.{layer}.mlp.up_proj", "model.layers.{layer}.self_attn.qkv_proj"),
        ((64, 32), (64, 64), (64, 96), (64, 128)),
    ),
}  # fmt: skip


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Gemma2", "GPT2"])  # no "sdpa"; tied weights that the file does not repeat
def test_other_families_are_loaded(save_model, family):
    folder = save_model(family, tie_word_embeddings=True)
    model, tokenizer = base_models.load(str(folder), torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16 and tokenizer.padding_side == "left"


def test_greedy_decoding_is_greedy(save_model):
    """Whatever penalties and sampling the folder asks for; its special tokens count, and the tokenizer's end of answers."""
    folder = save_model("Llama")
    own = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [3, 5]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    model, tokenizer = base_models.load(str(folder), torch.float32)
    made = model.generation_config
    assert tokenizer.eos_token_id == 2 and made.eos_token_id == [3, 5, 2]
    assert made.repetition_penalty in (None, 1.0) and not made.do_sample
    ids = torch.tensor([[7, 8, 9, 7, 8, 9]])
    endless = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 10**6, "pad_token_id": 0}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **endless)
    for end in range(ids.shape[1], said.shape[1]):
        assert said[0, end] == model(input_ids=said[:, :end]).logits[0, -1].argmax()


def test_a_tokenizer_ends_answers(save_model):
    folder = save_model("Llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ValueError, match="expected a tokenizer with an eos_token"):
        base_models.load(str(folder), torch.float32)


def test_models_that_are_not_whole(base_model, tmp_path, monkeypatch):
    """Weights that are missing are not made up, and code in a folder is not run, nor asked about at the terminal."""
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack \['model.layers.1.self_attn.q_proj.weight'\]"):
        base_models.load(str(folder), torch.float32)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked at the terminal"))
    values = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(values | own))
    with pytest.raises(ValueError, match="trust_remote_code"):
        base_models.load(str(folder), torch.float32)
    (folder / "adapter_config.json").write_text("{}")  # transformers would apply it: no base model any more
    with pytest.raises(ValueError, match="adapter_config.json in it would change the model"):
        base_models.load(str(folder), torch.float32)
    for name in (str(tmp_path), "nowhere"):
        with pytest.raises(FileNotFoundError, match="base_model: expected .* a local transformers folder with config.json"):
            base_models.load(name, torch.float32)


# --- linears ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LINEARS)
def test_linears_are_found(tiny_model, family):
    """In the order asked for; members of a packed projection have paths of their own."""
    changes, names, paths, features = LINEARS[family]
    found = context.locate(tiny_model(family, **changes), names)
    assert found == context.Modules(names, paths, *map(tuple, zip(*features, strict=True)), 2)
    assert found.own_paths == (None if family in ("Llama", "Phi3") else paths)


def test_linears_that_are_not_there(tiny_model):
    llama, gpt2 = tiny_model("Llama"), tiny_model("GPT2")
    for model, names, message in (
        (llama, ("q_proj", "w_proj"), "w_proj: LlamaForCausalLM has no such linear"),
        (llama, ("c_attn",), "c_attn: LlamaForCausalLM has no such linear"),
        (llama, ("lm_head",), "lm_head: LlamaForCausalLM has no such linear"),  # in no layer
        (llama, ("layers",), "layers: LlamaForCausalLM has no such linear"),
        (llama, ("",), ""),
        (llama, ("self_attn",), "self_attn: LlamaAttention does not state its features"),
        (gpt2, ("c_proj",), r"c_proj: .* several modules .*attn.c_proj', .*mlp.c_proj'"),
        (gpt2, ("attn.c_proj",), "expected plain .*names.*, got 'attn.c_proj'"),  # a name torch cannot hold
    ):
        with pytest.raises(ConfigError, match=f"^target_modules: .*{message}"):
            context.locate(model, names)
    llama.model.layers[1].mlp.up_proj = nn.Linear(64, 80)
    message = r"up_proj: expected the same features in every layer, got \[\(64, 80\), \(64, 96\)\]"
    with pytest.raises(ConfigError, match=message):
        context.locate(llama, ("q_proj", "up_proj"))
    for layer, left in ((1, [0]), (0, [])):
        del llama.model.layers[layer].mlp.up_proj
        expected = f"expected one in each of 2 layers, got layers {left}" if left else "has no such linear"
        with pytest.raises(ConfigError, match=f"up_proj: .*{re.escape(expected)}"):
            context.locate(llama, ("q_proj", "up_proj"))


# --- steps -------------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_its_seed(base_model, tasks):
    """Whatever random numbers were drawn before."""
    found = []
    for seed in (0, 0, 1):
        torch.rand(3)
        fit = context.TrainingContext(small_runs.sft(base_model, seed=seed), tasks, torch.device("cpu"))
        job = sft.SFT(fit.settings, fit)
        found.append((job.model.state_dict(), [batch.ids for batch in job.batches(0, Shard())]))
        fit.close()
    for i, equal in ((1, True), (2, False)):
        assert all(torch.equal(a, found[0][0][name]) for name, a in found[i][0].items()) is equal
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_examples_of_the_splits_are_needed(base_model, tasks):
    """Validation needs some of one task; what is too long does not count."""

    def load(**changes):
        settings = small_runs.sft(base_model, **{"max_tokens": 6, "validate_every": 0, "validation_samples": 8} | changes)
        return context.TrainingContext(settings, tasks, torch.device("cpu"))

    assert [len(load(validate_every=1).validation.kept[i]) for i in (0, 1)] == [5, 5]
    for path in tasks.glob("*.jsonl"):
        path.write_text(re.sub(r'( \w+)(", .*"val")', r"\1 cat\2", path.read_text()))  # 7 tokens, none left
    left_out = pytest.warns(UserWarning, match="max_tokens: 10 of 10 validation examples have more than 6 tokens")
    with pytest.raises(ConfigError, match="split 'val'"), left_out:
        load(validate_every=1)
    for path in tasks.glob("*.jsonl"):
        path.write_text("\n".join(line for line in path.read_text().splitlines() if '"val"' not in line))
    with pytest.raises(ConfigError, match="^validate_every: expected 0, since no task of .*tasks has .*'val', got 1"):
        load(validate_every=1)
    load()
