"""Evaluations of the study: ``t2l evaluate`` as a user calls it, its results kept below the work folder."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import BenchError, Record, record
from bench.specs import plan, runs
from bench.specs.plan import EVEN, LIBRARY, METHODS, PARTS, PLAN, RIVAL, RUNS, STORED, STORED_METHODS, T2L, TRAINED
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_texts
from t2l_engine.hypernetwork.folder import WEIGHTS_NAME
from t2l_engine.research.tasks.folder import read_descriptions
from t2l_engine.research.training import lora
from t2l_specs import suite


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations that were made before are read."""
    if without := [name for name in RUNS if not runs.finished(name, work)]:
        raise BenchError(f"--work: expected finished runs of the plan in {work}, got none of {', '.join(without)}")
    weights = hashlib.sha256((runs.rounded(T2L, work) / WEIGHTS_NAME).read_bytes()).hexdigest()
    yield record("plan", checkpoint=weights)
    for part in PARTS:
        found = judged(part, work)
        for task, scores in judged(part, work, EVEN, [T2L])["tasks"].items():
            found["tasks"][task][EVEN] = scores[T2L]
        yield from part_records(part, found)
        yield record("two_answers", part=part, tasks=runs.with_two_answers(runs.folder_of(work, part), [*found["tasks"]]))
    yield from part_records(STORED, stored(work))
    yield from runs.trained(work)


def judged(part: str, work: Path, name: str = T2L, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """The result of evaluating run ``name`` on one part, on held-out descriptions."""
    source = runs.folder_of(work, part)
    names = plan.drawn(read_descriptions(source), PLAN["trained_tasks"] if part == TRAINED else None, "judged")
    shots = ",".join(map(str, plan.SHOTS))
    return evaluate(work, f"{name}-{part}", names, methods, source, name, shots=shots, max_items=PLAN["items"][part])


def stored(work: Path) -> dict[str, Any]:
    """The result on trained tasks with a per-task LoRA, on held-out descriptions and inputs."""
    source = runs.folder_of(work, TRAINED)
    names = plan.drawn(read_descriptions(source), RUNS[LIBRARY].other["tasks"], TRAINED)
    return evaluate(work, f"{T2L}-{STORED}", names, STORED_METHODS, source, T2L, max_items=PLAN["items"][TRAINED])


def evaluate(
    work: Path, name: str, names: Sequence[str], methods: Sequence[str], tasks: Path, run: str, **options: Any
) -> dict[str, Any]:
    """The result of evaluating ``methods`` on the tasks ``names``, kept as ``name``; answers of an earlier call are read.

    ``options``: of ``t2l evaluate``, beside those that all evaluations share.
    """
    out = work / "judged"
    out.mkdir(parents=True, exist_ok=True)
    library = work / LIBRARY / lora.ADAPTERS
    needed = {RIVAL: ("multi_task", work / RIVAL), "nearest": ("library", library), "oracle": ("oracle", library)}
    given = {"json": out / f"{name}.json", "resume": out / f"{name}.answers.jsonl", "names": ",".join(names)}
    given |= {"methods": ",".join(methods), "tasks": tasks, "checkpoint": runs.rounded(run, work)}
    given |= {"dtype": "bfloat16", "batch_size": 32, "held_out_descriptions": suite.HELD_OUT, "repeats": PLAN["repeats"]}
    # One validation item of each task chooses the base model's prompt template.
    given |= {"validation_items": 1, "verify": True} | dict(needed[of] for of in methods if of in needed) | options
    command = [sys.executable, "-m", "t2l_engine", "evaluate"]
    for option, value in given.items():
        command += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
    return read_texts(out / f"{name}.json", MAX_DESCRIPTIONS_BYTES)  # names of ten thousand tasks


def part_records(part: str, result: Mapping[str, Any]) -> Iterator[Record]:
    """Scores by task; by method its prompt form and mean number of prompt tokens."""
    for task, scores in result["tasks"].items():
        scores = {method: round(score, 2) for method, score in scores.items()}
        yield record("scores", part=part, task=task, items=result["items"][task], scores=scores)
    for method, details in result["details"].items():
        tokens = round(statistics.fmean(task["prompt_tokens"] for task in details["tasks"].values()), 2)
        groups = {"all": {"prompt_tokens": tokens}}
        yield record("arm", part=part, arm=method, form=result["forms"][method]["form"], groups=groups)
