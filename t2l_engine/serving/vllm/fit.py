"""Whether adapters of a checkpoint fit the model that is served."""

from __future__ import annotations

from typing import Any

from t2l_engine.hypernetwork.config import HyperNetworkConfig


def misfit(config: HyperNetworkConfig, model: str) -> str | None:
    """What differs between the sizes of ``config`` and of the model ``model``, a folder or hub name; None if nothing does.

    vLLM copies an adapter that is too small into its slot without an error, so this must be asked before.  Linears whose
    sizes the model's configuration does not state are not compared.

    Raises OSError or ValueError if the model has no configuration that transformers can read, or it states no such sizes.
    """
    from transformers import AutoConfig

    served = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    try:
        layers, sizes = served.num_hidden_layers, _sizes(served)
    except AttributeError as error:
        raise ValueError(f"{type(served).__name__}: {error}") from None
    if layers != config.num_layers:
        return f"the checkpoint is for a model of {config.num_layers} layers, the served one has {layers}"
    for name, *own in zip(config.modules, config.in_features, config.out_features, strict=True):
        if name in sizes and tuple(own) != sizes[name]:
            return (
                f"the checkpoint is for a model whose {name} has {own[0]} inputs and {own[1]} outputs, "
                f"the served one has {sizes[name][0]} and {sizes[name][1]}"
            )
    return None


def _sizes(served: Any) -> dict[str, tuple[int, int]]:
    """Module -> (in, out) features in a decoder layer of Llama's kind, for what the configuration states."""
    hidden, heads = served.hidden_size, served.num_attention_heads
    width = getattr(served, "head_dim", None) or hidden // heads
    kv = getattr(served, "num_key_value_heads", None) or heads
    sizes = {
        "q_proj": (hidden, heads * width),
        "k_proj": (hidden, kv * width),
        "v_proj": (hidden, kv * width),
        "o_proj": (heads * width, hidden),
    }
    inner = getattr(served, "intermediate_size", None)
    if isinstance(inner, int):
        sizes |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return sizes
