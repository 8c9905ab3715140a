"""Timers and ceilings: what `bench` measures with, and what it measures against.

Candidates are timed beside each other in one process; ceilings are rates that this machine reached in the same run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import multiprocessing
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)

#: Longest call, in us, that is repeated untimed before a sample: beyond, what ran before it is a small part of it.
WARM_BELOW_US = 20_000.0
WARM_CALLS = 3
#: No larger working set is probed, in bytes: its bandwidth is that of memory.
LARGEST_PROBE = 4 << 30


# --- timers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and interquartile range over ``rounds`` samples, and these in the order of the rounds."""

    median_us: float
    iqr_us: float
    rounds: int
    samples: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Of at least two samples in us."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Timing(median, high - low, len(samples), tuple(samples))

    def to_json(self) -> dict[str, float]:
        return {"median_us": round(self.median_us, 3), "iqr_us": round(self.iqr_us, 3), "rounds": self.rounds}


def measure(
    functions: Mapping[Name, Call],
    *,
    rounds: tuple[int, int] = (5, 200),
    seconds: float = 1.0,
    sample_us: float = 2000.0,
    warm_calls: int = WARM_CALLS,
) -> dict[Name, Timing]:
    """Time every function beside the others.

    A round takes one sample of each in turn, beginning with another one every time: a machine whose speed moves, moves for
    all.  A sample is one call, or as many in a row as fill ``sample_us``, divided by their number.  The first round is
    discarded.  Rounds go on for ``seconds``, but are at least ``rounds[0]`` and at most ``rounds[1]``.  The garbage
    collector is off.

    ``warm_calls`` untimed calls come before every sample of a short function, so that it finds in cache what its own last
    calls left there, not what another candidate did (a last-level cache that is filled by evictions needs more than one).
    Functions whose arguments rotate (:class:`Rotation`) need as many as rid the caches of what another candidate wrote,
    which would else be written back on their account: ``Rotation.flush``.

    Raises ValueError for fewer than two rounds.
    """
    least, most = rounds
    if not 2 <= least <= most:
        raise ValueError(f"rounds: expected 2 <= least <= most, got {rounds}")
    sizes = {name: _sample_size(function, sample_us) for name, function in functions.items()}
    samples: dict[Name, list[float]] = {name: [] for name in functions}
    names = list(functions)
    with _no_gc():
        end = math.inf
        for i in range(most + 1):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                calls, estimate_us = sizes[name]
                if estimate_us < WARM_BELOW_US:
                    for _ in range(warm_calls):
                        functions[name]()
                taken = _sample(functions[name], calls)
                if i > 0:
                    samples[name].append(taken / calls)
            if i == 0:
                end = time.perf_counter() + seconds
            elif i >= least and time.perf_counter() >= end:
                break
    return {name: Timing.of(values) for name, values in samples.items()}


def _sample(function: Call, calls: int) -> float:
    """Microseconds that ``calls`` calls in a row take."""
    repeats = itertools.repeat(None, calls)
    start = time.perf_counter_ns()
    for _ in repeats:
        function()
    return (time.perf_counter_ns() - start) / 1e3


def _sample_size(function: Call, sample_us: float) -> tuple[int, float]:
    """Calls a sample, and microseconds a call."""
    function()
    calls = 1
    while (taken := _sample(function, calls)) < sample_us / 2 and calls < 1 << 16:
        calls *= 4
    return max(1, math.ceil(sample_us * calls / taken)), taken / calls


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Rotation:
    """Cold caches: every call, whichever candidate makes it, takes the next of many argument sets.

    ``sets`` that together exceed the last-level cache are out of it when their turn comes again.
    """

    def __init__(self, sets: Sequence[T]):
        self._sets, self._next = list(sets), 0

    @property
    def flush(self) -> int:
        """Calls that go through half of the sets: more than a last-level cache."""
        return (len(self._sets) + 1) // 2

    def bind(self, build: Callable[[T], Call]) -> Call:
        """The candidate that ``build`` makes of one argument set, over all of them."""
        calls = [build(arguments) for arguments in self._sets]

        def call() -> object:
            i = self._next
            self._next = (i + 1) % len(calls)
            return calls[i]()

        return call


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and the kernels that borrow its pool, on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- memory ----------------------------------------------------------------------------------------------------------


def cache_bytes(level: int) -> int | None:
    """All data caches of ``level`` that this process's CPUs have; None where the system does not say (not Linux)."""
    found: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            here = {name: (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")}
            if here["level"] == str(level) and here["type"] != "Instruction":
                number, unit = re.fullmatch(r"(\d+)([KMG]?)", here["size"]).groups()
                found[here["shared_cpu_list"]] = int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]
    return sum(found.values()) or None


def peak_memory(function: Callable[..., T], *arguments: Any) -> tuple[int, T]:
    """Bytes that ``function(*arguments)``, in a process of its own, held at most beyond those held before; its result.

    ``function`` is one of a module, importable by name; what importing it costs is held before.  Linux only (OSError).
    """
    context = multiprocessing.get_context("spawn")  # a fork would share, and not count, what is here already
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, function, arguments).result()


def _peak(function: Callable[..., T], arguments: tuple) -> tuple[int, T]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = function(*arguments)
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1))


# --- ceilings --------------------------------------------------------------------------------------------------------


