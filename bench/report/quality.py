"""Scores of the bundled checkpoints: means over tasks, differences with 95 % bootstrap intervals, and their tables.

Stored records keep older names; ``SPLITS``, ``METHODS`` and ``SKILLS_METHODS`` map them to the words of the pages.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.report.data import Data
from bench.report.tables import Line, derived
from t2l_engine.research.evaluation.metrics import Interval, by_family, interval

#: Split -> part of the records of ``specs``.
SPLITS = {"trained tasks": "trained", "development tasks": "development", "in-family": "sibling", "out-of-family": "novel"}
#: Tasks that no code made, of which nothing was trained on: a result of its own.
OTHER = "other origin"
#: Out-of-family tasks with more than two different answers, of which a guess is seldom right.
NOT_BINARY = "out-of-family, excluding binary labels"
#: Method -> its name in the records of ``specs``; RIVAL_EVEN is T2L after as many tokens as RIVAL.
T2L, SHUFFLED, RIVAL = "T2L", "shuffled-description baseline", "multi-task LoRA, description in the prompt"
SHOTS = "base model, description and 3 examples"
METHODS = {
    T2L: "t2l",
    "T2L, description and 3 examples": "t2l-examples",
    "T2L after as many tokens as the multi-task LoRA": "t2l-first",
    SHUFFLED: "t2l-shuffled",
    RIVAL: "multi-task-description",
    "nearest of 128 stored adapters": "nearest",
    "base model, description in the prompt": "base-description",
    SHOTS: "icl",
    "base model, description and 6 examples": "icl-6",
}
#: The same of ``study``, where the bundled checkpoint was judged in a part of its own.
SKILLS_SPLITS = {"trained tasks": ("seen", "all"), "in-family": ("unseen", "sibling"), "out-of-family": ("unseen", "novel")}
SKILLS_METHODS = {
    T2L: "t2l",
    SHUFFLED: "t2l-shuffled",
    "multi-task LoRA without description": "multi-task",
    RIVAL: "multi-task-description",
    SHOTS: "icl",
    "per-task LoRA": "oracle",
}

#: Task -> method, as it is stored -> exact match in percent.
Scores = Mapping[str, Mapping[str, float]]


def scores(data: Data, suite: str, part: str, group: str | None = None) -> Scores:
    """Scores of one part by task; ``group``: of the tasks of that group alone."""
    found = data.records(suite, "scores", part=part)
    return {of["task"]: of["scores"] for of in found if group is None or group in of["groups"]}


def split(data: Data, name: str) -> Scores:
    """Scores of a split of ``specs``, or of tasks of other origin."""
    if name == OTHER:
        return scores(data, "specs-other", "other")
    if name != NOT_BINARY:
        return scores(data, "specs", SPLITS[name])
    (two,) = data.records("specs", "two_answers", part="novel")
    novel = scores(data, "specs", "novel")
    return {task: of for task, of in novel.items() if task not in two["tasks"]}


def mean(found: Scores, method: str) -> float | None:
    """Mean over the tasks that ``method`` answered; None where there is none."""
    return statistics.fmean(values) if (values := [of[method] for of in found.values() if method in of]) else None


def gap(found: Scores, ours: str, theirs: str) -> Interval | None:
    """Difference in points over the tasks that both answered, with its interval."""
    values = [of[ours] - of[theirs] for of in found.values() if ours in of and theirs in of]
    return interval(values) if values else None


def gap_over_families(found: Scores, ours: str, theirs: str) -> Interval:
    """The same difference with an interval over families, whose tasks are alike."""
    return interval(*by_family({task: of[ours] - of[theirs] for task, of in found.items()}))


def tokens(data: Data, run: str, suite: str = "specs") -> float:
    """Million tokens that ``run``, and the runs that it started from, were trained on."""
    trained = {of["run"]: of for of in data.records(suite, "training")}
    total = 0
    while run:
        total, run = total + trained[run]["tokens"], trained[run].get("initial", "")
    return total / 1e6


@derived("quality", "Exact match of smollm2-135m-specs and other methods, %, means over tasks")
def quality(data: Data) -> list[Line]:
    splits = ["trained tasks", "development tasks", "in-family", "out-of-family", NOT_BINARY, OTHER]
    found = {name: split(data, name) for name in splits}
    prompts = {of["arm"]: of["groups"]["all"]["prompt_tokens"] for of in data.records("specs", "arm", part="sibling")}
    lines = []
    for method, key in METHODS.items():
        means = {name: mean(of, key) for name, of in found.items()}
        lines.append({"method": method, **means, "prompt tokens": prompts.get(key, prompts["t2l"])})
    return lines


@derived("quality-skills", "Exact match of smollm2-135m and other methods, %, means over tasks")
def quality_skills(data: Data) -> list[Line]:
    lines = []
    for method, key in SKILLS_METHODS.items():
        line: Line = {"method": method}
        for name, (part, group) in SKILLS_SPLITS.items():
            own = f"shipped/{part}" if key in ("t2l", "t2l-shuffled") else part
            line[name] = mean(scores(data, "study", own, group), key)
        lines.append(line)
    return lines


@derived("families", "Exact match of smollm2-135m-specs by family of specifications, %")
def families(data: Data) -> list[Line]:
    lines = []
    for name in (*SPLITS, OTHER):
        tasks: dict[str, dict[str, Any]] = {}
        for task, of in split(data, name).items():
            tasks.setdefault(task.rpartition("-")[0] or task, {})[task] = of
        for family, found in sorted(tasks.items()):
            shown = {method: mean(found, METHODS[method]) for method in (T2L, SHUFFLED, SHOTS)}
            lines.append({"split": name, "family": family, "tasks": len(found), **shown})
    return lines


@derived("changes", "What moved what: one change at a time")
def changes(data: Data) -> list[Line]:
    """Effects in points of exact match with an interval over tasks, or as the training loss before and after."""
    lines = []

    def add(change: str, measure: str, before: float | None, after: float | None, effect: Interval | None = None) -> None:
        lines.append({"change": change, "measured by": measure, "before": before, "after": after, "effect": effect})

    for name in ("in-family", "out-of-family"):
        found = split(data, name)
        words = f"{tokens(data, 't2l-first'):.1f} to {tokens(data, 't2l'):.1f} million training tokens"
        add(words, f"{name}, %", mean(found, "t2l-first"), mean(found, "t2l"), gap(found, "t2l", "t2l-first"))
    again = scores(data, "robustness", "sibling")
    both = {task: {**of, **again[task]} for task, of in split(data, "in-family").items() if task in again}
    first, second = "t2l-first", "t2l-first-again"
    add("another seed", "in-family, %", mean(both, first), mean(both, second), gap(both, second, first))
    ranks = scores(data, "robustness", "development")
    values = mean(ranks, "multi-task-8"), mean(ranks, "multi-task-32"), gap(ranks, "multi-task-32", "multi-task-8")
    add("multi-task LoRA of rank 32 instead of 8", "development tasks, %", *values)
    losses = {of["run"]: of["curve"][-1][1] for of in data.records("small", "training")}
    for run, change in SMALL.items():
        add(change, "training loss, 250 steps", losses["small"], losses[run])
    return lines


#: Small run -> what it changes.
SMALL = {
    "small-adamw": "AdamW instead of Muon",
    "small-slow": "learning rate 5e-4 instead of 1e-3",
    "small-warm": "start from a reconstruction of 128 adapters",
}
#: Start of tuning -> its name in ``adapt``.
STARTS = {
    "PEFT's start": "peft",
    "generated from the description": "generated",
    "generated from description and examples": "generated-examples",
    "multi-task LoRA": "multi-task-description",
}


@derived("tuning", "Tuning on a user's examples from several starts: right answers in percent, steps to PEFT's lowest loss")
def tuning(data: Data) -> list[Line]:
    """Means over tasks, each of which is the mean of its seeds; a start has only seeds that PEFT's start has, too."""
    runs = {(of["budget"], of["start"], of["task"], of["seed"]): of for of in data.records("adapt", "adapted")}
    lines = []
    for budget in sorted({key[0] for key in runs}):
        for start, name in STARTS.items():
            found = {key[2:]: of for key, of in runs.items() if key[:2] == (budget, name)}
            peft = {key: runs[(budget, "peft", *key)] for key in found}
            more = {key: of["right"] - peft[key]["right"] for key, of in found.items()}
            steps = {key: steps_to(of["losses"], min(loss for _, loss in peft[key]["losses"])) for key, of in found.items()}
            right = by_task({key: of["right"] for key, of in found.items()})
            line = {"training examples": budget, "start": start, "tasks": len(right), "right": statistics.fmean(right)}
            line["beside PEFT's start"] = None if name == "peft" else interval(by_task(more))
            lines.append(line | {"steps": statistics.fmean(by_task(steps))})
    return lines


def by_task(values: Mapping[tuple[str, int], float]) -> list[float]:
    """The mean over seeds of every task, in the order of their names."""
    tasks: dict[str, list[float]] = {}
    for (task, _), value in values.items():
        tasks.setdefault(task, []).append(value)
    return [statistics.fmean(tasks[task]) for task in sorted(tasks)]


def steps_to(losses: Iterable[tuple[int, float]], target: float) -> int:
    """The first step whose validation loss is at most ``target``, or the last step."""
    *_, (last, _) = losses = list(losses)
    return next((step for step, loss in losses if loss <= target), last)
