"""``t2l show`` and ``t2l convert``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from t2l_engine.cli.common import Json, choices, console, print_json, printable, split_names
from t2l_engine.cli.describe import describe
from t2l_engine.files.errors import short_repr
from t2l_engine.hypernetwork import convert as conversion
from t2l_engine.hypernetwork.folder import resolve_checkpoint

Format = choices("Format", ("native", "sakana", "doc-to-lora"))


def convert(
    source: Annotated[str, typer.Argument(help="Bundled checkpoint name, or a checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Format | None,
        typer.Option(
            help="native: hypernet.safetensors; sakana: hypermod.pt; doc-to-lora: pytorch_model.bin; default: the other."
        ),
    ] = None,
    module_order: Annotated[
        str,
        typer.Option(help="Modules in row order (q_proj,v_proj), for a folder in Sakana format with another order."),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to another format."""
    folder = resolve_checkpoint(source)
    if target.is_dir():
        if target.samefile(folder):
            raise ValueError(f"{target}: expected another folder than the source")
        if not force and any(target.iterdir()):
            raise FileExistsError(f"{target}: not empty; --force writes into it all the same")
    written = conversion.convert(folder, target, to.value if to is not None else None, split_names(module_order) or None)
    if as_json:
        print_json({"source": str(folder), "target": str(target), "form": written})
    else:
        typer.echo(f"{target}: {'Sakana' if written == 'sakana' else written} format")


def show(
    folder: Annotated[str, typer.Argument(help="Bundled checkpoint name, a checkpoint folder, or a PEFT adapter folder.")],
    as_json: Json = False,
) -> None:
    """Describe a checkpoint (native, Sakana or Doc-to-LoRA format) or a PEFT adapter."""
    about = describe(resolve_checkpoint(folder))
    if as_json:
        print_json(about)
        return
    facts = Table.grid(padding=(0, 2))
    for key, value in about.items():
        if key != "modules":
            facts.add_row(key.replace("_", " "), _text(value))
    title = "modules in row order" if about["kind"] == "checkpoint" else "modules"
    modules = Table(*(key.replace("_", " ") for key in about["modules"][0]), title=title)
    for module in about["modules"]:
        modules.add_row(*map(_text, module.values()))
    screen = console()
    screen.print(facts)
    screen.print(modules)


def _text(value: Any, depth: int = 3) -> str:
    """``value``, from a file, as text of bounded length; ``depth``: levels of lists and objects that are shown."""
    if isinstance(value, (dict, list)) and not depth:
        return short_repr(value)
    inner = functools.partial(_text, depth=depth - 1)
    if isinstance(value, dict):
        return ", ".join(f"{inner(key)} {inner(item)}" for key, item in value.items())
    if isinstance(value, list):  # a one-hot encoder may have hundreds of tasks
        return ", ".join([*map(inner, value[:16]), *([f"... {len(value)} in all"] if len(value) > 16 else [])])
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value)
