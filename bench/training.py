"""Training the runs of a plan; interrupted runs go on, finished ones are read."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.harness import Record, record
from bench.plans import Run
from bench.suites.learn import logged
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.yaml import read_yaml
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import CONFIG_NAME
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, write_tasks
from t2l_engine.research.training import loop
from t2l_engine.research.training.runs import ADAPTERS
from t2l_engine.research.training.settings import Settings, differences


def train(run: Run, source: Path, output: Path, names: Sequence[str]) -> Path:
    """Train ``run`` on the tasks or adapters ``names`` of ``source``; what it starts from is beside ``output``."""
    made = settings_of(run, output)
    if run.kind != "lora" and is_finished(output, made, names):
        return output  # or a reader would read all its texts once more
    method = importlib.import_module(f"t2l_engine.research.training.{run.kind}")
    return method.train(made, source, output, names=names)


def settings_of(run: Run, output: Path) -> Settings:
    """The settings of ``run`` in folder ``output``; what it starts from is beside that."""
    if not run.initial:
        return run.settings
    start = output.resolve().with_name(run.initial)
    return run.settings.model_copy(update={"initial": str(start / ADAPTERS if run.kind == "lora" else start)})


def is_made(folder: Path) -> bool:
    """Whether a run has written a hypernetwork in ``folder``, of any settings: not the log, which comes before."""
    return (folder / loop.SETTINGS).is_file() and (folder / CONFIG_NAME).is_file()


def is_finished(folder: Path, made: Settings, names: Sequence[str]) -> bool:
    """Whether a hypernetwork in ``folder`` was trained on the tasks ``names`` with the settings ``made``, to its end."""
    if not is_made(folder) or differences(made, read_yaml(folder / loop.SETTINGS)):
        return False
    done = checkpoint.describe(folder)["training"]
    return done["steps_done"] >= made.steps and {*done["tasks"]} == {*names}


def trained(name: str, run: Run, folder: Path, tasks: int | None) -> Record:
    """Settings, tokens and seconds of a run, and its curve: million tokens so far, mean loss of a twentieth of the steps.

    ``tasks``: how many it was trained on, None for all.  A run in waves, each of other tasks, has no curve and no validation
    losses.
    """
    waves = logged(folder)
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
        **({"initial": run.initial} if run.initial else {}),
        tasks=tasks,
        steps=len(steps),
        tokens=sum(row.get("tokens", 0) for row in steps),
        seconds=round(sum(row["seconds"] for row in steps)),
        curve=curve,
        validation=[round(row["val_loss"], 4) for row in waves[0] if "val_loss" in row] if len(waves) == 1 else [],
    )


def write(folder: Path, tasks: Sequence[Task]) -> None:
    """Write the task folder, or ConfigError where it holds other tasks."""
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, tasks)
    elif load_tasks(folder, None) != sorted(tasks, key=lambda task: task.name):
        raise ConfigError(
            f"{folder}: expected the study's tasks, examples and descriptions, found others; --work: a new one"
        )
