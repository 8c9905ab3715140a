"""A tiny configuration of every family, with windows shorter than the prompts, and the options that change sizes."""

import torch

WINDOW = 7
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS, _SLIDING = {"head_dim": 20}, {"sliding_window": WINDOW}  # heads wider than hidden / heads
_QWEN, _EXPERTS = _SLIDING | {"use_sliding_window": True}, {"num_experts": 5, "num_experts_per_tok": 3}
_ALTERNATING = ["full_attention", "sliding_attention"]
#: By ``model_type``: what a configuration says beside SIZES.
FAMILIES = {
    "llama": _HEADS | {"attention_bias": True, "mlp_bias": True},
    "smollm3": _QWEN | {"layer_types": _ALTERNATING, "attention_bias": True, "mlp_bias": True},
    "mistral": _HEADS | _SLIDING,
    "ministral": _HEADS | _SLIDING | {"layer_types": _ALTERNATING},
    "ministral3": _HEADS | _SLIDING,
    "mixtral": _HEADS | _SLIDING | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": _QWEN | {"max_window_layers": 1},
    "qwen3": _HEADS | _QWEN | {"max_window_layers": 1, "attention_bias": True},
    "qwen2_moe": _QWEN
    | _EXPERTS
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 36, "qkv_bias": False}
    | {"num_hidden_layers": 3, "decoder_sparse_step": 2},
    "qwen3_moe": _HEADS | _QWEN | _EXPERTS | {"moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "gemma": _HEADS,
    "gemma2": _HEADS | _SLIDING,
    "gemma3_text": _HEADS | _SLIDING | {"sliding_window_pattern": 2, "attention_bias": True},
}


def config(family: str, **changes):
    """The transformers configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)


def model(family: str, attention: str = "sdpa", experts: str = "eager", **changes):
    """A random model in eval mode.

    ``attention``: "sdpa", of which the counter takes what a mask keeps, or "eager", of which it takes the full square.
    Transformers runs Gemma-2 eagerly alone, for the sake of its softcapping; without that, which is elementwise and so not
    counted, it runs with "sdpa" too.  ``experts``: fused products of mixtures are slow on a CPU.
    """
    from transformers import AutoModelForCausalLM

    if family == "gemma2":
        changes = {"attn_logit_softcapping": None} | changes
    torch.manual_seed(0)
    sizes = config(family, **changes)
    made = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager", experts_implementation=experts).eval()
    made.config._attn_implementation = attention  # set_attn_implementation refuses it for Gemma-2
    return made


def prompt(tokens: int, rows: int = 1) -> torch.Tensor:
    return (torch.arange(tokens) % 90 + 3).expand(rows, -1)
