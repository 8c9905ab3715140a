"""The records of the study's result file out of its evaluations, runs and analyses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Record, record
from bench.study import analysis, judge, plan
from bench.suites.learn import logged


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations that were made before are read."""
    yield from (room := list(judge.headroom(work)))
    for part, *of, options in judge.parts(work, [one["task"] for one in room if one["headroom"]]):
        yield from judge.part_records(part, judge.evaluate(work, part, *of, **options))
    yield from (_run(name, work) for name in plan.RUNS)
    yield from analysis.distances(work)
    yield from judge.scalings(work)
    yield analysis.wordings(work)
    yield from analysis.maps(work)
    yield from analysis.steered(work)
    yield from analysis.requests(work)
    yield from judge.benchmarks(work)


def _run(name: str, work: Path) -> Record:
    """Settings, tokens and seconds of a run, and its curve: million tokens so far, mean loss of a twentieth of the steps.

    No curve, nor validation losses, of a run in waves, each of other tasks.
    """
    run, waves = plan.RUNS[name], logged(work / name)
    steps = [row for wave in waves for row in wave if "loss" in row]
    bounds = [round(i * len(steps) / 20) for i in range(21)] if len(waves) == 1 else []
    curve, tokens = [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        tokens += sum(row.get("tokens", 0) for row in steps[start:end])  # a reconstruction reads none
        curve.append([round(tokens / 1e6, 3), round(statistics.fmean(row["loss"] for row in steps[start:end]), 4)])
    return record(
        "training",
        run=name,
        settings=run.settings.model_dump(mode="json"),
        tasks=run.count,
        steps=len(steps),
        tokens=sum(row.get("tokens", 0) for row in steps),
        seconds=round(sum(row["seconds"] for row in steps)),
        curve=curve,
        validation=[round(row["val_loss"], 4) for row in waves[0] if "val_loss" in row] if len(waves) == 1 else [],
    )
