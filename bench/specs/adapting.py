"""Tuning on a user's examples: a generated start beside others, on specifications that nothing was trained on.

``python -m bench adapt``
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import t2l_engine as t2l
from bench import judging, training
from bench.harness import BenchError, Record, record
from bench.source import SPECS, bundled
from bench.specs import runs, trained
from bench.specs.plan import HELD_OUT, LIBRARY, PLAN, RIVAL, RUNS, T2L, TRAINED, ordered
from bench.suites.learn import logged
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.library import DescriptionIndex
from t2l_engine.research.tasks.folder import Task, load_tasks, read_descriptions
from t2l_engine.research.tasks.specs import suite
from t2l_engine.research.tasks.specs.family import Specification
from t2l_engine.research.training import lora, settings
from t2l_engine.research.training.settings import LoRASettings
from t2l_engine.text.encoder import TextEncoder

ADAPTED: dict[str, Any] = PLAN["adapted"]
#: Where tuning starts: PEFT's own, the adapter that the bundled checkpoint generates from the description, that of
#: description and examples (as many of the budget's as it reads), that of the trained specification whose descriptions are
#: nearest, trained on it alone, and the multi-task LoRA, with the description in its prompts.  The last needs a run of the
#: study, and is left out without.
STARTS = ("peft", "generated", "generated-examples", "nearest", RIVAL)


def chosen(specifications: Iterable[Specification], count: int) -> list[Task]:
    """``count`` tasks with ADAPTED["inputs"] examples and one description, the first of those held out.

    Specifications that have fewer inputs are passed over.
    """
    known = {spec.name: spec for spec in specifications}
    made: list[Task] = []
    for name in ordered(known, "adapted"):
        try:
            task = suite.task(known[name], ADAPTED["inputs"], 0)
        except ConfigError:  # too few inputs
            continue
        made.append(dataclasses.replace(task, descriptions=task.descriptions[-suite.HELD_OUT :][:1]))
        if len(made) == count:
            return made
    raise BenchError(f"specifications: expected {count} with {ADAPTED['inputs']} inputs, found {len(made)}")


def limited(task: Task, budget: int) -> Task:
    """``task`` with ``budget`` training examples, and those of validation and test that all budgets have."""
    counts = {"train": budget, "val": ADAPTED["validation"], "test": ADAPTED["items"]}
    of_split = {split: [e for e in task.examples if e.split == split][:count] for split, count in counts.items()}
    return dataclasses.replace(task, examples=tuple(e for examples in of_split.values() for e in examples))


def rates(work: Path, specifications: runs.Specifications) -> Iterator[Record]:
    """``rates`` records, by which the plan's learning rates were chosen: mean of the lowest losses of development tasks."""
    tasks = chosen([placed.spec for placed in specifications.development], ADAPTED["chosen_by"])
    budget = ADAPTED["chosen_at"]
    for start in ("peft", "generated"):
        lowest = {}
        for rate in ADAPTED["rates"]:
            losses = tuned(work, f"rates-{rate:g}", tasks, budget, start, rate)
            lowest[f"{rate:g}"] = round(statistics.fmean(min(loss for _, loss in of) for of in losses.values()), 4)
        yield record("rates", start=start, budget=budget, tasks=len(tasks), lowest=lowest)


def records(work: Path, specifications: runs.Specifications) -> Iterator[Record]:
    """Every record of the result file but the run line; what was tuned below ``work`` before is read.

    ``adapted`` records: of a task, budget, start and seed the validation losses by step, and right answers, %, of the best;
    ``training`` records: of the multi-task LoRA.
    """
    without = runs.lacking(work)
    lacking = [start for start in STARTS if start in without or not ADAPTED["seeds"][start]]
    starts = [start for start in STARTS if start not in lacking]
    stored = len(specifications.trained)
    yield record("plan", checkpoint=bundled(SPECS), adapted=ADAPTED, stored=stored, lacking=lacking)
    if RIVAL in starts:
        yield from trained(work, (RUNS[RIVAL].initial, RIVAL))
    if "nearest" in starts:
        runs.write_trained(work, specifications)
    of_tier = lambda tier: [placed.spec for placed in specifications.tuned if placed.tier == tier]  # noqa: E731
    tiers = {tier: chosen(of_tier(tier), ADAPTED["tasks_a_tier"]) for tier in HELD_OUT}
    tasks = [task for of in tiers.values() for task in of]
    for seed, budget, start in planned(starts):
        folder = f"adapted-{seed}"
        losses = tuned(work, folder, tasks, budget, start, ADAPTED["learning_rates"][start], seed)
        right = _right(work, folder, budget, start)
        for tier, of in tiers.items():
            for task in of:
                yield record(
                    "adapted",
                    tier=tier,
                    task=task.name,
                    budget=budget,
                    start=start,
                    seed=seed,
                    right=right[task.name]["oracle"],
                    **({"before": right[task.name][T2L]} if T2L in right[task.name] else {}),
                    losses=losses[task.name],
                )


