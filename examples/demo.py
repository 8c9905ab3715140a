"""Effect and cost of adapters that are generated from sentences (``make demo``)."""

from __future__ import annotations

import argparse
import re
import timeit
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

import t2l_engine as t2l
from t2l_engine import ops
from t2l_engine.text import packaged
from t2l_engine.text.prompts import raw_prompt

CHECKPOINT = "smollm2-135m"
IN_FAMILY, OUT_OF_FAMILY = "in-family", "out-of-family"

#: Description -> (its split, (input, correct answer) of each row).  The checkpoint was not trained on these sentences.
TASKS = {
    'Spot the vehicle and insert it where "Draw the ___ in blue." has its blank.': (IN_FAMILY, [
        ("Nobody mentioned the tractor until Sunday.", "Draw the tractor in blue."),
        ("What do you know about the ambulance?", "Draw the ambulance in blue."),
        ("Do you enjoy the tram?", "Draw the tram in blue."),
    ]),
    "File the sentence under computers, cooking or law.": (IN_FAMILY, [
        ("Did Nora mention the download?", "computers"),
        ("Did Felix mention the prosecutor?", "law"),
        ("On Monday it was all about the recipe.", "cooking"),
    ]),
    'Combine the two words so that "magic" is before the other.': (IN_FAMILY, [
        ('"doctor"', "magic doctor"), ('"sister"', "magic sister"), ("the word pudding", "magic pudding"),
    ]),
    "Write the letters of the word from last to first.": (OUT_OF_FAMILY, [
        ('"doctor"', "rotcod"), ("the word pan", "nap"), ("the word tube", "ebut"),
    ]),
}  # fmt: skip
#: Inputs of several kinds for the user's own sentence.
INPUTS = (
    "paper, cold, forest, seven, moon", "lantern", "Anna Schmidt", "2024-03-07", "The cat sleeps on the red sofa.",
    "name: Omar; city: Lima; age: 31",
)  # fmt: skip
#: An input for the first two descriptions.
SAME_INPUT = "The report says a lot about the recipe in the van."

console = Console(highlight=False, width=118)


@torch.no_grad()
def answer(model, tokenizer, prompts: list[str], max_new_tokens: int = 14) -> list[str]:
    """First line of the greedy continuation of every prompt, in one batch."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


def ask(model, tokenizer, engine, lora, i: int, description: str, inputs: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Every input, and what the base model (which reads the description) and the model with adapter ``i`` answer."""
    base = answer(model, tokenizer, [raw_prompt(description, x) for x in inputs])
    with lora.use(i):
        adapted = answer(model, tokenizer, [engine.prompt(tokenizer, x) for x in inputs])
    return ((x, b[:48], a[:48]) for x, b, a in zip(inputs, base, adapted, strict=True))


def show(title: str, columns: str, rows: Iterable[Iterable[str]], note: str = "") -> None:
    """Print a table with ``note`` below it; a row of one cell begins a section."""
    table = Table(*columns.split(", "), title=escape(title))
    for row in rows:
        cells = [escape(cell[:120]) for cell in row]
        if len(cells) == 1:
            table.add_section()
        table.add_row(*cells)
    console.print(table)
    console.print(f"{note}\n" if note else "")


def show_tasks(model, tokenizer, engine, lora) -> None:
    rows, score, said = [], {"base": 0, "adapted": 0}, {True: "yes", False: "no"}
    for i, (description, (split, pairs)) in enumerate(TASKS.items()):
        rows.append((f"{description} ({split})",))
        asked = ask(model, tokenizer, engine, lora, i, description, [x for x, _ in pairs])
        for (x, base, adapted), (_, right) in zip(asked, pairs, strict=True):
            score["base"] += base == right
            score["adapted"] += adapted == right
            rows.append((x, base, said[base == right], adapted, said[adapted == right]))
    total = sum(len(pairs) for _, pairs in TASKS.values())
    show(
        "1. Sentences that nothing was trained on",
        "input, base model, right?, adapted model, right?",
        rows,
        f"Right, to the letter: base model {score['base']} of {total} (it reads the description in its prompt), "
        f"adapted {score['adapted']} of {total} (it reads the input alone). In-family: training had this kind of task, with "
        "other values. The first two sentences are among those that work best; docs/results/quality.md has the means "
        "over hundreds.",
    )


