"""PackedBert: the forward pass of plain BERT encoders, in float32 on a CPU, over the weights of transformers' module.

For short texts transformers spends most time in Python and in products of few rows.  Here texts are packed without padding,
and oneDNN multiplies: on AMD's CPUs twice as fast as MKL, which torch's linear calls for float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BERT = "transformers.models.bert.modeling_bert.Bert"
_PARTS = "Model Embeddings Encoder Layer Attention SelfAttention SelfOutput Intermediate Output Pooler".split()
_CLASSES = {_BERT + part for part in _PARTS} | {"transformers.activations.GELUActivation"}
_TORCH_CLASSES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, nn.Tanh)


def is_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether ``modules``, all of a model and itself first, are those of transformers' BertModel and no others."""
    named = [f"{type(m).__module__}.{type(m).__qualname__}" for m in modules]
    return named[0] == _BERT + "Model" and all(
        name in _CLASSES or type(m) in _TORCH_CLASSES for name, m in zip(named, modules, strict=True)
    )


class PackedBert:
    """Last hidden states of a BERT: those of transformers, but for rounding.

    Parameters are read at every call and never copied, so that a changed or replaced one takes effect.
    """

    def __init__(self, model: Any, modules: Sequence[nn.Module]):
        """``modules``: all of ``model``, for which :func:`is_plain` holds."""
        self._model, self._modules = model, list(modules)
        self._layers = [
            (
                (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
                (layer.attention.output.dense, layer.attention.output.LayerNorm),
                layer.intermediate.dense,
                (layer.output.dense, layer.output.LayerNorm),
            )
            for layer in model.encoder.layer
        ]

    def computes(self) -> bool:
        """Whether this is what the model computes now: an encoder with GELU in eval mode, in float32 on a CPU.

        Not with a hook, with a forward of a module's own, under autocast, or with parameters of another kind (quantised).
        """
        config = self._model.config
        if (
            not torch.backends.mkldnn.is_available()
            or config.hidden_act != "gelu"
            or config.is_decoder
            or config.add_cross_attention
            or config._attn_implementation not in ("sdpa", "eager")
            or torch.is_autocast_enabled("cpu")
            or nn.modules.module._has_any_global_hook()
        ):
            return False
        for m in self._modules:
            if m.training or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
                return False
            for p in m._parameters.values():
                if type(p) is not nn.Parameter or p.dtype is not torch.float32 or not p.is_cpu:
                    return False
        return True

    def hidden_states(self, tokens: Sequence[dict[str, list[int]]]) -> Tensor:
        """``[total tokens, width]`` float32 of texts one after another, fastest where texts of one length are neighbours.

        ``tokens``: per text ``input_ids`` and perhaps ``token_type_ids``.
        """
        lengths = [len(inputs["input_ids"]) for inputs in tokens]
        groups = [(len(list(group)), length) for length, group in itertools.groupby(lengths)]
        x = self._embed(tokens, lengths)
        heads = self._model.config.num_attention_heads
        for qkv, (out, norm1), up, (down, norm2) in self._layers:
            attended = _attention([_linear(linear, x) for linear in qkv], groups, heads)
            x = _norm(norm1, x + _linear(out, attended))
            x = _norm(norm2, x + _linear(down, _linear(up, x, "gelu")))
        return x

    def _embed(self, tokens: Sequence[dict[str, list[int]]], lengths: Sequence[int]) -> Tensor:
        """Sum of word, token type and position embeddings, normalised: ``[total tokens, width]``."""
        e = self._model.embeddings
        device = e.word_embeddings.weight.device
        flat = {key: torch.tensor([i for inputs in tokens for i in inputs[key]], device=device) for key in tokens[0]}
        types = flat.get("token_type_ids", torch.zeros_like(flat["input_ids"]))
        positions = torch.tensor([i for length in lengths for i in range(length)], device=device)
        x = F.embedding(flat["input_ids"], e.word_embeddings.weight) + F.embedding(types, e.token_type_embeddings.weight)
        return _norm(e.LayerNorm, x + F.embedding(positions, e.position_embeddings.weight))


def _linear(linear: nn.Linear, x: Tensor, activation: str = "none") -> Tensor:
    """``[T, out]`` of ``x [T, in]``; ``activation``: "gelu" is the exact one."""
    return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, activation, [], "none")


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attention(qkv: Sequence[Tensor], groups: Sequence[tuple[int, int]], heads: int) -> Tensor:
    """Attention inside each text, ``[T, width]``; ``groups``: (number of texts, their length), one after another."""
    sizes, outputs = [count * length for count, length in groups], []
    split = (part.split(sizes) for part in qkv)
    for (count, length), *parts in zip(groups, *split, strict=True):
        query, key, value = (part.view(count, length, heads, -1).transpose(1, 2) for part in parts)
        outputs.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(count * length, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
