"""Sizes of language models out of configurations: in every form, as older files have them, by default, and refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Mistral3Config

from t2l_engine import ConfigError
from t2l_engine.research.costs import Decoder
from tests.research.costs import tiny_decoders
from tests.research.costs.tiny_decoders import FAMILIES, SIZES

#: What a file must say, beside the sizes of a mixture.
REQUIRED = {
    "vocab_size": 130_000, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 32,
}  # fmt: skip
_MIXTURE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MIXTURES = {"qwen2_moe": _MIXTURE | {"shared_expert_intermediate_size": 36}, "qwen3_moe": _MIXTURE}


def parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_configuration(family, tmp_path):
    """An object, its values, the file it saves, that file's folder."""
    config = tiny_decoders.config(family)
    config.save_pretrained(tmp_path)
    forms = [config, config.to_dict(), tmp_path, str(tmp_path / "config.json")]
    first, *others = map(Decoder.from_config, forms)
    assert others == [first] * 3 and first.model_type == family


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """Of a file that says the required sizes alone, and of one that only switches windows on."""
    required = {"model_type": family, **REQUIRED, **MIXTURES.get(family, {})}
    config = AutoConfig.for_model(**required)
    decoder = Decoder.from_config(required)
    assert decoder == Decoder.from_config(config)
    if family != "ministral":  # whose model cannot be made without a head_dim
        assert decoder.num_parameters == parameters(config)
    deep = required | {"num_hidden_layers": 30, "use_sliding_window": True}
    deeper = Decoder.from_config(deep)
    assert deeper == Decoder.from_config(AutoConfig.for_model(**deep))
    if family == "qwen2_moe":
        assert deeper.windows == (4096, None) * 14 + (None, None)


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias", "qkv_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_switches_act_where_the_model_has_them(family, flag):
    """Both ways; a field that a family does not know changes nothing."""
    for value in (True, False):
        config = tiny_decoders.config(family, **{flag: value})
        decoder = Decoder.from_config(config)
        assert decoder.num_parameters == parameters(config)
        if flag == "tie_word_embeddings":
            assert decoder.parameters["logits"] == (0 if value else SIZES["vocab_size"] * SIZES["hidden_size"])


