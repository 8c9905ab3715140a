"""``t2l train``: hypernetworks by supervised fine-tuning or reconstruction, and adapters without a hypernetwork.

``accelerate launch -m t2l_engine train ...`` runs any of the commands on several processes.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from t2l_engine.cli.common import check_kernels, console, keep_freed_memory, need_packages, say, split_names
from t2l_engine.cli.options import takes
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import read_descriptions
from t2l_engine.text import dtypes

app = typer.Typer(no_args_is_help=True, help="Train hypernetworks and adapters; interrupted runs are resumed.")

#: Command -> its settings.
KINDS = {"sft": "SFTSettings", "lora": "LoRASettings", "reconstruction": "ReconstructionSettings"}


def _show_fields(context: typer.Context, wanted: bool) -> None:
    """List the fields of the settings of the command in ``context``."""
    if not wanted:
        return
    need_packages()
    from t2l_engine.research.training import settings

    table = Table("field", "default", "meaning")
    for row in settings.fields(getattr(settings, KINDS[context.info_name or ""])):
        table.add_row(*row)
    console().print(table)
    raise typer.Exit


@dataclasses.dataclass(frozen=True)
class Run:
    """What every run has."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an interrupted run in it is resumed.")]
    config: Annotated[Path | None, typer.Option(help='YAML file of settings, or packaged ones ("mini-sft").')] = None
    overrides: Annotated[list[str], typer.Option("--set", help="name=value, overrides the file; may be repeated.")] = ()
    names: Annotated[str, typer.Option(help="Comma-separated tasks to train on; default: all.")] = ""
    device: Annotated[str, typer.Option(help="cpu or cuda; for several processes use accelerate launch.")] = "cpu"
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's default.")] = 0
    fields: Annotated[
        bool, typer.Option("--fields", help="List the fields of the settings.", callback=_show_fields, is_eager=True)
    ] = False


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What a run on tasks reads."""

    tasks: Annotated[Path, typer.Option(help='Task folder with splits "train" and "val".')]
    manifest: Annotated[str, typer.Option(help="Packaged manifest, or a file of one, that the examples must match.")] = ""
    task_split: Annotated[str, typer.Option(help="Task split of the manifest to train on; default: train.")] = ""

    def chosen(self, names: str) -> list[str] | None:
        """Names of the tasks to train on (None: all); ConfigError if their examples differ from the manifest's."""
        wanted, split = split_names(names), self.task_split or "train"
        if not self.manifest:
            if self.task_split:
                raise ValueError("--task-split: expected --manifest beside it, whose tasks it selects")
            return wanted or None
        listed = manifests.read(self.manifest)
        chosen = manifests.select(read_descriptions(self.tasks, wanted or None), listed, split)
        if others := sorted(set(wanted) - set(chosen)):
            raise ValueError(f"--names: expected tasks that {self.manifest} lists as {split!r}, got {others[0]!r}")
        if not chosen:
            raise ValueError(f"--task-split: {self.tasks} has no task that {self.manifest} lists as {split!r}")
        if found := [d for d in manifests.check(self.tasks, listed, split) if d.task in chosen]:
            got = f"got {len(found)} differences: {found[0]}"
            raise ValueError(f"{self.tasks}: expected the examples of {self.manifest}, {got}")
        return chosen


@app.command()
@takes
def sft(tasks: Tasks, run: Run) -> None:
    """Train a hypernetwork end to end through the frozen base model."""
    _train("sft", run, tasks.tasks, tasks.chosen(run.names))


@app.command()
@takes
def lora(tasks: Tasks, run: Run) -> None:
    """Train one adapter per task, or one for all tasks; writes PEFT folders to OUTPUT/adapters."""
    _train("lora", run, tasks.tasks, tasks.chosen(run.names))


@app.command()
@takes
def reconstruction(
    adapters: Annotated[Path, typer.Option(help="Folder of PEFT adapter folders and descriptions.json.")], run: Run
) -> None:
    """Train a hypernetwork to reproduce a library of adapters; no base model is loaded."""
    _train("reconstruction", run, adapters, split_names(run.names) or None)


def _train(kind: str, run: Run, source: Path, names: list[str] | None) -> None:
    """Train on the tasks or adapters ``names`` in ``source``, print the speed."""
    from transformers.utils import logging

    keep_freed_memory()
    need_packages()
    check_kernels()
    from accelerate.utils import broadcast_object_list

    from t2l_engine.research.training import loop, settings
    from t2l_engine.research.training.runs import WAVES, begun_with, speed

    logging.disable_progress_bar()
    chosen = settings.read(getattr(settings, KINDS[kind]), run.config, run.overrides)
    accelerator = loop.accelerator(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    if hasattr(chosen, "dtype") and "dtype" not in chosen.model_fields_set:
        dtype = begun_with(run.output).get("dtype") or str(dtypes.preferred(accelerator.device)).removeprefix("torch.")
        (dtype,) = broadcast_object_list([dtype])  # every process measures for itself
        chosen = chosen.model_copy(update={"dtype": dtype})
    training = importlib.import_module(f"t2l_engine.research.training.{kind}")
    training.train(chosen, source, run.output, names=names, accelerator=accelerator)
    if accelerator.is_main_process:
        for folder in sorted((run.output / WAVES).glob("*")) or [run.output]:
            say(f"{folder}: {speed(folder)}")
        typer.echo(f"{run.output}: done")
