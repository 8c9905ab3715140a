"""The command line ``t2l``, one module per group of commands.

Results go to standard output, everything else to standard error.  With ``--json`` standard output is one JSON document, or
empty if the command fails; only ``info --check`` prints one in both cases.
May be imported: ``main``, ``app``.  Imports every room but ``testing``, which only ``info --check`` loads.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

import t2l_engine
from t2l_engine.cli import adapt, chat, cost, evaluate, export, folders, generate, info, serve_flags, tasks, train, ui
from t2l_engine.cli.common import say
from t2l_engine.cli.options import takes

STATUS = (
    "Exit status: 0 done; 1 an expected error, one line 't2l: ...' on standard error; 2 wrong usage; 130 interrupted. "
    "Warnings are lines 't2l: warning: ...' on standard error."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # unexpected exceptions are bugs: plain traceback
    help="From a sentence to LoRA adapters, without PEFT.",
    epilog=STATUS,
)
for command in (
    generate.generate, adapt.adapt, chat.chat, ui.ui, evaluate.evaluate, folders.convert, export.export, folders.show,
    cost.cost, info.info, serve_flags.serve_flags,
):  # fmt: skip
    app.command(epilog=STATUS)(takes(command))
app.add_typer(train.app, name="train")
app.add_typer(tasks.app, name="tasks")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"t2l_engine {t2l_engine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Entry point; prints expected errors as one line on stderr and exits with status 1, see ``t2l --help``."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            app()
        except (ValueError, OSError, FloatingPointError) as error:
            say(str(error))
            sys.exit(1)
