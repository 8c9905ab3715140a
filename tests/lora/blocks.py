"""Models of one's own: layers of one or two linears, adapters on them in plain torch, and stacks on fresh leaves."""

import torch
from torch import nn

from t2l_engine import AdapterStack


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


#: Module -> (in, out) features of :class:`TwoLinears`.
SHAPES = {"q_proj": (16, 24), "o_proj": (24, 16)}


class TwoLinears(nn.Module):
    """Layers of two linears over ``[..., 16]``; ``x`` goes to where each layer is, as accelerate's hooks see to.

    ``devices``: of the layers; None is the CPU.  Elsewhere weights are uninitialised: torch's fake devices draw no numbers.
    """

    def __init__(self, devices=(None, None)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: self._linear(shape, device) for name, shape in SHAPES.items()}) for device in devices
        )

    @staticmethod
    def _linear(shape, device):
        made = nn.Linear(*shape, device=device and "meta")
        if device is not None:
            made.weight, made.bias = (nn.Parameter(torch.empty(t.shape, device=device)) for t in (made.weight, made.bias))
        return made

    def forward(self, x):
        for layer in self.layers:
            x = x.to(next(layer.parameters()).device)
            x = x + layer["o_proj"](torch.tanh(layer["q_proj"](x)))
        return x


def leaves(stack):
    """The stack on fresh leaves, and these: A of every module, then B."""
    tensors = [t.detach().clone().requires_grad_() for t in (*stack.lora_A.values(), *stack.lora_B.values())]
    count = len(stack.lora_A)
    halves = (dict(zip(stack.lora_A, part, strict=True)) for part in (tensors[:count], tensors[count:]))
    return AdapterStack(*halves, stack.scaling, stack.ranks, stack.paths), tensors
