"""The study's result file out of its evaluations, runs and analyses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.source import source
from bench.study import analysis, judge, plan
from bench.study.runs import finished
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.training import log, lora
from t2l_engine.research.training.settings import LoRASettings

#: Of an arm's details, what is kept for every group of tasks.
_MEASURES = ("score", "containment", "rouge_l", "prompt_tokens")


def measure(work: Path) -> dict[str, Any]:
    """Everything that docs/results.md shows of the study; evaluations that were made before are read."""
    tree, manifest = source(), manifests.read(plan.MANIFEST)
    room = checked_headroom(work)
    names = room["headroom"]
    seen, unseen, varied = judge.seen(work, names), judge.unseen(work), judge.varied(work, names)
    reconstructed = judge.reconstruction(work)
    siblings = manifest.names("sibling")
    return {
        "suite": "study",
        "command": "python -m bench study --tasks TASKS --benchmarks BENCHMARKS --work WORK",
        **tree,
        "machine": harness.machine(torch.get_num_threads()),
        "versions": harness.versions(),
        "headroom": room,
        "seen": _kept(seen),
        "unseen": _kept(unseen),
        "learned": _kept(judge.learned(work, names)),
        "shipped": {part: _kept(found) for part, found in judge.shipped(work, names).items()},
        "varied": {group: _kept(result) for group, result in varied.items()},
        "lengths": {run: _kept(found) for run, found in judge.lengths(work).items()},
        "runs": {name: _run(name, work) for name in plan.RUNS if finished(name, work)},
        "reconstruction": {key: _kept(result) for key, result in reconstructed.items()},
        "distances": analysis.distances(work),
        "scalings": {s: result["summary"]["all"]["mean"] for s, result in judge.scalings(work).items()},
        "wordings": analysis.wordings(work),
        "maps": analysis.maps(work),
        "steered": analysis.steered(work),
        "requests": analysis.requests(work, siblings),
        "benchmarks": judge.benchmarks(work),
    }


def checked_headroom(work: Path) -> dict[str, Any]:
    """:func:`judge.headroom`; BenchError where oracles of this machine learn other tasks than plan.LEARNABLE."""
    room = judge.headroom(work)
    found, planned = set(room["learnable"]), set(plan.LEARNABLE)
    if found != planned:
        raise harness.BenchError(
            f"plan.LEARNABLE: expected the tasks whose oracles reach {plan.LEAST_ORACLE} % here; "
            f"it lacks {sorted(found - planned)} and has {sorted(planned - found)} beside them"
        )
    return room


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by task and arm; per arm the chosen form and, per group of tasks, means of what else was measured."""
    arms = {}
    for arm, details in result["details"].items():
        tasks = details["tasks"]
        groups = {g: [tasks[n] for n in names if n in tasks] for g, names in result["groups"].items()}
        arms[arm] = {
            "form": result["forms"][arm]["form"],
            "groups": {
                g: {m: round(statistics.fmean(t[m] for t in of if m in t), 2) for m in _MEASURES if any(m in t for t in of)}
                for g, of in groups.items()
                if of
            },
        }
    scores = {name: {arm: round(score, 2) for arm, score in of.items()} for name, of in result["tasks"].items()}
    return {"tasks": scores, "items": result["items"], "groups": result["groups"], "arms": arms}


def _run(name: str, work: Path) -> dict[str, Any]:
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
