"""Scores of the bundled checkpoints: means over tasks, differences with 95 % bootstrap intervals, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from bench.quality.plan import SECOND, T2L
from bench.report.data import Data
from bench.report.tables import Line, derived
from t2l_engine.research.evaluation.metrics import Interval, by_family, interval
from t2l_engine.research.tasks.folder import family_of

#: Heading -> part of the records of ``quality``.
SPLITS = {
    "trained tasks": "trained",
    "development tasks": "development",
    "new value": "value",
    "new combination": "combination",
    "out-of-family": "out-of-family",
    "natural tasks": "natural",
}
#: The split by tasks with more than two different answers, of which a guess is seldom right.
NOT_BINARY = "out-of-family, excluding binary labels"
#: Method -> its name in the records of ``quality``.
METHODS = {
    "T2L": "t2l",
    "T2L, description and 3 examples": "t2l-examples",
    "T2L, another description of the same family": "t2l-same-family",
    "shuffled-description baseline": "t2l-shuffled",
    "T2L, second seed": "t2l-second",
    "second seed, another description of the same family": "t2l-second-same-family",
    "second seed, shuffled-description baseline": "t2l-second-shuffled",
    "network of the paper, one vector": "paper",
    "multi-task LoRA, description in the prompt": "multi-task-description",
    "base model, description in the prompt": "base-description",
    "base model, description and 3 examples": "icl",
    "base model, description and 6 examples": "icl-6",
}

#: Task -> method, as it is stored -> exact match in percent.
Scores = Mapping[str, Mapping[str, float]]


def scores(data: Data, part: str) -> Scores:
    """Scores of one part by task."""
    return {of["task"]: of["scores"] for of in data.records("quality", "scores", part=part)}


def parts(data: Data) -> dict[str, Scores]:
    """Scores of the splits that were judged."""
    there = {of["part"] for of in data.records("quality", "scores")}
    found = {name: scores(data, part) for name, part in SPLITS.items() if part in there}
    if "out-of-family" in found:
        found[NOT_BINARY] = by_answers(data, "out-of-family")[1]
    return found


def by_answers(data: Data, split: str) -> tuple[Scores, Scores]:
    """The scores of a split: of tasks with two different answers, of which a guess is often right, and of the others."""
    (record,) = data.records("quality", "two_answers", part=SPLITS[split])
    found, two = scores(data, SPLITS[split]), {*record["tasks"]}
    return {task: found[task] for task in found if task in two}, {task: found[task] for task in found if task not in two}


def mean(found: Scores, method: str) -> float | None:
    """Mean over the tasks that ``method`` answered; None where there is none."""
    return statistics.fmean(values) if (values := [of[method] for of in found.values() if method in of]) else None


def gap(found: Scores, ours: str, theirs: str) -> Interval | None:
    """Difference in points over the tasks that both answered, with an interval over families, whose tasks are alike."""
    values = {task: of[ours] - of[theirs] for task, of in found.items() if ours in of and theirs in of}
    return interval(*by_family(values)) if values else None


def tokens(data: Data, run: str) -> float:
    """Million tokens that ``run`` was trained on."""
    (of,) = data.records("quality", "training", run=run)
    return of["tokens"] / 1e6


@derived("quality", "Exact match of smollm2-135m and other methods, %, means over tasks")
def quality(data: Data) -> list[Line]:
    lines, found = [], parts(data)
    for method, key in METHODS.items():
        means = {name: mean(of, key) for name, of in found.items()}
        if any(value is not None for value in means.values()):
            lines.append({"method": method, **means})
    return lines


def _less(data: Data, ours: str, head: str) -> list[Line]:
    """Differences between the method ``ours`` and others, of T2L's runs only its own controls."""
    found, lines = parts(data), []
    for method, key in METHODS.items():
        run = next((name for name in (SECOND, T2L) if key.startswith(name)), ours)
        if run == ours != key:
            lines.append({head: method, **{name: gap(of, ours, key) for name, of in found.items()}})
    return [line for line in lines if any(isinstance(of, Interval) for of in line.values())]


@derived("gaps", "Exact match of smollm2-135m less that of other methods, points, 95 % intervals over families")
def gaps(data: Data) -> list[Line]:
    return _less(data, T2L, "T2L less")


@derived("gaps-second", "Exact match of T2L's second seed less that of other methods, points, 95 % intervals over families")
def second_gaps(data: Data) -> list[Line]:
    return _less(data, SECOND, "second seed less")


@derived("families", "Exact match of smollm2-135m by family of tasks, %")
def families(data: Data) -> list[Line]:
    shown = [name for name, key in METHODS.items() if key in ("t2l", "t2l-same-family", "multi-task-description", "icl")]
    lines = []
    for name, found in parts(data).items():
        of_family: dict[str, dict[str, Mapping[str, float]]] = {}
        for task, of in found.items():
            of_family.setdefault(family_of(task), {})[task] = of
        for family, tasks in sorted(of_family.items()):
            means = {method: mean(tasks, METHODS[method]) for method in shown}
            lines.append({"split": name, "family": family, "tasks": len(tasks), **means})
    return lines
