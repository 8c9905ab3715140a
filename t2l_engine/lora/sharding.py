"""Linears whose weights torch's tensor parallelism has divided among processes, as transformers' ``tp_plan`` has it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn


class Sharding(NamedTuple):
    """What one process has of a linear in tensor parallelism, as in Megatron-LM (arXiv 1909.08053).

    ``in_features``, ``out_features``: half-open ranges of this process.  Where output features are divided, it has rows of
    B ``[out, r]`` and all of A ``[r, in]``; where input features are, columns of A and all of B.
    ``features``: (in, out) of the whole linear.  ``group``: the processes that add up their products, None where output
    features are divided.
    """

    in_features: tuple[int, int]
    out_features: tuple[int, int]
    features: tuple[int, int]
    group: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of (input, output) features of this process."""
        return self.in_features[1] - self.in_features[0], self.out_features[1] - self.out_features[0]

    def take(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Views of what this process has of A ``[..., r, in]`` and B ``[..., out, r]``."""
        return A[..., slice(*self.in_features)], B[..., slice(*self.out_features), :]


def is_distributed(weight: object) -> bool:
    """Whether ``weight`` is a DTensor; torch.distributed is not imported for it."""
    return type(weight).__name__ == "DTensor"


def local(weight: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other ``weight`` itself."""
    return weight.to_local() if is_distributed(weight) else weight  # pyright: ignore[reportAttributeAccessIssue]


def sharding(linear: nn.Module, path: str, packed: bool) -> Sharding | None:
    """How ``linear`` at ``path`` is divided, None if its weight is a plain tensor; ``packed``: it is several modules.

    Raises ValueError for a weight that is divided in another way than tensor parallelism divides a linear.
    """
    weight: Any = getattr(linear, "weight", None)
    if getattr(linear, "_hf_quantized_needs_local_tp", False):
        raise ValueError(f"model: {path} is quantised and divided among processes, which adapters cannot follow")
    if not is_distributed(weight):
        return None
    from torch.distributed.tensor.placement_types import Shard  # not every torch has it

    mesh, placements = weight.device_mesh, weight.placements
    features: Any = tuple(getattr(linear, name, None) for name in ("in_features", "out_features"))
    dim = placements[0].dim % 2 if len(placements) == 1 and type(placements[0]) is Shard else None
    if dim is None or features != tuple(reversed(weight.shape)):
        raise ValueError(
            f"model: {path}: expected a linear whose rows or columns are divided among the processes of a mesh of "
            f"one dimension, got a {type(linear).__name__} with a weight {tuple(weight.shape)} placed {placements}"
        )
    if packed:
        raise ValueError(f"model: {path} is a packed projection divided among processes; its modules' parts are mixed")
    # As torch.chunk: equal parts, a smaller last one.
    size, part = weight.shape[dim], -(-weight.shape[dim] // mesh.size())
    start = min(mesh.get_local_rank() * part, size)
    ranges = [(0, n) for n in weight.shape]
    ranges[dim] = start, min(start + part, size)
    n_out, n_in = ranges
    if local(weight).shape[dim] != ranges[dim][1] - start or not part * (mesh.size() - 1) < size:
        raise ValueError(f"model: {path}: expected equal parts for {mesh.size()} processes, of {size} features")
    return Sharding(n_in, n_out, features, mesh.get_group() if dim else None)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has divided weights of ``model``, which it gathers for each product."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported if it was used
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
