"""``t2l train``: train hypernetworks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train hypernetworks.")


@app.command()
def sft(
    config: Annotated[Path, typer.Option(help="YAML file with the fields of SFTConfig.")],
    tasks: Annotated[Path, typer.Option(help="Task folder; examples of split 'train' are used.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint folder; an interrupted run there resumes.")],
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's default.")] = 0,
) -> None:
    """Supervised fine-tuning through the frozen base model."""
    import torch
    from transformers.utils import logging

    from t2l_engine._yaml import read_yaml
    from t2l_engine.config import from_json
    from t2l_engine.training.sft import SFTConfig, train

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file")
    train(from_json(SFTConfig, read_yaml(config), str(config)), tasks, output)
    typer.echo(f"checkpoint: {output}")
