"""Ceilings: the best rates of this machine or card, measured in the run that is held to them.  Peak memory of a process."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.baselines import copies
from bench.timing import Call, Candidate, Device, elapsed_us, measure, threads
from t2l_engine.text import dtypes

T = TypeVar("T")
Key = tuple[str, Any, int]
#: Kind of a ceiling -> its key in a record, its unit.
KINDS = {"gemm": ("dtype", "gflops"), "read": ("bytes", "gbps"), "copy": ("bytes", "gbps")}
#: No larger working set is probed, in bytes: its bandwidth is that of memory.
LARGEST_PROBE = 4 << 30


@dataclasses.dataclass
class Ceilings(ABC):
    """``rates``, measured when first asked for: by kind (a copy counts source and destination), dtype or bytes, threads."""

    rates: dict[Key, float] = dataclasses.field(default_factory=dict)

    def get(self, *key: Any) -> float:
        if key not in self.rates:
            self.rates[key] = self.probe(*key)
        return self.rates[key]

    @abstractmethod
    def probe(self, kind: str, of: Any, count: int) -> float:
        """The rate, measured now."""

    def gemm_at(self, dtype: str, count: int = 1) -> float:
        """GFLOP/s of matrix products of numbers in ``dtype`` on ``count`` threads."""
        return self.get("gemm", self.fastest(dtype), count)

    def fastest(self, dtype: str) -> str:
        """The dtype in which numbers in ``dtype`` are multiplied the fastest: of bfloat16, perhaps float32."""
        return dtype

    def records(self, when: str, known: Iterable[Key] = ()) -> Iterator[dict[str, Any]]:
        """A record for every rate that is not among ``known``."""
        for kind, of, count in sorted(self.rates.keys() - known, key=str):
            name, unit = KINDS[kind]
            fields = {name: of, "threads": count, unit: round(self.rates[kind, of, count], 3)}
            yield {"record": "ceiling", "when": when, "kind": kind, **fields}

    def load(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take what :meth:`records` gave, before."""
        for entry in records:
            if entry["record"] == "ceiling" and entry["when"] == "before":
                name, unit = KINDS[entry["kind"]]
                self.rates[entry["kind"], entry[name], entry["threads"]] = entry[unit]

    def again(self) -> Ceilings:
        """Everything known here, measured anew."""
        other = dataclasses.replace(self, rates={})
        for key in sorted(self.rates, key=str):
            other.get(*key)
        return other


def gemm_call(dtype: torch.dtype, size: int, device: torch.device | None = None) -> tuple[Call, int]:
    """``torch.mm`` of two square matrices of ``size``, and its FLOPs."""
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(device, dtype) for seed in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def _together(calls: Sequence[Call]) -> float:
    """Seconds from the first start to the last end of ``calls``, each on a thread of its own."""
    ready = threading.Barrier(len(calls))

    def run(call: Call) -> tuple[float, float]:
        ready.wait()
        start = time.perf_counter()
        call()
        return start, time.perf_counter()

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        starts, ends = zip(*pool.map(run, calls), strict=True)
    return max(ends) - min(starts)


