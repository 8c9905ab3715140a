"""The command line ``t2l``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="From a sentence to LoRA adapters, without PEFT.")
train_app = typer.Typer(no_args_is_help=True, help="Train hypernetworks.")
app.add_typer(train_app, name="train")

Checkpoint = Annotated[str, typer.Option("--checkpoint", "-c", help="Bundled checkpoint name, or a checkpoint folder.")]
DEFAULT_CHECKPOINT = "smollm2-135m"


@app.command()
def generate(
    descriptions: Annotated[list[str], typer.Argument(help="Task descriptions, one adapter each.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the adapter; several descriptions: DIR/0, DIR/1, ...")
    ],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    scaling: Annotated[str, typer.Option(help="rslora, plain or a number; default: as trained.")] = "",
) -> None:
    """Write one PEFT adapter folder per description."""
    from t2l_engine.checkpoint import describe
    from t2l_engine.engine import TextToLoRA, resolve_checkpoint
    from t2l_engine.integrations import base_model, smollm2

    _quiet()
    folder = resolve_checkpoint(checkpoint)
    engine = TextToLoRA.from_pretrained(folder, scaling=_scaling(scaling))
    stack = engine.generate(descriptions)
    base = describe(folder).get("base_model")
    base = smollm2.BASE_MODEL if base == base_model.PACKAGED else base
    for i, text in enumerate(descriptions):
        target = output if len(descriptions) == 1 else output / str(i)
        stack.save_pretrained(target, adapter=i, base_model_name_or_path=base)
        typer.echo(f"{target}: rank {engine.hypernetwork.config.rank}, scaling {engine.hypernetwork.scaling:g}, {text!r}")


def _quiet() -> None:
    """No weight-loading bars of transformers: stderr is for our messages."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _scaling(text: str) -> str | float | None:
    if not text or text in ("rslora", "plain"):
        return text or None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--scaling: expected rslora, plain or a number, got {text!r}") from None


@app.command()
def info() -> None:
    """This build and machine: versions, kernels, instruction set, threads, bundled checkpoints."""
    import torch

    import t2l_engine
    from t2l_engine import ops
    from t2l_engine.engine import bundled_checkpoints

    typer.echo(f"t2l_engine {t2l_engine.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    typer.echo(f"native library: {'loaded' if ops.NATIVE else 'not in use: every op runs its plain-torch reference'}")
    try:
        from t2l_engine import _core
    except ImportError:
        typer.echo("build details: unknown (_core was not built: pybind11 was absent)")
    else:
        build = _core.build_info()
        typer.echo(f"build: {build['version']}, {build['build_type']}, compiler {build['compiler']}")
        typer.echo(f"instruction set: {_core.chosen_isa()} (this CPU has {', '.join(_core.available_isas())})")
    typer.echo(f"threads: {torch.get_num_threads()}")
    typer.echo("ops (native kernels cover float32 and bfloat16; other dtypes run the reference):")
    for name in ops.SCHEMAS:
        runs = {backend: "native" if ops.has_kernel(name, backend) else "reference" for backend in ("CPU", "CUDA")}
        typer.echo(f"  {name:24} CPU {runs['CPU']:9}  CUDA {runs['CUDA']}")
    typer.echo(f"bundled checkpoints: {', '.join(bundled_checkpoints()) or 'none'}")


@app.command()
def evaluate(
    tasks: Annotated[Path, typer.Option(help="Task folder: <name>.jsonl files and descriptions.json.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    arms: Annotated[
        str, typer.Option(help="Comma-separated: t2l, t2l-shuffled, base-raw, base-raw-3shot, base-chat.")
    ] = "t2l",
    split: Annotated[str, typer.Option(help="Split of the examples that are asked.")] = "test",
    base_model: Annotated[str, typer.Option(help="Default: what the checkpoint names.")] = "",
    max_items: Annotated[int, typer.Option(help="At most this many examples a task; 0: all.")] = 0,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: arithmetic of the base model.")] = "float32",
) -> None:
    """Exact match of a checkpoint's adapters, and of the base model, on a task folder."""
    import dataclasses

    import torch
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from t2l_engine.checkpoint import describe
    from t2l_engine.engine import TextToLoRA, resolve_checkpoint
    from t2l_engine.evaluation import exact_match
    from t2l_engine.integrations import base_model as models
    from t2l_engine.tasks import load_tasks

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    _quiet()
    folder = resolve_checkpoint(checkpoint)
    loaded = load_tasks(tasks, split)
    if max_items:
        loaded = [dataclasses.replace(t, examples=t.examples[:max_items]) for t in loaded]
    chosen = tuple(a.strip() for a in arms.split(",") if a.strip())
    shots = {t.name: t.examples for t in load_tasks(tasks, "train")} if any("shot" in a for a in chosen) else None
    blocks = describe(folder)
    name = base_model or blocks.get("base_model")
    if not name:
        raise ValueError("--base-model: the checkpoint does not name one; give it here")
    model, tokenizer = models.load(name, getattr(torch, dtype))
    engine = TextToLoRA.from_pretrained(folder)
    with tqdm(total=sum(len(t.examples) * len(t.descriptions) for t in loaded) * len(chosen), unit="answer") as bar:

        def progress(arm: str, count: int) -> None:
            bar.set_postfix(arm=arm)
            bar.update(count)

        result = exact_match.evaluate(
            engine, model, tokenizer, loaded, arms=chosen, shots=shots, max_new_tokens=max_new_tokens,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    about = {"checkpoint": str(checkpoint), "base_model": name, "dtype": dtype, "split": split}
    result = about | result | {"trained_tasks": blocks.get("training", {}).get("tasks", [])}
    table = Table("task", *chosen, title=f"exact match, %, scaling {result['scaling']:g}")
    for task, scores in result["tasks"].items():
        table.add_row(task, *(f"{scores[a]:.1f}" for a in chosen))
    table.add_row("mean", *(f"{result['mean'][a]:.1f}" for a in chosen), style="bold")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@train_app.command()
def sft(
    config: Annotated[Path, typer.Option(help="YAML file with the fields of SFTConfig.")],
    tasks: Annotated[Path, typer.Option(help="Task folder; examples of split 'train' are used.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint folder; an interrupted run there resumes.")],
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's default.")] = 0,
) -> None:
    """Supervised fine-tuning through the frozen base model."""
    import torch
    import yaml

    from t2l_engine.config import from_json
    from t2l_engine.training.sft import SFTConfig, train

    _quiet()
    if threads:
        torch.set_num_threads(threads)
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file")
    train(from_json(SFTConfig, yaml.safe_load(config.read_text(encoding="utf-8")), str(config)), tasks, output)
    typer.echo(f"checkpoint: {output}")


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError, IndexError) as error:
        typer.echo(f"t2l: {error}", err=True)
        sys.exit(1)