def planned(starts: Iterable[str]) -> list[tuple[int, int, str]]:
    """Seed, budget and start of all that is tuned, seed by seed: some starts have fewer seeds."""
    budgets, seeds = ADAPTED["budgets"], ADAPTED["seeds"]
    made = [(seed, budget, start) for budget in budgets for start in starts for seed in seeds[start]]
    return sorted(made, key=lambda of: of[0])


def tuned(
    work: Path, name: str, tasks: Sequence[Task], budget: int, start: str, rate: float, seed: int = 0
) -> dict[str, list[tuple[int, float]]]:
    """Tune an adapter of each task on ``budget`` examples, below folder ``name``: validation losses by step, by task."""
    source, output = work / name / str(budget) / "tasks", work / name / str(budget) / start
    training.write(source, [limited(task, budget) for task in tasks])
    lora.train(_settings(start, _start(start, work, tasks), rate, seed), source, output)
    rows = [row for wave in logged(output) for row in wave if "tasks" in row]
    return {
        task.name: [(row["step"], round(row["tasks"][task.name], 4)) for row in rows if task.name in row["tasks"]]
        for task in tasks
    }


def _settings(start: str, initial: Path | None, rate: float, seed: int) -> LoRASettings:
    fields = ADAPTED["settings"] | {
        "base_model": PLAN["model"],
        "target_modules": ("q_proj", "v_proj"),
        "learning_rate": rate,
        "seed": seed,
    }
    fields |= {"initial": str(initial.resolve()) if initial else "", "prompt": "description" if start == RIVAL else "input"}
    return settings.build(LoRASettings, fields, source=f"plan.yaml: adapted: {start}")


def _start(start: str, work: Path, tasks: Sequence[Task]) -> Path | None:
    """The adapter, or the folder of adapters by task, that tuning starts from: the same for all budgets, made once."""
    if start == "peft":
        return None
    if start == RIVAL:
        return work / RIVAL / lora.ADAPTERS / lora.MULTI_TASK
    checkpoint = resolve_checkpoint(SPECS)
    texts = [task.descriptions[0] for task in tasks]
    train = [[e for e in task.examples if e.split == "train"][: min(ADAPTED["budgets"])] for task in tasks]
    shown = [[(e.input, e.outputs[0]) for e in of] for of in train]
    known = json.dumps([bundled(SPECS), texts, shown])  # of these weights
    folder = work / "starts" / f"{start}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if folder.is_dir():  # generated again on another CPU, they would be others in the last bits
        return folder
    partial = folder.with_suffix(".partial")
    if start == "nearest":
        for task, stored in zip(tasks, _nearest(work, texts), strict=True):
            shutil.copytree(stored, partial / task.name, dirs_exist_ok=True)
    else:
        engine = t2l.TextToLoRA.from_pretrained(checkpoint)
        most = engine.encoder.max_examples
        stack = engine.generate(texts, [of[:most] for of in shown] if start == "generated-examples" else None)
        for i, task in enumerate(tasks):
            stack.save_pretrained(partial / task.name, adapter=i, base_model_name_or_path=PLAN["model"])
    return partial.rename(folder)


def _nearest(work: Path, texts: Sequence[str]) -> list[Path]:
    """For each of ``texts`` the adapter of the trained specification with the nearest descriptions.

    Only these are trained, with the settings of the study's library: one of all trained specifications would take a day.
    """
    source, library = runs.folder_of(work, TRAINED), work / "stored"
    described = {name: of[: -suite.HELD_OUT] for name, of in read_descriptions(source).items()}
    near = [found[0].name for found in DescriptionIndex(described, TextEncoder.from_pretrained()).nearest(texts)]
    lora.train(RUNS[LIBRARY].settings, source, library, names=sorted(set(near)))
    return [library / lora.ADAPTERS / name for name in near]


def _right(work: Path, name: str, budget: int, start: str) -> dict[str, dict[str, float]]:
    """Exact match on test items by task, in percent, of the adapters that validation kept; once of T2L's before, too."""
    source, output = work / name / str(budget) / "tasks", work / name / str(budget) / start
    options = {
        "tasks": source,
        "checkpoint": resolve_checkpoint(SPECS),
        "oracle": output / lora.ADAPTERS,
        "repeats": 1,
        "verify": True,
    }
    names = [task.name for task in load_tasks(source, "test")]
    arms = ["oracle", T2L] if start == "generated" else ["oracle"]
    return judging.evaluate(work / "judged", f"{name}-{budget}-{start}", names, arms, **options)["tasks"]
