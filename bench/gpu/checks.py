"""What is no time: graphs that are captured once and replayed over other data, and streams.

Every comparison is of bits: a replay, and a call on another stream, run the same kernels in the same order as an eager call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases
from bench.gpu.cases import LAYERS, Case, Launch, Operands, rows
from bench.gpu.context import Context, Skip
from bench.gpu.generation import kept, one_net
from bench.gpu.lora import need_kernels
from t2l_engine import HyperNetwork, ops

Change = Callable[[Launch], None]
#: Cycles that a stream is kept busy for: some 20 ms.
BUSY = 40_000_000


def run(context: Context) -> None:
    need_kernels(context, "lora_add_", "lora_add_group_", "hypernet_trunk", "hypernet_heads_out_")
    for dtype in (torch.bfloat16, torch.float32):
        for name, index in (("lora_add_group_", 0), ("lora_add_", 1)):
            case = f"graph of {name}, {str(dtype).removeprefix('torch.')}"
            context.attempt(case, functools.partial(lora_graph, context, case, index, dtype))
    context.attempt("graph of generation", functools.partial(generation_graph, context))
    context.attempt("graph that generates and applies", functools.partial(whole_graph, context))
    context.attempt("another stream", functools.partial(other_stream, context))
    context.attempt("two streams", functools.partial(two_streams, context))
    context.attempt("second device", functools.partial(second_device, context))


def verdict(check: str, differences: list[str], what: str) -> list[tuple[str, dict[str, Any]]]:
    """An entry of "checks"; ``differences``: after what the bits were not equal."""
    detail = f"equal bits: {what}" if not differences else f"other bits after {', '.join(differences)}"
    return [("checks", {"check": check, "passed": not differences, "detail": detail})]


# --- graphs ----------------------------------------------------------------------------------------------------------


def _fill(tensor: Tensor, value: Callable[[Tensor], Tensor]) -> None:
    tensor.copy_(value(tensor))


def changes() -> dict[str, Change]:
    """What a server does between steps, one after the other: name -> a change in place of operands that a graph holds."""

    def ids(*chosen: int) -> Change:
        def change(one: Launch) -> None:
            held = one.members[0]["seg_adapters"]
            held.copy_(torch.tensor(chosen, dtype=torch.int32)[torch.arange(len(held)) % len(chosen)])

        return change

    def ranks(*chosen: int) -> Change:
        def change(one: Launch) -> None:
            for member in one.members:
                member["ranks"].copy_(torch.tensor(chosen, dtype=torch.int32)[: len(member["ranks"])])

        return change

    def weights(one: Launch) -> None:
        for member in one.members:
            for side in ("lora_A", "lora_B"):
                member[side][1].copy_(torch.randn_like(member[side][1]) * 0.1)

    return {
        "capture": lambda one: None,
        "other ids": ids(3, 1, 2, 0),
        "more adapters at work": ids(0, 1, 2, 3, 4, 5, 6, 7),
        "rows of the base model": ids(-1, 7, -1, 0),
        "the base model alone": ids(-1),
        "one adapter for all": ids(5),
        "other weights in a slot": weights,
        "other ranks": ranks(8, 3, 0, 1, 8, 5, 2, 7),
        "other scalings": lambda one: one.members[0]["scaling"].mul_(-0.5),
        "other inputs": lambda one: _fill(one.members[0]["x"], torch.randn_like),
    }


@torch.inference_mode()
def lora_graph(context: Context, check: str, index: int, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """A graph captured with two adapters at work on eight rows, replayed after each of :func:`changes`."""
    layer = LAYERS["7b-all"] if context.on_card else LAYERS["tiny"]
    case = Case(layer, rows(0, 1, 2, 3, 4, 5, 6, 7), "", dtype=dtype)
    one = cases.operands(case, context.device.torch, seed=5).launches[index]
    one.members[0]["seg_adapters"].fill_(1)[::2] = 0
    start = one.y.clone()
    replay, wrong = context.device.capture(one.call()), []
    for name, change in changes().items():
        change(one)
        results = []
        for call in (replay, one.call()):
            one.y.copy_(start)
            call()
            context.device.synchronize()
            results.append(one.y.clone())
        if not torch.equal(*results):
            wrong.append(name)
    return verdict(check, wrong, ", ".join(changes()))


def _stack_of(context: Context) -> tuple[HyperNetwork, Callable[[int], Tensor]]:
    shape, net = one_net(context, "smollm2-135m", "bfloat16")
    return net, lambda seed: shape.task_embeddings(8, seed).to(context.device.torch)


@torch.inference_mode()
def generation_graph(context: Context) -> list[tuple[str, dict[str, Any]]]:
    """Trunk and heads into slots, replayed for other descriptions."""
    net, embeddings = _stack_of(context)
    task_emb = embeddings(1).clone()
    call, out = kept(net, task_emb)
    replay, wrong = context.device.capture(call), []
    for seed in (1, 2, 3):
        task_emb.copy_(embeddings(seed))
        replay()
        context.device.synchronize()
        fresh = net.generate(embeddings(seed))
        sides = ((out.lora_A, fresh.lora_A), (out.lora_B, fresh.lora_B))
        if not all(torch.equal(held[name], right[name]) for held, right in sides for name in right):
            wrong.append(f"descriptions {seed}")
    return verdict("graph of generation", wrong, "eight adapters for each of three sets of descriptions")


@torch.inference_mode()
def whole_graph(context: Context) -> list[tuple[str, dict[str, Any]]]:
    """One graph that writes adapters into slots and applies them at once: what is read is what was just written."""
    net, embeddings = _stack_of(context)
    device, task_emb = context.device.torch, embeddings(1).clone()
    call, out = kept(net, task_emb)
    name = next(iter(out.lora_A))
    A, B = (side[name][:, 0] for side in (out.lora_A, out.lora_B))
    x = torch.randn(8, A.shape[2], device=device).bfloat16()
    y = torch.zeros(8, B.shape[1], device=device, dtype=x.dtype)
    bounds, ids = (torch.arange(n, dtype=torch.int32, device=device) for n in (9, 8))

    def both() -> None:
        call()
        ops.lora_add_(y, x, A, B, out.scaling, bounds, ids, 1)

    replay, wrong = context.device.capture(both), []
    for seed in (4, 5):
        task_emb.copy_(embeddings(seed))
        y.zero_()
        replay()
        context.device.synchronize()
        fresh = net.generate(embeddings(seed))
        A_, B_ = (side[name][:, 0] for side in (fresh.lora_A, fresh.lora_B))
        if not torch.equal(y, ops.lora_add_(torch.zeros_like(y), x, A_, B_, fresh.scaling, bounds, ids, 1)):
            wrong.append(f"descriptions {seed}")
    return verdict("graph that generates and applies", wrong, "applied as generated in the same graph")


# --- streams ---------------------------------------------------------------------------------------------------------


def _pair(context: Context, seed: int) -> tuple[Operands, list[Tensor]]:
    """Operands, and what an eager call on the current stream makes of a copy of them."""
    layer = LAYERS["7b"] if context.on_card else LAYERS["tiny"]
    case = Case(layer, rows(0, 1, -1, 2, 3, 3, 1, 0), "")
    ours, other = (cases.operands(case, context.device.torch, seed) for _ in range(2))
    other.grouped()()
    context.device.synchronize()
    return ours, [one.y for one in other.launches]


def _streams(context: Context, count: int) -> list[Any]:
    """Contexts of ``count`` new streams that wait for what came before."""
    if not context.on_card:
        return [contextlib.nullcontext() for _ in range(count)]
    streams = [torch.cuda.Stream() for _ in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    return [torch.cuda.stream(stream) for stream in streams]


def _keep_busy(context: Context) -> None:
    if context.on_card:
        torch.cuda._sleep(BUSY)


def _equal(operands: Operands, right: list[Tensor]) -> bool:
    return all(torch.equal(one.y, y) for one, y in zip(operands.launches, right, strict=True))


@torch.inference_mode()
def other_stream(context: Context) -> list[tuple[str, dict[str, Any]]]:
    """Inputs that a busy stream writes late: a kernel launched on any other stream would read what was there before."""
    ours, right = _pair(context, seed=7)
    inputs = [one.members[0]["x"].clone() for one in ours.launches]
    for one in ours.launches:
        one.members[0]["x"].fill_(float("nan"))
    call = ours.grouped()
    with _streams(context, 1)[0]:
        _keep_busy(context)
        for one, x in zip(ours.launches, inputs, strict=True):
            one.members[0]["x"].copy_(x)
        call()
    context.device.synchronize()
    wrong = [] if _equal(ours, right) else ["a late input"]
    return verdict("another stream", wrong, "inputs that were written late on the same stream")


@torch.inference_mode()
def two_streams(context: Context) -> list[tuple[str, dict[str, Any]]]:
    """Two streams at once, many calls each, on operands of their own."""
    pairs, wrong = [_pair(context, seed) for seed in (8, 9)], []
    starts = [[one.y.clone() for one in ours.launches] for ours, _ in pairs]
    calls, streams = [ours.grouped() for ours, _ in pairs], _streams(context, 2)
    for _ in range(50 if context.on_card else 2):
        for (ours, _), start, call, stream in zip(pairs, starts, calls, streams, strict=True):
            with stream:
                for one, y in zip(ours.launches, start, strict=True):
                    one.y.copy_(y)
                call()
    context.device.synchronize()
    wrong += [f"stream {i}" for i, (ours, right) in enumerate(pairs) if not _equal(ours, right)]
    return verdict("two streams", wrong, "fifty calls on each of two streams at once")


@torch.inference_mode()
def second_device(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    """A call on a device that is not the current one."""
    if not context.on_card or torch.cuda.device_count() < 2:
        raise Skip("one device only")
    ours, right = _pair(context, seed=10)
    case = Case(LAYERS["7b"], rows(0, 1, -1, 2, 3, 3, 1, 0), "")
    there = cases.operands(case, torch.device("cuda", 1), seed=10)
    there.grouped()()
    torch.cuda.synchronize(1)
    wrong = [] if all(torch.equal(a.y.cpu(), y.cpu()) for a, y in zip(there.launches, right, strict=True)) else ["cuda:1"]
    yield from verdict("second device", wrong, "cuda:1 while cuda:0 is current")
