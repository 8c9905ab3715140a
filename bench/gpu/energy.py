"""Joules, power and clocks of an adapter, or of whatever calls make, while graphs are replayed for seconds."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.gpu import cases, nvml
from bench.gpu.cases import LAYERS, Case, Operands, rows
from bench.gpu.context import Context
from bench.gpu.generation import kept, nets
from bench.gpu.lora import need_kernels
from bench.gpu.nvml import Meter
from bench.gpu.timing import Call, num_sets

#: Seconds of replaying a case: the energy counter of a card moves in steps of a tenth of a second or so.
SECONDS = 2.5
IDLE_SECONDS = 1.0
#: Seconds between two readings of clocks.
EVERY = 0.05
CLOCKS = ("sm_mhz", "memory_mhz")


@dataclasses.dataclass(frozen=True)
class Work:
    """``calls``, which together make ``count`` of ``unit``: what joules are told of, a noun."""

    case: str
    unit: str
    count: int
    calls: Sequence[Call]


def run(context: Context) -> None:
    need_kernels(context, "hypernet_trunk", "hypernet_heads_out_", "lora_add_group_")
    meter = nvml.meter(context)
    context.attempt("idle", lambda: [("energy", idle(context, meter))])
    for count in (1, 8, 64) if context.on_card else (1,):
        work = functools.partial(generating, context, count)
        context.attempt(f"generating {count}", functools.partial(measured, context, meter, work), needs=SECONDS + 5)
    context.attempt("decoding", functools.partial(measured, context, meter, functools.partial(decoding, context)), needs=5.0)


def idle(context: Context, meter: Meter) -> dict[str, Any]:
    """The card with nothing to do."""
    context.device.synchronize()
    before, start = meter.joules(), time.perf_counter()
    time.sleep(IDLE_SECONDS if context.on_card else 0.01)
    spent, taken = meter.joules() - before, time.perf_counter() - start
    known = {"watts": round(spent / taken, 1), "joules": round(spent, 3), "seconds": round(taken, 3)}
    return {"case": "idle", "unit": None, "count": 0, **meter.state(), **known}


def generating(context: Context, count: int) -> Work:
    """Mistral's hypernetwork in bfloat16."""
    shape, copies = nets(context, "mistral-7b" if context.on_card else "tiny", "bfloat16")
    task_emb = shape.task_embeddings(count).to(context.device.torch)
    calls = [kept(net, task_emb)[0] for net in copies]
    return Work(f"generating, {shape.name} L bfloat16, {count} at a time", "adapter", count * len(calls), calls)


def decoding(context: Context) -> Work:
    """One layer's 64 adapters on 64 tokens, cold."""
    case = Case(LAYERS["7b"], rows(*range(64)), "") if context.on_card else Case(LAYERS["tiny"], rows(0, 1), "")
    sets = num_sets(context.device, case.working_set)
    shared = cases.routing(case, context.device.torch)
    made: list[Operands] = [cases.operands(case, context.device.torch, seed, shared) for seed in range(sets)]
    name = f"applying, {case.name}, cold (an adapter: one, to one token, in one layer)"
    return Work(name, "adapter", case.adapters * sets, [one.grouped() for one in made])


@torch.inference_mode()
def measured(context: Context, meter: Meter, make: Callable[[], Work]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Joules, time, mean power and clocks of replaying what ``make`` gives for SECONDS."""
    device, work = context.device, make()
    replay = device.capture(lambda: [call() for call in work.calls])
    us = min(device.elapsed_us(replay, covered=True) for _ in range(3))
    batch, seconds = (max(1, int(EVERY * 1e6 / us)), SECONDS) if context.on_card else (1, 0.02)
    states, passes = [], 0
    device.synchronize()
    before, start = meter.joules(), time.perf_counter()
    while time.perf_counter() - start < seconds or not passes:
        for _ in range(batch):
            replay()
        states.append(meter.state(*CLOCKS))  # while they run
        device.synchronize()
        passes += batch
    spent, taken = meter.joules() - before, time.perf_counter() - start
    known = {key: [s[key] for s in states if s[key] is not None] for key in CLOCKS}
    made = passes * work.count
    yield (
        "energy",
        {
            "case": work.case,
            "unit": work.unit,
            "count": work.count,
            "us_each": round(1e6 * taken / made, 4),
            "mj_each": round(1e3 * spent / made, 5),
            "watts": round(spent / taken, 1),
            "joules": round(spent, 3),
            "seconds": round(taken, 3),
            **{key: round(statistics.fmean(values), 1) for key, values in known.items() if values},
        },
    )
