"""Task folders, training runs and evaluations of the study; what is interrupted goes on, what is finished is read."""

from __future__ import annotations

import hashlib
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import t2l_engine as t2l
from bench.harness import BenchError, Record, record
from bench.specs import plan
from bench.specs.plan import DEVELOPMENT, FURTHER, HELD_OUT, MORE, PLAN, RIVAL, RUNS, T2L, TRAINED, Run, drawn, ordered
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_texts
from t2l_engine.files.yaml import read_yaml
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, read_descriptions, write_tasks
from t2l_engine.research.training import loop
from t2l_engine.research.training import runs as lora_runs
from t2l_engine.research.training.settings import LoRASettings, Settings, differences
from t2l_engine.text.llm_encoder import LLMEncoder
from t2l_specs import suite


def specifications() -> dict[str, list[suite.Placed]]:
    """Those of the plan by part; held out is the third set, without what earlier sets and the study of tuning used."""
    found = suite.suite(PLAN["more"])
    first, later = found[: PLAN["specifications"]], found[PLAN["specifications"] :]
    known = {placed.spec.name: placed for placed in first if placed.task_split == "train"}
    development = set(drawn(known, PLAN["development"], DEVELOPMENT))
    second = held_out_set("second", first[suite.SPECIFICATIONS :], first)
    siblings = {placed.spec.name: placed for placed in later if placed.task_split == "in-family"}
    tuned = [siblings.pop(name) for name in ordered(siblings, "adapted")[: PLAN["adapted"]["siblings"]]]
    for seed in PLAN["adapted"]["novel_seeds"]:
        tuned += suite.more_out_of_family([*found, *second, *tuned], seed)
    trained = [placed for name, placed in known.items() if name not in development]
    held_out = held_out_set("third", siblings.values(), [*found, *second, *tuned])
    parts = {part: [placed for placed in held_out if placed.task_split == split] for part, split in HELD_OUT.items()}
    parts |= {TRAINED: trained, DEVELOPMENT: [known[name] for name in sorted(development)]}
    return parts | {MORE: [*trained, *suite.more_trained(later, second, 0)]}


def held_out_set(name: str, of: Iterable[suite.Placed], known: Sequence[suite.Placed]) -> list[suite.Placed]:
    """Set ``name`` of the plan: a sample of the in-family ones among ``of``, and new out-of-family ones beside ``known``."""
    wanted, by_name = PLAN[name], {placed.spec.name: placed for placed in of if placed.task_split == "in-family"}
    held_out = [by_name[sibling] for sibling in drawn(by_name, wanted["siblings"], name)]
    for seed in wanted["novel_seeds"]:
        held_out += suite.more_out_of_family([*known, *held_out], seed)
    return held_out


def folder_of(work: Path, part: str) -> Path:
    return work / "tasks" / part


def tasks(work: Path, parts: Mapping[str, Sequence[suite.Placed]]) -> None:
    """Write the task folders of all parts; BenchError if a held-out description is trained on."""
    made = {part: [suite.task(placed.spec, suite.EXAMPLES, 0) for placed in of] for part, of in parts.items()}
    made[FURTHER] = [suite.task(placed.spec, suite.EXAMPLES, 0, PLAN["further"]) for placed in parts[MORE]]
    splits = [("train", task) for part in (MORE, FURTHER) for task in made[part]]
    splits += [(part, task) for part in (DEVELOPMENT, *HELD_OUT) for task in made[part]]
    if leaks := suite.leaks(splits):
        raise BenchError(f"tasks: expected no held-out description among those trained on, got {leaks[0]}")
    for part, of in made.items():
        write(folder_of(work, part), of)


def write(folder: Path, tasks: Sequence[Task]) -> None:
    """Write the task folder, or ConfigError where it holds other tasks."""
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, tasks)
    elif load_tasks(folder, None) != sorted(tasks, key=lambda task: task.name):
        raise ConfigError(f"{folder}: expected the tasks of the study, got others; --work: choose a new folder")


