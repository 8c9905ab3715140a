"""A small real model answers the questions of real tasks one by one, in every way: time to the first token, accuracy.

Prompts are those of ``t2l evaluate``.  Every way answers a question before the next is asked, in an order that rotates.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

import t2l_engine as t2l
from bench.harness import Context, Record, record
from bench.icl.first import tokens_of, uncached
from bench.models import shared
from bench.timing import elapsed_us
from examples import demo
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.research.evaluation.answers import cache_argument
from t2l_engine.research.evaluation.metrics import exact_match
from t2l_engine.research.tasks.folder import Example, Task, load_tasks
from t2l_engine.text import packaged
from t2l_engine.text.prompts import prompt_ids, raw_prompt

SHOTS, MAX_NEW_TOKENS = 3, 16
#: As the quality of the bundled checkpoint was measured.
DTYPE = torch.bfloat16
Shots = Sequence[tuple[str, str]]


class Answer(NamedTuple):
    """``us``: to the first token."""

    text: str
    us: float


def tasks(folder: Path | None) -> list[tuple[Task, Shots]]:
    """The tasks of ``folder`` with the questions of split test, and the first examples of split train of each.

    Without a folder those of the demo: the last row of each is its question, the others are its examples.
    """
    if folder is None:
        demos = [(text, shots, last) for text, (_, (*shots, last)) in demo.TASKS.items()]
        return [(Task(text, (text,), (Example(asked, (right,), "test"),)), shots) for text, shots, (asked, right) in demos]
    both = zip(load_tasks(folder, "test"), load_tasks(folder, "train"), strict=True)
    return [(task, [(e.input, e.outputs[0]) for e in shown.examples[:SHOTS]]) for task, shown in both]


# --- answers ---------------------------------------------------------------------------------------------------------


class Speaker:
    """Greedy answers of one sequence at a time; an answer ends with its turn, its line, or MAX_NEW_TOKENS tokens."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends)

    def read(self, ids: Sequence[int], cache: DynamicCache) -> int:
        """The token that follows ``ids``, which ``cache`` holds too from now on."""
        given = {"use_cache": True, "logits_to_keep": 1, **cache_argument(self.model, cache)}
        return int(self.model(input_ids=torch.tensor([ids]), **given).logits[0, -1].argmax())

    def answer(self, ids: Sequence[int], cache: DynamicCache | None = None) -> Answer:
        """``cache`` holds what comes before ``ids``, and no more than that afterwards."""
        cache = DynamicCache() if cache is None else cache
        before, made, line = cache.get_seq_length(), [], ""
        start = time.perf_counter_ns()
        token = self.read(ids, cache)
        us = (time.perf_counter_ns() - start) / 1e3
        while token not in self.ends:
            made.append(token)
            line, *more = self.tokenizer.decode(made, skip_special_tokens=True).strip().split("\n")
            if more or len(made) == MAX_NEW_TOKENS:
                break
            token = self.read([token], cache)
        cache.crop(before - cache.get_seq_length())
        return Answer(line, us)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; one of each is left at least."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


# --- a task ----------------------------------------------------------------------------------------------------------


class Serving:
    """The model as it is, and on the same weights with a slot for an adapter."""

    def __init__(self):
        self.engine = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper")
        self.engine.encoder = uncached(self.engine.encoder)
        model, self.tokenizer = packaged.load(DTYPE)
        adapted = shared(model)
        self.slot = t2l.attach(adapted, slots=1, max_rank=self.engine.hypernetwork.config.rank)
        self.plain, self.adapted = Speaker(model, self.tokenizer), Speaker(adapted, self.tokenizer)

    def ids(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, [prompt])[0]

    def put(self, description: str) -> None:
        """The adapter of a text in its slot."""
        self.engine.generate_into(self.slot, 0, [description])
        self.slot.set(0)


def entries(context: Context, folder: Path | None) -> Iterator[Record]:
    """A record for every task with all its methods, each answer timed."""
    serving = Serving()
    trained = checkpoint.trained_tasks(checkpoint.describe(resolve_checkpoint("smollm2-135m-paper")))
    about = {"threads": context.threads, "dtype": str(DTYPE).removeprefix("torch.")}
    with torch.inference_mode():
        for task, shots in tasks(folder):
            known = {"task": task.name, "trained": task.name in trained, "questions": len(task.examples), **about}
            yield record("questions", **known, **asked(serving, task, shots))


def asked(serving: Serving, task: Task, shots: Shots) -> dict[str, Any]:
    """By the first description of the task: exact match in percent, times to the first token."""
    description, cache = task.descriptions[0], DynamicCache()
    prompts = {
        "icl": [serving.ids(raw_prompt(description, e.input, shots)) for e in task.examples],
        "t2l": [serving.ids(serving.engine.prompt(serving.tokenizer, e.input)) for e in task.examples],
    }
    shown, alone = prompts.values()
    # Beside questions of no task: all tokens of a single prompt would be common, and few questions may begin alike.
    prefix = common_prefix([*shown, *(serving.ids(raw_prompt(description, text, shots)) for text in ("0", "a"))])
    if prefix:
        serving.plain.read(shown[0][:prefix], cache)
    ways = {
        "icl": lambda i: serving.plain.answer(shown[i]),
        "icl-warm": lambda i: serving.plain.answer(shown[i][prefix:], cache),
        "t2l-task": lambda i: serving.adapted.answer(alone[i]),
    }
    serving.put(description)
    for ask in ways.values():
        ask(0)  # not timed, as what comes before: first calls are slower
    generate_us, given, methods = [], {method: [] for method in ways}, [*ways]
    for i in range(len(task.examples)):
        generate_us.append(elapsed_us(lambda: serving.put(description)))
        for method in methods[i % len(ways) :] + methods[: i % len(ways)]:
            given[method].append(ways[method](i))
    tokens = {name: round(statistics.fmean(map(len, ids)), 1) for name, ids in prompts.items()}
    tokens |= {"prefix": prefix, "encoder": tokens_of(serving.engine.encoder, description)}
    arms = {}
    for method, answers in given.items():
        right = [exact_match(a.text, question.outputs) for a, question in zip(answers, task.examples, strict=True)]
        median = round(statistics.median(a.us for a in answers), 1)
        arms[method] = {"accuracy": round(100 * statistics.fmean(right), 1), "first_token_us": {"median": median}}
    return {"description": description, "tokens": tokens, "generate_us": statistics.median(generate_us), "arms": arms}
