"""Applying adapters: batched LoRA alone, warm and cold, with gradients; in a whole model by :mod:`bench.suites.decode`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import baselines, cases
from bench.baselines import COPY, gather_bmm, gather_bmm_delta, mm_loop, mm_loop_delta
from bench.cases import LAYERS, Arguments, Case, Layer, Operands, even, launch, ragged, rows, zipf
from bench.harness import OURS, Context, Error, Record, Target, Task, roofline, row, verify, worst
from bench.suites import decode
from bench.timing import Call, Candidate, tolerant
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import BF16, LORA_CASES
from t2l_engine.testing.oracle import in_float64

SERVE = [
    Case(LAYERS["linear"], case.segments, layout=case.b_layout, label=case.name)
    for case in LORA_CASES
    if case.name.startswith("serve_") and case.x_dtype == BF16
]
#: A prefill reuses its adapters: more operations than bytes, and a wider target.
WARM, WARM_PREFILL, COLD, CUDA_MANY = Target(1.5), Target(1.8), Target(1.4), Target(1.35, of=COPY)
#: Gathered weights of more bytes are not tried.
LARGEST_GATHER = 8 << 30
APART = "ours, a launch a linear"
#: Name -> what makes a call of the arguments of ``ops.lora_add_``.
BUILDERS: dict[str, Callable[[Arguments], Call]] = {
    OURS: launch,
    "reference": lambda arguments: functools.partial(reference.lora_add_, *arguments.values()),
    "mm loop": mm_loop,
    "gather bmm": gather_bmm,
}
CUDA_BUILDERS: dict[str, Callable[[Arguments], Call]] = {
    APART: launch,
    "cuBLAS per adapter": mm_loop,
    "gather bmm": gather_bmm,
}


def plan(context: Context) -> list[Task]:
    return [*(_cpu_plan if context.on_cpu else _cuda_plan)(context), *decode.plan(context)]


def _cpu_plan(context: Context) -> list[Task]:
    layer = LAYERS["linear"] if context.full else Layer.linear(512)
    serve, tasks = [dataclasses.replace(case, layer=layer) for case in SERVE], []
    for case in serve:
        for n in context.thread_counts:
            tasks.append(Task.of(f"{case.name} warm {n}", lora, context, case, "lora", ["warm"], n))
        tasks.append(Task.of(f"{case.name} cold", lora, context, case, "lora", ["cold"], 1))
    for features in (576, 2048) if context.full else (64,):
        case = Case(Layer.linear(features), even(512, 8), dtype=torch.float32, label=f"backward_8x64_{features}")
        tasks.append(Task.of(case.name, backward, context, case))
    return tasks


def _cuda_plan(context: Context) -> list[Task]:
    """In order of worth: what a run that ends early has."""
    full, tasks = context.full, []
    for group, chosen, caches in (
        ("decode", decode_cases(full), ["cold", "warm"]),
        ("prefill", prefill_cases(full), ["cold"]),
    ):
        tasks += [Task.of(f"{group} {c.name}", lora, context, c, group, caches, 1) for c in chosen]
    return tasks


def decode_cases(full: bool) -> list[Case]:
    """Of a card, in order of worth."""
    if not full:
        return [Case(LAYERS["tiny"], rows(0, 1, 2)), Case(LAYERS["tiny"], rows(0, -1), "half base")]
    n64, one, half = rows(*range(64)), rows(*[0] * 64), rows(*(-1 if i % 2 else i // 2 for i in range(64)))
    chosen = [(layer, segments) for layer in ("linear", "7b") for segments in (n64, rows(0), rows(*range(8)), one)]
    chosen += [("7b-all", n64), ("7b-all", rows(0)), ("2b", n64), ("1b", n64)]
    chosen += [("7b", zipf(64), "zipf"), ("7b", half, "half base"), ("7b", rows(*(i % 16 for i in range(64))))]
    chosen += [("7b", rows(*range(n))) for n in (2, 4, 16, 32)]
    chosen += [("7b", n64, "", rank) for rank in (16, 32, 64)]
    chosen += [("linear", segments, "", 16) for segments in (n64, rows(0), rows(*range(8)))]
    return [Case(LAYERS[layer], *of) for layer, *of in [*chosen, ("7b", n64, "", 8, torch.float32)]]


def prefill_cases(full: bool) -> list[Case]:
    """Of a card, in order of worth."""
    if not full:
        return [Case(LAYERS["tiny"], even(32, 2)), Case(LAYERS["tiny"], ragged(40, 3), "ragged")]
    chosen = [("7b", even(*size)) for size in ((2048, 4), (8192, 8), (512, 1), (8192, 1))]
    chosen += [("7b", ragged(8192, 8), "ragged"), ("7b-all", even(8192, 8))]
    chosen += [("7b", even(2048, 4), "", rank) for rank in (16, 64)]
    return [Case(LAYERS[layer], *of) for layer, *of in chosen]


@torch.inference_mode()
def lora(context: Context, case: Case, group: str, caches: Sequence[str], count: int) -> Iterator[Record]:
    """The linears' own products left out: a row for each of ``caches`` that the case has, on ``count`` threads."""
    device = context.device
    builders, skipped = _builders(context, case)
    errors = lora_errors(case, builders, device.torch, skipped)
    builders, wrong = verify(case.name, {name: builders[name] for name in errors}, errors)
    for cache in caches:
        if not context.on_cpu and cache == "warm" and case.working_set > device.l2_bytes:
            continue  # what exceeds the level-2 cache is never warm
        operands, gone = cold_sets(context, case, None if cache == "cold" else 1), skipped | wrong
        candidates = {} if context.on_cpu else baselines.copies(device, case.bytes, len(operands))
        for name, build in builders.items():
            with tolerant(name, gone):
                candidates[name] = Candidate([build(one) for one in operands])
        timings = context.time(candidates, count, skipped=gone)
        given: dict[str, Any] = {"count": count, "cache": cache, "skipped": gone}
        if context.on_cpu:
            given |= _cpu_limits(context, case, group, cache, count)
        else:
            timings, given = baselines.with_best_copy(timings), given | _cuda_limits(context, case, cache)
        yield row(context, case.name, group, case.shape(), timings, errors[OURS], **given)
        del operands, candidates  # before the next ones are made


