"""What both suites share: verify, then time, then a row of the result file; and the file around the rows.

A row that could flatter is not written: ours is held to its bound on fresh inputs before anything is timed, baselines are
verified against the same oracle, floors come from ceilings of the same run, and what cannot run says why.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import t2l_engine
from bench.source import source
from bench.timing import WARM_CALLS, Call, Ceilings, Name, Timing, cache_bytes, measure, threads
from t2l_engine.ops import native
from t2l_engine.testing import numerics

OURS = "ours"


class BenchError(RuntimeError):
    """What a caller can understand and mend: the message says it."""


class VerificationError(BenchError):
    """Ours does not compute what it should; it was not timed."""


class Error(NamedTuple):
    """An error against the float64 oracle, and what numerics.py allows."""

    value: float
    bound: float
    measure: str = "relative Frobenius against float64"

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def worst(errors: Iterable[Error]) -> Error:
    """The one nearest to its bound, or farthest beyond; NaN is beyond any."""
    return max(errors, key=lambda e: float("inf") if e.value != e.value else e.value / e.bound)


def logits_error(got: Tensor, exact: Tensor, other: Tensor) -> Error:
    """Relative to the float64 logits; ``other``: those of another way to call the model in the dtype of ``got``.

    In float32 two ways to call one model differ by torch's own products, which round by shape and alignment.
    """
    called_otherwise = numerics.EMBEDDING_FROBENIUS if got.dtype == torch.float32 else 0.0
    bound = numerics.logits_bound(exact, other) / float(exact.norm()) + called_otherwise
    return Error(numerics.relative_frobenius(got, exact), bound, "logits, relative Frobenius against float64")


def admit(case: str, functions: Mapping[str, Call], errors: Mapping[str, Error]) -> tuple[dict[str, Call], dict[str, str]]:
    """The candidates that may be timed, and for the others why not.

    Raises VerificationError where ours is beyond its bound.  Baselines, which sum and round in other places, may reach
    ERROR_RATIO times the bound.
    """
    admitted, absent = {}, {}
    for name, function in functions.items():
        error = errors[name]
        if error.value <= error.bound * (1 if name == OURS else numerics.ERROR_RATIO):
            admitted[name] = function
        elif name == OURS:
            raise VerificationError(f"{case}: error {error.value:.3g} beyond {error.bound:.3g}: {error.measure}")
        else:
            absent[name] = f"wrong: error {error.value:.3g} where {error.bound:.3g} is allowed"
    return admitted, absent


@dataclasses.dataclass(frozen=True)
class Context:
    """A run.  ``seconds`` a case; ``rounds``: least and most; ``rotated``: bytes that cold cases go through."""

    size: str
    threads: int
    ceilings: Ceilings
    rounds: tuple[int, int]
    seconds: float
    rotated: int

    @staticmethod
    def of(size: str, count: int) -> Context:
        last_level = cache_bytes(3) or cache_bytes(2) or 32 << 20
        if size == "tiny":
            ceilings = Ceilings(gemm_size=512, probe_bytes=1 << 24, best_of=2)
            return Context(size, count, ceilings, (3, 20), 0.05, min(3 * last_level, 64 << 20))
        return Context(size, count, Ceilings(), (4, 300), 1.0, 3 * last_level)

    @property
    def full(self) -> bool:
        return self.size == "full"

    @property
    def thread_counts(self) -> list[int]:
        """One, and all."""
        return sorted({1, self.threads})

    def time(
        self, functions: Mapping[Name, Call], count: int, *, warm_calls: int = WARM_CALLS, factor: float = 1
    ) -> dict[Name, Timing]:
        """:func:`bench.timing.measure` on ``count`` threads; ``factor``: times the usual seconds."""
        with threads(count):
            return measure(functions, rounds=self.rounds, seconds=factor * self.seconds, warm_calls=warm_calls)


def floor(flops: int, num_bytes: int, gflops: float, gbps: float) -> dict[str, Any]:
    """The least time at these rates: that of the operations or that of the bytes, whichever is larger."""
    by = {"flops": flops / gflops / 1e3, "bytes": num_bytes / gbps / 1e3}
    name = max(by, key=by.get)
    rates = {"gflops": round(gflops, 3), "gbps": round(gbps, 3)}
    return {"us": round(by[name], 3), "by": name, "flops": flops, "bytes": num_bytes, **rates}


@dataclasses.dataclass(frozen=True)
class Bar:
    """``ratio`` times the floor, or the baseline or row that ``of`` names, plus ``plus_us``."""

    ratio: float
    of: str = "floor"
    plus_us: float = 0.0

    def to_json(self, ours_us: float, unit_us: float) -> dict[str, Any]:
        plus = {"plus_us": self.plus_us} if self.plus_us else {}
        return {"ratio": self.ratio, **plus, "of": self.of, "met": ours_us <= self.ratio * unit_us + self.plus_us}


def row(
    case: str,
    group: str,
    shape: dict[str, Any],
    count: int,
    timings: Mapping[str, Timing],
    error: Error,
    *,
    cache: str | None = None,
    absent: Mapping[str, str] | None = None,
    least: dict[str, Any] | None = None,
    bar: Bar | None = None,
    unit_us: float | None = None,
    peak_gflops: float | None = None,
) -> dict[str, Any]:
    """A row of the file.  ``timings`` holds OURS and the baselines; ``least``: the floor.

    ``unit_us``: what the bar's ratio refers to where that is not the floor.  ``peak_gflops``: of register multiply-adds:
    ``fma_ratio`` is the time over what they would need, since the products that make a floor are slow on some CPUs.
    """
    ours = timings[OURS]
    unit = unit_us if unit_us is not None else least["us"] if least else None
    others = {name: timing for name, timing in timings.items() if name != OURS}
    baselines = {name: {**t.to_json(), "speedup": round(t.median_us / ours.median_us, 4)} for name, t in others.items()}
    made = {
        "case": case,
        "group": group,
        "shape": shape,
        "threads": count,
        "cache": cache,
        "ours": ours.to_json(),
        "floor": least,
        "ratio": None if unit is None else round(ours.median_us / unit, 4),
        "bar": None if bar is None else bar.to_json(ours.median_us, unit),
        "baselines": baselines | {name: {"absent": why} for name, why in (absent or {}).items()},
        "error": error.to_json(),
    }
    if peak_gflops is not None:
        made["fma_ratio"] = round(ours.median_us / (least["flops"] / peak_gflops / 1e3), 4)
    return made


# --- the run ---------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A share of a suite.  ``run`` gives (list of the file, entry): ("rows", row), ("memory", ...), ..."""

    name: str
    run: Callable[[], Iterable[tuple[str, dict[str, Any]]]]


