"""Task folders and training runs of the study."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench import training
from bench.study import plan
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import Task, load_tasks, read_descriptions
from t2l_engine.research.training import lora

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
    loaded = {task.name: task for task in checked(source, [name for chosen in names.values() for name in chosen])}
    for tier, chosen in names.items():
        training.write(folder_of(work, tier), [worded(loaded[name]) for name in chosen])
    training.write(folder_of(work, "evaluation"), [asked(task) for task in loaded.values()])
    if benchmarks is not None:
        training.write(folder_of(work, "benchmarks"), load_tasks(benchmarks, None))


def checked(source: Path, names: Sequence[str]) -> list[Task]:
    """The tasks ``names`` of ``source``; ConfigError where their examples or splits are not the manifest's."""
    if differences := [d for d in manifests.check(source, manifests.read(plan.MANIFEST)) if d.task in names]:
        raise ConfigError(f"{source}: differs from manifest {plan.MANIFEST}, first: {differences[0]}")
    return load_tasks(source, None, names=names)


def asked(task: Task) -> Task:
    """``task`` with the descriptions that are held out from training."""
    return dataclasses.replace(task, descriptions=tuple(WORDINGS["held-out"][task.name]))


def worded(task: Task) -> Task:
    """``task`` with its own descriptions and the study's, each once, without those that are held out."""
    texts = dict.fromkeys([*task.descriptions, *WORDINGS["train"].get(task.name, [])])
    out = WORDINGS["held-out"][task.name]
    return dataclasses.replace(task, descriptions=tuple(text for text in texts if text not in out))


def train(name: str, work: Path) -> Path:
    """Train run ``name`` of the plan below ``work``; a reconstruction reads the library of tier train."""
    run, source = plan.RUNS[name], work / "library-train" / lora.ADAPTERS
    if run.kind != "reconstruction":
        source = folder_of(work, run.other.get("tier", "train"))
    return training.train(run, source, work / name, plan.chosen(read_descriptions(source), plan.count(run)))
