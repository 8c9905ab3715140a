"""Rows of the suite: those of :mod:`bench.harness`, with the ratios that are read on a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from bench import harness
from bench.gpu.ceilings import Ceilings
from bench.gpu.context import Context
from bench.gpu.tables import COPY, EAGER, rivals
from bench.gpu.timing import Candidate, Device, Timing
from bench.harness import OURS, Bar, Error


def copies(device: Device, num_bytes: int, sets: int) -> dict[str, Candidate]:
    """Moving ``num_bytes``, half read and half written, as often as there are ``sets``: by a copy, and by a kernel."""
    count = max(64, num_bytes // 8 // 64 * 64)  # int32; whole lines
    own = torch.Generator(device.torch).manual_seed(0)  # torch's own one is of no use after a capture that failed
    source = torch.randint(1 << 30, (sets, count), dtype=torch.int32, device=device.torch, generator=own)
    target = torch.empty_like(source)
    pairs = list(zip(source, target, strict=True))
    return {
        f"{COPY} by copy": Candidate([lambda a=a, b=b: b.copy_(a) for a, b in pairs]),
        f"{COPY} by kernel": Candidate([lambda a=a, b=b: torch.bitwise_not(a, out=b) for a, b in pairs]),
    }


def with_best_copy(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """``timings`` with the faster of :func:`copies` alone, under the name COPY."""
    ways = {name: timing for name, timing in timings.items() if name.startswith(f"{COPY} by ")}
    best = min(ways, key=lambda name: ways[name].median_us)
    others = {name: timing for name, timing in timings.items() if name not in ways}
    return others | {COPY: dataclasses.replace(ways[best], note=best.removeprefix(f"{COPY} "))}


def floor(ceilings: Ceilings, flops: int, num_bytes: int, dtype: torch.dtype) -> dict[str, Any]:
    """The least time by the rates of this run."""
    return harness.floor(flops, num_bytes, ceilings.gflops(dtype), ceilings.gbps)


def expected(group: str, case: str, cache: str, bar: Bar) -> dict[str, Any]:
    """An entry of "expected": a bar that a whole run has a row for."""
    return {"group": group, "case": case, "cache": cache, **dataclasses.asdict(bar)}


def row(
    context: Context,
    case: str,
    group: str,
    shape: dict[str, Any],
    timings: Mapping[str, Timing],
    error: Error,
    *,
    cache: str | None,
    absent: Mapping[str, str],
    least: dict[str, Any] | None = None,
    bar: Bar | None = None,
    unit_us: float | None = None,
) -> tuple[str, dict[str, Any]]:
    """An entry of "rows".  ``bar`` and ``unit_us`` as in :func:`bench.harness.row`; off a card there is no bar.

    ``floor_ratio``, ``copy_ratio``: the time over the floor and over a copy of the same bytes.  ``lost``: what is faster, on
    a card.  A rival that was called from the host is compared with ours called from the host (EAGER), which is timed where
    there is one.
    """
    bar = bar if context.on_card else None
    made = harness.row(
        case, group, shape, 1, timings, error, cache=cache, absent=absent, least=least, bar=bar, unit_us=unit_us
    )
    ours, from_host = timings[OURS].median_us, timings.get(EAGER, timings[OURS]).median_us
    made["floor_ratio"] = round(ours / least["us"], 4) if least and least["us"] else None
    made["copy_ratio"] = round(ours / timings[COPY].median_us, 4) if COPY in timings else None
    alike = {name: ours if timings[name].graph else from_host for name in rivals(timings)}
    for name, us in alike.items():
        made["baselines"][name]["speedup"] = round(timings[name].median_us / us, 4)
    made["lost"] = [name for name, us in alike.items() if context.on_card and timings[name].median_us < us]
    return "rows", made
