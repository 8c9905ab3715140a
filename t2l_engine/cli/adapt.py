"""``t2l adapt``: an adapter for a user's task, generated from a description and tuned on examples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.cli import common
from t2l_engine.cli.common import EngineOptions, Json, named
from t2l_engine.engine import DocToLoRA
from t2l_engine.text import base_model as models
from t2l_engine.text.prompts import answer_ids, answer_in, prompt_of, read_examples


def adapt(
    description: Annotated[str, typer.Argument(help="Description of the task.")],
    examples: Annotated[Path, typer.Option(help="JSON Lines of at least four examples, input and output.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapter; an interrupted run is resumed.")],
    engine_options: EngineOptions,
    overrides: Annotated[
        list[str], typer.Option("--set", help="name=value, as t2l train lora takes; may be repeated.")
    ] = (),
    as_json: Json = False,
) -> None:
    """Generate an adapter from a description, tune it on examples and write it as a PEFT folder.

    One example in four, at most 64, is held out.  These examples choose the step that is kept and stop the run.  Their loss
    and number of right answers are printed for the generated adapter (kept in start/) and for the tuned one.  This estimate
    is optimistic, as the same examples choose the step.
    """
    began = time.perf_counter()
    common.keep_freed_memory()
    common.need_packages()
    from t2l_engine.research.training import adapt as tuning
    from t2l_engine.research.training.runs import settings_of
    from t2l_engine.research.training.settings import parse_overrides

    shown = read_examples(examples)
    changes = parse_overrides(overrides)
    engine, folder = engine_options.load()
    common.expect_descriptions(folder)
    if isinstance(engine, DocToLoRA) and engine.hypernetwork.config.bias:  # of other ranks than the checkpoint's
        raise ValueError(f"--checkpoint: expected one that reads descriptions, got {folder}, which reads documents")
    model = common.base_model_of(folder, engine_options.base_model)
    with named({"texts[0]": "DESCRIPTION", "settings": "--set"}):
        report = tuning.adapt(engine, model, description, shown, output, **changes)
    _, held_out = tuning.split(shown)
    made = settings_of(output / tuning.RUN)
    assert made is not None  # the run has just finished
    before, after = _right([output / tuning.START, output], made, description, held_out)
    seconds = round(time.perf_counter() - began, 1)
    if as_json:
        common.print_json({**vars(report), "right_before": before, "right_after": after, "total_seconds": seconds})
        return
    count = report.held_out
    typer.echo(
        f"{output}: on {count} held-out examples {before} -> {after} right, loss {report.loss_before:.3f} -> "
        f"{report.loss_after:.3f}; {report.examples} examples, {report.steps} steps, step {report.best_step} kept; "
        f"{seconds:.0f} s"
    )


def _right(adapters: list[Path], made: Mapping[str, Any], description: str, examples: list[tuple[str, str]]) -> list[int]:
    """How many of ``examples`` each of ``adapters`` answers exactly, by greedy decoding: model and prompts as in the run.

    ``made``: the settings of the run.
    """
    from t2l_engine.research.evaluation.answers import Answerer, Query, Store
    from t2l_engine.research.evaluation.methods import Stored
    from t2l_engine.research.evaluation.metrics import exact_match

    model, tokenizer = models.load(made["base_model"], getattr(torch, made["dtype"]))
    answerer = Answerer(model, tokenizer, identity="", store=Store(), batch_size=32)
    longest = max(len(answer_ids(tokenizer, answer)) for _, answer in examples) + 4
    shown = description if made["prompt"] == "description" else ""
    prompts = [prompt_of(made["prompt_form"], tokenizer, text, shown) for text, _ in examples]
    queries = [
        Query(prompt, max_new_tokens=longest, one_line="\n" not in answer.strip())
        for prompt, (_, answer) in zip(prompts, examples, strict=True)
    ]
    counts = []
    for adapter in adapters:
        answers = answerer.ask(queries, Stored(AdapterStack.from_peft(adapter), [""]))
        texts = [answer_in(made["prompt_form"], a.text) for a in answers]
        counts.append(sum(exact_match(text, (answer,)) for text, (_, answer) in zip(texts, examples, strict=True)))
    return counts