def gemm_call(dtype: torch.dtype, size: int) -> tuple[Call, int]:
    """``torch.mm`` of two square matrices of ``size``, and its FLOPs."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def _native() -> Any:
    try:
        from t2l_engine import _core
    except ImportError:
        raise RuntimeError("ceilings: t2l_engine._core is not built (pybind11 was absent); run make setup") from None
    return _core


def _together(calls: Sequence[Callable[[], T]]) -> tuple[float, list[T]]:
    """Seconds from the first start to the last end of ``calls``, each on a thread of its own; their results."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> tuple[int, int, T]:
        ready.wait()
        start = time.perf_counter_ns()
        result = call()
        return start, time.perf_counter_ns(), result

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        starts, ends, results = zip(*pool.map(run, calls), strict=True)
    return (max(ends) - min(starts)) / 1e9, list(results)


@dataclasses.dataclass
class Ceilings:
    """The best rates of this machine: measured when first asked for, then kept.

    ``gemm``: GFLOP/s of ``torch.mm`` on squares of ``gemm_size``, by (dtype, threads).  ``fma``: GFLOP/s of multiply-adds
    between registers in the chosen instruction set, likewise.  ``read``, ``copy``: GB/s by (bytes of the working set,
    threads), over disjoint parts; a copy's working set is source and destination, both counted.

    Each is the best of ``best_of`` probes; a probe of bandwidth moves at least ``probe_bytes``.
    """

    gemm_size: int = 2048
    probe_bytes: int = 1 << 28
    best_of: int = 5
    gemm: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    fma: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    read: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    copy: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)

    def gemm_at(self, dtype: str, count: int) -> float:
        """GFLOP/s of matrix products in ``dtype`` on ``count`` threads."""
        if (dtype, count) not in self.gemm:
            with threads(count):
                call, flops = gemm_call(getattr(torch, dtype), self.gemm_size)
                call()
                self.gemm[dtype, count] = flops / 1e3 / min(_sample(call, 1) for _ in range(self.best_of))
        return self.gemm[dtype, count]

    def fma_at(self, dtype: str, count: int) -> float:
        """GFLOP/s of multiply-adds in ``dtype`` on ``count`` threads."""
        if (dtype, count) not in self.fma:
            multiply_adds, iterations = _native().multiply_adds, 1 << 12
            while _sample(functools.partial(multiply_adds, dtype, iterations), 1) < 2_000:
                iterations *= 2
            calls = [functools.partial(multiply_adds, dtype, iterations)] * count
            probes = [_together(calls) for _ in range(self.best_of)]
            self.fma[dtype, count] = max(sum(flops) / seconds / 1e9 for seconds, flops in probes)
        return self.fma[dtype, count]

    def bandwidth_at(self, num_bytes: int, count: int) -> float:
        """GB/s of reading a working set of ``num_bytes`` over and over on ``count`` threads.

        Cached by size in steps of an eighth at most, rounded down, where caches are faster.
        """
        return self._bandwidth("read", num_bytes, count)

    def copy_at(self, num_bytes: int, count: int) -> float:
        """GB/s, read and written, of copying one half of ``num_bytes`` onto the other."""
        return self._bandwidth("copy", num_bytes, count)

    def _bandwidth(self, kind: str, num_bytes: int, count: int) -> float:
        known = getattr(self, kind)
        num_bytes = min(max(num_bytes, 4096 * count), LARGEST_PROBE)
        step = max(4096, 1 << num_bytes.bit_length() - 4)
        key = num_bytes // step * step, count
        if key not in known:
            known[key] = self._probe(kind, *key)
        return known[key]

    def _probe(self, kind: str, num_bytes: int, count: int) -> float:
        native = _native()
        part = num_bytes // count // 128 * 128  # of one thread; whole cache lines, also of its halves
        memory = torch.zeros(part * count + 64, dtype=torch.uint8)  # written: untouched pages would be one page of zeros
        address = -(-memory.data_ptr() // 64) * 64
        repeats = max(1, self.probe_bytes // (part * count))

        def call(i: int) -> Callable[[], None]:
            start = address + i * part
            if kind == "read":
                return lambda: native.read_memory(start, part, repeats)
            return lambda: native.copy_memory(start + part // 2, start, part // 2, repeats)

        calls = [call(i) for i in range(count)]
        _together(calls)
        seconds = min(_together(calls)[0] for _ in range(self.best_of))
        return part * count * repeats / seconds / 1e9

    def survey(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Measure all kinds, bandwidths at ``sizes`` in bytes, on each number of threads of ``counts``."""
        for count in counts:
            for dtype in ("float32", "bfloat16"):
                self.gemm_at(dtype, count)
                self.fma_at(dtype, count)
            for size in sizes:
                self.bandwidth_at(size, count)
                self.copy_at(size, count)

    def again(self) -> Ceilings:
        """Everything known here, measured anew."""
        other = Ceilings(self.gemm_size, self.probe_bytes, self.best_of)
        for known, probe in (
            (self.gemm, other.gemm_at),
            (self.fma, other.fma_at),
            (self.read, other.bandwidth_at),
            (self.copy, other.copy_at),
        ):
            for key in known:
                probe(*key)
        return other

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Lists of {"dtype", "threads", "gflops"} and {"bytes", "threads", "gbps"}."""
        flops, bandwidth = ("dtype", "gflops"), ("bytes", "gbps")
        return {
            kind: [{of: key, "threads": n, unit: round(rate, 3)} for (key, n), rate in sorted(getattr(self, kind).items())]
            for kind, (of, unit) in {"gemm": flops, "fma": flops, "read": bandwidth, "copy": bandwidth}.items()
        }
