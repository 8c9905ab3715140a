"""The cases of batched LoRA: what a layer of a model adapts, which tokens use which adapter, and their operands.

Bytes and FLOPs are of useful work: adapters in use and x read once, y read and written, nothing for rows of the base model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import Call
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing.oracle import in_float64, problems_of

Arguments = dict[str, Any]  # of ops.lora_add_, by name
ORDER = ("y", "x", "lora_A", "lora_B", "scaling", "seg_indptr", "seg_adapters", "max_seg_len", "ranks")
Segments = tuple[tuple[int, int], ...]  # (tokens, adapter); -1: the base model


class Group(NamedTuple):
    """Linears that share an input: (first column, out features) of each that is adapted, in an output of ``columns``."""

    n_in: int
    outs: tuple[tuple[int, int], ...]
    columns: int

    @staticmethod
    def packed(n_in: int, **widths: int) -> Group:
        """Linears side by side; a name that ends in ``_`` is not adapted."""
        ends = list(itertools.accumulate(widths.values()))
        outs = [(end - width, width) for (name, width), end in zip(widths.items(), ends, strict=True) if name[-1] != "_"]
        return Group(n_in, tuple(outs), ends[-1])

    @property
    def out(self) -> int:
        """Columns that are adapted."""
        return sum(width for _, width in self.outs)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer of a model adapts: a launch for each group."""

    name: str
    groups: tuple[Group, ...]

    @staticmethod
    def linear(features: int) -> Layer:
        return Layer(f"one linear {features}", (Group.packed(features, q=features),))

    @property
    def width(self) -> int:
        """in + out features of all its linears."""
        return sum(group.n_in * len(group.outs) + group.out for group in self.groups)

    def weight_bytes(self, adapters: int, rank: int = 8, itemsize: int = 2) -> int:
        return adapters * rank * self.width * itemsize

    def activation_bytes(self, tokens: int, itemsize: int = 2) -> int:
        return tokens * sum(group.n_in + 2 * group.out for group in self.groups) * itemsize

    def flops(self, tokens: int, rank: int = 8) -> int:
        return 2 * tokens * rank * self.width


