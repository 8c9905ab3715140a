"""Tuning on a user's examples: a generated start beside others, on specifications that nothing was trained on."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import t2l_engine as t2l
from bench import judging, training
from bench.harness import Record, record
from bench.specs.plan import HELD_OUT, LIBRARY, PLAN, RIVAL, T2L, ordered
from bench.specs.runs import folder_of, rounded
from bench.suites.learn import logged
from t2l_engine.files.errors import ConfigError
from t2l_engine.library import DescriptionIndex
from t2l_engine.research.tasks.folder import Task, load_tasks
from t2l_engine.research.tasks.specs import suite
from t2l_engine.research.training import lora, settings
from t2l_engine.research.training.runs import descriptions_of
from t2l_engine.research.training.settings import LoRASettings
from t2l_engine.text.encoder import TextEncoder

ADAPTED: dict[str, Any] = PLAN["adapted"]
#: Where tuning starts: PEFT's own, the adapter that the description generates, that of description and examples (as many of
#: the budget's as the checkpoint reads), the stored one whose descriptions are nearest, and the multi-task LoRA, with the
#: description in its prompts.
STARTS = ("peft", "generated", "generated-examples", "nearest", RIVAL)


def chosen(held_out: Sequence[suite.Placed]) -> list[Task]:
    """Tasks of each held-out tier with ADAPTED["inputs"] examples and one description, which is a held-out one.

    Specifications that have fewer inputs are passed over.
    """
    made = []
    for tier in HELD_OUT:
        known = {placed.spec.name: placed.spec for placed in held_out if placed.tier == tier}
        found: list[Task] = []
        for name in ordered(known, "adapted"):
            try:
                task = suite.task(known[name], ADAPTED["inputs"], 0)
            except ConfigError:  # too few inputs
                continue
            found.append(dataclasses.replace(task, descriptions=task.descriptions[-1:]))
            if len(found) == ADAPTED["tasks_a_tier"]:
                break
        made += found
    return made


def limited(task: Task, budget: int) -> Task:
    """``task`` with ``budget`` training examples, and those of validation and test that all budgets have."""
    counts = {"train": budget, "val": ADAPTED["validation"], "test": ADAPTED["items"]}
    of_split = {split: [e for e in task.examples if e.split == split][:count] for split, count in counts.items()}
    return dataclasses.replace(task, examples=tuple(e for examples in of_split.values() for e in examples))


def records(work: Path, held_out: Sequence[suite.Placed]) -> Iterator[Record]:
    """``adapted`` records: of a task, budget and start the validation losses by step, and right answers, %, of the best."""
    tasks = chosen(held_out)
    engine = functools.cache(lambda: t2l.TextToLoRA.from_pretrained(rounded(T2L, work)))
    for budget in ADAPTED["budgets"]:
        part = f"adapted-{budget}"
        training.write(folder_of(work, part), [limited(task, budget) for task in tasks])
        for start in STARTS:
            output = work / part / start
            made = _settings(start, _start(start, work, part, engine))
            lora.train(made, folder_of(work, part), output)
            rows = [row for wave in logged(output) for row in wave if "tasks" in row]
            right = _right(work, part, start, output / lora.ADAPTERS)
            for task in tasks:
                losses = [[row["step"], round(row["tasks"][task.name], 4)] for row in rows if task.name in row["tasks"]]
                yield record("adapted", task=task.name, budget=budget, start=start, right=right[task.name], losses=losses)


def _settings(start: str, initial: Path | None) -> LoRASettings:
    fields = ADAPTED["settings"] | {"base_model": PLAN["model"], "target_modules": ("q_proj", "v_proj")}
    fields |= {"initial": str(initial or ""), "prompt": "description" if start == RIVAL else "input"}
    return settings.build(LoRASettings, fields, source=f"plan.yaml: adapted: {start}")


def _start(start: str, work: Path, part: str, engine: Any) -> Path | None:
    """The adapter, or the folder of adapters by task, that tuning starts from."""
    if start == "peft":
        return None
    if start == RIVAL:
        return work / RIVAL / lora.ADAPTERS / lora.MULTI_TASK
    folder, tasks = work / part / "starts" / start, load_tasks(folder_of(work, part), "train")
    if start == "nearest":
        library = work / LIBRARY / lora.ADAPTERS
        index = DescriptionIndex(descriptions_of(library), TextEncoder.from_pretrained())
        for task, near in zip(tasks, index.nearest([task.descriptions[0] for task in tasks]), strict=True):
            shutil.copytree(library / near[0].name, folder / task.name, dirs_exist_ok=True)
        return folder
    shown = [[(e.input, e.outputs[0]) for e in task.examples][: engine().encoder.max_examples] for task in tasks]
    texts = [task.descriptions[0] for task in tasks]
    stack = engine().generate(texts, shown if start == "generated-examples" else None)
    for i, task in enumerate(tasks):
        stack.save_pretrained(folder / task.name, adapter=i, base_model_name_or_path=PLAN["model"])
    return folder


def _right(work: Path, part: str, start: str, adapters: Path) -> dict[str, float]:
    """Exact match on test items by task, in percent, of the adapters that validation kept."""
    source = folder_of(work, part)
    options = {"tasks": source, "checkpoint": rounded(T2L, work), "oracle": adapters, "repeats": 1, "verify": True}
    names = [task.name for task in load_tasks(source, "test")]
    found = judging.evaluate(work / "judged", f"{part}-{start}", names, ("oracle",), **options)
    return {name: of["oracle"] for name, of in found["tasks"].items()}
