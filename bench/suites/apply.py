"""Applying adapters: batched LoRA alone, warm and cold, with gradients; steps of a language model."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import baselines, cases, models
from bench.baselines import COPY, added, batched_delta, gather_bmm_delta, mm_loop
from bench.cases import LAYERS, Arguments, Case, Layer, Operands, even, launch, ragged, rows
from bench.harness import OURS, Context, Error, Record, Target, Task, logits_error, roofline, row, verify, worst
from bench.models import LINEARS, MODULES, TINY, Forward, Step
from bench.records import BASE
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
Builder = Callable[[Arguments], Call]
BUILDERS: dict[str, Builder] = {
    OURS: launch,
    "reference": lambda arguments: functools.partial(reference.lora_add_, *arguments.values()),
    "mm loop": mm_loop,
    "gather bmm": functools.partial(added, gather_bmm_delta),
    "batched": functools.partial(added, batched_delta),
}
CUDA_BUILDERS: dict[str, Builder] = {APART: launch, "cuBLAS per adapter": mm_loop, "gather bmm": BUILDERS["gather bmm"]}


def plan(context: Context) -> list[Task]:
    return [*(_cpu_plan if context.on_cpu else _cuda_plan)(context), *_model_plan(context)]


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
    both = (("decode", decode_cases, ["cold", "warm"]), ("prefill", prefill_cases, ["cold"]))
    chosen = ((group, case, caches) for group, cases_of, caches in both for case in cases_of(context.full))
    return [Task.of(f"{group} {case.name}", lora, context, case, group, caches, 1) for group, case, caches in chosen]


def decode_cases(full: bool) -> list[Case]:
    """Of a card, in order of worth."""
    if not full:
        return [Case(LAYERS["tiny"], rows(0, 1, 2)), Case(LAYERS["tiny"], rows(0, -1), "half base")]
    n64, one, half = rows(*range(64)), rows(*[0] * 64), rows(*(-1 if i % 2 else i // 2 for i in range(64)))
    chosen = [(layer, segments) for layer in ("linear", "7b") for segments in (n64, rows(0), rows(*range(8)), one)]
    chosen += [("7b-all", n64), ("7b-all", rows(0)), ("2b", n64), ("1b", n64)]
    chosen += [("7b", half, "half base"), ("7b", rows(*(i % 16 for i in range(64))))]
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
    device, shared = context.device, cases.routing(case, context.device.torch)
    builders, skipped = _builders(context, case)
    errors = lora_errors(case, builders, device.torch, skipped)
    builders, wrong = verify(case.name, {name: builders[name] for name in errors}, errors)
    for cache in caches:
        if not context.on_cpu and cache == "warm" and case.working_set > device.l2_bytes:
            continue  # what exceeds the level-2 cache is never warm
        sets, gone = context.num_sets(case.working_set) if cache == "cold" else 1, skipped | wrong
        operands = [cases.operands(case, device.torch, seed, shared) for seed in range(2, 2 + sets)]
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
    chosen, skipped = BUILDERS if context.on_cpu else CUDA_BUILDERS, {}
    builders = {name: functools.partial(Operands.one_by_one, build=build) for name, build in chosen.items()}
    if not context.on_cpu:
        builders = {OURS: Operands.grouped, **builders}
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
    """The worst error of every way over the linears; a baseline that throws goes to ``skipped``."""
    exact = cases.operands(case, device, seed=1).exact()
    bound, errors = numerics.lora_frobenius(case.dtype), {}
    for name, build in builders.items():
        fresh = cases.operands(case, device, seed=1)
        with tolerant(name, skipped):
            build(fresh)()
            got = [problem["y"] for problem in fresh.problems]
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


Delta = Callable[[Arguments], Callable[[], Tensor]]


def _delta(backend) -> Delta:
    return lambda arguments: functools.partial(backend.lora_delta, *(arguments[name] for name in cases.ORDER[1:]))


DELTAS: dict[str, Delta] = {OURS: _delta(ops), "gather bmm": gather_bmm_delta, "batched": batched_delta}
DIFFERENTIATED = ("x", "lora_A", "lora_B")
CPU = torch.device("cpu")


def step(build: Delta, arguments: Arguments) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward, of a gradient at random: (delta, gradients of x, A and B)."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIATED}
    forward, y = build(arguments | leaves), arguments["y"]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)

    def run() -> tuple[Tensor, ...]:
        delta = forward()
        return delta, *torch.autograd.grad(delta, tuple(leaves.values()), grad)

    return run


def delta_errors(case: Case) -> dict[str, Error]:
    """The worst error of delta and gradients of every builder, relative to the largest entry."""
    arguments = cases.operands(case, CPU, seed=1).problems[0]
    oracle = step(_delta(reference), in_float64(arguments))()

    def error(got: Tensor, right: Tensor) -> Error:
        value = float((got.detach() - right.detach()).abs().max() / right.detach().abs().max())
        return Error(value, numerics.GRADIENT_RTOL, "largest error over largest entry, delta and gradients, against float64")

    results = {name: step(build, arguments)() for name, build in DELTAS.items()}
    return {name: worst(map(error, got, oracle)) for name, got in results.items()}


def backward(context: Context, case: Case) -> Iterator[Record]:
    """``lora_delta`` forward and backward."""
    errors = delta_errors(case)
    arguments = cases.operands(case, CPU, seed=0).problems[0]
    calls = {name: step(build, arguments) for name, build in DELTAS.items()}
    functions, skipped = verify(case.name, calls, errors)
    # Forward reads, backward reads and writes; the delta is written, its gradient read.
    moved = 3 * sum(arguments[name].nbytes for name in DIFFERENTIATED) + 2 * arguments["y"].nbytes
    for count in context.thread_counts:
        timings = context.time(functions, count)
        least = context.roofline(3 * case.flops, moved, "float32", count)
        given = {"count": count, "cache": "warm", "skipped": skipped, "least": least}
        shape = case.shape("forward and backward")
        yield row(context, case.name, "backward", shape, timings, errors[OURS], **given)


# --- a whole language model ---------------------------------------------------------------------------------------------

ROWS, CACHED = 8, 64
#: Name of a set of adapters -> its target.
TARGETS = {"q,v": Target(1.05, of=BASE), "all linears": Target(1.15, of=BASE)}
PHASES = {"decode": models.decode, "prefill": models.prefill}
#: The way that gives every row adapter 0.
MERGED = "merged"

#: On a card, of a 7B-shaped model: (modules, rows, adapters) in order of worth; rank; tokens that a row has when the step
#: ends: few, so that the base step is short and the adapters' share large.
CUDA_FULL = (("q,v", 64, (1, 8, 64)), ("q,v", 1, (1,)), ("all linears", 64, (64,)), ("q,v", 8, (8,)))
CUDA_TINY = (("q,v", 4, (1, 4)), ("all linears", 2, (2,)))
CUDA_TARGET = Target(1.08, of=BASE)
RANK, CONTEXT = 8, 128


def _model_plan(context: Context) -> list[Task]:
    if not context.on_cpu:
        chosen = CUDA_FULL if context.full else CUDA_TINY
        return [Task.of(step_name(modules, rows), cuda, context, modules, rows, n) for modules, rows, n in chosen]
    dtypes = [name for name in ("float32", "bfloat16") if context.ceilings.fastest(name) == name]  # as t2l chooses a model's
    all_of = itertools.product(dtypes, {"model": steps, "model sweep": sweep}.items())
    return [Task.of(f"{name} {dtype}", run, context, getattr(torch, dtype)) for dtype, (name, run) in all_of]


def _tokens(model: nn.Module, rows: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, count), generator=generator)


def steps(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    """Both phases for eight rows with eight adapters: of q and v, and of all linears."""
    (name, model), (_, wide) = models.load(context, dtype), models.load(context, torch.float64)
    ranks = {"q,v": RANK, "all linears": 16}
    sets = {
        "q,v": models.bundled_adapters(context, wide, ROWS).to(dtype=dtype),
        "all linears": models.random_adapters(wide, LINEARS, ROWS, ranks["all linears"]).to(dtype=dtype),
    }
    fresh, timed = (_tokens(model, ROWS, CACHED + 1, seed) for seed in (1, 0))
    chosen = {of: _ways(context, model, stack) for of, stack in sets.items()}
    with torch.inference_mode():
        base = _exact(wide, model, None, fresh, range(ROWS))
        for of, (ways, skipped) in chosen.items():
            stack = sets[of]
            exact = {BASE: base, MERGED: _exact(wide, model, stack, fresh, [0] * ROWS)}
            each = _exact(wide, model, stack, fresh, range(ROWS))
            for phase, make in PHASES.items():
                case = f"{phase} {ROWS} rows, {of}"
                got = {way: make(forward, fresh)() for way, forward in ways.items()}
                errors = {way: logits_error(logits, *exact.get(way, each)[phase]) for way, logits in got.items()}
                calls, wrong = verify(case, {way: make(forward, timed) for way, forward in ways.items()}, errors)
                shape = {"model": name, "phase": phase, "rows": ROWS, "modules": of, "rank": ranks[of]}
                given = {"skipped": skipped | wrong, "target": TARGETS[of]}
                yield _row(context, case, shape, dtype, context.time(calls, factor=10), errors[OURS], **given)


def _exact(
    wide: nn.Module, model: nn.Module, stack: t2l.AdapterStack | None, tokens: Tensor, ids: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By phase the float64 logits, and those of the merged models in the dtype of ``model``."""
    exact, other = (models.exact_logits(m, stack, tokens, ids) for m in (wide, model))
    return {phase: (exact[phase], other[phase]) for phase in PHASES}


