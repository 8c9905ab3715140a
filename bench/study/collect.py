"""The records of the study's result file out of its evaluations, runs and analyses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.harness import BenchError, Record, record
from bench.study import analysis, judge, plan
from bench.study.runs import finished
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.training import log, lora
from t2l_engine.research.training.settings import LoRASettings

#: Of an arm's details, what is kept for every group of tasks.
_MEASURES = ("score", "containment", "rouge_l", "prompt_tokens")


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations that were made before are read."""
    room = checked_headroom(work)
    for task, scores in room["tasks"].items():
        yield record("headroom", task=task, scores=scores, **{of: task in room[of] for of in ("learnable", "headroom")})
    for part, found in judge.parts(work, room["headroom"]):
        yield from _part(part, found)
    for name in plan.RUNS:
        if finished(name, work):
            yield record("training", run=name, **_run(name, work))
    yield from (record("distance", **found) for found in analysis.distances(work))
    for scaling, found in judge.scalings(work).items():
        yield record("scaling", scaling=scaling, scores=found["summary"]["all"]["mean"])
    yield record("wordings", **analysis.wordings(work))
    yield from (record(kind, **found) for kind, found in analysis.maps(work))
    yield from (record("steered", **found) for found in analysis.steered(work))
    siblings = manifests.read(plan.MANIFEST).names("sibling")
    yield from (record("request", **found) for found in analysis.requests(work, siblings))
    yield from (record("benchmark", **found) for found in judge.benchmarks(work))


def checked_headroom(work: Path) -> dict[str, Any]:
    """:func:`judge.headroom`; BenchError where oracles of this machine learn other tasks than plan.LEARNABLE."""
    room = judge.headroom(work)
    found, planned = set(room["learnable"]), set(plan.LEARNABLE)
    if found != planned:
        raise BenchError(
            f"plan.LEARNABLE: expected the tasks whose oracles reach {plan.LEAST_ORACLE} % here; "
            f"it lacks {sorted(found - planned)} and has {sorted(planned - found)} in excess"
        )
    return room


def _part(part: str, result: Mapping[str, Any]) -> Iterator[Record]:
    """Scores a task; per arm its prompt template and, per group of tasks, means of what else was measured."""
    for task, scores in result["tasks"].items():
        groups = [group for group, names in result["groups"].items() if task in names]
        scores = {arm: round(score, 2) for arm, score in scores.items()}
        yield record("scores", part=part, task=task, items=result["items"][task], groups=groups, scores=scores)
    for arm, details in result["details"].items():
        groups = {}
        for group, names in result["groups"].items():
            if of := [details["tasks"][name] for name in names if name in details["tasks"]]:
                means = {m: [task[m] for task in of if m in task] for m in _MEASURES}
                groups[group] = {m: round(statistics.fmean(values), 2) for m, values in means.items() if values}
        yield record("arm", part=part, arm=arm, form=result["forms"][arm]["form"], groups=groups)


def _run(name: str, work: Path) -> Record:
    """Settings, tokens and seconds of a run, and its curve: million tokens so far, mean loss of a twentieth of the steps."""
    settings = plan.RUNS[name].settings
    folders = [work / name]
    if isinstance(settings, LoRASettings):
        folders = sorted((work / name / lora.WAVES).iterdir())
    rows = [row for folder in folders for row in log.read_log(folder)]
    steps = [row for row in rows if "loss" in row]
    curve, tokens = [], 0
    for part in _parts(steps, 20) if len(folders) == 1 else ():
        tokens += sum(row.get("tokens", 0) for row in part)  # a reconstruction reads none
        curve.append([round(tokens / 1e6, 3), round(statistics.fmean(row["loss"] for row in part), 4)])
    return {
        "settings": settings.model_dump(mode="json"),
        "tasks": len(plan.LEARNABLE) if plan.RUNS[name].learnable else plan.RUNS[name].count,
        "steps": len(steps),
        "tokens": sum(row.get("tokens", 0) for row in steps),
        "seconds": round(sum(row["seconds"] for row in steps)),
        "curve": curve,
        "validation": [round(row["val_loss"], 4) for row in rows if "val_loss" in row] if len(folders) == 1 else [],
    }


def _parts(rows: list[Any], count: int) -> list[list[Any]]:
    """``rows`` in at most ``count`` parts of about the same length, in order."""
    bounds = [round(i * len(rows) / count) for i in range(count + 1)]
    return [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
