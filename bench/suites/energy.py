"""Energy on a GPU by the counter of NVML (nvidia-ml-py): millijoules of a generated adapter and of a decoded token."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from bench.harness import OURS, BenchError, Context, Record, Task, record, verify
from bench.suites import apply, generate
from bench.timing import Call, Candidate, repeated

#: A case is replayed for so long, since the counter moves ten times a second or so; with a wait after so many replays.
SECONDS, REPLAYS = 2.5, 100


def plan(context: Context) -> list[Task]:
    context.only("cuda", "energy")
    joules, most = counter(), 64 if context.full else 2
    kinds = (("generate", generation, 1), ("generate", generation, most), ("decode", decoding, most))
    return [Task.of(f"{name} {count}", run, context, joules, count) for name, run, count in kinds]


def counter() -> Callable[[], float]:
    """Joules that the current card has taken since its driver was loaded; BenchError where nothing counts them."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(card)  # not every card counts
    except ImportError:
        raise BenchError("energy: expected the package nvidia-ml-py, found none") from None
    except nvml.NVMLError as error:
        raise BenchError(f"energy: NVML: {error}") from None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3


def measured(context: Context, joules: Callable[[], float], case: str, unit: str, count: int, calls: list[Call]) -> Record:
    """Energy and mean power while ``calls``, which together make ``count`` of ``unit``, are replayed."""
    run, made = repeated(context.device.capture(Candidate(calls).once), REPLAYS), 0
    before, start = joules(), time.perf_counter()
    while not made or time.perf_counter() - start < SECONDS:
        run()
        context.device.synchronize()
        made += REPLAYS * count
    spent, seconds = joules() - before, time.perf_counter() - start
    return record("energy", case=case, unit=unit, made=made, mj_each=1e3 * spent / made, watts=spent / seconds)


@torch.inference_mode()
def generation(context: Context, joules: Callable[[], float], count: int) -> Iterator[Record]:
    """Adapters for Mistral-7B by variant L, cold: as many copies of the hypernetwork as exceed the caches take turns."""
    shape, net = generate.one_net(context, "mistral-7b", "bfloat16")
    case, _ = generate.described(shape, "bfloat16", count)
    fresh, timed = (shape.task_embeddings(count, seed).to(context.device.torch) for seed in (2, 3))
    verify(case, {OURS: None}, generate.cuda_errors(net, fresh, {}, {}))
    calls = [generate.preallocated(one, timed)[0] for one in generate.copies(context, net)]
    yield measured(context, joules, case, "adapter", len(calls) * count, calls)


@torch.inference_mode()
def decoding(context: Context, joules: Callable[[], float], rows: int) -> Iterator[Record]:
    """Decode steps of a 7B-shaped model without adapters, and with another one in every row."""
    tokens, base, adapted, *_ = apply.Steps.of(context, "q,v", rows, (rows,))
    for number, step in {0: base, **adapted}.items():
        case = f"decode step, {rows} rows, {number} adapters"
        yield measured(context, joules, case, "token", rows, [functools.partial(step, tokens)])
