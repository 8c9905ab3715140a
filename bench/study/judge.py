"""Evaluations of the study: ``t2l evaluate`` as a user calls it, its results kept below the work folder."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
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
#: Runs judged beside ``t2l``, with all controls; the shorter runs and one by reconstruction, which are judged apart, beside
#: ``t2l`` again, with the shuffled control alone.
CONTROLLED = ("t2l-seed1", "t2l-description")
VARIED = ("short-L", "short-L-16", "short-L-32", "short-L-64", "short-L-90", "short-M", "short-S", "short-base-model",
          "short-random", "short-quiet", "short-chat", "short-one-hot", "reconstruction-64", "short-input")  # fmt: skip
#: Has no descriptions to shuffle; knows tasks by their names, and so those alone that it was trained on.
BY_INPUT, BY_NAME = "short-input", "short-one-hot"
MULTI_TASK = ("multi-task", "multi-task-description")
SCALINGS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def evaluate(
    work: Path, name: str, *options: str | Path, tasks: str = "evaluation", answers: str | None = None
) -> dict[str, Any]:
    """The result of one evaluation; what was answered before is read from its file of answers.

    ``answers``: name of that file, for evaluations that ask some of the same; else ``name``.
    """
    out = work / "judged"
    out.mkdir(exist_ok=True)
    fixed = ["--tasks", folder_of(work, tasks), "--dtype", "bfloat16", "--manifest", plan.MANIFEST, "--batch-size", "32"]
    kept = ["--json", out / f"{name}.json", "--resume", out / f"{answers or name}.answers.jsonl"]
    command = [sys.executable, "-m", "t2l_engine", "evaluate", *map(str, [*fixed, *kept, *options])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def headroom(work: Path) -> dict[str, Any]:
    """Oracles and the base model's prompts on validation examples of tasks with short answers.

    ``learnable``: whose oracle is good enough to train on; ``headroom``: those of them whose oracle beats every prompt.
    """
    _, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    short = [task.name for task in load_tasks(folder_of(work, "train"), None) if _short(task, tokenizer)]
    result = evaluate(work, "headroom", "--split", "val", "--repeats", "1", "--arms", ",".join(("oracle", *BASE)),
                      "--checkpoint", work / "t2l", "--names", ",".join(short), *_oracles(work))  # fmt: skip
    scores = result["tasks"]
    learnable = [name for name, of in scores.items() if of["oracle"] >= plan.LEAST_ORACLE]
    chosen = [n for n in learnable if scores[n]["oracle"] - max(scores[n][arm] for arm in BASE) >= HEADROOM]
    return {"tasks": scores, "learnable": learnable, "headroom": chosen}


def _short(task: Task, tokenizer: Any) -> bool:
    answers = tokenizer([example.outputs[0] for example in task.examples], add_special_tokens=False)["input_ids"]
    return statistics.fmean(map(len, answers)) <= plan.SHORT_ANSWER


def seen(work: Path, names: Sequence[str]) -> dict[str, Any]:
    """All arms on held-out examples and descriptions of the tasks ``names``, which were trained on."""
    return _everything(work, "seen", names, SEEN_ITEMS)


def unseen(work: Path) -> dict[str, Any]:
    """All arms on tasks that nothing but the oracles was trained on."""
    return _everything(work, "unseen", _held_out("sibling", "novel"), UNSEEN_ITEMS)


def varied(work: Path, names: Sequence[str]) -> dict[str, Any]:
    """``t2l`` and the shorter runs on the tasks ``names``, and on siblings with the shuffled control.

    Results by group of tasks; empty before one of the runs has ended.
    """
    there = [run for run in VARIED if finished(run, work)]
    described = [run for run in there if run != BY_NAME]
    if not described:
        return {}
    beside = [arm for run in ("t2l", *described) for arm in ((run,) if run == BY_INPUT else (run, run + CONTROLS[0]))]
    found = {}
    for group, chosen, runs, arms, repeats in (
        ("train", names, there, ["t2l", *there], 1),
        ("sibling", _held_out("sibling"), described, beside, 3),
    ):
        found[group] = evaluate(
            work, f"varied-{group}", "--checkpoint", work / "t2l", "--names", ",".join(chosen), "--arms", ",".join(arms),
            "--max-items", str(VARIED_ITEMS), "--repeats", str(repeats),
            *(o for run in runs for o in ("--also", f"{run}={work / run}")),
        )  # fmt: skip
    return found


def learned(work: Path, names: Sequence[str]) -> dict[str, Any]:
    """``t2l`` on the items of :func:`seen`, by the first three descriptions of a task that it was trained on."""
    options = ["--checkpoint", work / "t2l", "--names", ",".join(names), "--max-items", str(SEEN_ITEMS), "--arms", "t2l"]
    return evaluate(work, "learned", *options, tasks="train")


def shipped(work: Path, names: Sequence[str]) -> dict[str, Any]:
    """The bundled checkpoint, ``t2l`` rounded to bfloat16, and its shuffled control on the tasks of both other parts."""
    found = {}
    for part, chosen, items in (("seen", names, SEEN_ITEMS), ("unseen", _held_out("sibling", "novel"), UNSEEN_ITEMS)):
        found[part] = evaluate(
            work, f"shipped-{part}", "--checkpoint", plan.MODEL, "--names", ",".join(chosen), "--max-items", str(items),
            "--arms", "t2l,t2l-shuffled",
        )  # fmt: skip
    return found


def reconstruction(work: Path) -> dict[str, Any]:
    """Reconstructed adapters beside those they were made from, by a description they learned and by a held-out one."""
    found = {}
    for run, count in ((work / f"reconstruction-{count}", count) for count in plan.COUNTS):
        if not finished(run.name, work):
            continue
        names = json.loads((run / "config.json").read_text(encoding="utf-8"))["training"]["tasks"]
        for tasks in ("train", "evaluation"):
            options = ["--checkpoint", run, "--names", ",".join(sorted(names)), "--max-items", str(SEEN_ITEMS),
                       "--repeats", "1", "--arms", "t2l,t2l-shuffled,oracle,base", *_oracles(work)]  # fmt: skip
            found[f"{count}/{tasks}"] = evaluate(work, f"{run.name}-{tasks}", *options, tasks=tasks, answers=run.name)
    return found


def lengths(work: Path) -> dict[str, dict[str, Any]]:
    """T2L and its rival after parts of their training, by T2L's run: plan.LENGTHS but the last, on siblings."""
    names = ",".join(_held_out("sibling"))
    fixed = ["--names", names, "--max-items", str(UNSEEN_ITEMS), "--arms", "t2l,multi-task-description"]
    return {
        ours: evaluate(work, f"length-{ours}", "--checkpoint", work / ours, "--multi-task", work / theirs, *fixed)
        for ours, theirs in plan.LENGTHS[:-1]
        if finished(ours, work) and finished(theirs, work)
    }


