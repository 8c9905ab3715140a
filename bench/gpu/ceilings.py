"""What the card can do, measured in the run that uses it: bandwidth, matrix products, an empty launch."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from bench.gpu.context import Context, Skip
from bench.gpu.nvml import Nvml
from bench.gpu.timing import Candidate, Device, Timing, measure

#: Products that are timed: dtype of the operands, rows of the squares on a card, torch's float32_matmul_precision.
GEMMS = {
    "bfloat16": (torch.bfloat16, 8192, "highest"),
    "float32": (torch.float32, 4096, "highest"),
    "tf32": (torch.float32, 8192, "high"),
}
#: TF32 products that make one of float32, as in the kernels.
SPLIT = 3


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """GB/s and GFLOP/s (by the names of GEMMS).

    ``read``: the best of summing and of a matrix times a vector; ``copy``: read and written, by the faster of a copy and a
    kernel.
    """

    read_gbps: float
    copy_gbps: float
    gemm_gflops: dict[str, float]

    @property
    def gbps(self) -> float:
        """What floors are made with: no way to move bytes was faster."""
        return max(self.read_gbps, self.copy_gbps)

    def gflops(self, dtype: torch.dtype) -> float:
        """What floors are made with: of float32, the faster of its own products and of three in TF32."""
        if dtype == torch.float32:
            return max(self.gemm_gflops["float32"], self.gemm_gflops["tf32"] / SPLIT)
        return self.gemm_gflops[str(dtype).removeprefix("torch.")]

    def to_json(self) -> dict[str, Any]:
        rates = {dtype: round(rate, 1) for dtype, rate in self.gemm_gflops.items()}
        return {"read_gbps": round(self.read_gbps, 1), "copy_gbps": round(self.copy_gbps, 1), "gemm_gflops": rates}


def probe(device: Device, seconds: float = 0.6) -> Ceilings:
    """The best rates, on working sets far beyond the caches."""
    size = 1 << 30 if device.on_card else 1 << 20
    bandwidth = memory_timings(device, size, seconds / 2)
    read = size / min(bandwidth[name].median_us for name in ("sum", "matrix times vector")) / 1e3
    copy = 2 * size / min(bandwidth[name].median_us for name in ("copy", "copy kernel")) / 1e3
    gemm = {name: _gemm(device, *how, seconds / 6) for name, how in GEMMS.items()}
    return Ceilings(read, copy, gemm)


def _gemm(device: Device, dtype: torch.dtype, n: int, precision: str, seconds: float) -> float:
    """GFLOP/s of squares of ``n``."""
    n = n if device.on_card else 128
    a, b = (torch.randn(n, n, device=device.torch).to(dtype) for _ in range(2))
    out, before = torch.empty_like(a), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        timing = measure(device, {"mm": Candidate([lambda: torch.mm(a, b, out=out)])}, seconds)["mm"]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / timing.median_us / 1e3


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
