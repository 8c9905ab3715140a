"""Every suite at size tiny: that all of it runs and verifies, and that no ratio to a baseline is out of all proportion.

Never times: another machine has others, and much the same ratios.  Regressions are found by ``python -m bench compare``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from bench.harness import OURS, Record
from bench.source import ROOT

SUITES = ("generate", "apply", "icl", "train")
FILE = ROOT / "bench" / "results" / "gate.json"
#: Instruction sets, caches and torch's products differ between CPUs (its float32 product by two); small shapes are noisy.
SLACK = 3.0

Ratios = dict[str, float]


def ratios(suite: str, records: Iterable[Record]) -> Ratios:
    """Of every row with baselines: its time over that of the best one, which took turns with it.

    Rooflines are left out: at these sizes the bandwidth that makes them moves more than any change that matters.
    """
    found: Ratios = {}
    for row in records:
        if row["record"] == "row" and len(row["times"]) > 1:
            times = {name: timing["median_us"] for name, timing in row["times"].items()}
            ours, threads = times.pop(OURS), "1 thread" if row["threads"] == 1 else "all threads"
            name = ", ".join(filter(None, [row["case"], row["cache"], threads]))
            found[f"{suite}: {name}"] = float(f"{ours / min(times.values()):.3g}")
    return found


def faults(measured: Ratios, known: Mapping[str, float], slack: float) -> list[str]:
    """A line for every fault: a ratio beyond ``slack`` times the known one, a row that only one side has."""
    found = [f"{row}: committed, but not measured" for row in sorted(known.keys() - measured.keys())]
    for row, ratio in measured.items():
        if row not in known:
            found.append(f"{row}: measured, but not committed; look at it, then python -m bench gate --update")
        elif not ratio <= slack * known[row]:
            limit = f"{slack * known[row]:.3g} x the best baseline ({slack:g} x the committed ratio)"
            found.append(f"{row}: expected at most {limit}, got {ratio}")
    return found


def committed() -> Ratios:
    return json.loads(FILE.read_text(encoding="utf-8"))


def commit(found: Ratios) -> None:
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
