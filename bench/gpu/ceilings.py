"""What the card can do, measured in the run that uses it: bandwidth, matrix products, an empty launch."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from bench.gpu.context import Context, Skip
from bench.gpu.nvml import Nvml
from bench.gpu.timing import Candidate, Device, Timing, measure

#: float32 products are float32 products: torch's default, said here because floors depend on it.
DTYPES = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """GB/s and GFLOP/s.  ``read``: the best of summing and of a matrix times a vector; ``copy``: read and written."""

    read_gbps: float
    copy_gbps: float
    gemm_gflops: dict[str, float]

    @property
    def gbps(self) -> float:
        """What floors are made with: no way to move bytes was faster."""
        return max(self.read_gbps, self.copy_gbps)

    def to_json(self) -> dict[str, Any]:
        rates = {dtype: round(rate, 1) for dtype, rate in self.gemm_gflops.items()}
        return {"read_gbps": round(self.read_gbps, 1), "copy_gbps": round(self.copy_gbps, 1), "gemm_gflops": rates}


def probe(device: Device, seconds: float = 0.6) -> Ceilings:
    """The best rates, on working sets far beyond the caches."""
    full = device.kind == "cuda"
    size = 1 << 30 if full else 1 << 20
    bandwidth = memory_timings(device, size, seconds / 2)
    read = size / min(bandwidth[name].median_us for name in ("sum", "matrix times vector")) / 1e3
    copy = 2 * size / bandwidth["copy"].median_us / 1e3
    gemm = {}
    for dtype in DTYPES:
        n = (8192 if dtype == torch.bfloat16 else 4096) if full else 128
        a, b = (torch.randn(n, n, device=device.torch).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = measure(device, {"mm": Candidate([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])}, seconds / 4)["mm"]
        gemm[str(dtype).removeprefix("torch.")] = 2 * n**3 / timing.median_us / 1e3
    return Ceilings(read, copy, gemm)


def begin(context: Context) -> Ceilings:
    """The ceilings of a step, kept with it, and the state of the card while it works."""
    ceilings = probe(context.device)
    info: dict[str, Any] = {"ceilings": ceilings.to_json()}
    if context.on_card:
        info["card"] = _under_load(context.device)
    context.part.set(info=info)
    return ceilings


def _under_load(device: Device) -> dict[str, Any]:
    a, b = (torch.randn(8192, 8192, device=device.torch, dtype=torch.bfloat16) for _ in range(2))
    try:
        card = Nvml()
    except Skip as why:
        return {"nvml": str(why)}
    for _ in range(100):  # some 150 ms, which run while the card is asked
        torch.mm(a, b)
    time.sleep(0.05)
    state = card.state()
    device.synchronize()
    return state


def memory_timings(device: Device, size: int, seconds: float) -> dict[str, Timing]:
    """Summing ``size`` bytes, multiplying them with a vector, copying them with one copy and with one kernel."""
    source = torch.randn(size // 4, device=device.torch)
    matrix = source.view(-1, 4096 if source.numel() >= 1 << 24 else 64)
    vector = torch.randn(matrix.shape[1], device=device.torch)
    target = torch.empty_like(source)
    candidates = {
        "sum": Candidate([lambda: source.sum()]),
        "matrix times vector": Candidate([lambda: torch.mv(matrix, vector)]),
        "copy": Candidate([lambda: target.copy_(source)]),
        "copy kernel": Candidate([lambda: torch.neg(source, out=target)]),
    }
    return measure(device, candidates, seconds)


def run(context: Context) -> None:
    """A survey: bandwidth over the size of the working set, and what a launch costs in a graph."""
    device = context.device

    def ceilings():
        yield "ceilings", {"what": "best", **probe(device).to_json()}

    def bandwidth():
        for exponent in range(22, 32, 1) if context.on_card else (16, 18):
            size = 1 << exponent
            for name, timing in memory_timings(device, size, 0.4).items():
                moved = size * (2 if "copy" in name else 1)
                gbps = round(moved / timing.median_us / 1e3, 1)
                yield "ceilings", {"what": name, "bytes": moved, "gbps": gbps, **timing.to_json()}

    def launches():
        tiny = torch.zeros(1, device=device.torch)
        timing = measure(device, {"launch": Candidate([lambda: tiny.add_(1)])}, 0.3)["launch"]
        yield "ceilings", {"what": "a kernel that does nothing, in a graph", **timing.to_json()}

    context.attempt("ceilings", ceilings)
    context.attempt("launch", launches)
    context.attempt("bandwidth over size", bandwidth)
