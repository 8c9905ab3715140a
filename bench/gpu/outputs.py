"""What the kernels give for the small cases of the tests: on a card, and in the emulator on a CPU.

``python -m bench.gpu.outputs --backend NAME --out FILE [--few]`` writes them; the step "emulator" starts one for the
emulator and compares both.  With ``--few``, on a card, this is what sanitizers run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.build import of_these_sources
from bench.gpu.context import Context
from t2l_engine import ops
from t2l_engine.ops import native, reference
from t2l_engine.testing import backends, numerics, oracle
from t2l_engine.testing.cases import F64, GROUP_CASES, HYPER_CASES, LORA_CASES, GroupCase, HyperCase, LoraCase

SEED = 11
#: Multiply-adds of a case that the emulator does in a second or so.
LARGEST = 5_000_000
#: Seconds that comparing takes.
COMPARING = 5.0
#: Name that tells which process to start.
MODULE = "bench.gpu.outputs"
#: A sanitizer makes every case some hundred times slower: edges, ranks, layouts, dtypes, one of each.
FEW = (
    "all_base",
    "mixed_rows",
    "ragged",
    "rank_3",
    "rank_64",
    "odd_features",
    "bf16_odd",
    "bf16_out_r_mixed_ranks",
    "bf16_x_fp32_adapters",
    "fp16",
    "qkv",
    "bf16",
    "one_member_with_gaps",
    "L",
    "M_bf16_affine",
    "S_rotary_bf16",
    "odd_sizes_bf16",
)
Arguments = dict[str, Any]
Results = dict[str, list[Tensor]]  # "op, case" -> outputs on the CPU
Table = dict[str, tuple[Callable[[torch.device | None], Arguments], Callable[[Arguments], list[Tensor]]]]


def _add(arguments: Arguments) -> list[Tensor]:
    return [ops.lora_add_(**arguments)]


def _group(arguments: Arguments) -> list[Tensor]:
    return [ops.lora_add_group_(**arguments)]


def _delta(arguments: Arguments) -> list[Tensor]:
    return [ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})]


def _heads(arguments: Arguments) -> list[Tensor]:
    return [t for sides in zip(*ops.hypernet_heads(**arguments), strict=True) for t in sides]


def _small(case: LoraCase | GroupCase | HyperCase) -> bool:
    if isinstance(case, HyperCase):
        return case.dtype != F64
    lora, width = (case, case.out_features) if isinstance(case, LoraCase) else (case.lora, case.columns)
    return lora.x_dtype != F64 and lora.tokens * lora.rank * (lora.in_features + width) <= LARGEST


def table(few: bool) -> Table:
    """ "op, case" -> what makes its operands on a device, and what computes its outputs."""

    def made(make: Callable[[int], Arguments]) -> Callable[[torch.device | None], Arguments]:
        return lambda device: backends.placed(make(SEED), device)

    wanted = lambda cases: [c for c in cases if _small(c) and (not few or c.name in FEW)]  # noqa: E731
    runs: Table = {}
    for case in wanted(LORA_CASES):
        runs[f"lora_add_, {case.name}"] = made(case.make), _add
        runs[f"lora_delta, {case.name}"] = made(case.make), _delta
    for case in wanted(GROUP_CASES):
        runs[f"lora_add_group_, {case.name}"] = made(case.make), _group
    for case in wanted(HYPER_CASES):
        runs[f"hypernet_trunk, {case.name}"] = made(case.make_trunk), lambda a: [ops.hypernet_trunk(**a)]
        runs[f"hypernet_heads, {case.name}"] = made(case.make_heads), _heads
    return runs


@torch.no_grad()  # inference mode would hide from backends.placed what the operands are slices of
def compute(device: torch.device, few: bool = False) -> Results:
    """The outputs of every case of :func:`table`."""
    results = {}
    for name, (make, call) in table(few).items():
        results[name] = [t.cpu().clone() for t in call(make(device))]
    return results


# --- comparison ------------------------------------------------------------------------------------------------------


def allowed(name: str, index: int) -> Tensor | float:
    """The error that tests allow output ``index`` of ``name``, per element or (trunk) as a norm."""
    op, case = name.split(", ")
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
    """The largest difference of two outputs over what each may err: infinite where NaNs lie elsewhere."""
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


def compare(mine: Results, emulated: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    """An entry of "checks" for every op.  Two results that both err by their bound at most differ by twice that."""
    ratios = {name: ratio(name, mine[name], emulated[name]) for name in mine}
    for name, over in ratios.items():
        print(f"{name}: {over:.3f} x the bound", flush=True)
    for op in dict.fromkeys(name.split(", ")[0] for name in mine):
        here = {name: over for name, over in ratios.items() if name.split(", ")[0] == op}
        worst = max(here, key=here.get)
        same = sum(over == 0 for over in here.values())
        detail = f"{len(here)} cases, {same} of equal bits; largest difference {here[worst]:.2f} x the bound ({worst})"
        yield "checks", {"check": f"{op} beside the emulator", "passed": here[worst] <= 2, "detail": detail}


def run(context: Context) -> None:
    """The step: outputs of this device beside the emulator's, which another process makes; a dry run's are of the CPU."""
    context.attempt("emulator", lambda: beside_emulator(context))


def beside_emulator(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    file = context.part.path.with_name("emulator.pt")
    command = [sys.executable, "-m", MODULE, "--out", str(file)]
    command += ["--backend", "emu"] if context.on_card else ["--backend", "cpu", "--few"]
    emulator = backends.emulator_library()
    if context.on_card and emulator.exists() and of_these_sources(emulator):
        command += ["--emulator", str(emulator)]
    environment = os.environ | ({native.DISABLE_VARIABLE: "1"} if context.on_card else {})
    with subprocess.Popen(command, env=environment, cwd=backends.ROOT) as other:
        try:
            mine = compute(backends.select("cuda" if context.on_card else "cpu"), few=not context.on_card)
            other.wait(max(1.0, context.left - COMPARING))
        except BaseException:
            other.kill()
            raise
    if other.returncode:
        raise RuntimeError("the emulator gave no outputs; the log says why")
    yield from compare(mine, torch.load(file, weights_only=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.outputs", description=__doc__)
    parser.add_argument("--backend", choices=backends.NAMES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--emulator", type=Path, help="library of backend emu (built where it is not given)")
    chosen = parser.parse_args()
    results = compute(backends.select(chosen.backend, chosen.emulator), chosen.few)
    torch.save(results, chosen.out)
    print(f"{len(results)} outputs")
