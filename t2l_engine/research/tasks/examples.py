"""Examples of one task: deduplication, selection and assignment to splits.

All are functions of the SHA-256 of normalised inputs, independent of file order and random generators.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.folder import Example, Task

#: The splits, in the order in which they are filled, and their shares in percent.
SHARES = {"train": 65, "val": 10, "test": 25}
#: Limit of examples per task; examples of at most MAX_CHARS characters (input and first output) are preferred.
MAX_EXAMPLES, MAX_CHARS = 200, 900


def normalise(text: str) -> str:
    """``text`` with white space collapsed and case folded; inputs with equal results are duplicates.

    >>> normalise("  Île\\n de  FRANCE ")
    'île de france'
    """
    return " ".join(text.split()).casefold()


def words(text: str) -> list[str]:
    """The words of ``text``, case folded, without punctuation."""
    return re.findall(r"[^\W_]+", text.casefold())


def input_digest(example: Example) -> bytes:
    """SHA-256 (32 bytes) of the normalised input, by which the examples of a task are ordered."""
    return hashlib.sha256(normalise(example.input).encode()).digest()


def example_digest(text: str, output: str) -> bytes:
    """SHA-256 (32 bytes) of the normalised input ``text``, a line feed, and the output."""
    return hashlib.sha256(f"{normalise(text)}\n{output}".encode()).digest()


def pool(examples: Iterable[Example]) -> list[Example]:
    """One example per normalised input: the first, with the distinct accepted outputs of all its duplicates, in order.

    The split is that of the first.  Outputs of duplicates with another metric, options or tests are dropped.
    """
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(normalise(example.input), []).append(example)
    pooled = []
    for same in found.values():
        comparable = (example for example in same if _scoring(example) == _scoring(same[0]))
        outputs = dict.fromkeys(output for example in comparable for output in example.outputs)
        pooled.append(dataclasses.replace(same[0], outputs=tuple(outputs)))
    return pooled


def _scoring(example: Example) -> tuple[str, tuple[str, ...], str]:
    return example.metric, example.options, example.tests


def check_splits(tasks: Iterable[Task], where: str) -> None:
    """ConfigError unless every input of a task is in one split only; ``where`` begins the message."""
    shared = {task.name: count for task in tasks if (count := shared_inputs(task.examples))}
    for name, count in shared.items():
        raise ConfigError(f"{where}: {len(shared)} tasks have inputs in more than one split, first: {name}: {count} inputs")


def shared_inputs(examples: Iterable[Example]) -> int:
    """Number of normalised inputs that are in more than one split."""
    splits: dict[str, set[str]] = {}
    for example in examples:
        splits.setdefault(normalise(example.input), set()).add(example.split)
    return sum(len(names) > 1 for names in splits.values())


def choose(examples: Iterable[Example], limit: int = MAX_EXAMPLES) -> list[Example]:
    """At most ``limit`` of the pooled examples, preferring those of up to MAX_CHARS characters (input and first output).

    Ties are broken by the hash of the input; the result is in order of hash.
    """

    def rank(example: Example) -> tuple[bool, bytes]:
        return len(example.input) + len(example.outputs[0]) > MAX_CHARS, input_digest(example)

    return sorted(sorted(pool(examples), key=rank)[:limit], key=input_digest)


def split(examples: Iterable[Example]) -> list[Example]:
    """The pooled examples with their splits: in order of hash the first 65 % train, the next 10 % val, the rest test.

    An input is in one split only.  200 examples give 130, 20 and 50.
    """
    ordered = sorted(pool(examples), key=input_digest)
    return [dataclasses.replace(e, split=_split_of(i, len(ordered))) for i, e in enumerate(ordered)]


def _split_of(position: int, count: int) -> str:
    bounds = itertools.accumulate(SHARES.values())
    return next(name for name, bound in zip(SHARES, bounds, strict=True) if position * 100 < bound * count)
