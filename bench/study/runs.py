"""Task folders and training runs of the study; interrupted runs go on, finished ones are read."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.harness import Record, record
from bench.study import plan
from bench.suites.learn import logged
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, read_descriptions, write_tasks
from t2l_engine.research.training import lora, reconstruction, sft
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings

#: Descriptions by task: those of "train" join a task's own, those of "held-out" are read by evaluations alone; of "steered",
#: by input.
WORDINGS = read_json(Path(__file__).with_name("wordings.json"))


def folder_of(work: Path, tier: str) -> Path:
    """The tasks of a tier with what is trained on; ``"evaluation"``: all of them with held-out descriptions."""
    return work / "tasks" / tier


def tasks(source: Path, work: Path, benchmarks: Path | None = None) -> None:
    """Write the task folders out of ``source``, which holds the tasks of the manifest, and of ``benchmarks``.

    Raises ConfigError where examples or splits are not the manifest's, or ``work`` holds other tasks already.
    """
    manifest = manifests.read(plan.MANIFEST)
    permissive = manifests.select(manifest.tasks, manifest, "train", permissive=True)
    names = {"train": permissive, "held-out": sorted([*manifest.names("sibling"), *manifest.names("novel")])}
    held = {name for chosen in names.values() for name in chosen}
    if differences := [d for d in manifests.check(source, manifest) if d.task in held]:
        raise ConfigError(f"{source}: differs from manifest {plan.MANIFEST}, first: {differences[0]}")
    everything = []
    for tier, chosen in names.items():
        loaded = load_tasks(source, None, names=chosen)
        write(folder_of(work, tier), [worded(task) for task in loaded])
        everything += [dataclasses.replace(task, descriptions=tuple(WORDINGS["held-out"][task.name])) for task in loaded]
    write(folder_of(work, "evaluation"), everything)
    if benchmarks is not None:
        write(folder_of(work, "benchmarks"), load_tasks(benchmarks, None))


def worded(task: Task) -> Task:
    """``task`` with its own descriptions and the study's, each once, without those that are held out."""
    texts = dict.fromkeys([*task.descriptions, *WORDINGS["train"].get(task.name, [])])
    out = WORDINGS["held-out"][task.name]
    return dataclasses.replace(task, descriptions=tuple(text for text in texts if text not in out))


def write(folder: Path, tasks: Sequence[Task]) -> None:
    """Write the folder, or ConfigError where it holds other tasks."""
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, tasks)
    elif load_tasks(folder, None) != sorted(tasks, key=lambda task: task.name):
        raise ConfigError(
            f"{folder}: expected the study's tasks, examples and descriptions, found others; --work: a new one"
        )


def train(name: str, work: Path) -> Path:
    """Train run ``name`` of the plan below ``work``."""
    run = plan.RUNS[name]
    if isinstance(run.settings, ReconstructionSettings):
        method, source = reconstruction, work / "library-train" / lora.ADAPTERS
    else:
        method, source = lora if isinstance(run.settings, LoRASettings) else sft, folder_of(work, run.tier)
    return method.train(run.settings, source, work / name, names=plan.chosen(read_descriptions(source), run.count))


def trained(name: str, work: Path) -> Record:
    """Settings, tokens and seconds of a run, and its curve: million tokens so far, mean loss of a twentieth of the steps.

    No curve, nor validation losses, of a run in waves, each of other tasks.
    """
    run, waves = plan.RUNS[name], logged(work / name)
    steps = [row for wave in waves for row in wave if "loss" in row]
    bounds = [round(i * len(steps) / 20) for i in range(21)] if len(waves) == 1 else []
    curve, tokens = [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        tokens += sum(row.get("tokens", 0) for row in steps[start:end])  # a reconstruction reads none
        curve.append([round(tokens / 1e6, 3), round(statistics.fmean(row["loss"] for row in steps[start:end]), 4)])
    return record(
        "training",
        run=name,
        settings=run.settings.model_dump(mode="json"),
        tasks=run.count,
        steps=len(steps),
        tokens=sum(row.get("tokens", 0) for row in steps),
        seconds=round(sum(row["seconds"] for row in steps)),
        curve=curve,
        validation=[round(row["val_loss"], 4) for row in waves[0] if "val_loss" in row] if len(waves) == 1 else [],
    )
