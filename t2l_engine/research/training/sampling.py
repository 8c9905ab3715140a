"""Sampling of training data as a pure function of seed and step, so that a resumed run reads the same data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.research.tasks.folder import Task
from t2l_engine.text.prompts import CHAT, answer_ids, answer_of, prompt_ids, prompt_of

G = TypeVar("G")
Descriptions = Sequence[Sequence[int]]  # of each task, indices of the descriptions to draw from

#: Samples with the description in the prompt that are kept: some 100 MB at 200 tokens.
DESCRIBED_KEPT = 1 << 14


@dataclasses.dataclass(frozen=True)
class Sample:
    """A tokenised example: ``tokens`` of prompt and answer, the last ``answer_len`` of the answer; ``input``: its text."""

    tokens: tuple[int, ...]
    answer_len: int
    input: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """``samples`` of the task with index ``task``, for its description with index ``description``; they share one adapter.

    Steps, batches and processes are made of whole groups.
    ``key``: seed of the group's noise, which therefore does not depend on its batch or process.
    """

    task: int
    description: int
    samples: tuple[Sample, ...]
    key: str

    @property
    def longest(self) -> int:
        return max(len(s.tokens) for s in self.samples)


def seeded(*parts: Any) -> int:
    """A seed below 2^63 for a random generator: a hash of the printed ``parts``."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def trained_descriptions(tasks: Sequence[Task], held_out: int) -> list[range]:
    """Of each task, indices of the descriptions that are trained on, all but the last ``held_out``.

    Raises ConfigError if none is left.
    """
    for task in tasks:
        count = len(task.descriptions)
        fewer = f"fewer than the {count} descriptions of task {task.name}"
        expect(held_out < count, "held_out_descriptions", fewer, held_out)
    return [range(len(task.descriptions) - held_out) for task in tasks]


@functools.lru_cache(maxsize=4096)
def _permutation(size: int, *key: Any) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seeded(*key)).shuffle(order)
    return tuple(order)


def permuted(size: int, position: int, *key: Any) -> int:
    """Entry ``position`` of an endless sequence of permutations of ``range(size)``: all values are equally frequent."""
    cycle, index = divmod(position, size)
    return _permutation(size, *key, cycle)[index]


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's shard of every batch: ``rank`` of ``world_size`` processes."""

    rank: int = 0
    world_size: int = 1

    def of(self, groups: Sequence[G]) -> Sequence[G]:
        return groups[self.rank :: self.world_size]


