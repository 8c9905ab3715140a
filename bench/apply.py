"""Applying adapters: batched LoRA alone, cold and hot, over the number of adapters, with gradients, around a linear."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import decode
from bench.baselines import PEFT_ABSENT, gather_bmm, gather_bmm_delta, mm_loop, mm_loop_delta, peft_linear, token_ids
from bench.harness import OURS, Bar, Context, Error, Task, admit, floor, row, worst
from bench.timing import WARM_CALLS, Call, Rotation
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import BF16, LORA_CASES, LoraCase
from t2l_engine.testing.oracle import in_float64

SERVE = [c for c in LORA_CASES if c.name.startswith("serve_") and c.x_dtype == BF16]
#: A prefill reuses its adapters: more operations than bytes, and a wider bar.
HOT, HOT_PREFILL, COLD = Bar(1.5, plus_us=3.0), Bar(1.8, plus_us=3.0), Bar(1.4)
SWEPT = (1, 2, 4, 8, 16, 32, 64)
Arguments = dict[str, Any]
Entries = Iterator[tuple[str, dict[str, Any]]]

BUILDERS: dict[str, Callable[[Arguments], Call]] = {
    OURS: lambda arguments: functools.partial(ops.lora_add_, *arguments.values()),
    "reference": lambda arguments: functools.partial(reference.lora_add_, *arguments.values()),
    "mm loop": mm_loop,
    "gather bmm": gather_bmm,
}


def plan(context: Context) -> list[Task]:
    size = {} if context.full else {"in_features": 512, "out_features": 512}
    serve = [dataclasses.replace(case, **size) for case in SERVE]
    tasks = []
    for case in serve:
        for n in context.thread_counts:
            tasks.append(Task(f"{case.name} hot {n}", functools.partial(lora, context, case, n)))
        tasks.append(Task(f"{case.name} cold", functools.partial(lora, context, case, 1, cold=True)))
    for case in (c for c in serve if c.b_layout == "r_out"):  # as the slots of an attached model are
        case = dataclasses.replace(case, name=case.name.replace("serve", "linear"))
        tasks.append(Task(case.name, functools.partial(around_linear, context, case)))
    for n in SWEPT:
        segments = tuple((64 // n, i) for i in range(n))
        case = dataclasses.replace(serve[0], name=f"sweep_64x{n}", segments=segments, adapters=n)
        tasks.append(Task(case.name, functools.partial(lora, context, case, 1, group="sweep")))
    for features in (576, 2048) if context.full else (64,):
        case = LoraCase(f"backward_8x64_{features}", tuple((64, i) for i in range(8)), features, features, adapters=8)
        tasks.append(Task(case.name, functools.partial(backward, context, case)))
    return tasks + decode.plan(context)


# --- batched LoRA alone ----------------------------------------------------------------------------------------------


def natural(arguments: Arguments) -> Arguments:
    """The operands as a model has them: dense, B in the layout of the case; the case's own strides are for tests."""
    stored = arguments["lora_B"].mT
    B = stored.contiguous().mT if stored.stride(-1) == 1 else arguments["lora_B"].contiguous()
    return arguments | {name: arguments[name].contiguous() for name in ("y", "x", "lora_A")} | {"lora_B": B}


def own(arguments: Arguments) -> Arguments:
    """A copy that shares no memory; layouts stay."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.mT.clone().mT if value.dim() == 3 and value.mT.is_contiguous() else value.clone()

    return {name: copied(value) for name, value in arguments.items()}


def exact_add(arguments: Arguments) -> Tensor:
    """``y`` after the op, in float64."""
    wide = in_float64(arguments)
    reference.lora_add_(**wide)
    return wide["y"]


def lora_errors(case: LoraCase, builders: dict[str, Callable[[Arguments], Call]], seed: int = 1) -> dict[str, Error]:
    """The error of every builder's call, each on operands of its own."""
    oracle = exact_add(natural(case.make(seed)))
    errors = {}
    for name, build in builders.items():
        arguments = natural(case.make(seed))
        build(arguments)()
        value = numerics.relative_frobenius(arguments["y"], oracle)
        errors[name] = Error(value, numerics.lora_frobenius(case.x_dtype))
    return errors