def _ways(context: Context, model: nn.Module, stack: t2l.AdapterStack) -> tuple[dict[str, Forward], dict[str, str]]:
    """Ways to run ``stack``, row i with adapter i, but for MERGED and BASE; and what is skipped."""
    ways: dict[str, Forward] = {OURS: models.ours(model, stack, range(ROWS)), MERGED: models.merged(model, stack, 0)}
    ways[BASE] = model
    if not (context.full and importlib.util.find_spec("peft")):
        return ways, {"PEFT mixed": "not installed" if context.full else "left out at this size"}
    mixed = functools.partial(models.peft_model(model, stack), adapter_names=[str(i) for i in range(ROWS)])
    return ways | {"PEFT mixed": mixed}, {}


def sweep(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    """Decode steps of many rows over the number of adapters among them, in the same rounds."""
    (name, model), (_, wide) = models.load(context, dtype), models.load(context, torch.float64)
    count, short = (64, 8) if context.full else (8, 4)
    stack = models.bundled_adapters(context, wide, count).to(dtype=dtype)
    choices = {2**i: [row % 2**i for row in range(count)] for i in range(count.bit_length())}
    forwards = {BASE: model} | {n: models.ours(model, stack[:n], ids) for n, ids in choices.items()}
    timed = _tokens(model, count, CACHED + 1, seed=0)
    # Every row reads the same: then the oracle needs a row an adapter, whichever rows use it.
    fresh = _tokens(model, 1, short + 1, seed=1).expand(count, -1)
    with torch.inference_mode():
        exact, other = _exact(wide, model, stack, fresh, range(count))["decode"]
        right = {n: (exact[ids], other[ids]) for n, ids in choices.items()}
        right[BASE] = tuple(t.expand(count, -1) for t in _exact(wide, model, None, fresh[:1], [0])["decode"])
        del wide
        errors = {n: logits_error(models.decode(f, fresh)(), *right[n]) for n, f in forwards.items()}
        # With one adapter all rows are alike, and one draw of rounding errors bounds no other: those of all adapters do.
        allowed = logits_error(other, exact, other).bound
        errors = {n: error._replace(bound=max(error.bound, allowed)) for n, error in errors.items()}
        for n, error in errors.items():
            verify(f"{n} adapters", {OURS: None}, {OURS: error})
        timings = context.time({n: models.decode(f, timed) for n, f in forwards.items()}, factor=20)
    for n in choices:
        mine = {OURS: timings[n], BASE: timings[BASE]}
        shape = {"model": name, "phase": "decode", "rows": count, "adapters": n, "modules": "q,v", "rank": RANK}
        yield _row(context, f"decode {count} rows, {n} adapters", shape, dtype, mine, errors[n])


def _row(context: Context, case: str, shape: Record, dtype: torch.dtype, timings, error: Error, **given: Any) -> Record:
    name = str(dtype).removeprefix("torch.")
    return row(context, f"{case}, {name}", "model", shape | {"dtype": name}, timings, error, **given)


def step_name(modules: str, rows: int, adapters: int = 0) -> str:
    """``adapters``: 0 for all numbers of them together."""
    of = f", {adapters} adapter{'s' if adapters > 1 else ''}" if adapters else ""
    return f"decode step, {rows} row{'s' if rows > 1 else ''}, {modules}{of}"


class Steps(NamedTuple):
    """One decode step of a 7B-shaped model on a card: without adapters, and by their number with them, verified."""

    tokens: Tensor
    base: Step
    adapted: dict[int, Step]
    errors: dict[int, Error]
    adapter_bytes: int

    @staticmethod
    def of(context: Context, modules: str, rows: int, counts: Sequence[int]) -> Steps:
        device, dtype = context.device.torch, torch.bfloat16
        shape = models.MISTRAL if context.full else TINY
        base = Step.of(models.decoder(shape, device, dtype), rows, CONTEXT if context.full else 6)
        tokens = torch.randint(shape["vocab_size"], (rows, 1), device=device)
        stack = models.random_adapters(base.model, MODULES[modules], max(counts), RANK).to(dtype=dtype)
        adapted, errors = {}, {}
        for count in counts:
            model = models.shared(base.model)
            t2l.attach(model, stack[:count]).set([row % count for row in range(rows)])
            adapted[count] = base.on(model)
            errors[count] = models.layer_error(adapted[count], tokens)
            verify(step_name(modules, rows, count), {OURS: None}, {OURS: errors[count]})
        return Steps(tokens, base, adapted, errors, stack.num_parameters * dtype.itemsize // max(counts))


@torch.inference_mode()
def cuda(context: Context, modules: str, rows: int, counts: Sequence[int]) -> Iterator[Record]:
    """A row for every number of adapters, all beside the same base step."""
    tokens, base, adapted, errors, adapter_bytes = Steps.of(context, modules, rows, counts)
    timings = context.time({n: functools.partial(s, tokens) for n, s in (adapted | {BASE: base}).items()}, factor=6)
    flops = 2 * rows * sum(m.weight.numel() for m in base.model.modules() if isinstance(m, nn.Linear))
    for count in counts:
        fields = {"model": "7B-shaped, random", "rows": rows, "adapters": count, "modules": modules, "rank": RANK}
        least = context.roofline(flops, base.num_bytes + count * adapter_bytes, "bfloat16")
        target = CUDA_TARGET if (modules, count) == ("q,v", 64) else None
        given = {"cache": "as it comes", "least": least, "target": target}
        mine = {OURS: timings[count], BASE: timings[BASE]}
        yield row(context, step_name(modules, rows, count), "model", fields, mine, errors[count], **given)
