"""The slots of one module: its adapters, for every layer on the device of that layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from t2l_engine.lora.locate import Target, device_of, slot_dtype
from t2l_engine.lora.sharding import Sharding


class Part(NamedTuple):
    """The slots of the layers on one device: ``A [slots, n, r, in]``, ``B [slots, n, r, out]``, ``ranks [n, slots]``.

    ``layers``: the n layers, ascending.
    """

    layers: list[int]
    A: Tensor
    B: Tensor
    ranks: Tensor


class Slots:
    """``count`` slots for adapters of rank ``rank`` at most, for the linears ``targets`` by layer; empty: rank 0.

    ``num_layers``: of the adapters, which may go beyond the last linear with rank 0.  ``features``: (in, out) of adapters.
    ``sharding``: how the linears are divided among processes; the slots are for this one's part.  ``dtype``: of linears
    whose weights are quantised.  ``elsewhere``: the device of those without weights.
    """

    def __init__(
        self,
        targets: dict[int, Target],
        num_layers: int,
        count: int,
        rank: int,
        features: tuple[int, int],
        dtype: torch.dtype,
        elsewhere: torch.device,
        sharding: Sharding | None,
    ):
        self.targets, self.sharding = targets, sharding
        self.whole_features = features
        #: (in, out) of A and B here.
        self.features = sharding.sizes if sharding else features
        devices = {layer: device_of(target.linear, elsewhere) for layer, target in sorted(targets.items())}
        distinct = dict.fromkeys(devices.values())
        dtype = slot_dtype(next(iter(targets.values())).linear, dtype)
        self.parts: dict[torch.device, Part] = {}
        for device in distinct:
            # On one device also layers without a linear: those of a stack are then a slice.
            all_layers = range(max(num_layers, max(targets) + 1))
            layers = [i for i in all_layers if len(distinct) == 1 or devices.get(i) == device]
            like, n = {"device": device, "dtype": dtype}, len(layers)
            A, B = (torch.zeros(count, n, rank, width, **like) for width in self.features)
            self.parts[device] = Part(layers, A, B, torch.zeros(n, count, device=device, dtype=torch.int32))
        self._places = {layer: (device, self.parts[device].layers.index(layer)) for layer, device in devices.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of A and B."""
        return next(iter(self.parts.values())).A.dtype

    @property
    def rank(self) -> int:
        """The largest rank that fits."""
        return next(iter(self.parts.values())).A.shape[2]

    def device(self, layer: int) -> torch.device | None:
        """Where ``layer`` is; None for one without a linear."""
        return self._places[layer][0] if layer in self._places else None

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one layer: ``A [slots, r, in]``, ``B [slots, out, r]``, ``ranks [slots]``."""
        device, i = self._places[layer]
        part = self.parts[device]
        return part.A[:, i], part.B[:, i].mT, part.ranks[i]

    def write(self, slot: int, A: Tensor, B: Tensor, ranks: Tensor) -> None:
        """Copy ``A [n, r, in]``, ``B [n, out, r]`` and ``ranks [n]`` of the first n layers into an empty slot."""
        if self.sharding:
            A, B = self.sharding.take(A, B)
        r = min(A.shape[1], self.rank)  # without the padding that exceeds the slots
        for part in self.parts.values():
            layers = [i for i in part.layers if i < len(A)]
            n, at = len(layers), _index(layers)
            part.A[slot, :n, :r].copy_(A[at, :r])
            part.B[slot, :n, :r].copy_(B[at].mT[:, :r])
            part.ranks[:n, slot] = ranks[at].to(part.ranks.device)

    def empty(self, slot: int, count: int) -> None:
        """Rank 0 in ``count`` slots."""
        for part in self.parts.values():
            part.ranks[:, slot : slot + count] = 0


def _index(layers: list[int]) -> slice | list[int]:
    """A slice where the layers are consecutive: no copy."""
    return slice(layers[0], layers[-1] + 1) if layers and layers[-1] - layers[0] == len(layers) - 1 else layers
