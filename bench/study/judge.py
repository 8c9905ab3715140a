"""Evaluations of the study: ``t2l evaluate`` as a user calls it, its results kept below the work folder."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.study import plan
from bench.study.runs import finished, folder_of
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import Task, load_tasks
from t2l_engine.research.training import lora
from t2l_engine.text import base_model

#: Points by which an oracle must beat the best prompt of the base model on validation examples.
HEADROOM = 10.0
BASE = ("base", "base-description", "icl")
SEEN_ITEMS, UNSEEN_ITEMS, VARIED_ITEMS, OPTION_ITEMS, LONG_ITEMS = 20, 40, 10, 60, 20
CONTROLS = ("-shuffled", "-junk", "-constant")
#: Runs judged beside ``t2l``, with all controls.
CONTROLLED = ("t2l-seed1", "t2l-description")
#: Runs that vary one thing, judged beside ``t2l`` with the shuffled control alone.
VARIED = ("short-L", "short-L-16", "short-L-32", "short-L-64", "short-L-90", "short-M", "short-S", "short-base-model",
          "short-random", "short-quiet", "short-chat", "short-one-hot", "reconstruction-64", "short-input")  # fmt: skip
#: Has no descriptions to shuffle; knows tasks by their names, and so only those it was trained on.
BY_INPUT, BY_NAME = "short-input", "short-one-hot"
MULTI_TASK = ("multi-task", "multi-task-description")
SCALINGS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def evaluate(
    work: Path,
    name: str,
    names: Sequence[str],
    arms: Sequence[str],
    *options: object,
    tasks: str = "evaluation",
    answers: str | None = None,
) -> dict[str, Any]:
    """The result of one evaluation of ``arms`` on the tasks ``names``; answers of an earlier call are read from its file.

    ``answers``: name of that file, for evaluations that share some of their questions; default ``name``.
    """
    out = work / "judged"
    out.mkdir(exist_ok=True)
    fixed = ["--tasks", folder_of(work, tasks), "--dtype", "bfloat16", "--manifest", plan.MANIFEST, "--batch-size", 32]
    fixed += ["--json", out / f"{name}.json", "--resume", out / f"{answers or name}.answers.jsonl"]
    fixed += ["--names", ",".join(names), "--arms", ",".join(arms)]
    command = [sys.executable, "-m", "t2l_engine", "evaluate", *map(str, [*fixed, *options])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def headroom(work: Path) -> dict[str, Any]:
    """Oracles and the base model's prompts on validation examples of tasks with short answers.

    ``learnable``: tasks whose oracle is good enough to train on; ``headroom``: those whose oracle beats every prompt, too.
    """
    _, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    short = [task.name for task in load_tasks(folder_of(work, "train"), None) if _short(task, tokenizer)]
    options = ["--split", "val", "--repeats", 1, "--checkpoint", work / "t2l", *_oracles(work)]
    scores = evaluate(work, "headroom", short, ("oracle", *BASE), *options)["tasks"]
    learnable = [name for name, of in scores.items() if of["oracle"] >= plan.LEAST_ORACLE]
    chosen = [n for n in learnable if scores[n]["oracle"] - max(scores[n][arm] for arm in BASE) >= HEADROOM]
    return {"tasks": scores, "learnable": learnable, "headroom": chosen}


def _short(task: Task, tokenizer: Any) -> bool:
    answers = tokenizer([example.outputs[0] for example in task.examples], add_special_tokens=False)["input_ids"]
    return statistics.fmean(map(len, answers)) <= plan.SHORT_ANSWER


def parts(work: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The evaluations of the result by name of their part, of the runs that have ended.

    ``names``: the trained tasks with headroom, judged on held-out examples and descriptions.
    """
    unseen = _held_out("sibling", "novel")
    of = ["--checkpoint", work / "t2l"]
    yield "seen", _everything(work, "seen", names, SEEN_ITEMS)
    yield "unseen", _everything(work, "unseen", unseen, UNSEEN_ITEMS)
    # The first three descriptions of a task that were trained on, on the items of "seen".
    yield "learned", evaluate(work, "learned", names, ("t2l",), *of, "--max-items", SEEN_ITEMS, tasks="train")
    for part, chosen, items in (("seen", names, SEEN_ITEMS), ("unseen", unseen, UNSEEN_ITEMS)):
        bundled = ["--checkpoint", plan.MODEL, "--max-items", items]  # ``t2l`` rounded to bfloat16
        yield f"shipped/{part}", evaluate(work, f"shipped-{part}", chosen, ("t2l", "t2l-shuffled"), *bundled)
    yield from _varied(work, names)
    yield from _lengths(work)
    yield from _reconstruction(work)


