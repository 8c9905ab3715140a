"""What the study of unseen sentences trains and judges, as ``plan.yaml`` says it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from bench import plans

#: Of a run's tasks: ``more`` and ``further``, those of part MORE or FURTHER instead of TRAINED; ``tasks``, how many of them
#: (default: all); ``two_answers``, only those with two different answers.
PLAN, RUNS = plans.read(Path(__file__).with_name("plan.yaml"), ("more", "further", "tasks", "two_answers"))
#: Parts of the result.  Two are tiers of the suite, held out from all decisions; the last is tasks of other origin.
DEVELOPMENT, TRAINED, HELD_OUT, OTHER = "development", "trained", ("sibling", "novel"), "other"
#: No part of the result: the trained tasks and more of tier train; the same with further descriptions.
MORE, FURTHER = "more", "further"
SUITE_PARTS = (TRAINED, DEVELOPMENT, *HELD_OUT)
PARTS = (*SUITE_PARTS, OTHER)
#: The trained tasks that the library has an adapter for, each trained on its task alone: what an adapter can do at all.
STORED = "stored"
#: Where points are lost: splits of those tasks' inputs, and wordings; nothing was trained on the last of each.
SPLITS, WORDINGS = ("train", "val", "test"), ("trained", "held out")
UNSEEN = SPLITS[-1], WORDINGS[-1]
#: Runs: what is judged, and what it is judged beside.
T2L, DESCRIBED, RIVAL, LIBRARY = "t2l", "t2l-described", "multi-task-description", "library"
#: Small runs that change one thing at a time, and what the last of them starts from: a result of their own.
SMALL = ("small", "small-adamw", "small-fast", "small-slow", "reconstruction", "small-warm")
#: T2L's first run with another seed, and the rival with other ranks: a result of their own.
AGAIN, RANKS = "t2l-first-again", ("multi-task-2", "multi-task-8", "multi-task-32")
ROBUSTNESS = (*RANKS, "again-constant", AGAIN)
#: All others.
STUDY = [name for name in RUNS if name not in SMALL + ROBUSTNESS]
#: Runs on the way to T2L that are judged, too, from the description; the one that has had as many tokens as RIVAL.
EARLIER, EVEN = ("t2l-first", "t2l-second", "t2l-third", "t2l-fourth"), "t2l-first"
#: Worked examples of the arms; those without a number show the first.
SHOTS = (3, 6)
OWN_ARMS = ("t2l", "t2l-shuffled", "t2l-examples", "t2l-examples-shuffled")
ARMS = (
    *(*OWN_ARMS, "t2l-examples-6", "t2l-junk", "t2l-constant"),
    *(DESCRIBED, RIVAL, "nearest"),
    *("base", "base-description", "icl", "icl-6"),
)
#: Arms of part STORED.
STORED_ARMS = ("oracle", "t2l", "t2l-examples", RIVAL, "icl")
#: Arm -> the run that it needs beside T2L.
NEEDS = {DESCRIBED: DESCRIBED, RIVAL: RIVAL, "nearest": LIBRARY, "oracle": LIBRARY}


def ordered(names: Iterable[str], key: str) -> list[str]:
    """``names`` by a hash of them and ``key``."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


def drawn(names: Iterable[str], count: int | None, key: str) -> list[str]:
    """The first ``count`` of ``ordered`` (None: all), sorted."""
    return sorted(ordered(names, key)[:count])
