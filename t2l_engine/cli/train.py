"""``t2l train``: hypernetworks by supervised fine-tuning or reconstruction, and adapters without a hypernetwork.

``accelerate launch -m t2l_engine train ...`` runs any of the commands on several processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import check_kernels, console, keep_freed_memory, need_packages, say, split_names

app = typer.Typer(no_args_is_help=True, help="Train hypernetworks and adapters; interrupted runs are resumed.")


def _print_fields(kind_name: str) -> Callable[[bool], None]:
    """The callback of ``--fields`` for one kind of settings."""

    def show(wanted: bool) -> None:
        if not wanted:
            return
        from rich.table import Table

        need_packages()
        from t2l_engine.research.training import settings

        table = Table("field", "default", "meaning")
        for row in settings.fields(getattr(settings, kind_name)):
            table.add_row(*row)
        console().print(table)
        raise typer.Exit

    return show


def _fields_option(kind_name: str) -> Any:
    callback = _print_fields(kind_name)
    return typer.Option("--fields", help="List the fields of the settings and exit.", callback=callback, is_eager=True)


Config = Annotated[Path | None, typer.Option(help='YAML file of settings, or packaged ones ("mini-sft").')]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="name=value, overrides the file; may be repeated.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an interrupted run in it is resumed.")]
Tasks = Annotated[Path, typer.Option(help='Task folder with splits "train" and "val".')]
Names = Annotated[str, typer.Option(help="Comma-separated tasks to train on; default: all.")]
Manifest = Annotated[
    str, typer.Option(help='Packaged manifest ("skills", "specs") or a file of one, that the examples must match.')
]
Tier = Annotated[str, typer.Option(help="Tier of the manifest to train on; default: train.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; for several processes use accelerate launch.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's default.")]


@app.command()
def sft(
    tasks: Tasks,
    output: Output,
    config: Config = None,
    overrides: Overrides = None,
    names: Names = "",
    manifest: Manifest = "",
    tier: Tier = "",
    device: Device = "cpu",
    threads: Threads = 0,
    fields: Annotated[bool, _fields_option("SFTSettings")] = False,
) -> None:
    """Train a hypernetwork end to end through the frozen base model."""
    accelerator, settings = _start("SFTSettings", config, overrides, device, threads)
    from t2l_engine.research.training import sft as training

    training.train(settings, tasks, output, names=_chosen(tasks, names, manifest, tier), accelerator=accelerator)
    _finish(accelerator, output, [output])


@app.command()
def lora(
    tasks: Tasks,
    output: Output,
    config: Config = None,
    overrides: Overrides = None,
    names: Names = "",
    manifest: Manifest = "",
    tier: Tier = "",
    device: Device = "cpu",
    threads: Threads = 0,
    fields: Annotated[bool, _fields_option("LoRASettings")] = False,
) -> None:
    """Train one adapter per task, or one for all tasks; writes PEFT folders to OUTPUT/adapters."""
    accelerator, settings = _start("LoRASettings", config, overrides, device, threads)
    from t2l_engine.research.training import lora as training

    training.train(settings, tasks, output, names=_chosen(tasks, names, manifest, tier), accelerator=accelerator)
    _finish(accelerator, output, sorted((output / training.WAVES).iterdir()))


@app.command()
def reconstruction(
    adapters: Annotated[Path, typer.Option(help="Folder of PEFT adapter folders and descriptions.json.")],
    output: Output,
    config: Config = None,
    overrides: Overrides = None,
    names: Names = "",
    device: Device = "cpu",
    threads: Threads = 0,
    fields: Annotated[bool, _fields_option("ReconstructionSettings")] = False,
) -> None:
    """Train a hypernetwork to reproduce a library of adapters, without the base model unless the encoder is a reader."""
    accelerator, settings = _start("ReconstructionSettings", config, overrides, device, threads)
    from t2l_engine.research.training import reconstruction as training

    training.train(settings, adapters, output, names=split_names(names) or None, accelerator=accelerator)
    _finish(accelerator, output, [output])


@app.command()
def plot(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Plot a run's losses so far to loss.png."""
    need_packages()
    from t2l_engine.research.training.log import plot as draw

    typer.echo(str(draw(folder)))


def _start(kind_name: str, config: Path | None, overrides: list[str] | None, device: str, threads: int) -> tuple[Any, Any]:
    """Print the settings; returns (accelerator, settings)."""
    import torch
    from rich.table import Table
    from transformers.utils import logging

    keep_freed_memory()
    need_packages()
    check_kernels()
    from t2l_engine.research.training import loop
    from t2l_engine.research.training import settings as kinds

    logging.disable_progress_bar()
    settings = kinds.read(getattr(kinds, kind_name), config, overrides or [])
    accelerator = loop.accelerator(device)
    if threads:
        torch.set_num_threads(threads)
    if accelerator.is_main_process:
        table = Table(
            "field", "value", "", "meaning", title=f"{kind_name}, {accelerator.num_processes} x {accelerator.device}"
        )
        for row in kinds.rows(settings):
            table.add_row(*row)
        console(stderr=True).print(table)
    return accelerator, settings


def _chosen(tasks: Path, names: str, manifest: str, tier: str) -> list[str] | None:
    """Names of the tasks to train on (None: all); ConfigError if their examples differ from the manifest's."""
    wanted = split_names(names)
    if not manifest:
        if tier:
            raise ValueError("--tier: expected --manifest beside it, which has the tiers")
        return wanted or None
    tier = tier or "train"
    from t2l_engine.files.errors import ConfigError
    from t2l_engine.research.tasks import manifest as manifests
    from t2l_engine.research.tasks.folder import read_descriptions

    listed = manifests.read(manifest)
    chosen = manifests.select(read_descriptions(tasks, wanted or None), listed, tier)
    if others := sorted(set(wanted) - set(chosen)):
        raise ConfigError(f"--names: expected tasks that {manifest} lists as {tier!r}, got {others[0]!r}")
    if not chosen:
        raise ConfigError(f"--tier: {tasks} has no task that {manifest} lists as {tier!r}")
    differences = [d for d in manifests.check(tasks, listed, tier) if d.task in chosen]
    if differences:
        raise ConfigError(
            f"{tasks}: expected the examples of {manifest}, got {len(differences)} differences: {differences[0]}"
        )
    return chosen


def _finish(accelerator: Any, output: Path, runs: list[Path]) -> None:
    if not accelerator.is_main_process:
        return
    from t2l_engine.research.training.log import plot as draw
    from t2l_engine.research.training.log import speed

    for folder in runs:
        draw(folder)
        say(f"{folder}: {speed(folder)}")
    typer.echo(f"{output}: done")