def show_own(model, tokenizer, engine, text: str) -> None:
    lora = t2l.attach(model, engine.generate([text]))
    show(
        f"Your sentence: {text!r}",
        "input, base model, adapted model",
        ask(model, tokenizer, engine, lora, 0, text, INPUTS),
        "Answers are not scored: the right ones are not known. The base model reads the sentence in its prompt, the adapted "
        "model reads the input alone.",
    )
    lora.detach()


def show_batches(model, tokenizer, engine, lora) -> None:
    with lora.use([0, 1]):
        answers = answer(model, tokenizer, [engine.prompt(tokenizer, SAME_INPUT)] * 2)
    show(f"2. One input, two descriptions: {SAME_INPUT!r}", "description, answer", zip(TASKS, answers, strict=False))

    inputs = [(i, pairs[0][0]) for i, (_, pairs) in enumerate(TASKS.values())]
    inputs += [(-1, inputs[0][1]), (0, "Do you enjoy the ferry?"), (2, "the word banjo")]
    prompts, rows = [engine.prompt(tokenizer, x) for _, x in inputs], []
    with lora.use([i for i, _ in inputs]):
        together = answer(model, tokenizer, prompts)
    for row, (adapter, text) in enumerate(inputs):
        with lora.use(adapter):
            alone = answer(model, tokenizer, prompts)[row]
        name = str(adapter) if adapter >= 0 else "base"
        rows.append((str(row), name, text, together[row][:48], "same" if alone == together[row] else alone))
    show("3. One batch, each row with its own adapter or none", "row, adapter, input, answer, alone", rows)


def show_times(model, engine) -> None:
    description, config = next(iter(TASKS)), engine.hypernetwork.config
    latents = engine.embed([description])
    stack = engine.hypernetwork.generate(latents)
    steps = {
        "embed: SmolLM2 reads the sentence, the hypernetwork attends to its tokens": lambda: engine.embed([description]),
        "generate: A and B of every adapted linear": lambda: engine.hypernetwork.generate(latents),
        "attach: adapter into the model's slots": lambda: t2l.attach(model, stack).detach(),
    }
    size, dtype = config.adapter_values * stack.dtype.itemsize / 1e6, str(stack.dtype).removeprefix("torch.")
    show(
        "4. Times (this machine, one description, fastest of 5)",
        "step, time",
        ((name, f"{1e3 * min(timeit.repeat(step, number=1)):.1f} ms") for name, step in steps.items()),
        f"One adapter: rank {config.rank} on {', '.join(config.modules)} of {config.num_adapted} layers, "
        f"{config.adapter_values:,} values, {size:.2f} MB in {dtype}. FLOPs beside few-shot prompts: t2l cost -c "
        f"{CHECKPOINT}.",
    )


def main(svg: str | None = None, text: str = "") -> None:
    """Run the demo; all printed numbers are measured in this run.

    ``svg``: file for a picture of the first three tables; ``text``: a sentence of the user's own, shown first.
    """
    logging.disable_progress_bar()
    console.print(f"[bold]t2l_engine {t2l.__version__}[/bold], native kernels: {'on' if ops.NATIVE else 'off'}\n")
    console.print("Loading SmolLM2-135M-Instruct (unpacked the first time) and the hypernetwork ...")
    model, tokenizer = packaged.load(torch.float32)  # as the tables of the documentation
    engine = t2l.TextToLoRA.from_pretrained(CHECKPOINT)
    if text.strip():
        show_own(model, tokenizer, engine, text.strip())
    lora = t2l.attach(model, engine.generate([*TASKS]))
    console.record = svg is not None
    show_tasks(model, tokenizer, engine, lora)
    show_batches(model, tokenizer, engine, lora)
    lora.detach()
    if svg is not None:
        picture = console.export_svg(title="make demo")
        without_web_fonts = re.sub(r"@font-face {.*?}", "", picture, flags=re.DOTALL)
        Path(svg).write_text(without_web_fonts, encoding="utf-8")
    show_times(model, engine)
    console.print(
        'Next: t2l generate "File the sentence under computers, cooking or law." -o out/   writes an adapter in the PEFT '
        "format."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--svg", metavar="FILE", help="write the first three tables as a picture")
    parser.add_argument("--text", default="", help="a sentence of your own, whose adapter is shown first")
    main(**vars(parser.parse_args()))
