"""Ratios of a small run to its baselines, beside committed ones.

Never times: another machine has others, and much the same ratios.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bench.harness import BenchError
from bench.source import ROOT

SUITES = ("generate", "apply", "icl", "train")
FILE = ROOT / "bench" / "results" / "gate.json"
#: Instruction sets, caches and torch's products differ between CPUs (its float32 product by two); small shapes are noisy.
SLACK = 3.0

Ratios = dict[str, float]


def name(row: Mapping[str, Any], all_threads: bool = True) -> str:
    """A row by case, cache and threads; with ``all_threads`` not by their number."""
    count = row["threads"]
    threads = "1 thread" if count == 1 else "all threads" if all_threads else f"{count} threads"
    return ", ".join(filter(None, [row["case"], row["cache"], threads]))


def ratios(results: Iterable[Mapping[str, Any]]) -> Ratios:
    """Of every row with baselines: its time over that of the best one, which took turns with it.

    Floors are left out: at these sizes the bandwidth that makes them moves more than any change that matters.
    """
    found: Ratios = {}
    for result in results:
        for row in result["rows"]:
            ours = row["ours"]["median_us"]
            times = [b["median_us"] for b in row["baselines"].values() if "median_us" in b]
            if times:
                found[f"{result['suite']}: {name(row)}"] = float(f"{ours / min(times):.3g}")
    return found


def committed() -> Ratios:
    """What :data:`FILE` holds; BenchError where there is none."""
    if not FILE.is_file():
        raise BenchError(f"{FILE.relative_to(ROOT)}: no such file; make it with python -m bench gate --update")
    return json.loads(FILE.read_text(encoding="utf-8"))


def compare(measured: Ratios, known: Ratios, slack: float) -> list[str]:
    """A line for every fault: a ratio beyond ``slack`` times the known one, a row that only one side has."""
    faults = [f"{row}: committed, but not measured" for row in sorted(known.keys() - measured.keys())]
    for row, ratio in measured.items():
        if row not in known:
            faults.append(f"{row}: measured, but not committed; look at it, then python -m bench gate --update")
        elif not ratio <= slack * known[row]:
            limit = f"{slack * known[row]:.3g} x the best baseline ({slack:g} x the committed ratio)"
            faults.append(f"{row}: expected at most {limit}, got {ratio}")
    return faults
