"""Evaluations of the studies: ``t2l evaluate`` as a user calls it, its results kept below the work folder."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import Record, record
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_texts

#: Of an arm's details, what is kept for every group of tasks.
MEASURES = ("score", "containment", "rouge_l", "prompt_tokens")


def evaluate(out: Path, name: str, names: Sequence[str], arms: Sequence[str], **options: Any) -> dict[str, Any]:
    """The result of one evaluation of ``arms`` on the tasks ``names``, kept as ``name`` in folder ``out``.

    Answers of an earlier call are read from their file, ``options["answers"]`` (default: ``name``), which evaluations that
    share some of their questions may share.  Other ``options`` are those of ``t2l evaluate``: a list where one is repeated.
    """
    out.mkdir(parents=True, exist_ok=True)
    given = {"json": out / f"{name}.json", "resume": out / f"{options.pop('answers', name)}.answers.jsonl"}
    given |= {"dtype": "bfloat16", "batch_size": 32, **options, "names": ",".join(names), "methods": ",".join(arms)}
    command = [sys.executable, "-m", "t2l_engine", "evaluate"]
    for option, values in given.items():
        for value in values if isinstance(values, list) else [values]:
            command += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # those of the run that is recorded
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
    return read_texts(out / f"{name}.json", MAX_DESCRIPTIONS_BYTES)  # names of ten thousand tasks


def part_records(part: str, result: Mapping[str, Any]) -> Iterator[Record]:
    """Scores a task; per arm its prompt form and, per group of tasks, means of what else was measured."""
    for task, scores in result["tasks"].items():
        groups = [group for group, names in result["groups"].items() if task in names]
        scores = {arm: round(score, 2) for arm, score in scores.items()}
        yield record("scores", part=part, task=task, items=result["items"][task], groups=groups, scores=scores)
    for arm, details in result["details"].items():
        groups = {}
        for group, names in result["groups"].items():
            if of := [details["tasks"][name] for name in names if name in details["tasks"]]:
                means = {m: [task[m] for task in of if m in task] for m in MEASURES}
                groups[group] = {m: round(statistics.fmean(values), 2) for m, values in means.items() if values}
        yield record("arm", part=part, arm=arm, form=result["forms"][arm]["form"], groups=groups)
