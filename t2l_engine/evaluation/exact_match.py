"""Exact match of greedy answers on a task folder, for adapters and for the base model they must beat.

Arms: ``t2l`` (input only, the adapter generated from the description), ``t2l-shuffled`` (the adapter of another task's
description: how much of the gain the text itself brings), ``base-raw`` (base model, description and input as plain text),
``base-raw-3shot`` (three worked examples beside), ``base-chat`` (description and input in the chat template).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from t2l_engine.engine import TextToLoRA
from t2l_engine.handle import attach
from t2l_engine.prompts import chat_prompt, raw_prompt
from t2l_engine.tasks import Example, Task

ARMS = ("t2l", "t2l-shuffled", "base-raw", "base-raw-3shot", "base-chat")


@dataclasses.dataclass(frozen=True)
class Query:
    """One prompt: ``task`` indexes the tasks, ``adapter`` the stack (-1: base model)."""

    task: int
    prompt: str
    adapter: int
    accepted: tuple[str, ...]


def answer_matches(answer: str, accepted: tuple[str, ...]) -> bool:
    """Equality after trimming white space; case and punctuation count."""
    return answer.strip() in {a.strip() for a in accepted}


@torch.no_grad()
def greedy(
    model, tokenizer, handle, queries: list[Query], max_new_tokens: int, batch_size: int, progress: Callable
) -> list[str]:
    """Answers to ``queries``, batched by length across tasks and adapters; an answer ends at its first line break."""
    tokens = [tokenizer(q.prompt, add_special_tokens=False)["input_ids"] for q in queries]
    order = sorted(range(len(queries)), key=lambda i: len(tokens[i]))
    answers = [""] * len(queries)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, padding=True, return_tensors="pt")
        with handle.use([queries[i].adapter for i in rows]):
            out = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text.strip().split("\n")[0]
        progress(len(rows))
    return answers


def _queries(arm: str, tasks: list[Task], shots: dict[str, tuple[Example, ...]], first: list[int], tokenizer) -> list[Query]:
    queries = []
    for index, task in enumerate(tasks):
        source = (index + len(tasks) // 2) % len(tasks) if arm == "t2l-shuffled" else index
        for d, description in enumerate(task.descriptions):
            adapter = first[source] + min(d, len(tasks[source].descriptions) - 1) if arm.startswith("t2l") else -1
            for example in task.examples:
                if arm.startswith("t2l"):
                    prompt = chat_prompt(tokenizer, example.input)
                elif arm == "base-chat":
                    prompt = chat_prompt(tokenizer, f"{description}\n\n{example.input}")
                else:
                    pairs = [(e.input, e.outputs[0]) for e in shots[task.name][:3]] if arm.endswith("3shot") else []
                    prompt = raw_prompt(description, example.input, pairs)
                queries.append(Query(index, prompt, adapter, example.outputs))
    return queries


def check_arms(arms: Sequence[str]) -> None:
    """ValueError unless ``arms`` are some of :data:`ARMS`."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms:
        raise ValueError(f"arms: expected some of {ARMS}, got {unknown[0] if unknown else 'none'!r}")


def evaluate(
    engine: TextToLoRA,
    model,
    tokenizer,
    tasks: list[Task],
    *,
    arms: tuple[str, ...] = ("t2l",),
    shots: dict[str, tuple[Example, ...]] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    progress: Callable[[str, int], None] = lambda arm, count: None,
) -> dict:
    """Exact match in percent per arm and task, each the mean over the task's descriptions and examples.

    ``shots``: examples per task name for "base-raw-3shot".  Returns ``{"scaling": s, "tasks": {name: {arm: percent}},
    "mean": {arm: percent}, "items": {name: count}}``.  Raises ValueError for an unknown arm, or none.
    """
    check_arms(arms)
    for arm in arms:
        if arm == "t2l-shuffled" and len(tasks) < 2:
            raise ValueError("arms: t2l-shuffled needs at least two tasks")
        if arm.endswith("3shot") and not all((shots or {}).get(t.name) for t in tasks):
            raise ValueError(f"shots: {arm} needs examples of every task")
    texts = [d for task in tasks for d in task.descriptions]
    first = [0]
    for task in tasks:
        first.append(first[-1] + len(task.descriptions))
    stack = engine.generate(texts)
    handle = attach(model, stack)
    scores: dict[str, dict[str, float]] = {task.name: {} for task in tasks}
    try:
        for arm in arms:
            queries = _queries(arm, tasks, shots or {}, first, tokenizer)
            answers = greedy(
                model, tokenizer, handle, queries, max_new_tokens, batch_size, lambda n, arm=arm: progress(arm, n)
            )
            hits: list[list[bool]] = [[] for _ in tasks]
            for query, answer in zip(queries, answers, strict=True):
                hits[query.task].append(answer_matches(answer, query.accepted))
            for task, found in zip(tasks, hits, strict=True):
                scores[task.name][arm] = round(100 * sum(found) / len(found), 1)
    finally:
        handle.detach()
    return {
        "scaling": engine.hypernetwork.scaling,
        "mean": {arm: round(sum(s[arm] for s in scores.values()) / len(scores), 1) for arm in arms},
        "tasks": scores,
        "items": {task.name: len(task.examples) for task in tasks},
    }