#: As the hub has them, written by older transformers: no head_dim, no layer_types, torch_dtype; with what each comes to.
OLDER = {
    "SmolLM2-135M": (
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "rope_scaling": None, "pretraining_tp": 1, "transformers_version": "4.42.3"},
        134_515_008, (None,) * 30,
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0"},
        7_241_732_096, (4096,) * 32,
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
         "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False, "torch_dtype": "bfloat16"},
        46_702_792_704, (None,) * 32,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "vocab_size": 151936, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
         "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16"},
        494_032_768, (None,) * 24,
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
         "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "torch_dtype": "bfloat16"},
        2_614_341_888, (4096, None) * 13,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_files_of_older_transformers(name, tmp_path):
    values, count, windows = OLDER[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    decoder = Decoder.from_config(tmp_path)
    assert (decoder.num_parameters, decoder.windows) == (count, windows)
    assert decoder == Decoder.from_config(AutoConfig.from_pretrained(tmp_path))


def test_text_part_of_models_that_read_images(tmp_path):
    """Gemma-3's files leave out of ``text_config`` what its class says; whether embeddings are tied the whole model says."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"})
    )
    decoder = Decoder.from_config(tmp_path)
    assert (decoder.heads, decoder.kv_heads, decoder.vocabulary, decoder.tied) == (8, 4, 262208, True)
    assert [i for i, window in enumerate(decoder.windows) if window is None] == [5, 11, 17, 23, 29]
    config = Gemma3Config.from_pretrained(tmp_path)
    assert decoder == Decoder.from_config(config) == Decoder.from_config(config.text_config)
    assert decoder.num_parameters == parameters(config.text_config) == 3_880_263_168
    mistral = tiny_decoders.config("ministral3")
    for tied in (True, False):
        whole = Mistral3Config(text_config=mistral.to_dict(), tie_word_embeddings=tied)
        assert Decoder.from_config(whole).tied == tied


@pytest.mark.parametrize("kind", ["mamba", "phi3", "qwen3_next", "gemma3n_text", "gpt2", "", None, 3, ["llama"], {}])
def test_unknown_models_are_refused_by_name(kind):
    with pytest.raises(ConfigError) as refused:
        Decoder.from_config(SIZES | {"model_type": kind, "text_config": {"model_type": kind}})
    assert str(refused.value).startswith("config: model_type: expected one of llama, ")
    assert str(refused.value).endswith(f"got {kind!r}")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        *(("llama", {name: None}, f"{name}: expected an integer from 1 to .*, got None") for name in REQUIRED),
        *(("llama", {name: value}, f".*{name}.*{value}") for value in (0, -1, True, 2.0)
          for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim")),
        ("llama", {"vocab_size": 2**31 + 1}, "vocab_size: expected an integer from 1 to 2147483648, got 2147483649"),
        ("llama", {"vocab_size": 10**5000}, "vocab_size: expected an integer .*, got <int too large to print>"),
        ("llama", {"head_dim": 10**5000}, "head_dim: expected an integer .*, got <int too large to print>"),
        ("llama", {"num_hidden_layers": 4097}, "num_hidden_layers: expected an integer from 1 to 4096, got 4097"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4 attention heads, got 3"),
        ("llama", {"num_key_value_heads": 8}, "num_key_value_heads: expected a divisor of 4 attention heads, got 8"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, r".*attention heads \(5\)"),
        ("qwen2", {"num_attention_heads": 5, "head_dim": None, "num_key_value_heads": None}, ".*divisor of hidden_size 48"),
        ("llama", {"tie_word_embeddings": "yes"}, ".*tie_word_embeddings.*yes"),
        ("llama", {"attention_bias": 1}, ".*attention_bias.*1"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected an integer from 1 to .*, got 0"),
        ("gemma2", {"layer_types": ["full_attention"]}, r".*layer_types.*1"),
        ("gemma2", {"layer_types": ["linear_attention"] * 2}, "layer_types: expected .* or sliding_attention"),
        ("gemma2", {"layer_types": "full_attention"}, ".*layer_types"),
        ("qwen2", {"use_sliding_window": 1}, ".*use_sliding_window.*1"),
        ("qwen2", {"max_window_layers": 1.5}, ".*max_window_layers.*1.5"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: expected an integer from 1"),
        ("gemma3_text", {"use_bidirectional_attention": True},
         "use_bidirectional_attention: expected false, since causal masks are counted, got True"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok: expected at most 5, got 6"),
        ("mixtral", {"num_local_experts": 0}, "num_experts: expected an integer from 1"),
        ("qwen3_moe", {"num_experts": None}, "num_experts: expected an integer from 1 to .*, got None"),
        ("qwen3_moe", {"mlp_only_layers": 1}, ".*mlp_only_layers.*1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer from 1"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size: expected an integer"),
    ],
)  # fmt: skip
def test_refused_values(family, changes, message):
    values = {"model_type": family, **SIZES, **FAMILIES[family], **changes}
    with pytest.raises(ConfigError, match="^config: " + message):
        Decoder.from_config(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not valid JSON: "),
        ('{"model_type": "llama", "model_type": "gemma"}', "not valid JSON: a key occurs twice in one object"),
        ("[1]", "expected a JSON object, got list"),
        ("", "not valid JSON: "),
    ],
)
def test_refused_files(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        Decoder.from_config(tmp_path)


def test_refused_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such configuration; expected a config.json or a folder with one"):
        Decoder.from_config(tmp_path)
    with pytest.raises(ConfigError, match="config: expected a transformers configuration, a dict or a path, got int"):
        Decoder.from_config(3)