#: A task wrapped for display: called with all tasks, gives them one by one.
Progress = Callable[[Sequence[Task]], Iterable[Task]]


def run(
    suite: str,
    plan: Callable[[Context], Sequence[Task]],
    *,
    size: str,
    count: int,
    command: str,
    only: str = "",
    progress: Progress = iter,
) -> dict[str, Any]:
    """The result of a suite; ``only``: tasks whose name contains it.  Raises BenchError where that leaves none."""
    context = Context.of(size, count)
    tasks = [task for task in plan(context) if only in task.name]
    if not tasks:
        names = ", ".join(task.name for task in plan(context))
        raise BenchError(f"only: expected part of one of these names: {names}; got {only!r}")
    tree = source()  # of what is about to be measured
    with threads(count):
        sizes = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, context.rotated]
        context.ceilings.survey(sizes, context.thread_counts)
        lists: dict[str, list] = {"rows": []}
        for task in progress(tasks):
            for name, entry in task.run():
                lists.setdefault(name, []).append(entry)
        after = context.ceilings.again()
    return {
        "suite": suite,
        "size": size,
        "command": command,
        **tree,
        "machine": machine(count),
        "versions": versions(),
        "ceilings": {"before": context.ceilings.to_json(), "after": after.to_json()},
        **lists,
    }


def machine(count: int) -> dict[str, Any]:
    """The machine and ``count``, the threads used, for a result file."""
    l2, l3 = (None if b is None else b / 2**20 for b in map(cache_bytes, (2, 3)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about = native.about()
    isa = about["instruction_sets"]["chosen"] if about else "reference"
    machine = {"cpu": _cpu(), "cores": cores, "threads": count, "isa": isa, "memory_gib": round(memory, 1)}
    return {**machine, "l2_mib": l2, "l3_mib": l3}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of what a result depends on; None where it is not installed."""
    about = native.about()

    def installed(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "t2l_engine": t2l_engine.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "compiler": about and about["build"]["compiler"],
        "peft": installed("peft"),
        "transformers": installed("transformers"),
    }
