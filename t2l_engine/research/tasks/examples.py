"""Examples of one task: which are the same, which are chosen, and into which split each falls.

All of it is decided by SHA-256 of normalised inputs, so that neither the order of a file nor a random generator matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable

from t2l_engine.research.tasks.folder import Example

#: The splits, in the order in which the examples of a task fill them, and their shares in percent.
SHARES = {"train": 65, "val": 10, "test": 25}
#: Most examples of a task, and most characters of one (input and first output) that is preferred.
MAX_EXAMPLES, MAX_CHARS = 200, 900


def normalise(text: str) -> str:
    """``text`` with white space collapsed and case folded: inputs that agree in this are the same.

    >>> normalise("  Île\\n de  FRANCE ")
    'île de france'
    """
    return " ".join(text.split()).casefold()


def input_digest(example: Example) -> bytes:
    """SHA-256 (32 bytes) of the normalised input: what orders the examples of a task."""
    return hashlib.sha256(normalise(example.input).encode()).digest()


def example_digest(text: str, output: str) -> bytes:
    """SHA-256 (32 bytes) of the normalised input ``text``, a line feed, and an output as it is."""
    return hashlib.sha256(f"{normalise(text)}\n{output}".encode()).digest()


def pool(examples: Iterable[Example]) -> list[Example]:
    """One example an input, the first as it is written; the accepted outputs of all follow in order, each once.

    The splits of the examples do not matter; that of the first is kept.  Outputs of examples that are judged otherwise than
    the first (metric, options or tests) are not taken: they would be none of its options.
    """
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(normalise(example.input), []).append(example)
    pooled = []
    for same in found.values():
        alike = (example for example in same if _judged(example) == _judged(same[0]))
        outputs = dict.fromkeys(output for example in alike for output in example.outputs)
        pooled.append(dataclasses.replace(same[0], outputs=tuple(outputs)))
    return pooled


def _judged(example: Example) -> tuple[str, tuple[str, ...], str]:
    return example.metric, example.options, example.tests


def shared_inputs(examples: Iterable[Example]) -> int:
    """How many inputs, normalised, are in more than one split."""
    splits: dict[str, set[str]] = {}
    for example in examples:
        splits.setdefault(normalise(example.input), set()).add(example.split)
    return sum(len(names) > 1 for names in splits.values())


def choose(examples: Iterable[Example], most: int = MAX_EXAMPLES, max_chars: int = MAX_CHARS) -> list[Example]:
    """At most ``most`` of the pooled examples, those of up to ``max_chars`` characters (input and first output) first.

    Within the short and within the long ones the hash of the input decides, which is also the order of the result.
    """

    def rank(example: Example) -> tuple[bool, bytes]:
        return len(example.input) + len(example.outputs[0]) > max_chars, input_digest(example)

    return sorted(sorted(pool(examples), key=rank)[:most], key=input_digest)


def split(examples: Iterable[Example]) -> list[Example]:
    """The pooled examples, each with its split: in order of hash the first 65 % train, the next 10 % val, the rest test.

    An input is in one split only.  Of 200 examples 130, 20 and 50.
    """
    ordered = sorted(pool(examples), key=input_digest)
    return [dataclasses.replace(e, split=_split_of(i, len(ordered))) for i, e in enumerate(ordered)]


def _split_of(position: int, count: int) -> str:
    bounds = itertools.accumulate(SHARES.values())
    return next(name for name, bound in zip(SHARES, bounds, strict=True) if position * 100 < bound * count)
