"""``python -m bench learn``: adapters for tasks made by code, and what reconstruction keeps of them, on a real model.

Eight tasks of the synthetic suite; an adapter each by ``t2l train lora``; a hypernetwork for each target of ``t2l train
reconstruction``; all of them judged on the tasks' test examples beside the base model, with descriptions they learned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import t2l_engine as t2l
from bench.harness import Record, record
from t2l_engine.adapters.similarity import inner_products
from t2l_engine.research.evaluation.answers import Answerer, Store
from t2l_engine.research.evaluation.methods import Method, Stored
from t2l_engine.research.evaluation.run import Evaluation
from t2l_engine.research.tasks import synthetic
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, write_tasks
from t2l_engine.research.training import log, lora, reconstruction, runs
from t2l_engine.research.training.objective import Objective, collate, token_weights
from t2l_engine.research.training.sampling import Examples
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings
from t2l_engine.text import base_model

#: Arms beside the reconstructions.
BASE, ADAPTERS = "base model", "an adapter a task"
MODEL, DTYPE, COUNT = base_model.LANGUAGE_MODEL, torch.bfloat16, 8
LORA = LoRASettings(
    base_model=MODEL, target_modules=("q_proj", "v_proj"), steps=50, warmup_steps=5, learning_rate=2e-3,
    samples_per_task=8, tasks_per_batch=COUNT, max_tokens=96, validate_every=25, save_every=25,
)  # fmt: skip
RECONSTRUCTION = [
    ReconstructionSettings(
        target=target, steps=steps, learning_rate=rate, tasks_per_batch=COUNT, head_in_size=512, weight_decay=0.0,
        validate_every=250,
    )
    for target, steps, rate in (("z-score", 500, 5e-4), ("raw", 500, 5e-4), ("delta-w", 600, 1e-3))
]  # fmt: skip


def answerer(model: nn.Module, tokenizer: Any, batch_size: int) -> Answerer:
    """One that keeps no answers."""
    return Answerer(model, tokenizer, identity="", store=Store(), batch_size=batch_size, clock=time.perf_counter)


@torch.no_grad()
def judged(tasks: Sequence[Task], stacks: Mapping[str, t2l.AdapterStack]) -> Iterator[tuple[str, dict[str, Record]]]:
    """By arm and task exact match in percent and cross-entropy of the answers to test examples; adapter i on task i.

    The base model comes first.
    """
    names = [task.name for task in tasks]
    model, tokenizer = base_model.load(MODEL, DTYPE, attention="eager")
    model.requires_grad_(False)
    arms = [Method(BASE, repeats=False)]
    arms += [Method(arm, Stored(stack, names), lambda task, *_: task.name, repeats=False) for arm, stack in stacks.items()]
    matches = Evaluation(answerer(model, tokenizer, 64), tokenizer, tasks, arms).run()["tasks"]
    groups = Examples(tasks, tokenizer, LORA.max_tokens, with_description=False).all_groups(16, lambda task: range(1))
    weight = token_weights("sample", groups, per_task=True)
    shapes = next(iter(stacks.values()))
    objective = Objective(model, t2l.attach(model, shapes))
    for arm in [BASE, *stacks]:
        scores = {name: {"exact_match": matches[name][arm], "loss": 0.0} for name in names}
        adapter = (lambda i, group: -1) if arm == BASE else (lambda i, group: group.task)
        for group in groups:
            batch = collate([group], tokenizer.pad_token_id, weight, 1, adapter)
            scores[names[group.task]]["loss"] += float(objective.losses(batch, stacks.get(arm, shapes)).sum())
        yield arm, scores


def distance(ours: t2l.AdapterStack, theirs: t2l.AdapterStack) -> float:
    """Relative Frobenius error of all ``B A``, the mean over adapters."""
    ours, theirs = ours.to(dtype=torch.float64), theirs.to(dtype=torch.float64)
    pairs = (ours, ours), (ours, theirs), (theirs, theirs)
    own, both, exact = (inner_products(*pair).diagonal() for pair in pairs)
    return float(((own - 2 * both + exact).clamp_min(0) / exact).sqrt().mean())


def logged(folder: Path) -> list[list[dict[str, Any]]]:
    """Rows of the log of a run, or of each wave of a run of ``t2l train lora``."""
    waves = sorted((folder / runs.WAVES).glob("*"))
    return [log.read_log(wave) for wave in waves or [folder]]


def library(folder: Path) -> Record:
    """What a run of ``t2l train lora`` took: adapters, steps of each, seconds of all steps and their tokens."""
    waves, settings = logged(folder), runs.settings_of(folder)
    steps = [row for wave in waves for row in wave if "loss" in row]
    return {
        "adapters": len(list((folder / runs.ADAPTERS).glob("*/adapter_config.json"))),
        "waves": len(waves),
        "steps_each": settings["steps"],
        "seconds": sum(row["seconds"] for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
        "settings": settings,
    }


def records(work: Path, of_library: Path | None = None) -> Iterator[Record]:
    """Train and judge below ``work``; all but the record of the run.  Interrupted runs go on, finished ones are read.

    ``of_library``: the folder of a larger run of ``t2l train lora``, whose time is reported too.
    """
    folder = work / "tasks"
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, synthetic.suite()[:COUNT])
    tasks = load_tasks(folder, "test")
    adapters = lora.train(LORA, folder, work / "library") / runs.ADAPTERS
    oracle = t2l.AdapterStack.from_peft([adapters / task.name for task in tasks])
    stacks = {ADAPTERS: oracle}
    about = {BASE: {}, ADAPTERS: library(work / "library") | {"values": oracle.num_parameters * len(oracle)}}
    for settings in RECONSTRUCTION:
        arm, run = f"reconstruction, {settings.target}", reconstruction.train(settings, adapters, work / settings.target)
        engine, (rows,) = t2l.TextToLoRA.from_pretrained(run), logged(run)
        stacks[arm] = engine.generate([task.descriptions[0] for task in tasks])
        about[arm] = {
            "l1": [row["val_loss"] for row in rows if "val_loss" in row][-1],
            "relative_error": distance(stacks[arm], oracle),
            "seconds": sum(row["seconds"] for row in rows if "loss" in row),
            "values": engine.hypernetwork.config.num_parameters,
            "settings": settings.model_dump(mode="json"),
        }
    for arm, scores in judged(tasks, stacks):
        means = {of: statistics.fmean(one[of] for one in scores.values()) for of in ("exact_match", "loss")}
        yield record("arm", arm=arm, **means, **about[arm])
        yield from (record("scores", arm=arm, task=task, **values) for task, values in scores.items())
    if of_library:
        yield record("library", **library(of_library))
