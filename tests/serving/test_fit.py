"""Which checkpoints fit a served model: sizes are those of transformers' own model."""

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig, MixtralConfig

import t2l_engine as t2l
from t2l_engine.serving.vllm.fit import misfit

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
          "dtype": "bfloat16"}  # fmt: skip
SERVED = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    # q is as wide as what is rotated and what is not; o reads values of a width of their own.
    "latent attention": DeepseekV2Config(
        **COMMON, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=3, n_routed_experts=2,
        moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "experts": MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=2),
}  # fmt: skip


def network(layers=2, **sizes):
    modules = tuple(sizes)
    return t2l.HyperNetworkConfig(
        variant="L", modules=modules, in_features=tuple(sizes[m][0] for m in modules),
        out_features=tuple(sizes[m][1] for m in modules), num_layers=layers, rank=2, embed_dim=8, latent_size=8,
        head_in_size=4, lora_alpha=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("served, config, found", [
    ("llama", network(q_proj=(32, 32), v_proj=(32, 16), o_proj=(32, 32), down_proj=(48, 32)), None),
    ("llama", network(layers=3, q_proj=(32, 32)), "model of 3 layers, the served one has 2"),
    ("llama", network(v_proj=(32, 32)), "v_proj has 32 inputs and 32 outputs, the served one has 32 and 16"),
    ("latent attention", network(q_proj=(32, 40), o_proj=(12, 32)), None),
    ("latent attention", network(q_proj=(32, 16)), "q_proj has 32 inputs and 16 outputs, the served one has 32 and 40"),
    ("latent attention", network(gate_proj=(32, 48)), None),  # dense in one layer, of experts in the other: not compared
    ("experts", network(q_proj=(32, 32), up_proj=(1, 1)), None),  # no linear of that name
])  # fmt: skip
def test_sizes_are_compared(tmp_path, monkeypatch, served, config, found):
    """Of models in bfloat16, without a change of the default dtype, which other threads use."""
    dtypes = []
    monkeypatch.setattr(torch, "set_default_dtype", dtypes.append)
    SERVED[served].save_pretrained(tmp_path)
    said = misfit(config, str(tmp_path))
    assert set(dtypes) <= {torch.float32}
    assert said is None if found is None else said.endswith(found)


def test_models_that_cannot_be_made_are_errors(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(ValueError, match="of tomorrow"):
        misfit(network(q_proj=(32, 32)), str(tmp_path))
    monkeypatch.setattr("transformers.AutoModel.from_config", lambda *_, **__: 1 / 0)  # a model's own code
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaConfig: division by zero"):
        misfit(network(q_proj=(32, 32)), str(tmp_path))
