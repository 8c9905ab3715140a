"""What the study trains, as ``plan.yaml`` says it: names, settings and tasks of its runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bench import plans

#: ``tier`` of a run's tasks (default: train) and how many of them ``tasks`` are, "learnable", or null for all.
_PLAN, RUNS = plans.read(Path(__file__).with_name("plan.yaml"), ("tier", "tasks"))
MANIFEST, MODEL = _PLAN["manifest"], _PLAN["model"]
SHORT_ANSWER, LEAST_ORACLE = _PLAN["short_answer"], _PLAN["least_oracle"]
LEARNABLE, COUNTS, LENGTHS = (tuple(_PLAN[name]) for name in ("learnable", "counts", "lengths"))


def count(run: plans.Run) -> int | None:
    """How many tasks ``run`` trains on; None: all of its tier."""
    found = run.other.get("tasks")
    return len(LEARNABLE) if found == "learnable" else found


def chosen(names: Sequence[str], count: int | None) -> list[str]:
    """``count`` of the tasks ``names``, those of LEARNABLE first, then by hash: 16 are among the 32, and so on."""
    ordered = sorted(names, key=lambda name: (name not in LEARNABLE, hashlib.sha256(name.encode()).digest()))
    return sorted(ordered[:count])
