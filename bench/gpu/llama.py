"""A decoder of Llama's shape in plain torch, random weights: its decode step has fixed addresses, so a graph can hold it.

The step is that of rows which have all but one of ``context`` tokens cached: one more token a row, whose keys and values go
into the last place.  Modules are named as in transformers' Llama, so adapters find them.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Defaults: Llama-8B and Mistral-7B but for the vocabulary, which is Mistral's."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocabulary: int = 32000

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class _Attention(nn.Module):
    def __init__(self, shape: Shape, rows: int, context: int, **like):
        super().__init__()
        self.shape = shape
        width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False, **like)
        self.k_proj, self.v_proj = (nn.Linear(shape.hidden, width, bias=False, **like) for _ in range(2))
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False, **like)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.empty(rows, shape.kv_heads, context, shape.head_dim, **like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, d = x.shape[0], self.shape.head_dim
        q, k, v = (linear(x).view(rows, -1, 1, d) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (t * cos + torch.cat((-t[..., d // 2 :], t[..., : d // 2]), dim=-1) * sin for t in (q, k))
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return self.o_proj(y.reshape(rows, -1))


class _MLP(nn.Module):
    def __init__(self, shape: Shape, **like):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.hidden, shape.intermediate, bias=False, **like) for _ in range(2))
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, shape: Shape, rows: int, context: int, **like):
        super().__init__()
        self.self_attn, self.mlp = _Attention(shape, rows, context, **like), _MLP(shape, **like)
        self.norms = nn.ModuleList([nn.RMSNorm(shape.hidden, eps=1e-5, **like) for _ in range(2)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.norms[0](x), cos, sin)
        return x + self.mlp(self.norms[1](x))


class _Decoder(nn.Module):
    def __init__(self, shape: Shape, rows: int, context: int, **like):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden, **like)
        self.layers = nn.ModuleList([_Block(shape, rows, context, **like) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5, **like)


class Llama(nn.Module):
    """``forward(tokens [rows])``: the logits ``[rows, vocabulary]`` after one more token a row."""

    def __init__(self, shape: Shape, rows: int, context: int, **like):
        super().__init__()
        self.model = _Decoder(shape, rows, context, **like)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, **like)
        frequencies = 1e4 ** (-torch.arange(0, shape.head_dim, 2, device=like["device"]) / shape.head_dim)
        angles = ((context - 1) * frequencies).repeat(2)
        for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, values.to(like["dtype"]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos, self.sin)
        return self.lm_head(self.model.norm(x))


@torch.no_grad()
def make(shape: Shape, rows: int, context: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Llama:
    """Random weights of a sensible scale, and a cache of random keys and values."""
    model = Llama(shape, rows, context, device=device, dtype=dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith((".keys", ".values")):
            tensor.normal_(generator=generator)
        elif tensor.dim() == 2:
            tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
    return model
