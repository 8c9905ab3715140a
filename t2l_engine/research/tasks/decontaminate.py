"""Which examples repeat a benchmark: shared runs of words, as is usual for language models.

Words are those of the case-folded text without punctuation.  Two texts overlap where they share ``n`` words in a row, or,
where one of them has fewer, are the same in words and have at least ``MIN_WORDS``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from t2l_engine.research.tasks.folder import Example, Task

MIN_WORDS = 5


class Overlap(NamedTuple):
    """Example ``index`` of ``task`` (of all its examples), which is of ``split``, shares text with ``benchmark``."""

    task: str
    split: str
    index: int
    benchmark: str


def overlaps(tasks: Sequence[Task], benchmarks: Sequence[Task], n: int = 13) -> list[Overlap]:
    """The examples of ``tasks`` whose input or output shares ``n`` words in a row with any text of ``benchmarks``.

    Each is named once, with the first benchmark found.  ValueError unless ``n`` is at least ``MIN_WORDS``.
    """
    if n < MIN_WORDS:
        raise ValueError(f"n: expected at least {MIN_WORDS} words, got {n}")
    known: dict[str, str] = {}
    for benchmark in benchmarks:
        for example in benchmark.examples:
            for run in _runs(example, n):
                known.setdefault(run, benchmark.name)
    found = []
    for task in tasks:
        for index, example in enumerate(task.examples):
            run = next((run for run in _runs(example, n) if run in known), None)
            if run is not None:
                found.append(Overlap(task.name, example.split, index, known[run]))
    return found


def decontaminate(tasks: Sequence[Task], benchmarks: Sequence[Task], n: int = 13) -> tuple[list[Task], list[Overlap]]:
    """``tasks`` without the examples that :func:`overlaps` names, and those; a task that keeps none is left out."""
    found = overlaps(tasks, benchmarks, n)
    dropped = {(overlap.task, overlap.index) for overlap in found}
    kept = []
    for task in tasks:
        examples = tuple(e for index, e in enumerate(task.examples) if (task.name, index) not in dropped)
        if examples:
            kept.append(dataclasses.replace(task, examples=examples))
    return kept, found


def _runs(example: Example, n: int) -> Iterator[str]:
    """The runs of ``n`` words of the example's texts; a shorter text of at least ``MIN_WORDS`` is one run."""
    for text in (example.input, *example.outputs):
        words = re.findall(r"[^\W_]+", text.casefold())
        if len(words) >= MIN_WORDS:
            for start in range(max(len(words) - n, 0) + 1):
                yield " ".join(words[start : start + n])
