"""The parts of a hypernetwork that hold parameters: embeddings, MLPs, offsets, task encoders; and its folded tensors."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2l_engine.hypernetwork.config import DISCRETE_HIDDEN, NUM_CLASSES, NUM_CODES, HyperNetworkConfig
from t2l_engine.ops import reference

STD_EPS = 1e-10  # SakanaAI's code adds it to the standard deviation when it undoes z-scores


class NormedEmbedding(nn.Module):
    """A table of embeddings with LayerNorm over the last dimension: ``[*shape]``."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.norm = nn.LayerNorm(shape[-1], eps=reference.LAYER_NORM_EPS)

    def forward(self) -> Tensor:
        return reference.layer_norm(self.weight, self.norm.weight, self.norm.bias)


class MLP(nn.Module):
    """Parameters of ``silu(W2 silu(W1 [LN] x + b1) + b2)``, which the trunk op computes."""

    def __init__(self, width: int, hidden: int, out: int, norm: bool = True):
        super().__init__()
        if norm:
            self.norm = nn.LayerNorm(width, eps=reference.LAYER_NORM_EPS)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def weights(self) -> list[Tensor]:
        """In the order of ``reference.TRUNK_WEIGHTS``."""
        first, second = self.linear1, self.linear2
        return [self.norm.weight, self.norm.bias, first.weight, first.bias, second.weight, second.bias]


class Offsets(nn.Module):
    """The last step for A and B of one module: ``A * (std_A + 1e-10) + mean_A + add_A``, and the same for B.

    ``std`` and ``mean`` undo the z-scores that a reconstruction run was trained on; ``add`` is a multi-task LoRA, or a LoRA
    initialisation.  Buffers ``[n, r, in]`` for A and ``[n, out, r]`` for B, or None.
    """

    std_A: Tensor | None
    mean_A: Tensor | None
    add_A: Tensor | None
    std_B: Tensor | None
    mean_B: Tensor | None
    add_B: Tensor | None

    NAMES = ("std_A", "mean_A", "add_A", "std_B", "mean_B", "add_B")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, None)

    def folded(self) -> dict[str, Tensor | None]:
        """``mul_A``, ``add_A``, ``mul_B``, ``add_B`` as :func:`t2l_engine.ops.hypernet_heads` takes them."""
        out = {}
        for side in "AB":
            std, mean, add = (getattr(self, f"{name}_{side}") for name in ("std", "mean", "add"))
            out[f"mul_{side}"] = None if std is None else std + STD_EPS
            out[f"add_{side}"] = mean if add is None else add if mean is None else mean + add
        # B in the memory order of the heads' output, [n, r, out], so that the epilogue reads contiguously.
        return {key: t.mT.contiguous().mT if t is not None and key.endswith("B") else t for key, t in out.items()}


class Folded:
    """The folded tensors of a network, valid until a parameter or buffer changes.

    Keeps the modules' dictionaries: walking through the modules takes longer than a small hypernetwork's forward pass.
    """

    def __init__(self, net: nn.Module, tensors: dict):
        self.tensors = tensors
        self._dictionaries = [d for m in net.modules() for d in (m._parameters, m._buffers, m._modules)]
        self._found = self._values()
        self._versions = [_version(value) for value in self._found]

    def _values(self) -> list:
        return [value for dictionary in self._dictionaries for value in dictionary.values()]

    def current(self) -> bool:
        """Whether no tensor or module was replaced and no tensor written since; False with inference tensors.

        Inference tensors do not count writes.
        """
        values = self._values()
        versions = [_version(value) for value in values]
        # Compared by identity, not by id(), which a later parameter may reuse.
        return (
            len(values) == len(self._found)
            and all(map(operator.is_, values, self._found))
            and None not in versions
            and versions == self._versions
        )


def _version(value: object) -> int | None:
    """How often a tensor was written, None for an inference tensor; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    return None if value.is_inference() else value._version


# --- task encoders: task embedding [N, embed_dim] to encoded task [N, t], float32 ------------------------------------
#
# The paper and released checkpoints use linear; vq, softmax and discrete are options of SakanaAI's code.  All are plain
# torch: a few small products per description.


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
