"""Batched LoRA alone, the linears' own products left out: decode steps and prefills, cold and hot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.gpu import cases, results
from bench.gpu.cases import LAYERS, RIVALS, Case, Operands, even, launch, ragged, rows, zipf
from bench.gpu.ceilings import Ceilings, begin
from bench.gpu.context import Context, Skip
from bench.gpu.tables import APART, COPY
from bench.gpu.timing import Call, Candidate, measure, num_sets, tolerant
from bench.harness import OURS, Bar, Error, admit, worst
from t2l_engine import ops
from t2l_engine.testing import numerics

#: Of decode: an order in which what counts more comes first.
CACHES = ("cold", "hot")
#: Gathered weights of more bytes are not tried.
LARGEST_GATHER = 8 << 30
MANY, SINGLE = Bar(1.35, of=COPY), Bar(0.0, of=COPY, plus_us=5.0)

BUILDERS: dict[str, Callable[[Operands], Call]] = {
    OURS: Operands.grouped,
    APART: lambda operands: operands.one_by_one(launch),
    **{name: functools.partial(Operands.one_by_one, build=build) for name, build in RIVALS.items()},
}


def decode_cases(full: bool) -> list[Case]:
    """In order of worth: what a run that ends early has."""
    if not full:
        return [Case(LAYERS["tiny"], segments, name) for segments, name in ((rows(0, 1, 2), ""), (rows(0, -1), "half base"))]
    n64, one, half = range(64), rows(*[0] * 64), rows(*(-1 if i % 2 else i // 2 for i in range(64)))
    first = [
        Case(LAYERS[layer], segments, "")
        for layer in ("linear", "7b")
        for segments in (rows(*n64), rows(0), rows(*range(8)), one)
    ]
    first += [Case(LAYERS["7b-all"], segments, "") for segments in (rows(*n64), rows(0))]
    first += [Case(LAYERS[layer], rows(*n64), "") for layer in ("2b", "1b")]
    spread = [Case(LAYERS["7b"], segments, name) for segments, name in ((zipf(64), "zipf"), (half, "half base"))]
    spread.append(Case(LAYERS["7b"], rows(*(i % 16 for i in n64)), ""))
    sweep = [Case(LAYERS["7b"], rows(*range(n)), "") for n in (2, 4, 16, 32)]
    ranks = [Case(LAYERS["7b"], rows(*n64), "", rank=rank) for rank in (16, 32, 64)]
    return first + spread + sweep + ranks + [Case(LAYERS["7b"], rows(*n64), "", dtype=torch.float32)]


def prefill_cases(full: bool) -> list[Case]:
    """In order of worth."""
    if not full:
        return [Case(LAYERS["tiny"], even(32, 2), ""), Case(LAYERS["tiny"], ragged(40, 3), "ragged")]
    sizes = ((2048, 4), (8192, 8), (512, 1), (8192, 1))
    made = [Case(LAYERS["7b"], even(*size), "") for size in sizes]
    made += [Case(LAYERS["7b"], ragged(8192, 8), "ragged"), Case(LAYERS["7b-all"], even(8192, 8), "")]
    return made + [Case(LAYERS["7b"], even(2048, 4), "", rank=rank) for rank in (16, 64)]


def decode(context: Context) -> None:
    _run(context, "decode", decode_cases(context.on_card), CACHES)


def prefill(context: Context) -> None:
    _run(context, "prefill", prefill_cases(context.on_card), ("cold",))


def _run(context: Context, group: str, chosen: Sequence[Case], caches: Sequence[str]) -> None:
    need_kernels(context, "lora_add_", "lora_add_group_")
    ceilings = begin(context)
    for i, case in enumerate(chosen):
        seconds = max(0.3, min(1.5, 0.7 * context.left / (len(chosen) - i) / len(caches)))
        context.attempt(case.name, functools.partial(compare, context, case, group, caches, ceilings, seconds), needs=3.0)


def need_kernels(context: Context, *names: str) -> None:
    """Raises Skip on a card where the reference would run in place of one of the kernels."""
    absent = [name for name in names if context.on_card and not ops.has_kernel(name, "CUDA")]
    if absent:
        raise Skip(f"no CUDA kernel of {', '.join(absent)}: nothing to measure")


# --- one case --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(
    context: Context, case: Case, group: str, caches: Sequence[str], ceilings: Ceilings, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each of ``caches`` that the case has; ``seconds``: of measuring each."""
    device = context.device
    builders, absent = _builders(case)
    errors = verify(context, case, builders, absent)
    builders, wrong = admit(case.name, {name: builders[name] for name in errors}, errors)
    for cache in caches:
        if not _has(case, cache, device.l2_bytes):
            continue
        count = num_sets(device, case.working_set) if cache == "cold" else 1
        shared = cases.routing(case, device.torch)
        sets = [cases.operands(case, device.torch, seed, shared) for seed in range(2, 2 + count)]
        gone, candidates = absent | wrong, results.copies(device, case.bytes, count)
        for name, build in builders.items():
            with tolerant(name, gone):
                candidates[name] = Candidate([build(one) for one in sets])
        timings = results.with_best_copy(measure(device, candidates, seconds, gone))
        # What is hot comes from the cache: the rates of memory make no floor of it.
        least = results.floor(ceilings, case.flops, case.bytes, case.dtype) if cache == "cold" else None
        bar = _bar(case)
        unit = timings[COPY].median_us if bar else None
        given = {"cache": cache, "absent": gone, "least": least, "bar": bar, "unit_us": unit}
        yield results.row(context, case.name, group, case.shape(), timings, errors[OURS], **given)
        del sets, candidates  # before the next ones are made