def traffic(arguments: Arguments) -> tuple[int, int, int]:
    """FLOPs; bytes moved (adapters in use and x once, y twice); bytes of the working set (y once)."""
    y, x, A, B = (arguments[name] for name in ("y", "x", "lora_A", "lora_B"))
    used = len({i for i in arguments["seg_adapters"].tolist() if i >= 0})
    once = x.nbytes + used * (A[0].nbytes + B[0].nbytes)
    return 2 * len(x) * A.shape[1] * (x.shape[1] + y.shape[1]), once + 2 * y.nbytes, once + y.nbytes


def shape_of(case: LoraCase) -> dict[str, Any]:
    dtype, features = str(case.x_dtype).removeprefix("torch."), case.in_features
    shape = {"tokens": case.tokens, "adapters": case.adapters, "features": features, "rank": case.rank}
    return {**shape, "dtype": dtype, "layout": case.b_layout, "op": "LoRA alone"}


def lora(context: Context, case: LoraCase, threads: int, cold: bool = False, group: str = "lora") -> Entries:
    """``lora_add_`` on one linear, its own product left out."""
    cache = "cold" if cold else "hot"
    arguments = natural(case.make())
    operations, moved, working_set = traffic(arguments)
    if cold:
        sets = Rotation([own(arguments) for _ in range(context.rotated // working_set + 1)])
        functions, warm_calls = {name: sets.bind(build) for name, build in BUILDERS.items()}, sets.flush
    else:
        functions, warm_calls = {name: build(arguments) for name, build in BUILDERS.items()}, WARM_CALLS
    errors = lora_errors(case, BUILDERS)
    functions, absent = admit(case.name, functions, errors)
    dtype = str(case.x_dtype).removeprefix("torch.")
    gbps = context.ceilings.bandwidth_at(context.rotated if cold else working_set, threads)
    gflops, peak = context.ceilings.gemm_at(dtype, threads), context.ceilings.fma_at(dtype, threads)
    least = floor(operations, moved, gflops, gbps)
    if cold:  # stated in bytes, whatever the products would need
        least |= {"us": round(moved / gbps / 1e3, 3), "by": "bytes"}
    bar = COLD if cold else HOT_PREFILL if case.tokens > 64 else HOT
    with torch.inference_mode():
        timings = context.time(functions, threads, warm_calls=warm_calls)
    common = {"cache": cache, "absent": absent, "least": least, "peak_gflops": peak}
    bar = bar if context.full and group == "lora" else None  # stated for these sizes
    yield "rows", row(case.name, group, shape_of(case), threads, timings, errors[OURS], bar=bar, **common)


# --- with gradients --------------------------------------------------------------------------------------------------


Delta = Callable[[Arguments], Callable[[], Tensor]]


def _delta(backend) -> Delta:
    names = ("x", "lora_A", "lora_B", "scaling", "seg_indptr", "seg_adapters", "max_seg_len", "ranks")
    return lambda arguments: lambda: backend.lora_delta(*(arguments[name] for name in names))


DELTAS: dict[str, Delta] = {OURS: _delta(ops), "mm loop": mm_loop_delta, "gather bmm": gather_bmm_delta}
DIFFERENTIATED = ("x", "lora_A", "lora_B")


def step(build: Delta, arguments: Arguments, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward: (delta, gradients of x, A and B)."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIATED}
    forward = build(arguments | leaves)

    def run() -> tuple[Tensor, ...]:
        delta = forward()
        return delta, *torch.autograd.grad(delta, tuple(leaves.values()), grad)

    return run


def delta_errors(case: LoraCase, seed: int = 1) -> dict[str, Error]:
    """The worst error of delta and gradients of every builder, relative to the largest entry."""
    arguments = natural(case.make(seed))
    grad = torch.randn(case.tokens, case.out_features, generator=torch.Generator().manual_seed(seed))
    wide = in_float64(arguments)
    oracle = step(_delta(reference), wide, grad.double())()

    def error(got: Tensor, right: Tensor) -> Error:
        value = float((got.detach() - right.detach()).abs().max() / right.detach().abs().max())
        return Error(value, numerics.GRADIENT_RTOL, "largest error over largest entry, delta and gradients, against float64")

    results = {name: step(build, arguments, grad)() for name, build in DELTAS.items()}
    return {name: worst(map(error, got, oracle)) for name, got in results.items()}


def backward(context: Context, case: LoraCase) -> Entries:
    """``lora_delta`` forward and backward."""
    errors = delta_errors(case)
    arguments = natural(case.make())
    grad = torch.randn(case.tokens, case.out_features, generator=torch.Generator().manual_seed(0))
    functions, absent = admit(case.name, {name: step(build, arguments, grad) for name, build in DELTAS.items()}, errors)
    operations, _, _ = traffic(arguments)
    x, A, B = (arguments[name].nbytes for name in DIFFERENTIATED)
    moved = 3 * (x + A + B) + 2 * grad.nbytes  # forward reads, backward reads and writes; delta written, grad read
    shape = shape_of(case) | {"op": "forward and backward"}
    for threads in context.thread_counts:
        ceilings = context.ceilings
        least = floor(3 * operations, moved, ceilings.gemm_at("float32", threads), ceilings.bandwidth_at(moved, threads))
        timings = context.time(functions, threads)
        peak = ceilings.fma_at("float32", threads)
        common = {"cache": "hot", "absent": absent, "least": least, "peak_gflops": peak}
        yield "rows", row(case.name, "backward", shape, threads, timings, errors[OURS], **common)


# --- around a linear -------------------------------------------------------------------------------------------------


def attached(linear: nn.Linear, arguments: Arguments) -> nn.Module:
    """What ``attach`` makes of ``linear``, with the adapters and segments of ``arguments`` in use."""
    model = nn.ModuleList([nn.ModuleDict({"q_proj": linear})])
    lora_A, lora_B = ({"q_proj": arguments[name][:, None]} for name in ("lora_A", "lora_B"))
    handle = t2l.attach(model, t2l.AdapterStack(lora_A, lora_B, arguments["scaling"]))
    handle.set(t2l.AdapterBatch(arguments["seg_indptr"], arguments["seg_adapters"], arguments["max_seg_len"]))
    return model[0]["q_proj"]


def linear_calls(case: LoraCase, linear: nn.Linear, seed: int) -> tuple[Arguments, dict[str, Call], dict[str, str]]:
    """Operands, calls that give ``[T, out]``, and what is absent; "base" is the linear alone."""
    arguments = natural(case.make(seed))
    x, one = arguments["x"], case.adapters == 1
    ours = attached(linear, arguments)
    calls: dict[str, Call] = {OURS: lambda: ours(x), "base": lambda: linear(x)}
    absent = {} if one else dict.fromkeys(("merged", "PEFT single"), "holds one adapter; the batch has several")
    if PEFT_ABSENT:
        absent |= dict.fromkeys(("PEFT mixed", "PEFT single"), PEFT_ABSENT)
    else:
        peft, names = peft_linear(linear, arguments), [str(i) for i in token_ids(arguments).tolist()]
        calls["PEFT mixed"] = lambda: peft(x, adapter_names=names)
        if one:
            calls["PEFT single"] = lambda: peft(x)
    if one:
        delta = arguments["scaling"][0] * arguments["lora_B"][0].float() @ arguments["lora_A"][0].float()
        weight = (linear.weight.float() + delta).to(linear.weight.dtype)
        calls["merged"] = lambda: nn.functional.linear(x, weight)
    return arguments, calls, absent


def around_linear(context: Context, case: LoraCase) -> Entries:
    """``base(x)`` plus its adapters, as a layer of an attached model: what PEFT's layers can be compared with."""
    linear = nn.Linear(case.in_features, case.out_features, bias=False, device="meta").to_empty(device="cpu")
    linear.to(case.x_dtype).requires_grad_(False)
    linear.weight.normal_(0, case.in_features**-0.5, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        fresh, calls, _ = linear_calls(case, linear, seed=1)
        base = fresh["x"].double() @ linear.weight.double().mT
        oracle = exact_add(fresh | {"y": base.clone()})
        bound = numerics.lora_frobenius(case.x_dtype)
        errors = {
            name: Error(numerics.relative_frobenius(call(), base if name == "base" else oracle), bound)
            for name, call in calls.items()
        }
        _, calls, absent = linear_calls(case, linear, seed=0)
        functions, wrong = admit(case.name, calls, errors)
        timings = context.time(functions, context.threads)
    common = {"cache": "hot", "absent": absent | wrong}
    shape = shape_of(case) | {"op": "linear with LoRA"}
    yield "rows", row(case.name, "lora", shape, context.threads, timings, errors[OURS], **common)