_ALL = (
    Group.packed(4096, q=4096, k=1024, v=1024),
    Group.packed(4096, o=4096),
    Group.packed(4096, gate=14336, up=14336),
    Group.packed(14336, down=4096),
)
LAYERS = {
    "linear": Layer.linear(4096),
    "7b": Layer("Mistral-7B / Llama-8B q,v", (Group.packed(4096, q=4096, k_=1024, v=1024),)),
    "7b-all": Layer("Llama-8B all linears", _ALL),
    "2b": Layer("Gemma-2-2b q,v", (Group.packed(2304, q=2048, k_=1024, v=1024),)),
    "1b": Layer("1B model q,v", (Group.packed(2048, q=2048, k_=512, v=512),)),
    "tiny": Layer("tiny q,v", (Group.packed(64, q=64, k_=16, v=16), Group.packed(48, o=64))),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """``pattern``: how tokens are spread, in words; ``layout``: of B, "out_r" as PEFT's; ``label``: a name of its own."""

    layer: Layer
    segments: Segments
    pattern: str = ""
    rank: int = 8
    dtype: torch.dtype = torch.bfloat16
    layout: str = "r_out"
    label: str = ""

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        rank = "" if self.rank == 8 else f", rank {self.rank}"
        dtype = "" if self.dtype == torch.bfloat16 else f", {self.dtype_name}"
        return f"{self.layer.name}, {self.tokens} x {self.adapters}{self.pattern and ' '}{self.pattern}{rank}{dtype}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def tokens(self) -> int:
        return sum(count for count, _ in self.segments)

    @property
    def adapted(self) -> int:
        """Tokens that an adapter changes."""
        return sum(count for count, adapter in self.segments if adapter >= 0)

    @property
    def adapters(self) -> int:
        """Different ones in use: all that there are."""
        return len({adapter for count, adapter in self.segments if adapter >= 0 and count})

    @property
    def bytes(self) -> int:
        weights = self.layer.weight_bytes(self.adapters, self.rank, self.dtype.itemsize)
        return weights + self.layer.activation_bytes(self.adapted, self.dtype.itemsize)

    @property
    def working_set(self) -> int:
        """Bytes of a set of operands: y counts once."""
        return self.bytes - self.adapted * sum(group.out for group in self.layer.groups) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return self.layer.flops(self.adapted, self.rank)

    def shape(self, op: str = "LoRA alone") -> dict[str, Any]:
        """The fields of a row's shape."""
        counts, kind = {"tokens": self.tokens, "adapters": self.adapters}, {"rank": self.rank, "dtype": self.dtype_name}
        if self.label:
            return counts | {"features": self.layer.groups[0].n_in, **kind, "layout": self.layout, "op": op}
        return {"layer": self.layer.name, **counts, "pattern": self.pattern or "even", **kind}


def rows(*ids: int) -> Segments:
    """A decode step: one token a segment."""
    return tuple((1, i) for i in ids)


def even(tokens: int, adapters: int) -> Segments:
    """A prefill: one segment of the same length an adapter."""
    return tuple((tokens // adapters, i) for i in range(adapters))


def ragged(tokens: int, segments: int, seed: int = 0) -> Segments:
    """Segments of very different lengths, each with an adapter of its own."""
    cuts = sorted(random.Random(seed).sample(range(1, tokens), segments - 1))
    return tuple((hi - lo, i) for i, (lo, hi) in enumerate(zip([0, *cuts], [*cuts, tokens], strict=True)))


@dataclasses.dataclass(frozen=True)
class Operands:
    """One set of operands of a case: arguments of ``lora_add_group_`` for each group."""

    groups: list[Arguments]

    @property
    def problems(self) -> list[Arguments]:
        """Arguments of ``lora_add_`` for every linear, each with its part of ``y``."""
        return [{name: problem[name] for name in ORDER} for group in self.groups for problem in problems_of(group)]

    def grouped(self) -> Call:
        """Ours as packed projections have it: a launch a group."""
        return in_turn([_launch_group(group) for group in self.groups])

    def one_by_one(self, build: Callable[[Arguments], Call]) -> Call:
        """``build``'s call of every linear, one after the other."""
        return in_turn([build(problem) for problem in self.problems])

    def exact(self) -> list[Tensor]:
        """What becomes of the ``y`` of every linear, in float64; these operands stay as they are."""
        results = [in_float64(problem) for problem in self.problems]
        for wide in results:
            reference.lora_add_(**wide)
        return [wide["y"] for wide in results]


def in_turn(calls: list[Call]) -> Call:
    """A call of all of them, one after the other."""
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def launch(problem: Arguments) -> Call:
    """Ours on one linear."""
    return functools.partial(ops.lora_add_, *problem.values())


def _launch_group(group: Arguments) -> Call:
    if len(group["offsets"]) == 1:
        return launch(Operands([group]).problems[0])
    return functools.partial(ops.lora_add_group_, *group.values())


def routing(case: Case, device: torch.device) -> Arguments:
    """What the layers of a model share: scalings, and which token uses which adapter."""
    lengths = torch.tensor([0] + [count for count, _ in case.segments])
    return {
        "scaling": torch.linspace(0.5, 1.5, case.adapters, device=device),
        "seg_indptr": lengths.cumsum(0).to(device, torch.int32),
        "seg_adapters": torch.tensor([i for _, i in case.segments], dtype=torch.int32, device=device),
        "max_seg_len": max(count for count, _ in case.segments),
    }


def operands(case: Case, device: torch.device, seed: int, shared: Arguments | None = None) -> Operands:
    """Random operands; ``shared``: what :func:`routing` gives, where several sets share it."""
    generator, n, shared = torch.Generator(device).manual_seed(seed), case.adapters, shared or routing(case, device)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(case.dtype)

    def right(width: int) -> Tensor:
        return randn(n, case.rank, width).mT if case.layout == "r_out" else randn(n, width, case.rank)

    ranks = torch.full((n,), case.rank, dtype=torch.int32, device=device)
    return Operands(
        [
            {
                "y": randn(case.tokens, group.columns),
                "x": randn(case.tokens, group.n_in),
                "lora_A": [randn(n, case.rank, group.n_in, scale=group.n_in**-0.5) for _ in group.outs],
                "lora_B": [right(width) for _, width in group.outs],
                **shared,
                "ranks": [ranks for _ in group.outs],
                "offsets": [start for start, _ in group.outs],
            }
            for group in case.layer.groups
        ]
    )