def scalings(work: Path) -> dict[float, dict[str, Any]]:
    """The checkpoint at other scalings than it was trained with, on siblings."""
    names = ",".join(_held_out("sibling"))
    options = ["--checkpoint", work / "t2l", "--names", names, "--max-items", "20", "--repeats", "1"]
    return {
        s: evaluate(work, f"scaling-{s:g}", *options, "--scaling", str(s), "--arms", "t2l,t2l-shuffled") for s in SCALINGS
    }


def benchmarks(work: Path) -> dict[str, Any]:
    """The ten benchmarks of the paper, where ``work/tasks/benchmarks`` holds them, with the majority's score beside.

    Those with long answers have fewer items and no worked examples (HumanEval has none to draw from).
    """
    folder = folder_of(work, "benchmarks")
    if not folder.is_dir():
        return {}
    arms = ["t2l", "t2l-shuffled", "base", "base-description"]
    options = ["--checkpoint", work / "t2l", "--repeats", "1", "--run-code", "--max-prompt-tokens", "2048"]
    for run in MULTI_TASK:
        if finished(run, work):
            arms, options = [*arms, run], [*options, "--multi-task", work / run]
    tasks = load_tasks(folder, "test")
    long = [task.name for task in tasks if not task.examples[0].options]
    short = [task.name for task in tasks if task.examples[0].options]
    found: dict[str, Any] = {"tasks": {}, "items": {}, "majority": {}}
    for name, names, items, more in (
        ("benchmarks-options", short, OPTION_ITEMS, ["icl"]),
        ("benchmarks-long", long, LONG_ITEMS, []),
    ):
        which = ["--names", ",".join(names), "--max-items", str(items), "--arms", ",".join([*arms, *more])]
        result = evaluate(work, name, *options, *which, tasks="benchmarks")
        found["tasks"] |= result["tasks"]
        found["items"] |= result["items"]
    for task in tasks:
        examples = [e for e in task.examples[:OPTION_ITEMS] if e.options]
        if examples:  # by position: choices are texts that differ from one question to the next
            places = Counter(e.options.index(e.outputs[0]) for e in examples)
            found["majority"][task.name] = 100 * places.most_common(1)[0][1] / len(examples)
    return found


def _everything(work: Path, name: str, names: Sequence[str], items: int) -> dict[str, Any]:
    """All arms whose runs there are, in the order of the tables."""
    arms = ["t2l", *("t2l" + control for control in CONTROLS)]
    options: list[str | Path] = []
    for run in CONTROLLED:
        if finished(run, work):
            arms += [run, *(run + control for control in CONTROLS)]
            options += ["--also", f"{run}={work / run}"]
    for run in MULTI_TASK:
        if finished(run, work):
            arms.append(run)
            options += ["--multi-task", work / run]
    arms += ["oracle", "average", "arrow", *BASE]
    return evaluate(
        work, name, "--checkpoint", work / "t2l", "--names", ",".join(names), "--max-items", str(items),
        "--arms", ",".join(arms), *options, *_oracles(work), "--library", work / "library-train" / lora.ADAPTERS,
    )  # fmt: skip


def _held_out(*tiers: str) -> list[str]:
    """The tasks of the manifest's ``tiers``, tier by tier."""
    manifest = manifests.read(plan.MANIFEST)
    return [name for tier in tiers for name in manifest.names(tier)]


def _oracles(work: Path) -> list[str]:
    return [o for tier in ("train", "held-out") for o in ("--oracle", str(work / f"library-{tier}" / lora.ADAPTERS))]