@dataclasses.dataclass
class CpuCeilings(Ceilings):
    """The best of ``best_of`` probes: products of squares of ``gemm_size``; reads and copies that move ``probe_bytes``."""

    gemm_size: int = 2048
    probe_bytes: int = 1 << 28
    best_of: int = 5

    def fastest(self, dtype: str) -> str:
        return str(dtypes.preferred()).removeprefix("torch.") if dtype == "bfloat16" else dtype

    def bandwidth_at(self, num_bytes: int, count: int) -> float:
        """GB/s of reading ``num_bytes`` over and over on ``count`` threads; sizes are rounded down by an eighth at most."""
        return self.get("read", _rounded(num_bytes, count), count)

    def copy_at(self, num_bytes: int, count: int) -> float:
        """GB/s, read and written, of copying one half of ``num_bytes`` onto the other."""
        return self.get("copy", _rounded(num_bytes, count), count)

    def probe(self, kind: str, of: Any, count: int) -> float:
        if kind != "gemm":
            return self._bandwidth(kind, of, count)
        with threads(count):
            call, flops = gemm_call(getattr(torch, of), self.gemm_size)
            call()
            return flops / 1e3 / min(elapsed_us(call) for _ in range(self.best_of))

    def _bandwidth(self, kind: str, num_bytes: int, count: int) -> float:
        from t2l_engine import _core

        part = num_bytes // count // 128 * 128  # of one thread; whole cache lines, also of its halves
        memory = torch.zeros(part * count + 64, dtype=torch.uint8)  # written: untouched pages would be one page of zeros
        address = -(-memory.data_ptr() // 64) * 64
        repeats = max(1, self.probe_bytes // (part * count))

        def call(i: int) -> Callable[[], None]:
            start = address + i * part
            if kind == "read":
                return lambda: _core.read_memory(start, part, repeats)
            return lambda: _core.copy_memory(start + part // 2, start, part // 2, repeats)

        calls = [call(i) for i in range(count)]
        _together(calls)
        seconds = min(_together(calls) for _ in range(self.best_of))
        return part * count * repeats / seconds / 1e9

    def survey(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Measure all kinds, bandwidths at ``sizes`` in bytes, on each number of threads of ``counts``."""
        for count in counts:
            for dtype in ("float32", "bfloat16"):
                self.gemm_at(dtype, count)
            for size in sizes:
                self.bandwidth_at(size, count)
                self.copy_at(size, count)


def _rounded(num_bytes: int, count: int) -> int:
    num_bytes = min(max(num_bytes, 4096 * count), LARGEST_PROBE)
    step = max(4096, 1 << num_bytes.bit_length() - 4)
    return num_bytes // step * step


#: Products that are timed: dtype of the operands, rows of the squares, torch's float32_matmul_precision.
GEMMS = {
    "bfloat16": (torch.bfloat16, 8192, "highest"),
    "float32": (torch.float32, 4096, "highest"),
    "tf32": (torch.float32, 8192, "high"),
}
#: TF32 products that make one of float32, as in the kernels.
SPLIT = 3


@dataclasses.dataclass
class CudaCeilings(Ceilings):
    """Of one working set far beyond the caches, by the best of several ways, in ``seconds`` each."""

    device: Device | None = None
    seconds: float = 0.1

    @property
    def _big(self) -> int:
        return 1 << 30 if self.device.on_card else 1 << 20

    def gemm_at(self, dtype: str, count: int = 1) -> float:
        """Of float32, the faster of its own products and of three in TF32."""
        own = self.get("gemm", dtype, 1)
        return max(own, self.get("gemm", "tf32", 1) / SPLIT) if dtype == "float32" else own

    def bandwidth_at(self, num_bytes: int = 0, count: int = 1) -> float:
        """No way to move bytes was faster."""
        return max(self.get("read", self._big, 1), self.get("copy", 2 * self._big, 1))

    def probe(self, kind: str, of: Any, count: int) -> float:
        if kind == "copy":
            return of / self._fastest(copies(self.device, of, 1)) / 1e3
        if kind == "read":
            numbers = torch.randn(of // 4, device=self.device.torch)
            matrix = numbers.view(-1, 4096 if of >= 1 << 26 else 64)
            vector = torch.randn(matrix.shape[1], device=self.device.torch)
            return of / self._fastest({"sum": numbers.sum, "product": lambda: torch.mv(matrix, vector)}) / 1e3
        dtype, n, precision = GEMMS[of]
        call, flops = gemm_call(dtype, n if self.device.on_card else 128, self.device.torch)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return flops / self._fastest({"mm": call}) / 1e3
        finally:
            torch.set_float32_matmul_precision(before)

    def _fastest(self, calls: Mapping[str, Call | Candidate]) -> float:
        """Microseconds."""
        return min(timing.median_us for timing in measure(self.device, calls, seconds=self.seconds).values())

    def survey(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        for dtype in GEMMS:
            self.get("gemm", dtype, 1)
        self.bandwidth_at()
        for size in sizes if self.device.on_card else ():
            self.get("read", size, 1)
            self.get("copy", 2 * size, 1)


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


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` in a process of its own; ``function`` is importable by name."""
    context = multiprocessing.get_context("spawn")  # a fork would share, and not count, what is here already
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(run: Call) -> int:
    """What this process holds at most while it runs.  Linux only (OSError)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    run()
    return resident_bytes("VmHWM")


def resident_bytes(field: str, process: int | str = "self") -> int:
    """Bytes of this process or of the one with a number, now (``VmRSS``) or at most (``VmHWM``); OSError where it ended."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    if found is None:
        raise ProcessLookupError(f"process {process}: no {field}")
    return 1024 * int(found[1])