class Examples:
    """The tokenised examples of one split of some tasks; ``kept``: of each task, indices of the examples that are used.

    ``max_tokens``: limit of prompt and answer; longer examples are left out and counted in ``dropped``.
    ``with_description``: whether prompts have the description before the input.
    ``limit``: of the examples kept per task; None: all.

    Raises ConfigError if no example of a task is kept, unless ``allow_empty``.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Any,
        max_tokens: int,
        *,
        with_description: bool,
        template: str = CHAT,
        limit: int | None = None,
        allow_empty: bool = False,
    ):
        self.tasks, self._tokenizer = list(tasks), tokenizer
        self._template, self._with_description = template, with_description
        # With descriptions in prompts, every description is another prompt.
        self._tokenised = functools.lru_cache(DESCRIBED_KEPT if with_description else None)(self._tokenise)
        self.kept: list[list[int]] = []
        self.dropped = 0
        for index, task in enumerate(tasks):
            longest = 0
            if with_description:
                tokens = [len(ids) for ids in tokenizer(list(task.descriptions), add_special_tokens=False)["input_ids"]]
                longest = tokens.index(max(tokens))
            fits = [len(self.sample(index, i, longest).tokens) <= max_tokens for i in range(len(task.examples))]
            self.dropped += fits.count(False)
            self.kept.append([i for i, fit in enumerate(fits) if fit][:limit])
            if not self.kept[-1] and not allow_empty:
                raise ConfigError(f"max_tokens: no example of task {task.name} fits into {max_tokens} tokens")

    def mean_length(self, task: int) -> float:
        """Mean number of tokens of a task's examples (with its first description if prompts have descriptions)."""
        return statistics.fmean(len(self.sample(task, i, 0).tokens) for i in self.kept[task])

    def sample(self, task: int, example: int, description: int) -> Sample:
        return self._tokenised(task, example, description if self._with_description else None)

    def _tokenise(self, task: int, example: int, description: int | None) -> Sample:
        chosen = self.tasks[task].examples[example]
        text = "" if description is None else self.tasks[task].descriptions[description]
        (prompt,) = prompt_ids(self._tokenizer, [prompt_of(self._template, self._tokenizer, chosen.input, text)])
        answer = answer_ids(self._tokenizer, answer_of(self._template, chosen.outputs[0]))
        answer = [*answer, self._tokenizer.eos_token_id]
        return Sample(tuple(prompt + answer), len(answer), chosen.input)

    def group(self, task: int, visit: int, count: int, seed: int, descriptions: Descriptions) -> Group:
        """The group of a task's ``visit``-th visit: its next ``count`` examples and one of its descriptions."""
        name, kept, choices = self.tasks[task].name, self.kept[task], descriptions[task]
        description = choices[random.Random(seeded(seed, "description", name, visit)).randrange(len(choices))]
        turns = range(visit * count, (visit + 1) * count)
        chosen = [kept[permuted(len(kept), turn, seed, "examples", name)] for turn in turns]
        samples = tuple(self.sample(task, example, description) for example in chosen)
        return Group(task, description, samples, f"{seed}/{name}/{visit}")

    def all_groups(self, count: int, descriptions: Descriptions) -> list[Group]:
        """Every kept example once, in groups of up to ``count``, shortest first; descriptions rotate within a task."""
        groups = []
        for index, (kept, choices) in enumerate(zip(self.kept, descriptions, strict=True)):
            for start in range(0, len(kept), count):
                description = choices[start // count % len(choices)]
                samples = tuple(self.sample(index, i, description) for i in kept[start : start + count])
                groups.append(Group(index, description, samples, ""))
        return sorted(groups, key=lambda g: g.longest)


@dataclasses.dataclass
class Stream(Generic[G]):
    """The groups of every step: tasks in endless permutations, bucketed by length over ``bucket_steps`` steps.

    With ``bucket_steps`` 1 the tasks of a step are distinct if ``per_step`` divides their number; otherwise a step that
    spans two permutations may have a task twice.

    ``make``: (task, visit) -> group; visits of a task count from 0.  ``length``: of a group, the key of bucketing.
    """

    num_tasks: int
    per_step: int
    seed: int
    make: Callable[[int, int], G]
    length: Callable[[G], int] = lambda group: 0
    bucket_steps: int = 1
    _pool: tuple[int, list[G]] | None = None  # the last bucket

    def step(self, step: int) -> list[G]:
        """The groups of ``step``, shortest first."""
        bucket, index = divmod(step, self.bucket_steps)
        if self._pool is None or self._pool[0] != bucket:
            size = self.bucket_steps * self.per_step
            places = range(bucket * size, (bucket + 1) * size)
            tasks = [(permuted(self.num_tasks, at, self.seed, "tasks"), at // self.num_tasks) for at in places]
            self._pool = bucket, sorted((self.make(*of) for of in tasks), key=self.length)
        start = permuted(self.bucket_steps, index, self.seed, "bucket", bucket) * self.per_step
        return self._pool[1][start : start + self.per_step]


def divide(groups: Sequence[G], per_batch: int, shard: Shard) -> list[Sequence[G]]:
    """This process's shard of each batch; ``groups`` are split evenly into batches of at most ``per_batch``.

    Raises ConfigError if a shard would be empty.
    """
    count = -(-len(groups) // per_batch)
    batches = [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]
    if min(map(len, batches)) < shard.world_size:
        raise ConfigError(
            f"tasks_per_batch: expected at least a task for each of {shard.world_size} processes in every batch, "
            f"got one of {min(map(len, batches))}"
        )
    return [shard.of(batch) for batch in batches]
