"""The parts of a hypernetwork that hold parameters: embeddings, MLPs, offsets of the last step; and its folded tensors."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

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
