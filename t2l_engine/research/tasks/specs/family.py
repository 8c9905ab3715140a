"""Families of specifications, and the specifications drawn from them.

To add a family, copy one in its module and its phrases in ``phrases.txt``, and change both.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.draw import Draw
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Example

#: What a family reads -> how a description may call it.
GIVEN = {
    "list": "a list[| of words| of items]",
    "word": "a[| single] word",
    "text": "a [sentence|short text|short message]",
    "number": "a number",
    "numbers": "a list of numbers",
    "date": "a date",
    "time": "a time of day",
    "record": "a record[| with named fields]",
    "person": "a person's name",
    "file": "a file path",
    "quantity": "a quantity [with|and] its unit",
}
PHRASES, FURTHER = "phrases.txt", "further.txt"
#: Turns of 20 examples: 13 train, 2 val, 5 test.  Examples of split "test" have the layouts that the others never have.
_SPLITS = tuple("test" if i % 4 == 3 else "val" if i in {4, 14} else "train" for i in range(20))
#: Draws without a new input after which a specification has no more inputs.
_MAX_DRAWS = 500


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of specification.

    Args:
        name: of letters and underscores.
        reads: the kind of its inputs, a key of GIVEN.  ``answer`` gives a text for every input of that kind, also for those
            of other families, so that specifications can be compared by what they do.
        params: parameter -> the values that it can have: strings, numbers, or tuples of them.
        make: an input for given parameters.
        answer: the answer for given parameters to an input; a pure function that gives a text that is not empty.
        valid: whether parameters go together.
        constant: whether one answer may be given to most inputs.
        held_out: why this is another skill than those of the training families; the family is then held out whole.
    """

    name: str
    reads: str
    params: Mapping[str, Sequence[Any]]
    make: Callable[[Any, Draw], str]
    answer: Callable[[Any, str], str]
    valid: Callable[[Any], bool] = lambda p: True
    constant: bool = False
    held_out: str = ""

    def phrases(self, use: str, *, further: bool = False) -> tuple[str, ...]:
        """The phrases that descriptions are made of, by use: do, noun, ask, held or given; see :mod:`.wordings`.

        ``further``: those of further descriptions, for training alone.
        """
        return phrases_of(FURTHER if further else PHRASES).get(self.name, {}).get(use, ())


@functools.cache
def phrases_of(file: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Phrases by family and use, of a file beside this one: lines ``# family`` and, under each, ``use phrase``."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    family: dict[str, tuple[str, ...]] = {}
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        use, _, phrase = line.partition(" ")
        if use == "#":
            family = found[phrase] = {}
        elif phrase and use != "##":
            family[use] = (*family.get(use, ()), phrase.strip())
    return found


@dataclasses.dataclass(frozen=True)
class Specification:
    """A family with values for its parameters, in the order of ``family.params``; ``number``: its place in the family."""

    family: Family
    values: tuple[Any, ...]
    number: int = 0

    @property
    def name(self) -> str:
        """Of its task: ``"keep_kind-007"``."""
        return f"{self.family.name}-{self.number:03}"

    @functools.cached_property
    def params(self) -> types.SimpleNamespace:
        """The values by the names of the parameters."""
        return types.SimpleNamespace(**dict(zip(self.family.params, self.values, strict=True)))

    def answer(self, text: str) -> str:
        """The answer to an input."""
        return self.family.answer(self.params, text)

    def stream(self, seed: int) -> Iterator[Example]:
        """Its examples, none twice, balanced; each split has no more than half of one answer (and one or two examples),
        unless the family is a constant.

        The first n examples do not depend on how many are read.  Ends where no new input is found.
        """
        draw = Draw(f"{seed}/{self.family.name}/{self.values!r}")
        seen: set[str] = set()
        counts: dict[tuple[str, str], int] = {}
        turn = 0
        while True:
            split = _SPLITS[turn % len(_SPLITS)]
            draw.unseen = split == "test"
            for _ in range(_MAX_DRAWS):
                text = self.family.make(self.params, draw)
                if (normalised := normalise(text)) in seen:
                    continue
                answer = self.answer(text)
                count, total = counts.get((split, answer), 0), counts.get((split, ""), 0)
                if self.family.constant or count <= total // 2:
                    break
            else:
                return
            seen.add(normalised)
            counts[split, answer], counts[split, ""] = count + 1, total + 1
            turn += 1
            yield Example(text, (answer,), split)

    def examples(self, count: int, seed: int) -> tuple[Example, ...]:
        """``count`` examples of :meth:`stream`; ConfigError where there are fewer, or for a number below one."""
        if count < 1:
            raise ConfigError(f"examples: expected a number of at least 1, got {count}")
        found = tuple(example for _, example in zip(range(count), self.stream(seed), strict=False))
        if len(found) < count:
            raise ConfigError(f"examples: {self.name} has {len(found)} different inputs, expected {count}")
        return found


def draw_values(family: Family, draw: Draw) -> tuple[Any, ...] | None:
    """Values for the family's parameters; None where they do not go together."""
    values = tuple(draw.pick(pool) for pool in family.params.values())
    return values if family.valid(types.SimpleNamespace(**dict(zip(family.params, values, strict=True)))) else None