def with_two_answers(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the tasks ``names`` whose examples have two different answers, so that a guess is often right."""
    tasks = load_tasks(folder, None, names=names)
    return [task.name for task in tasks if len({example.outputs[0] for example in task.examples}) == 2]


def learnt(run: Run, work: Path) -> tuple[Path, list[str]]:
    """The task folder that ``run`` is trained on, and the names of its tasks there."""
    source = folder_of(work, FURTHER if run.other.get("further") else MORE if run.other.get("more") else TRAINED)
    names = drawn(read_descriptions(source), run.other.get("tasks"), TRAINED)
    return source, with_two_answers(source, names) if run.other.get("two_answers") else names


def settings_of(run: Run, output: Path) -> Settings:
    """The settings of ``run`` in folder ``output``; the run that it starts from lies beside that."""
    if not run.initial:
        return run.settings
    start = output.resolve().with_name(run.initial)
    return run.settings.model_copy(update={"initial": str(start / lora_runs.ADAPTERS if run.kind == "lora" else start)})


def train(name: str, work: Path) -> None:
    """Train run ``name`` of the plan below ``work``, after the run that it starts from; a finished one is kept."""
    run, folder = RUNS[name], work / name
    if run.initial:
        train(run.initial, work)
    if not finished(name, work):
        method = importlib.import_module(f"t2l_engine.research.training.{run.kind}")
        source, names = learnt(run, work)
        method.train(settings_of(run, folder), source, folder, names=names)


def finished(name: str, work: Path) -> bool:
    """Whether run ``name`` was trained below ``work`` to its end, with the settings and tasks of the plan."""
    run, folder = RUNS[name], work / name
    made = settings_of(run, folder)
    if isinstance(made, LoRASettings):
        theirs = lora_runs.settings_of(folder)
        if theirs is None or differences(made, theirs):
            return False
        wanted = {lora_runs.MULTI_TASK} if made.mode == lora_runs.MULTI_TASK else {*learnt(run, work)[1]}
        records = (folder / lora_runs.WAVES).glob(f"*/{lora_runs.RECORD}")  # of the waves that are done
        return wanted <= {name for path in records for name in read_texts(path, MAX_DESCRIPTIONS_BYTES)["adapters"]}
    if not (folder / loop.SETTINGS).is_file() or not (folder / CONFIG_NAME).is_file():
        return False
    done = checkpoint.describe(folder)["training"]
    same = not differences(made, read_yaml(folder / loop.SETTINGS)) and {*done["tasks"]} == {*learnt(run, work)[1]}
    return same and done["steps_done"] >= made.steps


def rounded(name: str, work: Path) -> Path:
    """The checkpoint of run ``name`` with its matrices in bfloat16, as it is published and judged."""
    weights = hashlib.sha256((work / name / WEIGHTS_NAME).read_bytes()).hexdigest()
    folder = work / f"{name}-{weights[:12]}-bfloat16"  # the run may have gone on since the last call
    if not (folder / WEIGHTS_NAME).is_file():
        engine = t2l.TextToLoRA.from_pretrained(work / name)
        assert isinstance(engine.encoder, LLMEncoder)
        network, pooling = engine.hypernetwork.set_dtype(torch.bfloat16), engine.encoder.pooling.bfloat16()
        network.save_pretrained(folder, checkpoint.describe(work / name), pooling)
    return folder


def trained(work: Path) -> Iterator[Record]:
    """``training`` records: settings, steps, tokens and seconds of every run."""
    for name, run in RUNS.items():
        waves = sorted((work / name / lora_runs.WAVES).glob("*")) or [work / name]
        steps = [row for wave in waves for row in lora_runs.read_log(wave) if "loss" in row]
        about = {"settings": run.settings.model_dump(mode="json"), "tasks": len(learnt(run, work)[1]), "steps": len(steps)}
        sums = {"tokens": sum(row["tokens"] for row in steps), "seconds": round(sum(row["seconds"] for row in steps))}
        yield record("training", run=name, **({"initial": run.initial} if run.initial else {}), **about, **sums)


# --- evaluations, by ``t2l evaluate`` as a user calls it ---------------------------------------------------------------


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations that were made before are read."""
    if without := [name for name in RUNS if not finished(name, work)]:
        raise BenchError(f"--work: expected finished runs of the plan in {work}, got none of {', '.join(without)}")
    weights = hashlib.sha256((rounded(T2L, work) / WEIGHTS_NAME).read_bytes()).hexdigest()
    yield record("plan", checkpoint=weights)
    for part in plan.PARTS:
        found = judged(part, work)
        for task, scores in judged(part, work, plan.EVEN, [T2L])["tasks"].items():
            found["tasks"][task][plan.EVEN] = scores[T2L]
        yield from part_records(part, found)
        yield record("two_answers", part=part, tasks=with_two_answers(folder_of(work, part), [*found["tasks"]]))
    yield from part_records(plan.STORED, stored(work))
    yield from trained(work)


def judged(part: str, work: Path, name: str = T2L, methods: Sequence[str] = plan.METHODS) -> dict[str, Any]:
    """The result of evaluating run ``name`` on one part, on held-out descriptions."""
    source = folder_of(work, part)
    names = drawn(read_descriptions(source), PLAN["trained_tasks"] if part == TRAINED else None, "judged")
    shots = ",".join(map(str, plan.SHOTS))
    return evaluate(work, f"{name}-{part}", names, methods, source, name, shots=shots, max_items=PLAN["items"][part])


def stored(work: Path) -> dict[str, Any]:
    """The result on trained tasks with a per-task LoRA, on held-out descriptions and inputs."""
    source = folder_of(work, TRAINED)
    names = drawn(read_descriptions(source), RUNS[plan.LIBRARY].other["tasks"], TRAINED)
    return evaluate(work, f"{T2L}-{plan.STORED}", names, plan.STORED_METHODS, source, T2L, max_items=PLAN["items"][TRAINED])


def evaluate(
    work: Path, name: str, names: Sequence[str], methods: Sequence[str], tasks: Path, run: str, **options: Any
) -> dict[str, Any]:
    """The result of ``methods`` on the tasks ``names``, kept as ``name``; ``options``: more of those of ``t2l evaluate``."""
    out = work / "judged"
    out.mkdir(parents=True, exist_ok=True)
    library = work / plan.LIBRARY / lora_runs.ADAPTERS
    needed = {RIVAL: ("multi_task", work / RIVAL), "nearest": ("library", library), "oracle": ("oracle", library)}
    given = {"json": out / f"{name}.json", "resume": out / f"{name}.answers.jsonl", "names": ",".join(names)}
    given |= {"methods": ",".join(methods), "tasks": tasks, "checkpoint": rounded(run, work)}
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
        form = result["forms"][method]["form"]
        yield record("arm", part=part, arm=method, form=form, groups={"all": {"prompt_tokens": tokens}})
