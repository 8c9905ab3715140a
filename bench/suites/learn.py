"""``python -m bench learn``: adapters for tasks made by code, and what reconstruction keeps of them, on a real model.

Eight tasks of the synthetic suite; an adapter each by ``t2l train lora``; a hypernetwork for each target of ``t2l train
reconstruction``; all of them judged on the tasks' test examples beside the base model, with descriptions they learned.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2l_engine as t2l
from bench.harness import Record, record
from t2l_engine.research.evaluation.answers import Answerer, Query, Store
from t2l_engine.research.evaluation.arms import Stored
from t2l_engine.research.evaluation.metrics import exact_match
from t2l_engine.research.tasks import synthetic
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, write_tasks
from t2l_engine.research.training import log, lora, reconstruction
from t2l_engine.research.training.objective import Objective, collate, token_weights
from t2l_engine.research.training.sampling import Examples
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings
from t2l_engine.text import base_model
from t2l_engine.text.prompts import chat_prompt

#: Arms beside the reconstructions.
BASE, ADAPTERS = "base model", "an adapter a task"
MODEL, DTYPE, COUNT = base_model.LANGUAGE_MODEL, torch.bfloat16, 8
LORA = LoRASettings(
    base_model=MODEL, target_modules=("q_proj", "v_proj"), steps=50, warmup_steps=5, learning_rate=2e-3,
    samples_per_task=8, tasks_per_batch=COUNT, max_tokens=96, validate_every=25, save_every=25,
)  # fmt: skip
_SHARED = {"tasks_per_batch": COUNT, "head_in_size": 512, "weight_decay": 0.0, "validate_every": 250}
RECONSTRUCTION = {
    "z-score": ReconstructionSettings(target="z-score", steps=500, learning_rate=5e-4, **_SHARED),
    "raw": ReconstructionSettings(target="raw", steps=500, learning_rate=5e-4, **_SHARED),
    "delta-w": ReconstructionSettings(target="delta-w", steps=600, learning_rate=1e-3, **_SHARED),
}


class Judge:
    """Scores of adapters on the test examples of ``tasks``: exact match in percent, and cross-entropy of the answers."""

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = tasks
        self._model, self._tokenizer = base_model.load(MODEL, DTYPE, attention="eager")
        self._model.requires_grad_(False)
        self._answerer = Answerer(
            self._model, self._tokenizer, identity=f"{MODEL} {DTYPE}", store=Store(), batch_size=64, clock=time.perf_counter
        )
        self._examples = Examples(tasks, self._tokenizer, LORA.max_tokens, with_description=False)

    @torch.no_grad()
    def scores(self, stack: t2l.AdapterStack, base: bool = False) -> dict[str, Any]:
        """Adapter i of ``stack`` on task i; ``base``: the model without, for which the stack's shapes alone count."""
        names = [task.name for task in self._tasks]
        asked = [(task.name, e) for task in self._tasks for e in task.examples]
        queries = [Query(chat_prompt(self._tokenizer, e.input), name) for name, e in asked]
        answers = self._answerer.ask(queries, None if base else Stored(stack, names))
        hits: dict[str, list[bool]] = {name: [] for name in names}
        for (name, example), answer in zip(asked, answers, strict=True):
            hits[name].append(exact_match(answer.text, example.outputs))
        handle = t2l.attach(self._model, stack)
        try:
            losses = self._losses(Objective(self._model, handle), stack, (lambda task: -1) if base else (lambda task: task))
        finally:
            handle.detach()
        matches = [100 * statistics.fmean(hits[name]) for name in names]
        return {
            "exact_match": statistics.fmean(matches),
            "loss": statistics.fmean(losses),
            "tasks": {t.name: {"exact_match": m, "loss": c} for t, m, c in zip(self._tasks, matches, losses, strict=True)},
        }

    def _losses(self, objective: Objective, stack: t2l.AdapterStack, number: Callable[[int], int]) -> list[float]:
        found = [0.0] * len(self._tasks)
        groups = self._examples.all_groups(16, lambda task: range(1))
        weight = token_weights("sample", groups, apart=True)
        for group in groups:
            batch = collate([group], self._tokenizer.pad_token_id, weight, 1, lambda i, g: number(g.task))
            found[group.task] += float(objective.losses(batch, stack).sum())
        return found


def distance(ours: t2l.AdapterStack, theirs: t2l.AdapterStack) -> float:
    """Relative Frobenius error of all ``B A``, the mean over adapters."""

    def errors(name: str) -> tuple[Tensor, Tensor]:
        (a, b), (c, d) = ((s.lora_A[name].double(), s.lora_B[name].double()) for s in (ours, theirs))
        gram = lambda p, q, r, s: ((q.mT @ s) * (p @ r.mT)).sum(dim=(1, 2, 3))  # noqa: E731  <q p, s r> without the products
        exact = gram(c, d, c, d)
        return gram(a, b, a, b) - 2 * gram(a, b, c, d) + exact, exact

    found = [errors(name) for name in ours.lora_A]
    return float((sum(e for e, _ in found).clamp_min(0) / sum(x for _, x in found)).sqrt().mean())


def library(folder: Path) -> dict[str, Any]:
    """What a run of ``t2l train lora`` took: adapters, steps of each, seconds of all steps and their tokens."""
    waves = [folder / lora.WAVES / name for name in sorted(path.name for path in (folder / lora.WAVES).iterdir())]
    records = [json.loads((wave / lora.RECORD).read_text(encoding="utf-8")) for wave in waves]
    steps = [row for wave in waves for row in log.read_log(wave) if "loss" in row]
    return {
        "adapters": sum(len(record["adapters"]) for record in records),
        "waves": len(waves),
        "steps_each": records[0]["settings"]["steps"],
        "seconds": sum(row["seconds"] for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
        "settings": records[0]["settings"],
    }


def records(work: Path, of_library: Path | None = None) -> Iterator[Record]:
    """Train and judge below ``work``; all but the record of the run.  Interrupted runs go on, finished ones are read.

    ``of_library``: the folder of a larger run of ``t2l train lora``, whose time is reported too.
    """
    folder = work / "tasks"
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, synthetic.suite()[:COUNT])
    tasks = load_tasks(folder, "test")
    adapters = lora.train(LORA, folder, work / "library") / lora.ADAPTERS
    oracle = t2l.AdapterStack.from_peft([adapters / task.name for task in tasks])
    judge = Judge(tasks)
    yield from _arm(BASE, judge.scores(oracle, base=True))
    values = oracle.num_parameters * len(oracle)
    yield from _arm(ADAPTERS, judge.scores(oracle), **library(work / "library"), values=values)
    for target, settings in RECONSTRUCTION.items():
        run = reconstruction.train(settings, adapters, work / target)
        engine = t2l.TextToLoRA.from_pretrained(run)
        stack = engine.generate([task.descriptions[0] for task in tasks])
        rows = log.read_log(run)
        yield from _arm(
            f"reconstruction, {target}",
            judge.scores(stack),
            l1=[row["val_loss"] for row in rows if "val_loss" in row][-1],
            relative_error=distance(stack, oracle),
            seconds=sum(row["seconds"] for row in rows if "loss" in row),
            values=engine.hypernetwork.config.num_parameters,
            settings=settings.model_dump(mode="json"),
        )
    if of_library:
        yield record("library", **library(of_library))


def _arm(arm: str, scores: dict[str, Any], **more: Any) -> Iterator[Record]:
    tasks = scores.pop("tasks")
    yield record("arm", arm=arm, **scores, **more)
    yield from (record("scores", arm=arm, task=name, **values) for name, values in tasks.items())