def _builders(context: Context, case: Case) -> tuple[dict[str, Callable[[Operands], Call]], dict[str, str]]:
    """The ways that can do the case; why others cannot."""

    def each(build: Callable[[Arguments], Call]) -> Callable[[Operands], Call]:
        return lambda operands: operands.one_by_one(build)

    builders, skipped = {name: each(build) for name, build in BUILDERS.items()}, {}
    if not context.on_cpu:
        builders = {OURS: Operands.grouped, **{name: each(build) for name, build in CUDA_BUILDERS.items()}}
        if all(len(group.outs) == 1 for group in case.layer.groups):  # then a launch a linear is what ours is
            del builders[APART]
    if any(adapter < 0 for _, adapter in case.segments):
        skipped["gather bmm"] = "has no row of the base model"
    elif (gathered := case.layer.weight_bytes(case.tokens, case.rank, case.dtype.itemsize)) > LARGEST_GATHER:
        skipped["gather bmm"] = f"would gather {gathered / 1e9:.0f} GB"
    return {name: build for name, build in builders.items() if name not in skipped}, skipped


def lora_errors(
    case: Case, builders: Mapping[str, Callable[[Operands], Call]], device: torch.device, skipped: dict[str, str]
) -> dict[str, Error]:
    """The worst error of every way over the linears, each on operands of its own that nothing else sees.

    A baseline that throws goes to ``skipped``.
    """
    exact = cases.operands(case, device, seed=1).exact()
    bound, errors = numerics.lora_frobenius(case.dtype), {}
    for name, build in builders.items():
        fresh = cases.operands(case, device, seed=1)
        with tolerant(name, skipped):
            build(fresh)()
            got = [member["y"] for member in fresh.members]
            pairs = zip(got, exact, strict=True)
            errors[name] = worst(Error(numerics.relative_frobenius(one, right), bound) for one, right in pairs)
    return errors


