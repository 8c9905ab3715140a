"""The study: T2L on SmolLM2 beside what a user would do instead, with controls.  ``python -m bench study``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Record


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations that were made before are read."""
    from bench import judging, training  # here: tables and figures read names of this package without them
    from bench.study import analysis, judge, plan

    yield from (room := list(judge.headroom(work)))
    for part, *of, options in judge.parts(work, [one["task"] for one in room if one["headroom"]]):
        yield from judging.part_records(part, judge.evaluate(work, part, *of, **options))
    for name, run in plan.RUNS.items():
        yield training.trained(name, run, work / name, plan.count(run))
    yield from analysis.distances(work)
    yield from judge.scalings(work)
    yield analysis.wordings(work)
    yield from analysis.maps(work)
    yield from analysis.steered(work)
    yield from analysis.requests(work)
    yield from judge.benchmarks(work)