def _has(case: Case, cache: str, l2_bytes: int) -> bool:
    """Whether ``case`` can be timed so: what exceeds the level-2 cache is never hot."""
    return cache == "cold" or case.working_set <= l2_bytes


def _builders(case: Case) -> tuple[dict[str, Callable[[Operands], Call]], dict[str, str]]:
    """The ways that can do the case; why others cannot."""
    absent = {}
    if any(adapter < 0 for _, adapter in case.segments):
        absent["gather bmm"] = "has no row of the base model"
    elif (gathered := case.layer.weight_bytes(case.tokens, case.rank, case.dtype.itemsize)) > LARGEST_GATHER:
        absent["gather bmm"] = f"would gather {gathered / 1e9:.0f} GB"
    same = all(len(group.outs) == 1 for group in case.layer.groups)  # then a launch a linear is what ours is
    return {name: b for name, b in BUILDERS.items() if name not in absent and not (same and name == APART)}, absent


def _bar(case: Case) -> Bar | None:
    if case.rank != 8 or case.dtype != torch.bfloat16:
        return None
    if case.tokens == 1 and len(case.layer.groups) == 1:
        return SINGLE
    return MANY if case.tokens == case.adapters == 64 else None


def barred(l2_bytes: int) -> list[dict[str, Any]]:
    """The bars of a whole run on a card with such a cache."""
    pairs = [(case, cache) for case in decode_cases(True) for cache in CACHES if _has(case, cache, l2_bytes)]
    return [results.expected("decode", case.name, cache, bar) for case, cache in pairs if (bar := _bar(case))]


def verify(
    context: Context, case: Case, builders: dict[str, Callable[[Operands], Call]], absent: dict[str, str]
) -> dict[str, Error]:
    """The worst error of every way over the linears, each on operands of its own that nothing else sees.

    A rival that throws goes to ``absent``.
    """
    exact = cases.operands(case, context.device.torch, seed=1).exact()
    bound, errors = numerics.lora_frobenius(case.dtype), {}
    for name, build in builders.items():
        fresh = cases.operands(case, context.device.torch, seed=1)
        with tolerant(name, absent):
            build(fresh)()
            got = [member["y"] for member in fresh.members]
            errors[name] = worst(
                Error(numerics.relative_frobenius(one, right), bound) for one, right in zip(got, exact, strict=True)
            )
    return errors
