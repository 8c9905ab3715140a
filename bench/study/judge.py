"""Evaluations of the study: which arms answer the questions of which tasks."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import judging
from bench.harness import BenchError, Record, record
from bench.study import plan
from bench.study.runs import folder_of
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import load_tasks, read_descriptions
from t2l_engine.research.training import lora
from t2l_engine.text import base_model

#: Points by which an oracle must beat the best prompt of the base model on validation examples.
HEADROOM = 10.0
BASE, MULTI_TASK = ("base", "base-description", "icl"), ("multi-task", "multi-task-description")
MATCHED, CONTROLS = ("t2l", "t2l-shuffled"), ("-shuffled", "-junk", "-constant")
#: Runs judged beside ``t2l``: with all controls, and those that vary one thing with the shuffled control alone.
CONTROLLED = ("t2l-seed1", "t2l-description")
VARIED = (*(run for run in plan.RUNS if run.startswith("short")), "reconstruction-64")
#: Has no descriptions to shuffle; knows tasks by their names, and so only those it was trained on.
BY_INPUT, BY_NAME = "short-input", "short-one-hot"
ARMS = (
    *(run + control for run in ("t2l", *CONTROLLED) for control in ("", *CONTROLS)),
    *MULTI_TASK, "oracle", "average", "arrow", *BASE,
)  # fmt: skip
SEEN_ITEMS, UNSEEN_ITEMS, VARIED_ITEMS, SCALING_ITEMS, OPTION_ITEMS, LONG_ITEMS = 20, 40, 10, 20, 60, 20
SCALINGS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def evaluate(work: Path, part: str, names: Sequence[str], arms: Sequence[str], **options: Any) -> dict[str, Any]:
    """The result of one evaluation below ``work``; ``options["tasks"]``: which folder (evaluation)."""
    given = {"tasks": folder_of(work, options.pop("tasks", "evaluation")), "checkpoint": work / "t2l"}
    given |= {"manifest": plan.MANIFEST, **options}
    return judging.evaluate(work / "judged", part.replace("/", "-"), names, arms, **given)


def headroom(work: Path) -> Iterator[Record]:
    """Oracles and the base model's prompts on validation examples of tasks with short answers.

    ``learnable``: the oracle is good enough to train on; ``headroom``: it beats every prompt, too.  Raises BenchError where
    oracles of this machine learn other tasks than plan.LEARNABLE.
    """
    _, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    answers = {task.name: [e.outputs[0] for e in task.examples] for task in load_tasks(folder_of(work, "train"), None)}
    tokens = {name: tokenizer(texts, add_special_tokens=False)["input_ids"] for name, texts in answers.items()}
    short = [name for name, ids in tokens.items() if statistics.fmean(map(len, ids)) <= plan.SHORT_ANSWER]
    scores = evaluate(work, "headroom", short, ("oracle", *BASE), split="val", repeats=1, oracle=_oracles(work))["tasks"]
    learnable = {name for name, of in scores.items() if of["oracle"] >= plan.LEAST_ORACLE}
    if learnable != set(plan.LEARNABLE):
        raise BenchError(
            f"plan.LEARNABLE: expected the tasks whose oracles reach {plan.LEAST_ORACLE} % here; it lacks "
            f"{sorted(learnable - set(plan.LEARNABLE))} and has {sorted(set(plan.LEARNABLE) - learnable)} in excess"
        )
    for task, of in scores.items():
        ahead = task in learnable and of["oracle"] - max(of[arm] for arm in BASE) >= HEADROOM
        yield record("headroom", task=task, scores=of, learnable=task in learnable, headroom=ahead)


Part = tuple[str, Sequence[str], Sequence[str], dict[str, Any]]


def parts(work: Path, names: Sequence[str]) -> Iterator[Part]:
    """Arguments of :func:`evaluate` for every part of the result.

    ``names``: the trained tasks with headroom, judged on held-out examples and descriptions.
    """
    manifest, oracle = manifests.read(plan.MANIFEST), _oracles(work)
    siblings, rivals = manifest.names("sibling"), [work / run for run in MULTI_TASK]
    library = work / "library-train" / lora.ADAPTERS
    others = {"oracle": oracle, "library": library, "also": _also(work, CONTROLLED), "multi_task": rivals}
    for part, chosen, items in (
        ("seen", names, SEEN_ITEMS),
        ("unseen", [*siblings, *manifest.names("novel")], UNSEEN_ITEMS),
    ):
        yield part, chosen, ARMS, {"max_items": items, **others}
        # ``t2l`` rounded to bfloat16
        yield f"shipped/{part}", chosen, MATCHED, {"max_items": items, "checkpoint": plan.MODEL}
    # The first three descriptions of a task that were trained on, on the items of "seen".
    yield "learned", names, ("t2l",), {"max_items": SEEN_ITEMS, "tasks": "train"}
    described = [run for run in VARIED if run != BY_NAME]
    pairs = [arm for run in ("t2l", *described) for arm in (run, run + "-shuffled") if arm != f"{BY_INPUT}-shuffled"]
    once = {"max_items": VARIED_ITEMS, "repeats": 1, "also": _also(work, VARIED)}
    yield "varied/train", names, ("t2l", *VARIED), once
    yield "varied/sibling", siblings, pairs, {"max_items": VARIED_ITEMS, "also": _also(work, described)}
    for ours, theirs in plan.LENGTHS[:-1]:
        options = {"checkpoint": work / ours, "multi_task": work / theirs, "max_items": UNSEEN_ITEMS}
        yield f"lengths/{ours}", siblings, ("t2l", "multi-task-description"), options
    for count in plan.COUNTS:  # beside the adapters they were made from, by a description they learned and by a held-out one
        run, learned = f"reconstruction-{count}", plan.chosen(read_descriptions(library), count)
        options = {"checkpoint": work / run, "max_items": SEEN_ITEMS, "repeats": 1, "oracle": oracle, "answers": run}
        for tasks in ("train", "evaluation"):
            yield f"reconstruction/{count}/{tasks}", learned, (*MATCHED, "oracle", "base"), {**options, "tasks": tasks}


def scalings(work: Path) -> Iterator[Record]:
    """The checkpoint at other scalings than it was trained with, on siblings."""
    siblings, options = manifests.read(plan.MANIFEST).names("sibling"), {"max_items": SCALING_ITEMS, "repeats": 1}
    for scaling in SCALINGS:
        found = evaluate(work, f"scaling-{scaling:g}", siblings, MATCHED, scaling=scaling, **options)
        yield record("scaling", scaling=scaling, scores=found["summary"]["all"]["mean"])


def benchmarks(work: Path) -> Iterator[Record]:
    """The ten benchmarks of the paper, where ``work/tasks/benchmarks`` holds them: items, majority and scores of each.

    Those with long answers have fewer items and no few-shot arm (HumanEval has no examples to draw from).
    """
    if not (folder := folder_of(work, "benchmarks")).is_dir():
        return
    options = {"tasks": "benchmarks", "repeats": 1, "run_code": True, "max_prompt_tokens": 2048}
    options["multi_task"] = [work / run for run in MULTI_TASK]
    arms = (*MATCHED, *BASE[:2], *MULTI_TASK)
    tasks = {task.name: task.examples for task in load_tasks(folder, "test")}
    for kind, items, more in (("options", OPTION_ITEMS, ["icl"]), ("long", LONG_ITEMS, [])):
        names = [name for name, examples in tasks.items() if bool(examples[0].options) == (kind == "options")]
        found = evaluate(work, f"benchmarks-{kind}", names, [*arms, *more], max_items=items, **options)
        for task, scores in found["tasks"].items():
            # By position: options are texts that differ from one question to the next.
            places = Counter(e.options.index(e.outputs[0]) for e in tasks[task][:OPTION_ITEMS] if e.options)
            majority = 100 * max(places.values()) / places.total() if places else None
            yield record("benchmark", task=task, items=found["items"][task], majority=majority, scores=scores)


def _also(work: Path, runs: Sequence[str]) -> list[str]:
    return [f"{run}={work / run}" for run in runs]


def _oracles(work: Path) -> list[Path]:
    return [work / f"library-{tier}" / lora.ADAPTERS for tier in ("train", "held-out")]
