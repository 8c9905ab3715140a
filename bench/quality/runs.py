"""Training runs and evaluations of the study; what is interrupted goes on, what is finished is read."""

from __future__ import annotations

import hashlib
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import t2l_engine as t2l
from bench.harness import BenchError, Record, record
from bench.quality import plan
from bench.quality.plan import NATURAL, PAPER, PLAN, RIVAL, RUN_OF, RUNS, T2L, TRAINED, drawn
from bench.quality.tasks import folder_of
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_json
from t2l_engine.files.yaml import read_yaml
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.hypernetwork.network import save
from t2l_engine.research.tasks.folder import load_tasks, read_descriptions
from t2l_engine.research.training import loop
from t2l_engine.research.training import runs as lora_runs
from t2l_engine.research.training.settings import LoRASettings, differences
from t2l_specs import suite


def train(name: str, work: Path) -> None:
    """Train run ``name`` of the plan below ``work``; a finished one is kept."""
    if not finished(name, work):
        method = importlib.import_module(f"t2l_engine.research.training.{RUNS[name].kind}")
        method.train(RUNS[name].settings, folder_of(work, TRAINED), work / name)


def finished(name: str, work: Path) -> bool:
    """Whether run ``name`` was trained below ``work`` to its end, with the settings and tasks of the plan."""
    made, folder = RUNS[name].settings, work / name
    if isinstance(made, LoRASettings):
        theirs = lora_runs.settings_of(folder)
        return theirs is not None and not differences(made, theirs)
    if not (folder / loop.SETTINGS).is_file() or not (folder / CONFIG_NAME).is_file():
        return False
    done = checkpoint.describe(folder)["training"]
    same = not differences(made, read_yaml(folder / loop.SETTINGS))
    return same and {*done["tasks"]} == {*read_descriptions(folder_of(work, TRAINED))} and done["steps_done"] >= made.steps


def digest(folder: Path) -> str:
    """SHA-256 of the weights in ``folder``."""
    return hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()


def rounded(name: str, work: Path) -> Path:
    """The checkpoint of run ``name`` with its matrices in bfloat16, as it is published and judged."""
    folder = work / f"{name}-{digest(work / name)[:12]}-bfloat16"  # the run may have gone on since the last call
    if not (folder / WEIGHTS_NAME).is_file():
        network = t2l.TextToLoRA.from_pretrained(work / name).hypernetwork.set_dtype(torch.bfloat16)
        save(network, folder, checkpoint.describe(work / name))
    return folder


def trained(name: str, work: Path) -> Record:
    """Settings, steps, tokens and seconds of a run."""
    waves = sorted((work / name / lora_runs.WAVES).glob("*")) or [work / name]
    steps = [row for wave in waves for row in lora_runs.read_log(wave) if "loss" in row]
    sums = {"tokens": sum(row["tokens"] for row in steps), "seconds": round(sum(row["seconds"] for row in steps))}
    return record("training", run=name, settings=RUNS[name].settings.model_dump(mode="json"), steps=len(steps), **sums)


# --- evaluations, by ``t2l evaluate`` as a user calls it ---------------------------------------------------------------


def records(work: Path, parts: Sequence[str], methods: Sequence[str]) -> Iterator[Record]:
    """Every record of the result file but the run line, of the runs that have finished; evaluations made before are read.

    Raises BenchError for an unknown part, and if T2L has not finished.
    """
    if unknown := {*parts} - {*plan.PARTS}:
        raise BenchError(f"--parts: expected some of {', '.join(plan.PARTS)}, got {', '.join(sorted(unknown))}")
    done = [name for name in RUNS if finished(name, work)]
    if T2L not in done:
        raise BenchError(f"--work: expected the finished run {T2L} of the plan in {work}, got {done}")
    published = {"checkpoint": T2L, "paper": PAPER}
    yield record("plan", **{field: digest(rounded(run, work)) for field, run in published.items() if run in done})
    for part in parts:
        possible = [method for method in methods if RUN_OF.get(method, T2L) in done]
        if part == NATURAL:  # each is of a family of its own
            possible = [method for method in possible if not method.endswith("-same-family")]
        found = judged(part, work, [name for name in done if name != T2L], possible)
        yield from part_records(part, found)
        yield record("two_answers", part=part, tasks=with_two_answers(folder_of(work, part), [*found["tasks"]]))
    for name in done:
        yield trained(name, work)


def with_two_answers(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the tasks ``names`` whose examples have two different answers, so that a guess is often right."""
    return [task.name for task in load_tasks(folder, None, names=names) if len({e.outputs[0] for e in task.examples}) == 2]


def judged(part: str, work: Path, runs: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """The result of ``t2l evaluate`` on one part, on held-out descriptions; ``runs``: those judged beside T2L."""
    source, out, checkpoint = folder_of(work, part), work / "judged", rounded(T2L, work)
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join((part, *runs, checkpoint.name))
    given = {"json": out / f"{name}.json", "resume": out / f"{name}.answers.jsonl", "methods": ",".join(methods)}
    given |= {"tasks": source, "checkpoint": checkpoint, "shots": ",".join(map(str, plan.SHOTS))}
    given |= {"multi_task": work / RIVAL} if RIVAL in runs else {}
    if part == TRAINED:
        given["names"] = ",".join(sorted(drawn(read_descriptions(source), PLAN["trained_tasks"], 0)))
    if part != NATURAL:  # of which no description was trained on
        given["held_out_descriptions"] = suite.HELD_OUT
    # One validation item of each task chooses the base model's prompt template.
    given |= {"dtype": "bfloat16", "batch_size": 32, "repeats": PLAN["repeats"], "validation_items": 1, "verify": True}
    command = [sys.executable, "-m", "t2l_engine", "evaluate", "--max-items", str(PLAN["items"][part])]
    command += [text for run in runs if run != RIVAL for text in ("--also", f"{run}={rounded(run, work)}")]
    for option, value in given.items():
        command += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
    return read_json(out / f"{name}.json", MAX_DESCRIPTIONS_BYTES)  # names of thousands of tasks


def part_records(part: str, result: Mapping[str, Any]) -> Iterator[Record]:
    """Scores by task; by method its prompt form and mean number of prompt tokens."""
    for task, scores in result["tasks"].items():
        scores = {method: round(score, 2) for method, score in scores.items()}
        yield record("scores", part=part, task=task, items=result["items"][task], scores=scores)
    for method, details in result["details"].items():
        tokens = round(statistics.fmean(task["prompt_tokens"] for task in details["tasks"].values()), 2)
        yield record("arm", part=part, arm=method, form=result["forms"][method]["form"], prompt_tokens=tokens)