def _cpu_limits(context: Context, case: Case, group: str, cache: str, count: int) -> dict[str, Any]:
    """Roofline and target."""
    cold, ceilings = cache == "cold", context.ceilings
    gbps = ceilings.bandwidth_at(context.rotated if cold else case.working_set, count)
    least = roofline(case.flops, case.bytes, ceilings.gemm_at(case.dtype_name, count), gbps)
    if cold:  # stated in bytes, whatever the products would need
        least |= {"us": round(case.bytes / gbps / 1e3, 3), "by": "bytes"}
    target = (COLD if cold else WARM_PREFILL if case.tokens > 64 else WARM) if group == "lora" else None
    return {"least": least, "target": target}


def _cuda_limits(context: Context, case: Case, cache: str) -> dict[str, Any]:
    """What is warm comes from the cache: the rates of memory make no roofline of it."""
    least = context.roofline(case.flops, case.bytes, case.dtype_name) if cache == "cold" else None
    usual = case.rank in (8, 16) and case.dtype == torch.bfloat16
    return {"least": least, "target": CUDA_MANY if usual and case.tokens == case.adapters == 64 else None}


def cold_sets(context: Context, case: Case, count: int | None = None) -> list[Operands]:
    """``count`` sets of operands, by default as many as exceed the caches."""
    sets, shared = count or context.num_sets(case.working_set), cases.routing(case, context.device.torch)
    return [cases.operands(case, context.device.torch, seed, shared) for seed in range(2, 2 + sets)]


Delta = Callable[[Arguments], Callable[[], Tensor]]


def _delta(backend) -> Delta:
    return lambda arguments: functools.partial(backend.lora_delta, *(arguments[name] for name in cases.ORDER[1:]))


DELTAS: dict[str, Delta] = {OURS: _delta(ops), "mm loop": mm_loop_delta, "gather bmm": gather_bmm_delta}
DIFFERENTIATED = ("x", "lora_A", "lora_B")
CPU = torch.device("cpu")


def step(build: Delta, arguments: Arguments, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward: (delta, gradients of x, A and B)."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIATED}
    forward = build(arguments | leaves)

    def run() -> tuple[Tensor, ...]:
        delta = forward()
        return delta, *torch.autograd.grad(delta, tuple(leaves.values()), grad)

    return run


def backward_operands(case: Case, seed: int) -> tuple[Arguments, Tensor]:
    """Of a case of one linear: arguments, and the gradient of the delta."""
    arguments = cases.operands(case, CPU, seed).members[0]
    return arguments, torch.randn(arguments["y"].shape, generator=torch.Generator().manual_seed(seed))


def delta_errors(case: Case) -> dict[str, Error]:
    """The worst error of delta and gradients of every builder, relative to the largest entry."""
    arguments, grad = backward_operands(case, seed=1)
    oracle = step(_delta(reference), in_float64(arguments), grad.double())()

    def error(got: Tensor, right: Tensor) -> Error:
        value = float((got.detach() - right.detach()).abs().max() / right.detach().abs().max())
        return Error(value, numerics.GRADIENT_RTOL, "largest error over largest entry, delta and gradients, against float64")

    results = {name: step(build, arguments, grad)() for name, build in DELTAS.items()}
    return {name: worst(map(error, got, oracle)) for name, got in results.items()}


def backward(context: Context, case: Case) -> Iterator[Record]:
    """``lora_delta`` forward and backward."""
    errors = delta_errors(case)
    arguments, grad = backward_operands(case, seed=0)
    calls = {name: step(build, arguments, grad) for name, build in DELTAS.items()}
    functions, skipped = verify(case.name, calls, errors)
    x, A, B = (arguments[name].nbytes for name in DIFFERENTIATED)
    moved = 3 * (x + A + B) + 2 * grad.nbytes  # forward reads, backward reads and writes; delta written, grad read
    for count in context.thread_counts:
        timings = context.time(functions, count)
        least = context.roofline(3 * case.flops, moved, "float32", count)
        given = {"count": count, "cache": "warm", "skipped": skipped, "least": least}
        shape = case.shape("forward and backward")
        yield row(context, case.name, "backward", shape, timings, errors[OURS], **given)
