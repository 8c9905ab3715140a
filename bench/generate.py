"""Generating adapters: whole hypernetworks, the parts of a request, memory, and what bfloat16 weights cost."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import baselines, split
from bench.baselines import Adapters
from bench.harness import OURS, Bar, Context, Error, Task, VerificationError, admit, floor, row, worst
from bench.rows import FRESH, KEPT
from bench.timing import gemm_call, peak_memory
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.research.costs import hypernet_flops
from t2l_engine.testing import numerics
from t2l_engine.testing.models import SHAPES, VARIANTS, HyperShape

DTYPES = ("float32", "bfloat16")
#: model -> variants, numbers of descriptions.
FULL = {
    "mistral-7b": (VARIANTS, (1, 8, 64)),
    "llama-3.1-8b": (("L",), (1, 8)),
    "gemma-2-2b": (("L",), (1, 8)),
    "smollm2-135m": (VARIANTS, (1, 8, 64)),
}
TINY = {"smollm2-135m": (VARIANTS, (1, 8))}
#: The model that bars are stated for, by variant and dtype at one description; and at many.
BARRED = "mistral-7b"
ONE = {"L": dict(zip(DTYPES, (1.25, 1.35), strict=True))} | dict.fromkeys(
    ("M", "S-learnable"), dict(zip(DTYPES, (1.35, 1.5), strict=True))
)
MANY, AS_ONE, MEMORY = Bar(1.2), Bar(1.0, of="one description"), 1.2
#: Descriptions that the float64 oracle takes at a time: 64 at once would need gigabytes.
CHUNK = 8
#: Compiling takes a minute: the released Mistral form only, at this number of descriptions.
COMPILED = (1,)


def plan(context: Context) -> list[Task]:
    # What a mistake shows in soonest comes first: a run that fails late has cost much.
    tasks = [Task("split smollm2-135m bundled", functools.partial(split.bundled, context))]
    if context.full:
        tasks += [Task(f"split {BARRED} {d}", functools.partial(split.shaped, context, BARRED, d)) for d in DTYPES]
    tasks.append(Task("memory", functools.partial(memory, context)))
    tasks += [
        Task(
            f"{name} {variant} {dtype}",
            functools.partial(generation, context, dataclasses.replace(SHAPES[name], variant=variant), dtype, counts),
        )
        for name, (variants, counts) in (FULL if context.full else TINY).items()
        for variant in variants
        for dtype in DTYPES
    ]
    return tasks


# --- whole hypernetworks ---------------------------------------------------------------------------------------------


def generation(
    context: Context, shape: HyperShape, dtype: str, counts: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one hypernetwork at each number of descriptions, all in the same rounds, with a matrix product among them.

    Of the barred model also rows into memory that is used again, beside the same call into fresh memory as every other
    candidate gets it.
    """
    net = shape.make(seed=1)
    if dtype == "bfloat16":
        single = net
        net = copy.deepcopy(net).set_dtype(torch.bfloat16)
        yield "bf16_weights", _cost_of_bf16(shape, single, net)
        del single
    barred = context.full and shape.name == BARRED
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    chosen = {n: _candidates(net, exact, shape, n, barred and shape.variant == "L") for n in counts}
    del exact
    kept = {n: _into_kept(net, shape, n) for n in counts} if barred else {}
    for threads in context.thread_counts if barred else [context.threads]:
        here = [n for n in counts if threads == context.threads or n == 1]
        gemm, gemm_flops = gemm_call(getattr(torch, dtype), context.ceilings.gemm_size)
        functions = {(n, name): f for n in here for name, f in chosen[n][0].items()}
        functions |= {(n, KEPT): kept[n] for n in here if kept}
        timings = context.time({**functions, "gemm": gemm}, threads, factor=3)
        gflops = gemm_flops / 1e3 / timings["gemm"].median_us
        for n in here:
            _, absent, error = chosen[n]
            least = _floor(context, net, n, threads, gflops)
            common = {
                "case": f"{shape.name} {shape.variant} {dtype}, {n} description{'s' if n > 1 else ''}",
                "group": "generate",
                "shape": {"model": shape.name, "variant": shape.variant, "dtype": dtype, "descriptions": n},
                "count": threads,
                "error": error,
            }
            bar = None
            if shape.name == BARRED:
                bar = {1: Bar(ONE[shape.variant][dtype]), 64: MANY}.get(n)
            of_n = {name: timings[n, name] for name in chosen[n][0]}
            peak = context.ceilings.fma_at(dtype, threads)
            yield "rows", row(**common, timings=of_n, absent=absent, least=least, bar=bar, peak_gflops=peak)
            results = {"": OURS}
            if kept:
                results[f", {KEPT}"] = KEPT
                beside = {OURS: timings[n, KEPT], FRESH: of_n[OURS]}
                again = common | {"case": f"{common['case']}, {KEPT}"}
                yield "rows", row(**again, timings=beside, least=least, bar=bar, peak_gflops=peak)
            if shape.name == BARRED and n == 64:
                for suffix, name in results.items():
                    beside_one = common | {"case": f"{common['case']}{suffix}, beside one"}
                    unit = 64 * timings[1, name].median_us
                    yield "rows", row(**beside_one, timings={OURS: timings[n, name]}, bar=AS_ONE, unit_us=unit)


