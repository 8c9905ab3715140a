"""What the kernels give for the small cases of the tests, by backend.

``python tests/cuda/kernel_outputs.py --backend NAME --out FILE [--few] [--library LIBRARY]`` writes them; sanitizers run it
with ``--few``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics, oracle
from t2l_engine.testing.cases import (
    F64,
    GROUP_CASES,
    HYPER_CASES,
    LORA_CASES,
    GroupCase,
    HyperCase,
    LoraCase,
    placed,
)
from tests import backends

SEED = 11
#: Multiply-adds of a case that the emulator does in a second or so.
LARGEST = 5_000_000
#: A sanitizer makes every case some hundred times slower: edges, ranks, layouts, dtypes, one of each.
FEW = (
    "all_base", "mixed_rows", "ragged", "rank_3", "rank_64", "odd_features", "bf16_odd", "bf16_out_r_mixed_ranks",
    "bf16_x_fp32_adapters", "fp16", "qkv", "bf16", "one_member_with_gaps", "L", "M_bf16_affine", "S_rotary_bf16",
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


def _small(case: LoraCase | GroupCase | HyperCase) -> bool:
    if isinstance(case, HyperCase):
        return case.dtype != F64
    lora, width = (case, case.out_features) if isinstance(case, LoraCase) else (case.lora, case.columns)
    return lora.x_dtype != F64 and lora.tokens * lora.rank * (lora.in_features + width) <= LARGEST


def table(few: bool) -> dict[str, tuple[Callable[[int], Arguments], Callable[[Arguments], list[Tensor]]]]:
    """ "op, case" -> what makes its operands by seed, and what computes its outputs."""
    runs = {}
    for case in filter(_small, (*LORA_CASES, *GROUP_CASES, *HYPER_CASES)):
        if few and case.name not in FEW:
            continue
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
def compute(device: torch.device, few: bool = False) -> Results:
    """The outputs of every case of :func:`table`."""
    return {name: [t.cpu().clone() for t in call(placed(make(SEED), device))] for name, (make, call) in table(few).items()}


# --- comparison ------------------------------------------------------------------------------------------------------


def allowed(name: str, index: int) -> Tensor | float:
    """The error that tests allow output ``index`` of ``name``, per element or (trunk) as a norm."""
    op, case = name.split(", ")
    if op == "lora_backward_":
        arguments = oracle.in_float64(lora := next(c for c in LORA_CASES if c.name == case).make(SEED))
        grad = arguments.pop("y")
        exact = oracle.gradients(reference.lora_backward_, grad, arguments)[index]
        return torch.full_like(exact, numerics.gradient_bound(exact, lora[("x", "lora_A", "lora_B")[index]].dtype))
    if op.startswith("lora"):
        members = GROUP_CASES if op == "lora_add_group_" else LORA_CASES
        return _lora_allowed(op, next(c for c in members if c.name == case).make(SEED))
    hyper = next(c for c in HYPER_CASES if c.name == case)
    if op == "hypernet_trunk":
        exact = reference.hypernet_trunk(**hyper.make_trunk(SEED, dtype=F64))
        plain = reference.hypernet_trunk(**hyper.make_trunk(SEED))
        return numerics.trunk_bound(exact, plain, hyper.dtype) * float(exact.norm())
    _, exact, magnitude = oracle.heads(hyper, SEED)
    return numerics.head_bound(magnitude[index], exact[index], hyper.head_in, hyper.dtype)


def _lora_allowed(op: str, arguments: Arguments) -> Tensor:
    if op == "lora_delta":
        arguments = arguments | {"y": torch.zeros_like(arguments["y"])}
    if op != "lora_add_group_":
        return oracle.lora(arguments)[2]
    bound = torch.zeros(arguments["y"].shape, dtype=F64)
    for member, start in zip(oracle.members_of(arguments), arguments["offsets"], strict=True):
        bound[:, start : start + member["y"].shape[1]] = oracle.lora(member)[2]
    return bound


def ratio(name: str, left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference of two outputs over the bound of their errors: infinite where NaNs lie elsewhere."""
    largest = 0.0
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if a.numel() == 0 or torch.equal(a.nan_to_num(), b.nan_to_num()):
            continue
        difference, bound = (a.double() - b.double()).nan_to_num().abs(), allowed(name, i)
        largest = max(largest, float(difference.norm()) / bound if isinstance(bound, float) else _largest(difference, bound))
    return largest


def _largest(difference: Tensor, bound: Tensor) -> float:
    """Over the elements; rows of the base model may not differ: 0 / 0 is nothing, more than that infinite."""
    over = difference / bound
    return float(over[~over.isnan()].max())


def differing(left: Results, right: Results) -> dict[str, float]:
    """Ratios above 2 by "op, case": two results that both err by their bound at most differ by twice that."""
    if left.keys() != right.keys():
        raise ValueError(f"expected outputs of the same cases, got {sorted(left.keys() ^ right.keys())} on one side")
    ratios = {name: ratio(name, left[name], right[name]) for name in left}
    return {name: over for name, over in ratios.items() if not over <= 2}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=backends.NAMES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--library", type=Path, help="native library in place of the package's; of emu, else it is built")
    chosen = parser.parse_args()
    results = compute(backends.select(chosen.backend, chosen.library), chosen.few)
    torch.save(results, chosen.out)
    print(f"{len(results)} outputs")
