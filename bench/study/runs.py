"""Task folders and training runs of the study; interrupted runs go on, finished ones are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.study import plan
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.folder import CONFIG_NAME
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, read_descriptions, write_tasks
from t2l_engine.research.training import lora, reconstruction, sft
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings

#: Descriptions by task: those of "train" join a task's own, those of "held-out" are read by evaluations alone; of "steered",
#: by input.
WORDINGS = Path(__file__).with_name("wordings.json")


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
    differences = [d for d in manifests.check(source, manifest) if d.task in held]
    if differences:
        raise ConfigError(f"{source}: differs from manifest {plan.MANIFEST}, first: {differences[0]}")
    wordings = json.loads(WORDINGS.read_text(encoding="utf-8"))
    everything = []
    for tier, chosen in names.items():
        loaded = load_tasks(source, None, names=chosen)
        _write(folder_of(work, tier), [_worded(task, wordings) for task in loaded])
        everything += [dataclasses.replace(task, descriptions=tuple(wordings["held-out"][task.name])) for task in loaded]
    _write(folder_of(work, "evaluation"), everything)
    if benchmarks is not None:
        _write(folder_of(work, "benchmarks"), load_tasks(benchmarks, None))


def _worded(task: Task, wordings: dict[str, dict[str, list[str]]]) -> Task:
    """``task`` with its own descriptions and the study's, each once, without those that are held out."""
    texts = [*task.descriptions, *wordings["train"].get(task.name, [])]
    out = wordings["held-out"][task.name]
    return dataclasses.replace(task, descriptions=tuple(text for text in dict.fromkeys(texts) if text not in out))


def _write(folder: Path, tasks: Sequence[Task]) -> None:
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
        library = work / "library-train" / lora.ADAPTERS
        names = plan.chosen(read_descriptions(library), run.count)
        return reconstruction.train(run.settings, library, work / name, names=names)
    folder, names = folder_of(work, run.tier), None
    if run.learnable or run.count is not None:
        names = list(plan.LEARNABLE) if run.learnable else [task.name for task in load_tasks(folder, "train")]
        names = plan.chosen(names, run.count)
    method = lora if isinstance(run.settings, LoRASettings) else sft
    return method.train(run.settings, folder, work / name, names=names)


def finished(name: str, work: Path) -> bool:
    """Whether run ``name`` has ended: what is judged are the runs that have."""
    run = plan.RUNS[name]
    if not isinstance(run.settings, LoRASettings):
        path = work / name / CONFIG_NAME  # written with every saved state
        return path.is_file() and read_json(path)["training"]["steps_done"] == run.settings.steps
    waves = list((work / name / lora.WAVES).glob("*"))
    return bool(waves) and all((wave / lora.RECORD).is_file() for wave in waves)
