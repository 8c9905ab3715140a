"""``t2l generate``: descriptions to PEFT folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from t2l_engine.cli.common import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    Encoder,
    Json,
    Scaling,
    TrustRemoteCode,
    load_engine,
    print_json,
)

BATCH_SIZE = 64  # adapters in memory at a time
INDEX_NAME = "index.json"


def generate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the adapter; several: DIR/0, DIR/1, ... and DIR/index.json.")
    ],
    descriptions: Annotated[list[str] | None, typer.Argument(help="Task descriptions, one adapter each.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read descriptions here, one a line, blank lines skipped; -: standard input."),
    ] = None,
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write one PEFT adapter folder per description; an adapter already there is replaced.

    One description as an argument: the adapter is in DIR itself.  Several, or --file: in DIR/0, DIR/1, ..., and
    DIR/index.json maps these folders to their descriptions.  --json prints a list of objects with description, folder,
    rank, scaling, modules and parameters.
    """
    from t2l_engine import checkpoint as checkpoints
    from t2l_engine.integrations import base_model, smollm2

    if bool(descriptions) == (file is not None):
        raise typer.BadParameter("expected descriptions as arguments, or --file; not both")
    several = file is not None or len(descriptions) > 1
    texts = descriptions if file is None else _read(file)
    engine, folder = load_engine(checkpoint, scaling, encoder, trust_remote_code)
    config = engine.hypernetwork.config
    base = checkpoints.describe(folder).get("base_model")
    base = smollm2.BASE_MODEL if base == base_model.PACKAGED else base
    index = output / INDEX_NAME
    if several and output.is_dir():
        index.unlink(missing_ok=True)  # what it says is true no longer; the new one is written when all adapters are
    results = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = texts[start : start + BATCH_SIZE]
        stack = engine.generate(batch)
        for i, text in enumerate(batch):
            target = output / str(start + i) if several else output
            stack.save_pretrained(target, adapter=i, base_model_name_or_path=base)
            result = {
                "description": text,
                "folder": str(target),
                "rank": config.rank,
                "scaling": engine.hypernetwork.scaling,
                "modules": list(config.modules),
                "parameters": stack.num_parameters,
            }
            results.append(result)
            if not as_json:
                typer.echo(f"{target}: rank {result['rank']}, scaling {result['scaling']:g}, {text!r}")
    if several:
        names = {str(i): text for i, text in enumerate(texts)}
        index.write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(results)


def _read(file: Path) -> list[str]:
    """The descriptions of ``file``, one a line; "-" is standard input."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file: {file}: expected UTF-8 text: {error}") from None
    lines = [line.strip() for line in text.split("\n")]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"--file: {file}: expected one description a line, got none")
    return found
