"""Learning rates of ``t2l adapt`` at its own settings, on development tasks.  ``python -m bench rates``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import t2l_engine as t2l
from bench import judging, training
from bench.harness import Record, record
from bench.source import SPECS, bundled
from bench.specs.adapting import chosen, limited
from bench.specs.plan import PLAN
from bench.specs.runs import Specifications
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training.adapt import adapt

RATES: dict[str, Any] = PLAN["rates"]


def records(work: Path, specifications: Specifications) -> Iterator[Record]:
    """Every record of the result file but the run line; what was tuned below ``work`` before is read.

    ``rate`` records: of settings by name and a task, the report of ``t2l adapt`` and right answers, %, on test items.
    """
    tasks = chosen([placed.spec for placed in specifications.development], RATES["tasks"])
    source, checkpoint = work / "rates" / "tasks", resolve_checkpoint(SPECS)
    training.write(source, [limited(task, RATES["examples"]) for task in tasks])
    yield record("plan", checkpoint=bundled(SPECS), rates=RATES)
    engine = t2l.TextToLoRA.from_pretrained(checkpoint)
    for name, changes in RATES["tried"].items():
        folder = work / "rates" / name
        reports = {task.name: tuned(engine, task, folder / task.name, changes) for task in tasks}
        options = {"tasks": source, "checkpoint": checkpoint, "oracle": folder, "repeats": 1, "verify": True}
        found = judging.evaluate(work / "judged", f"rates-{name}", [*reports], ["oracle"], **options)
        for task, report in reports.items():
            yield record("rate", settings=name, task=task, right=round(found["tasks"][task]["oracle"], 2), **report)


def tuned(engine: t2l.TextToLoRA, task: Task, output: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The report of ``t2l adapt`` for the description of ``task`` and its first training examples."""
    examples: Sequence[tuple[str, str]] = [(e.input, e.outputs[0]) for e in task.examples if e.split == "train"]
    report = adapt(engine, PLAN["model"], task.descriptions[0], examples[: RATES["examples"]], output, **changes)
    kept = {name: round(value, 4) for name, value in dataclasses.asdict(report).items()}
    del kept["seconds"]  # of this call, which may have trained nothing
    return kept
