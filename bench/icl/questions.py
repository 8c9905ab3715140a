"""A small real model answers the questions of real tasks one by one, in every way: time to first and last token, accuracy.

Examples come before the question as plain text, after the description; an adapted model reads the question alone, in
the form of its training: both as in ``t2l evaluate``.  Every way answers a question before the next is asked, in an order
that rotates.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

import t2l_engine as t2l
from bench.harness import Context, Record, record
from bench.icl.first import embed_anew, tokens_of
from bench.models import shared
from t2l_engine.cli import demo
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.research.evaluation.metrics import exact_match
from t2l_engine.research.tasks.folder import Example, load_tasks
from t2l_engine.testing.models import cache_argument
from t2l_engine.text import packaged
from t2l_engine.text.prompts import raw_prompt

SHOTS, MAX_NEW_TOKENS = 3, 16
#: As the quality of the bundled checkpoint was measured.
DTYPE = torch.bfloat16
ICL, WARM, ADAPTED, MERGED, DESCRIBED = "icl", "icl-warm", "t2l-task", "t2l-merged", "description"
ARMS = (ICL, WARM, ADAPTED, MERGED, DESCRIBED)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task as it is asked: examples to show, questions, and whether the bundled checkpoint was trained on it.

    ``others``: further descriptions, for which answers are not timed: how much depends on the wording.
    """

    name: str
    description: str
    others: tuple[str, ...]
    shots: tuple[tuple[str, str], ...]
    questions: tuple[Example, ...]
    trained: bool


@dataclasses.dataclass(frozen=True)
class Answer:
    """``us``: to the last token, ``first_us``: to the first; ``tokens``: how many."""

    text: str
    first_us: float
    us: float
    tokens: int


def tasks(folder: Path | None, trained: Sequence[str]) -> list[Asked]:
    """The tasks of ``folder``: descriptions, the first examples of split train, the questions of split test.

    Without a folder those of the demo, with a question each.
    """
    if folder is None:
        return [
            Asked(text, text, (), tuple(shots), (Example(asked, (right,), "test"),), False)
            for text, (*shots, (asked, right)) in demo.TASKS.items()
        ]
    shown = {task.name: task.examples[:SHOTS] for task in load_tasks(folder, "train")}
    return [
        Asked(task.name, task.descriptions[0], task.descriptions[1:], shots, task.examples, task.name in trained)
        for task in load_tasks(folder, "test")
        for shots in [tuple((e.input, e.outputs[0]) for e in shown[task.name])]
    ]


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

    def answer(self, ids: Sequence[int], cache: DynamicCache) -> Answer:
        """``cache`` holds what comes before ``ids``, and no more than that afterwards."""
        before, made, line = cache.get_seq_length(), [], ""
        start = time.perf_counter_ns()
        token = self.read(ids, cache)
        first = time.perf_counter_ns()
        while token not in self.ends:
            made.append(token)
            line, *more = self.tokenizer.decode(made, skip_special_tokens=True).strip().split("\n")
            if more or len(made) == MAX_NEW_TOKENS:
                break
            token = self.read([token], cache)
        end = time.perf_counter_ns()
        cache.crop(before - cache.get_seq_length())
        return Answer(line, (first - start) / 1e3, (end - start) / 1e3, len(made) + (token in self.ends))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; one of each is left at least."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


# --- a task ----------------------------------------------------------------------------------------------------------


class Serving:
    """The model as it is, the same weights with a slot for an adapter, and a copy of them that adapters are merged into."""

    def __init__(self):
        self.engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
        model, self.tokenizer = packaged.load(DTYPE)
        adapted, merged = shared(model), copy.deepcopy(model)
        rank = self.engine.hypernetwork.config.rank
        self.slot, self.weights = (t2l.attach(m, slots=1, max_rank=rank) for m in (adapted, merged))
        self.plain, self.adapted, self.merged = (Speaker(m, self.tokenizer) for m in (model, adapted, merged))

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def switch(self, description: str) -> tuple[t2l.AdapterStack, float]:
        """The adapter of a text that the encoder does not know yet, in its slot; microseconds until it can be used."""
        start = time.perf_counter_ns()
        stack = self.engine.hypernetwork.generate(embed_anew(self.engine.encoder, description))
        self.slot.put(0, stack)
        self.slot.set(0)
        return stack, (time.perf_counter_ns() - start) / 1e3

    @contextlib.contextmanager
    def merging(self, stack: t2l.AdapterStack) -> Iterator[float]:
        """The adapter in the weights inside the block; microseconds that merging took."""
        self.weights.put(0, stack)
        start = time.perf_counter_ns()
        self.weights.merge(0)
        taken = (time.perf_counter_ns() - start) / 1e3
        try:
            yield taken
        finally:
            self.weights.unmerge()

    def filled(self, prefix: Sequence[int]) -> tuple[DynamicCache, float]:
        """A cache that holds ``prefix``; microseconds that filling it took."""
        cache, start = DynamicCache(), time.perf_counter_ns()
        if prefix:
            self.plain.read(prefix, cache)
        return cache, (time.perf_counter_ns() - start) / 1e3


