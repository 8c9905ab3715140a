"""``t2l evaluate``: exact match on a task folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from t2l_engine.cli.common import (
    DEFAULT_CHECKPOINT,
    BaseDType,
    BaseModel,
    Checkpoint,
    DType,
    Encoder,
    TrustRemoteCode,
    base_model_of,
    console,
    load_engine,
    split_names,
)


def evaluate(
    tasks: Annotated[Path, typer.Option(help="Task folder: <name>.jsonl files and descriptions.json.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    arms: Annotated[
        str, typer.Option(help="Comma-separated: t2l, t2l-shuffled, base-raw, base-raw-3shot, base-chat.")
    ] = "t2l",
    split: Annotated[str, typer.Option(help="Split of the examples that are asked.")] = "test",
    base_model: BaseModel = "",
    max_items: Annotated[int, typer.Option(min=0, help="At most this many examples a task; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    dtype: BaseDType = DType.float32,
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Exact match of a checkpoint's adapters, and of the base model, on a task folder."""
    from rich.table import Table
    from tqdm import tqdm

    from t2l_engine import checkpoint as checkpoints
    from t2l_engine.evaluation import exact_match
    from t2l_engine.integrations import base_model as models
    from t2l_engine.tasks import load_tasks

    if json_file is not None:  # better now than after the answers
        if not json_file.parent.is_dir():
            raise FileNotFoundError(f"--json: {json_file.parent}: no such folder")
        if json_file.is_dir():
            raise IsADirectoryError(f"--json: {json_file}: expected a file, got a folder")
    loaded = load_tasks(tasks, split)
    if max_items:
        loaded = [dataclasses.replace(t, examples=t.examples[:max_items]) for t in loaded]
    chosen = tuple(split_names(arms))
    exact_match.check_arms(chosen)
    shots = {t.name: t.examples for t in load_tasks(tasks, "train")} if any("shot" in a for a in chosen) else None
    engine, folder = load_engine(checkpoint, "", encoder, trust_remote_code)
    name = base_model_of(folder, base_model)
    model, tokenizer = models.load(name, dtype.torch)
    with tqdm(total=sum(len(t.examples) * len(t.descriptions) for t in loaded) * len(chosen), unit="answer") as bar:

        def progress(arm: str, count: int) -> None:
            bar.set_postfix(arm=arm)
            bar.update(count)

        result = exact_match.evaluate(
            engine, model, tokenizer, loaded, arms=chosen, shots=shots, max_new_tokens=max_new_tokens,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    about = {"checkpoint": str(checkpoint), "base_model": name, "dtype": dtype.value, "split": split}
    result = about | result | {"trained_tasks": list(checkpoints.describe(folder).get("training", {}).get("tasks", []))}
    table = Table("task", *chosen, title=f"exact match, %, scaling {result['scaling']:g}")
    for task, scores in result["tasks"].items():
        table.add_row(task, *(f"{scores[a]:.1f}" for a in chosen))
    table.add_row("mean", *(f"{result['mean'][a]:.1f}" for a in chosen), style="bold")
    console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
