"""The task encoders: task embedding ``[N, embed_dim]`` to encoded task ``[N, t]``, float32.

The paper and released checkpoints use linear; vq, softmax and discrete are options of SakanaAI's code.  All are plain torch:
a few small products per description.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2l_engine.hypernetwork.config import DISCRETE_HIDDEN, NUM_CLASSES, NUM_CODES, HyperNetworkConfig
from t2l_engine.ops import reference


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    acc = reference.accumulation_dtype(layer.weight)
    return F.linear(x.to(acc), layer.weight.to(acc), layer.bias.to(acc))


class TaskEncoder(nn.Module):
    """``LN(W e + b)``."""

    def __init__(self, config: HyperNetworkConfig):
        super().__init__()
        self.linear = nn.Linear(config.embed_dim, config.task_width)
        self.norm = nn.LayerNorm(config.task_width, eps=reference.LAYER_NORM_EPS)

    def folded(self) -> list[Tensor]:
        """The argument ``encoder`` of :func:`t2l_engine.ops.hypernet_trunk`."""
        acc = reference.accumulation_dtype(self.linear.weight)
        return [t.to(acc) for t in (self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias)]

    def forward(self, task_emb: Tensor) -> Tensor:
        encoder = self.folded()
        return reference.encode_task(task_emb.to(encoder[0].dtype), encoder)


class _MLPTaskEncoder(nn.Module):
    """Base of the other encoders: ``W2 silu(W1 e + b1) + b2``."""

    def __init__(self, config: HyperNetworkConfig, hidden: int, out: int):
        super().__init__()
        self.linear1 = nn.Linear(config.embed_dim, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def folded(self) -> list[Tensor]:
        """Nothing: the trunk takes what this encoder gives."""
        return []

    def mlp(self, task_emb: Tensor) -> Tensor:
        return _linear(self.linear2, F.silu(_linear(self.linear1, task_emb)))


class VQTaskEncoder(_MLPTaskEncoder):
    """LN of the column of the codebook ``embed [t, 32]`` nearest (L2) to the MLP's output.

    The choice has no gradient.  ``cluster_size`` and ``embed_avg`` are the state of the codebook's moving average.
    """

    embed: Tensor

    def __init__(self, config: HyperNetworkConfig):
        t = config.task_width
        super().__init__(config, 4 * t, t)
        self.register_buffer("embed", torch.randn(t, NUM_CODES))
        self.register_buffer("cluster_size", torch.zeros(NUM_CODES))
        self.register_buffer("embed_avg", self.embed.clone())
        self.norm = nn.LayerNorm(t, eps=reference.LAYER_NORM_EPS)

    def forward(self, task_emb: Tensor) -> Tensor:
        x = self.mlp(task_emb)
        # Differences, not the expanded square: no cancellation between near codes.
        nearest = (x[:, None] - self.embed.mT).square().sum(dim=-1).argmin(dim=1)
        return reference.layer_norm(self.embed.mT[nearest], self.norm.weight, self.norm.bias)


class SoftmaxTaskEncoder(_MLPTaskEncoder):
    """``LN(softmax(MLP(e)) @ embed)`` with ``embed [32, t]``."""

    def __init__(self, config: HyperNetworkConfig):
        t = config.task_width
        super().__init__(config, 4 * t, NUM_CODES)
        self.embed = nn.Parameter(torch.randn(NUM_CODES, t))
        self.norm = nn.LayerNorm(t, eps=reference.LAYER_NORM_EPS)

    def forward(self, task_emb: Tensor) -> Tensor:
        x = self.mlp(task_emb).softmax(dim=-1) @ self.embed
        return reference.layer_norm(x, self.norm.weight, self.norm.bias)


class DiscreteTaskEncoder(_MLPTaskEncoder):
    """One-hot of the argmax over 64 classes; the choice has no gradient."""

    def __init__(self, config: HyperNetworkConfig):
        super().__init__(config, DISCRETE_HIDDEN, NUM_CLASSES)

    def forward(self, task_emb: Tensor) -> Tensor:
        x = self.mlp(task_emb)
        return F.one_hot(x.argmax(dim=-1), NUM_CLASSES).to(x.dtype)


TASK_ENCODERS = {
    "linear": TaskEncoder,
    "vq": VQTaskEncoder,
    "softmax": SoftmaxTaskEncoder,
    "discrete": DiscreteTaskEncoder,
}