def entries(context: Context, folder: Path | None) -> Iterator[Record]:
    """A record for every task with all its arms, each answer timed."""
    serving = Serving()
    trained = checkpoint.describe(resolve_checkpoint("smollm2-135m"))["training"]["tasks"]
    with torch.inference_mode():
        for asked in tasks(folder, trained):
            yield _task(serving, asked, context.threads)


def _task(serving: Serving, asked: Asked, threads: int) -> Record:
    shown, described, alone = (
        [serving.ids(prompt(question.input)) for question in asked.questions]
        for prompt in (
            lambda text: raw_prompt(asked.description, text, asked.shots),
            lambda text: raw_prompt(asked.description, text),
            lambda text: serving.engine.prompt(serving.tokenizer, text),
        )
    )
    prefix = min(common_prefix([*shown, other]) for other in _other_prompts(serving, asked))
    serving.switch(asked.description)  # not timed: first calls are slower
    serving.filled(shown[0][:prefix])
    stack, _ = serving.switch(asked.description)
    cache, fill_us = serving.filled(shown[0][:prefix])
    generate_us, given = [], {arm: [] for arm in ARMS}
    with serving.merging(stack) as merge_us:
        ways = {
            ICL: lambda i: serving.plain.answer(shown[i], DynamicCache()),
            WARM: lambda i: serving.plain.answer(shown[i][prefix:], cache),
            ADAPTED: lambda i: serving.adapted.answer(alone[i], DynamicCache()),
            MERGED: lambda i: serving.merged.answer(alone[i], DynamicCache()),
            DESCRIBED: lambda i: serving.plain.answer(described[i], DynamicCache()),
        }
        for ask in ways.values():
            ask(0)  # not timed
        for i in range(len(asked.questions)):
            generate_us.append(serving.switch(asked.description)[1])
            for arm in ARMS[i % len(ARMS) :] + ARMS[: i % len(ARMS)]:
                given[arm].append(ways[arm](i))
    others = [_accuracy(asked, _reworded(serving, description, alone)) for description in asked.others]
    lengths = {"icl": shown, "t2l": alone, "description": described}
    same = {
        arm: sum(a.text == b.text for a, b in zip(given[arm], given[other], strict=True))
        for arm, other in ((WARM, ICL), (MERGED, ADAPTED))
    }
    tokens = {name: round(statistics.fmean(map(len, prompts)), 1) for name, prompts in lengths.items()}
    about = {"task": asked.name, "trained": asked.trained, "description": asked.description}
    about |= {"questions": len(asked.questions), "threads": threads, "dtype": str(DTYPE).removeprefix("torch.")}
    tokens |= {"prefix": prefix, "encoder": tokens_of(serving.engine.encoder, asked.description)}
    once = {"generate_us": statistics.median(generate_us), "merge_us": merge_us, "fill_us": fill_us}
    once = {name: round(us, 1) for name, us in once.items()}
    arms = {arm: _arm(asked, answers) for arm, answers in given.items()}
    reworded = dict(zip(asked.others, others, strict=True))
    return record("questions", **about, tokens=tokens, **once, reworded=reworded, arms=arms, same_answers=same)


def _other_prompts(serving: Serving, asked: Asked) -> list[list[int]]:
    """Prompts with questions of no task: of a single prompt all tokens would be the common prefix."""
    return [serving.ids(raw_prompt(asked.description, text, asked.shots)) for text in ("0", "a")]


def _reworded(serving: Serving, description: str, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """Answers with the adapter of another description of the task."""
    serving.switch(description)
    return [serving.adapted.answer(ids, DynamicCache()) for ids in prompts]


def _accuracy(asked: Asked, answers: Sequence[Answer]) -> float:
    """Exact match, in percent."""
    right = [exact_match(a.text, q.outputs) for a, q in zip(answers, asked.questions, strict=True)]
    return round(100 * statistics.fmean(right), 1)


def _arm(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "accuracy": _accuracy(asked, answers),
        "tokens": round(statistics.fmean(a.tokens for a in answers), 2),
        "first_token_us": _quartiles([a.first_us for a in answers]),
        "answer_us": _quartiles([a.us for a in answers]),
        "all_us": round(sum(a.us for a in answers), 1),
    }


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and between which values nine tenths lie."""
    if len(values) == 1:
        values = values * 2
    cut = statistics.quantiles(values, n=20, method="inclusive")
    return {"median": round(statistics.median(values), 1), "low": round(cut[0], 1), "high": round(cut[-1], 1)}
