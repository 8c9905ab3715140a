"""What is counted of a model: against torch's counter over the running module, closed forms by hand, and refusals."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, DynamicCache, Gemma3Config, MambaConfig

from t2l_engine import ConfigError
from t2l_engine.research.costs import Attention, count
from t2l_engine.text.base_model import cache_argument
from tests.research.costs import tiny_decoders
from tests.research.costs.flop_counter import counted
from tests.research.costs.tiny_decoders import FAMILIES, SIZES, WINDOW, prompt

LONG, MORE, STEPS = 17, 5, 3
LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 20, "vocab_size": 97,
}  # fmt: skip
MIXTURE = LLAMA | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
ENCODERS = ("bert", "roberta", "xlm-roberta", "gte")
tokens, windows = st.integers(0, 40), st.one_of(st.none(), st.integers(1, 30))


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_llama_by_hand(tied):
    """Kaplan et al. 2020: two operations a weight and token; grouped queries; logits of the last position alone."""
    model = count(LLAMA | {"tie_word_embeddings": tied})
    layer, logits = 48 * 20 * 2 * (4 + 2) + 3 * 48 * 80, 48 * 97
    assert model.flops(7) == 2 * 7 * 3 * layer + 3 * 4 * 4 * 20 * (7 * 8 // 2) + 2 * logits
    body = 3 * (layer + 2 * 48) + 48
    assert model.parameters == body + (2 - tied) * logits and model.weights(5) == body + logits
    assert count(LLAMA | {"tie_word_embeddings": tied}, head=False).weights(5) == body
    assert model.kept(10) == 10 * 3 * 2 * 2 * 20
    attention = {"q_proj": (48, 80), "k_proj": (48, 40), "v_proj": (48, 40), "o_proj": (80, 48)}
    assert model.linears == attention | {"gate_proj": (48, 80), "up_proj": (48, 80), "down_proj": (80, 48)}


def test_experts_by_hand():
    """arXiv 2401.04088: a token uses two of five gated MLPs; a pass reads the experts that its tokens hit on average."""
    model, dense = count(MIXTURE), count(LLAMA)
    expert = 3 * 48 * 80
    assert model.token_flops == dense.token_flops + 2 * 3 * ((2 - 1) * expert + 48 * 5)
    assert (model.expert_share, model.expert_weights) == (2 / 5, 3 * 5 * expert)
    rest = model.parameters - 48 * 97 - model.expert_weights
    choices = list(itertools.combinations(range(5), 2))
    for drawn in range(1, 3):
        hit = [len({e for choice in draw for e in choice}) for draw in itertools.product(choices, repeat=drawn)]
        assert model.weights(drawn) == pytest.approx(rest + 3 * expert * sum(hit) / len(hit), abs=1)
    assert "up_proj" not in model.linears


@given(tokens, tokens, windows)
def test_pairs(count, cached, window):
    """One query at a time: itself and what is before it, at most a window."""
    causal = Attention(1, 1, window, True)
    assert causal.pairs(count, cached) == sum(min(cached + i + 1, window or 1000) for i in range(count))
    assert Attention(1, 1, None, False).pairs(count) == count**2


# --- against the running module --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A random model on the CPU, and what is counted of its configuration."""
    model = tiny_decoders.model(request.param)
    return model, count(model.config)


def test_every_family(pair):
    """A prompt shorter and one longer than the window, then a part after cached tokens, then single tokens."""
    model, sizes = pair
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    for length in (WINDOW - 2, LONG):
        assert counted(lambda n=length: model(input_ids=prompt(n), logits_to_keep=1)) == sizes.flops(length)
    ids, cache = prompt(LONG + MORE + STEPS), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :LONG], **cache_argument(model, cache))
    got = counted(lambda: model(input_ids=ids[:, LONG : LONG + MORE], **cache_argument(model, cache), logits_to_keep=1))
    assert got == sizes.flops(MORE, LONG)

    def decode():
        for i in range(LONG + MORE, LONG + MORE + STEPS):
            model(input_ids=ids[:, i : i + 1], **cache_argument(model, cache))

    assert counted(decode) == sizes.flops(STEPS, LONG + MORE, logits=STEPS)
    # transformers keeps one token less than a window: the next query is the last of its keys.
    windowed = sum(layer.cached for layer in sizes.attention if layer.window)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sizes.kept(LONG + MORE + STEPS) == held + windowed


@pytest.mark.parametrize("family", ENCODERS)
def test_text_encoders(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | {"max_position_embeddings": 50})
    model, sizes = AutoModel.from_config(config, add_pooling_layer=False).eval(), count(config, head=False)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert counted(lambda: model(input_ids=prompt(23))) == sizes.flops(23)
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert sizes.weights(23) == sizes.parameters - tables


def test_models_of_other_families():
    """GPT-2 has linears of its own, DeepSeek-V3 compressed keys, gpt-oss biases of experts; Qwen3-Next is a hybrid."""
    gpt2 = count({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97})
    assert gpt2.token_flops == 2 * 2 * 12 * 48 * 48 and gpt2.linears == {}
    for kind in ("deepseek_v3", "gpt_oss"):
        sizes = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
        assert len(count({"model_type": kind, **sizes}).attention) == 2
    hybrid = count({"model_type": "qwen3_next", **sizes, "num_hidden_layers": 4})  # three layers have linear attention
    assert hybrid.layers == 4 and len(hybrid.attention) == 1


@pytest.mark.parametrize("form", range(4))
def test_forms_of_a_configuration(form, tmp_path):
    """An object, its values, the folder it saves to, that folder's file; beside a multimodal model's text part."""
    config = tiny_decoders.config("gemma3_text")
    config.save_pretrained(tmp_path)
    forms = config, config.to_dict(), tmp_path, str(tmp_path / "config.json")
    assert count(forms[form]) == count(Gemma3Config(text_config=config.to_dict()))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "unknown"}, r"config\.json: model_type: expected one that transformers knows, got 'unknown'"),
    ({"model_type": ["llama"]}, r"model_type: expected .*, got \['llama'\]"),
    ({"num_attention_heads": 5, "head_dim": None}, "attention heads"),
    ({"num_hidden_layers": 513}, r"config\.json: num_hidden_layers: expected at most 512, got 513"),
    ({"hidden_size": -48}, r"config\.json: .*-48"), ({"intermediate_size": 2.5}, "intermediate_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
])  # fmt: skip
def test_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ConfigError, match=message):
        count(tmp_path)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ConfigError, match="mamba does not attend by transformers' attention interface"):
        count(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=61))
    with pytest.raises(FileNotFoundError, match="none: expected the configuration of a transformers model, found no file"):
        count("none")