def _varied(work: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """``t2l`` and the shorter runs on the tasks ``names``, and on siblings with the shuffled control."""
    there = [run for run in VARIED if finished(run, work)]
    described = [run for run in there if run != BY_NAME]
    if not described:
        return
    beside = [arm for run in ("t2l", *described) for arm in ((run,) if run == BY_INPUT else (run, run + CONTROLS[0]))]
    for group, chosen, runs, arms, repeats in (
        ("train", names, there, ["t2l", *there], 1),
        ("sibling", _held_out("sibling"), described, beside, 3),
    ):
        also = [option for run in runs for option in ("--also", f"{run}={work / run}")]
        options = ["--checkpoint", work / "t2l", "--max-items", VARIED_ITEMS, "--repeats", repeats, *also]
        yield f"varied/{group}", evaluate(work, f"varied-{group}", chosen, arms, *options)


def _lengths(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """T2L and its rival after parts of their training, by T2L's run: plan.LENGTHS but the last, on siblings."""
    for ours, theirs in plan.LENGTHS[:-1]:
        if finished(ours, work) and finished(theirs, work):
            options = ["--checkpoint", work / ours, "--multi-task", work / theirs, "--max-items", UNSEEN_ITEMS]
            arms = ("t2l", "multi-task-description")
            yield f"lengths/{ours}", evaluate(work, f"length-{ours}", _held_out("sibling"), arms, *options)


def _reconstruction(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reconstructed adapters beside those they were made from, by a description they learned and by a held-out one."""
    for run, count in ((work / f"reconstruction-{count}", count) for count in plan.COUNTS):
        if not finished(run.name, work):
            continue
        names = sorted(json.loads((run / "config.json").read_text(encoding="utf-8"))["training"]["tasks"])
        options = ["--checkpoint", run, "--max-items", SEEN_ITEMS, "--repeats", 1, *_oracles(work)]
        arms = ("t2l", "t2l-shuffled", "oracle", "base")
        for tasks in ("train", "evaluation"):
            found = evaluate(work, f"{run.name}-{tasks}", names, arms, *options, tasks=tasks, answers=run.name)
            yield f"reconstruction/{count}/{tasks}", found


def scalings(work: Path) -> dict[float, dict[str, Any]]:
    """The checkpoint at other scalings than it was trained with, on siblings."""
    siblings, arms = _held_out("sibling"), ("t2l", "t2l-shuffled")
    options = ["--checkpoint", work / "t2l", "--max-items", 20, "--repeats", 1]
    return {s: evaluate(work, f"scaling-{s:g}", siblings, arms, *options, "--scaling", s) for s in SCALINGS}


def benchmarks(work: Path) -> Iterator[dict[str, Any]]:
    """The ten benchmarks of the paper, where ``work/tasks/benchmarks`` holds them: items, majority and scores of each.

    Those with long answers have fewer items and no few-shot arm (HumanEval has no examples to draw from).
    """
    folder = folder_of(work, "benchmarks")
    if not folder.is_dir():
        return
    rivals = [run for run in MULTI_TASK if finished(run, work)]
    options = ["--checkpoint", work / "t2l", "--repeats", 1, "--run-code", "--max-prompt-tokens", 2048]
    options += [option for run in rivals for option in ("--multi-task", work / run)]
    arms = ["t2l", "t2l-shuffled", "base", "base-description", *rivals]
    tasks = {task.name: task.examples for task in load_tasks(folder, "test")}
    for kind, items, more in (("options", OPTION_ITEMS, ["icl"]), ("long", LONG_ITEMS, [])):
        names = [name for name, examples in tasks.items() if bool(examples[0].options) == (kind == "options")]
        name, limit = f"benchmarks-{kind}", ("--max-items", items)
        found = evaluate(work, name, names, [*arms, *more], *options, *limit, tasks="benchmarks")
        for task, scores in found["tasks"].items():
            chosen = [e for e in tasks[task][:OPTION_ITEMS] if e.options]
            # By position: options are texts that differ from one question to the next.
            places = Counter(e.options.index(e.outputs[0]) for e in chosen)
            majority = 100 * places.most_common(1)[0][1] / len(chosen) if chosen else None
            yield {"task": task, "items": found["items"][task], "majority": majority, "scores": scores}


def _everything(work: Path, name: str, names: Sequence[str], items: int) -> dict[str, Any]:
    """All arms whose runs have ended, in the order of the tables."""
    controlled, rivals = ([run for run in runs if finished(run, work)] for runs in (CONTROLLED, MULTI_TASK))
    arms = [run + control for run in ("t2l", *controlled) for control in ("", *CONTROLS)]
    arms += [*rivals, "oracle", "average", "arrow", *BASE]
    options = [option for run in controlled for option in ("--also", f"{run}={work / run}")]
    options += [option for run in rivals for option in ("--multi-task", work / run)]
    options += ["--checkpoint", work / "t2l", "--max-items", items, *_oracles(work)]
    return evaluate(work, name, names, arms, *options, "--library", work / "library-train" / lora.ADAPTERS)


def _held_out(*tiers: str) -> list[str]:
    """The tasks of the manifest's ``tiers``, tier by tier."""
    manifest = manifests.read(plan.MANIFEST)
    return [name for tier in tiers for name in manifest.names(tier)]


def _oracles(work: Path) -> list[object]:
    return [o for tier in ("train", "held-out") for o in ("--oracle", work / f"library-{tier}" / lora.ADAPTERS)]
