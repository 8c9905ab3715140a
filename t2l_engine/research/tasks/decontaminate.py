"""Decontamination: finds examples that share word n-grams with a benchmark.

Words are those of the case-folded text without punctuation.  Two texts overlap if they share ``n`` consecutive words; a text
of fewer words, but at least ``MIN_WORDS``, overlaps with one of the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from t2l_engine.research.tasks.examples import words
from t2l_engine.research.tasks.folder import Example, Task

MIN_WORDS = 5


class Overlap(NamedTuple):
    """Example ``index`` of ``task`` (over all its splits), in ``split``, shares text with ``benchmark``."""

    task: str
    split: str
    index: int
    benchmark: str


def overlaps(tasks: Sequence[Task], benchmarks: Sequence[Task], n: int = 13) -> list[Overlap]:
    """The examples of ``tasks`` whose input or an output shares ``n`` consecutive words with any text of ``benchmarks``.

    Each is listed once, with the first benchmark found.  ValueError if ``n`` is less than ``MIN_WORDS``.
    """
    if n < MIN_WORDS:
        raise ValueError(f"n: expected at least {MIN_WORDS} words, got {n}")
    known: dict[str, str] = {}
    for benchmark in benchmarks:
        for example in benchmark.examples:
            for ngram in _ngrams(example, n):
                known.setdefault(ngram, benchmark.name)
    found = []
    for task in tasks:
        for index, example in enumerate(task.examples):
            ngram = next((ngram for ngram in _ngrams(example, n) if ngram in known), None)
            if ngram is not None:
                found.append(Overlap(task.name, example.split, index, known[ngram]))
    return found


def decontaminate(tasks: Sequence[Task], benchmarks: Sequence[Task], n: int = 13) -> tuple[list[Task], list[Overlap]]:
    """(``tasks`` without the examples of :func:`overlaps` and without empty tasks, the overlaps)."""
    found = overlaps(tasks, benchmarks, n)
    dropped = {(overlap.task, overlap.index) for overlap in found}
    kept = []
    for task in tasks:
        examples = tuple(e for index, e in enumerate(task.examples) if (task.name, index) not in dropped)
        if examples:
            kept.append(dataclasses.replace(task, examples=examples))
    return kept, found


def _ngrams(example: Example, n: int) -> Iterator[str]:
    """The word ``n``-grams of the example's texts; a shorter text of at least ``MIN_WORDS`` words is one."""
    for text in (example.input, *example.outputs):
        found = words(text)
        if len(found) >= MIN_WORDS:
            for start in range(max(len(found) - n, 0) + 1):
                yield " ".join(found[start : start + n])
