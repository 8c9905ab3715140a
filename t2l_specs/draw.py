"""Random choices from a seed that are the same in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices; uses only seeding with a string and ``random()`` of ``random.Random``, which are stable.

    ``unseen``, which may be changed: whether inputs are laid out in the ways that are kept for testing, see :meth:`layout`.
    """

    def __init__(self, seed: str):
        self._random = random.Random(seed)
        self.unseen = False

    def number(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self._random.random() * len(values))]

    def chance(self) -> bool:
        """True with probability one half."""
        return self._random.random() < 0.5

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return [value for _, value in sorted((self._random.random(), value) for value in values)]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """``count`` of the distinct ``values``, in random order."""
        found: list[T] = []
        while len(found) < count:
            value = self.pick(values)
            if value not in found:
                found.append(value)
        return found

    def layout(self, seen: Sequence[T], unseen: Sequence[T]) -> T:
        """One of ``seen``, or of ``unseen`` where :attr:`unseen` is set."""
        return self.pick(unseen if self.unseen else seen)
