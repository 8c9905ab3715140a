"""A model of one's own: layers of one linear over flattened tokens, and the same with adapters in plain torch."""

import torch
from torch import nn


class Blocks(nn.Module):
    """Layers of one's own over flattened tokens ``[T, 16]``."""

    def __init__(self, make=nn.Linear, num_layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": make(16, 16)}) for _ in range(num_layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["q_proj"](x))
        return x


def by_hand(blocks, stack, x, adapters):
    """Blocks on rows ``x``, ``adapters`` one a row."""
    for i, layer in enumerate(blocks.layers):
        A, B, s = stack.lora_A["q_proj"][:, i], stack.lora_B["q_proj"][:, i], stack.scaling
        deltas = [s[a] * (row @ A[a].mT) @ B[a].mT if a >= 0 else 0 * row for row, a in zip(x, adapters, strict=True)]
        x = torch.tanh(layer["q_proj"](x) + torch.stack(deltas))
    return x
