"""What the emulator counts, and the operations of a product: for the tests that hold both to closed forms."""

from __future__ import annotations

import dataclasses
from math import ceil

import torch

from t2l_engine.testing.cases import F32

NUM_SMS = 132


@dataclasses.dataclass
class Counts:
    read: int = 0
    written: int = 0
    flops: int = 0

    def add(self, read: int = 0, written: int = 0, flops: int = 0, times: int = 1) -> None:
        self.read += read * times
        self.written += written * times
        self.flops += flops * times


def counted(emulator) -> Counts:
    return Counts(*(emulator.t2l_emu_counter(name) for name in (b"read", b"written", b"flops")))


def size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def products(rows: int, columns: int, depth: int, dtype: torch.dtype) -> int:
    """Of tensor cores: whole blocks of 64 bytes along the depth, three products for one of float32."""
    features = 64 // size(dtype)
    return 2 * rows * columns * ceil(depth / features) * features * (3 if dtype == F32 else 1)
