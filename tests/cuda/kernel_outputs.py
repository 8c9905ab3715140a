"""Runs the kernels on a few small cases, for sanitizers: ``python tests/cuda/kernel_outputs.py FILE`` writes the outputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import ops
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES, GroupCase, LoraCase, placed
from tests import backends

SEED = 11
#: A sanitizer makes every case some hundred times slower: edges, ranks, layouts, dtypes, one of each.
FEW = (
    "all_base", "mixed_rows", "ragged", "rank_3", "rank_64", "odd_features", "bf16_odd", "bf16_out_r_mixed_ranks",
    "bf16_x_fp32_adapters", "fp16", "qkv", "bf16", "one_problem_with_gaps", "L", "M_bf16_affine", "S_rotary_bf16",
    "odd_sizes_bf16", "aligned_rows", "aligned_rows_mixed_ranks", "aligned_heads_256",
)  # fmt: skip
Arguments = dict[str, Any]
Results = dict[str, list[Tensor]]  # "op, case" -> outputs on the CPU


def _delta(arguments: Arguments) -> list[Tensor]:
    return [ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})]


def _backward(arguments: Arguments) -> list[Tensor]:
    rest = {k: v for k, v in arguments.items() if k != "y"}
    return list(oracle.gradients(torch.ops.t2l_engine.lora_backward_, arguments["y"], rest))


def _heads(arguments: Arguments) -> list[Tensor]:
    return [t for sides in zip(*ops.hypernet_heads(**arguments), strict=True) for t in sides]


def table() -> dict[str, tuple[Callable[[int], Arguments], Callable[[Arguments], list[Tensor]]]]:
    """ "op, case" -> what makes its operands by seed, and what computes its outputs."""
    runs = {}
    for case in (case for case in (*LORA_CASES, *GROUP_CASES, *HYPER_CASES) if case.name in FEW):
        if isinstance(case, LoraCase):
            runs[f"lora_add_, {case.name}"] = case.make, lambda a: [ops.lora_add_(**a)]
            runs[f"lora_delta, {case.name}"] = case.make, _delta
            runs[f"lora_backward_, {case.name}"] = case.make, _backward
        elif isinstance(case, GroupCase):
            runs[f"lora_add_group_, {case.name}"] = case.make, lambda a: [ops.lora_add_group_(**a)]
        else:
            runs[f"hypernet_trunk, {case.name}"] = case.make_trunk, lambda a: [ops.hypernet_trunk(**a)]
            runs[f"hypernet_heads, {case.name}"] = case.make_heads, _heads
    return runs


@torch.no_grad()  # inference mode would hide from placed what the operands are slices of
def compute(device: torch.device) -> Results:
    """The outputs of every case of :func:`table`."""
    return {name: [t.cpu().clone() for t in call(placed(make(SEED), device))] for name, (make, call) in table().items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    torch.save(compute(backends.select("cuda")), parser.parse_args().out)
