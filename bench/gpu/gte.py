"""A text encoder of gte-large-en-v1.5's shape in plain torch, random weights: what turns a description into a vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import llama
from t2l_engine.research import costs


class _Layer(nn.Module):
    """Norms come after what they follow; the MLP is gated."""

    def __init__(self, shape: costs.Encoder, **like):
        super().__init__()
        hidden, wide = shape.hidden, shape.intermediate
        self.heads = shape.heads
        self.qkv_proj, self.o_proj = nn.Linear(hidden, 3 * hidden, **like), nn.Linear(hidden, hidden, **like)
        self.up_gate_proj, self.down_proj = nn.Linear(hidden, 2 * wide, bias=False, **like), nn.Linear(wide, hidden, **like)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden, **like) for _ in range(2)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(llama.rotated(q, cos, sin), llama.rotated(k, cos, sin), v)
        x = self.norms[0](x + self.o_proj(y.transpose(1, 2).flatten(2)))
        up, gate = self.up_gate_proj(x).chunk(2, dim=-1)
        return self.norms[1](x + self.down_proj(F.gelu(gate) * up))


class Encoder(nn.Module):
    """``forward(tokens [N, n])``: the task embeddings ``[N, hidden]`` of the first tokens, of norm sqrt(hidden)."""

    def __init__(self, shape: costs.Encoder, tokens: int, **like):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.embeddings, shape.hidden, **like)
        self.norm = nn.LayerNorm(shape.hidden, **like)
        self.layers = nn.ModuleList([_Layer(shape, **like) for _ in range(shape.layers)])
        positions = torch.arange(tokens, device=like["device"])
        for name, values in zip(("cos", "sin"), llama.rotary(positions, shape.hidden // shape.heads), strict=True):
            self.register_buffer(name, values.to(like["dtype"]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.normalize(x[:, 0].float(), dim=-1) * x.shape[-1] ** 0.5


def make(shape: costs.Encoder, tokens: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Encoder:
    """Random weights, for descriptions of ``tokens`` tokens."""
    encoder = Encoder(shape, tokens, device=device, dtype=dtype).requires_grad_(False).eval()
    llama.draw(encoder, torch.Generator(device).manual_seed(seed))
    return encoder
