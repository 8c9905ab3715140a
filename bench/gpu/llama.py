"""A decoder of Llama's shape in plain torch, random weights: its step has fixed addresses, so a graph can hold it.

The step is that of rows which have all but the last ``new`` of ``context`` tokens cached: one where it decodes, all of them
where it is a whole prefill.  Their keys and values go into the last places.  Modules are named as in transformers' Llama, so
adapters find them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from t2l_engine.research.costs import Decoder, known_setup

#: Llama-8B's, too, but for the vocabulary.
MISTRAL = known_setup("mistral-7b").decoder


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, head_dim]`` for :func:`rotated`."""
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings on ``x [..., positions, head_dim]``."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


@torch.no_grad()
def draw(module: nn.Module, generator: torch.Generator) -> None:
    """Random matrices of a sensible scale; vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)


class _Attention(nn.Module):
    def __init__(self, shape: Decoder, **like):
        super().__init__()
        self.shape = shape
        width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False, **like)
        self.k_proj, self.v_proj = (nn.Linear(shape.hidden, width, bias=False, **like) for _ in range(2))
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False, **like)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, new = x.shape[:2]
        heads = (linear(x).view(rows, new, -1, self.shape.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in heads)
        q, k = (rotated(t, cos, sin) for t in (q, k))
        self.keys[:, :, -new:] = k
        self.values[:, :, -new:] = v
        # The mask is a name, not a tensor: kernels that know it read no mask.  The only new token sees all there is.
        mask = causal_lower_right(new, self.keys.shape[2]) if new > 1 else None
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, new, -1))


class _MLP(nn.Module):
    def __init__(self, shape: Decoder, **like):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.hidden, shape.intermediate, bias=False, **like) for _ in range(2))
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, shape: Decoder, **like):
        super().__init__()
        self.self_attn, self.mlp = _Attention(shape, **like), _MLP(shape, **like)
        self.norms = nn.ModuleList([nn.RMSNorm(shape.hidden, eps=1e-5, **like) for _ in range(2)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.norms[0](x), cos, sin)
        return x + self.mlp(self.norms[1](x))


class _Decoder(nn.Module):
    def __init__(self, shape: Decoder, **like):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden, **like)
        self.layers = nn.ModuleList([_Block(shape, **like) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5, **like)


class Llama(nn.Module):
    """``forward(tokens [rows, new])``: the logits ``[rows, vocabulary]`` after the last of them.

    :meth:`reserve` must have been called.
    """

    def __init__(self, shape: Decoder, **like):
        super().__init__()
        self.shape = shape
        self.model = _Decoder(shape, **like)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, **like)

    @torch.no_grad()
    def reserve(self, rows: int, context: int, new: int = 1, seed: int = 0) -> Llama:
        """A cache of its own for ``context`` tokens a row, of random keys and values; a step is of the last ``new``."""
        like, shape = self.lm_head.weight, self.shape
        generator = torch.Generator(like.device).manual_seed(seed)
        for block in self.model.layers:
            for name in ("keys", "values"):
                cache = like.new_empty(rows, shape.kv_heads, context, shape.head_dim).normal_(generator=generator)
                block.self_attn.register_buffer(name, cache)
        positions = torch.arange(context - new, context, device=like.device)
        for name, values in zip(("cos", "sin"), rotary(positions, shape.head_dim), strict=True):
            self.register_buffer(name, values.to(like.dtype))
        return self

    @torch.no_grad()
    def follow(self, other: Llama) -> None:
        """All but the new tokens get the keys and values that ``other``, of as many tokens, has for them."""
        for mine, theirs in zip(self.model.layers, other.model.layers, strict=True):
            for name in ("keys", "values"):
                cached = slice(0, -len(self.cos))
                getattr(mine.self_attn, name)[:, :, cached] = getattr(theirs.self_attn, name)[:, :, cached]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos, self.sin)
        return self.lm_head(self.model.norm(x[:, -1]))


@torch.no_grad()
def make(
    shape: Decoder, rows: int, context: int, device: torch.device, dtype: torch.dtype, new: int = 1, seed: int = 0
) -> Llama:
    """Random weights, and what :meth:`Llama.reserve` makes."""
    model = Llama(shape, device=device, dtype=dtype).requires_grad_(False).eval()
    draw(model, torch.Generator(device).manual_seed(seed))
    return model.reserve(rows, context, new, seed + 1)
