"""What the study of unseen sentences trains and judges, as ``plan.yaml`` says it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from bench import plans

#: ``tasks`` of a run: how many of the trained ones (default: all).
PLAN, RUNS = plans.read(Path(__file__).with_name("plan.yaml"), ("tasks",))
#: Parts of the result.  The last two are tiers of the suite, held out from all decisions.
DEVELOPMENT, TRAINED, HELD_OUT = "development", "trained", ("sibling", "novel")
PARTS = (TRAINED, DEVELOPMENT, *HELD_OUT)
#: Runs: what is judged, and what it is judged beside.
T2L, RIVAL, LIBRARY = "t2l", "multi-task-description", "library"
OWN_ARMS = ("t2l", "t2l-shuffled", "t2l-examples", "t2l-examples-shuffled")
ARMS = (*OWN_ARMS, "t2l-junk", "t2l-constant", RIVAL, "nearest", "base", "base-description", "icl")
#: Arm -> the run that it needs beside T2L.
NEEDS = {RIVAL: RIVAL, "nearest": LIBRARY}


def ordered(names: Iterable[str], key: str) -> list[str]:
    """``names`` by a hash of them and ``key``."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


def drawn(names: Iterable[str], count: int | None, key: str) -> list[str]:
    """The first ``count`` of ``ordered`` (None: all), sorted."""
    return sorted(ordered(names, key)[:count])