def _into_kept(net: HyperNetwork, shape: HyperShape, count: int) -> Callable[[], object]:
    """A call that generates ``count`` adapters over earlier ones, verified to give the same bits."""
    task_emb = shape.task_embeddings(count, seed=3)
    out = net.generate(shape.task_embeddings(count, seed=2))
    net.generate(task_emb, out=out)
    fresh = net.generate(task_emb)
    for name in fresh.lora_A:
        if not (torch.equal(out.lora_A[name], fresh.lora_A[name]) and torch.equal(out.lora_B[name], fresh.lora_B[name])):
            raise VerificationError(f"{shape.name} {shape.variant}, {count}: other bits in memory that is used again")
    return functools.partial(net.generate, task_emb, out=out)


def _candidates(
    net: HyperNetwork, exact: HyperNetwork, shape: HyperShape, count: int, compile_it: bool
) -> tuple[dict[str, Callable], dict[str, str], Error]:
    """Verified calls that generate ``count`` adapters; what is absent and why; the error of ours."""
    eager, compiled_absent = baselines.Eager(net), {}
    generators = {OURS: baselines.of_stack(net), "reference": baselines.plain(net), "eager": eager}
    if compile_it and count in COMPILED:
        try:
            generators["torch.compile"] = baselines.compiled(net, shape.task_embeddings(count))
        except Exception as error:  # whatever the compiler cannot do is a fact about it, and is reported
            compiled_absent["torch.compile"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    elif compile_it:
        compiled_absent["torch.compile"] = "compiled for 1 description only"
    fresh = shape.task_embeddings(count, seed=2)
    results = {name: eager.stacked(f(fresh)) if f is eager else f(fresh) for name, f in generators.items()}
    errors = adapter_errors(exact, results, fresh, net.dtype)
    del results
    timed = shape.task_embeddings(count, seed=3)
    functions = {name: functools.partial(f, timed) for name, f in generators.items()}
    functions, absent = admit(f"{shape.name} {shape.variant} {net.dtype}, {count}", functions, errors)
    return functions, absent | compiled_absent, errors[OURS]


@torch.no_grad()
def adapter_errors(
    exact: HyperNetwork, results: dict[str, Adapters], task_emb: Tensor, dtype: torch.dtype
) -> dict[str, Error]:
    """The worst error of each candidate over modules, sides and chunks of descriptions.

    ``exact``: the same weights in float64.  ``results`` holds "reference", whose error in the same dtype makes the bound.
    """
    errors: dict[str, list[Error]] = {name: [] for name in results}
    for start in range(0, len(task_emb), CHUNK):
        rows = slice(start, start + CHUNK)
        oracle = baselines.of_stack(exact)(task_emb[rows].double())
        for module, sides in oracle.items():
            for side, right in enumerate(sides):
                bound = numerics.trunk_bound(right, results["reference"][module][side][rows], dtype)
                for name, got in results.items():
                    value = numerics.relative_frobenius(got[module][side][rows], right)
                    errors[name].append(Error(value, bound))
    return {name: worst(found) for name, found in errors.items()}


def adapter_bytes(config: HyperNetworkConfig, count: int, dtype: torch.dtype) -> int:
    """A and B of ``count`` adapters."""
    return count * config.num_layers * config.rank * sum(config.in_features + config.out_features) * dtype.itemsize


def weight_bytes(net: HyperNetwork) -> int:
    """All parameters of a hypernetwork."""
    return sum(p.nbytes for p in net.parameters())


def _floor(context: Context, net: HyperNetwork, count: int, threads: int, gflops: float) -> dict[str, Any]:
    num_bytes = weight_bytes(net) + adapter_bytes(net.config, count, net.dtype)
    gbps = context.ceilings.bandwidth_at(num_bytes, threads)
    return floor(hypernet_flops(net.config, count).total, num_bytes, gflops, gbps)


def _cost_of_bf16(shape: HyperShape, single: HyperNetwork, rounded: HyperNetwork) -> dict[str, Any]:
    task_emb = shape.task_embeddings(8, seed=4)
    pairs = zip(*(baselines.of_stack(net)(task_emb).values() for net in (single, rounded)), strict=True)
    wrong = exact = 0.0
    for right, got in pairs:
        for a, b in zip(right, got, strict=True):
            wrong += float((b.double() - a.double()).square().sum())
            exact += float(a.double().square().sum())
    return {"model": shape.name, "variant": shape.variant, "relative_frobenius": (wrong / exact) ** 0.5}


# --- memory ----------------------------------------------------------------------------------------------------------


def build_and_generate(name: str, dtype: str, count: int) -> tuple[int, int]:
    """Bytes of the weights and of the adapters of a hypernetwork that is made, and used, here."""
    shape = SHAPES[name]
    net = shape.make(getattr(torch, dtype))
    stack = net.generate(shape.task_embeddings(count))
    return weight_bytes(net), sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values())


def memory(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    """The peak of a process that makes a hypernetwork and many adapters, beyond what it held before."""
    name, count = (BARRED, 64) if context.full else ("smollm2-135m", 8)
    peak, (weights, adapters) = peak_memory(build_and_generate, name, "bfloat16", count)
    ratio = peak / (weights + adapters)
    yield (
        "memory",
        {
            "what": f"{name} L bfloat16, {count} descriptions",
            "peak_mib": round(peak / 2**20, 1),
            "weights_mib": round(weights / 2**20, 1),
            "adapters_mib": round(adapters / 2**20, 1),
            "ratio": round(ratio, 4),
            "bar": MEMORY if name == BARRED else None,  # beside a few megabytes, torch's own pages count
        },
    )
