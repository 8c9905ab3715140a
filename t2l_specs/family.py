"""Families of specifications, and the specifications drawn from them.

A family is a section of ``families.txt`` and a :class:`Rule` in ``rules.py``.  To add one, copy both and change them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Example
from t2l_specs import english, operators
from t2l_specs.draw import Draw
from t2l_specs.english import KIND_NAMES, KINDS, MAPS, NAMES, NOUNS, POOLS, REPLIES, STRINGS, TOPICS, UNITS, values_of
from t2l_specs.inputs import FIELDS, READERS, Maker

#: Families with their phrases, and phrases of further descriptions.
FAMILIES, FURTHER = "families.txt", "further.txt"
#: Turns of 20 examples: 13 train, 2 val, 5 test.  Examples of split "test" have the layouts that the others never have.
_SPLITS = tuple("test" if i % 4 == 3 else "val" if i in {4, 14} else "train" for i in range(20))
#: Draws without a new input after which a specification has no more inputs.
_MAX_DRAWS = 500


class Rule(NamedTuple):
    """What a family does.

    Attributes:
        make: an input for given parameters.
        answer: the answer for given parameters to what the family's reader makes of an input; a pure function that gives a
            text that is not empty, for every input of that kind, also of other families: so specifications can be compared.
        valid: whether parameters go together.
        operators: whether the parameters are operators, some pairs of which training never has together.
    """

    make: Maker
    answer: Callable[[Any, Any], str]
    valid: Callable[[Any], bool] = lambda p: True
    operators: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of specification.

    Args:
        name: of letters and underscores.
        reads: the kind of its inputs, such as "list" or "date".
        params: parameter -> the values that it can have: strings, numbers, or tuples of strings.
        held_out: why this is another skill than those of the training families; the family is then held out whole.
    """

    name: str
    reads: str
    params: Mapping[str, tuple[Any, ...]]
    rule: Rule
    held_out: str = ""

    @property
    def constant(self) -> bool:
        """Whether one answer may be given to most inputs."""
        return self.name == "constant"

    def read(self, text: str) -> Any:
        """An input, read back."""
        return READERS[self.reads](text)

    def phrases(self, use: str, *, further: bool = False) -> tuple[str, ...]:
        """The phrases that descriptions are made of, by use: do, noun, ask, held or given; see :mod:`.wordings`.

        ``further``: those of further descriptions, for training alone.
        """
        return sections(FURTHER if further else FAMILIES).get(self.name, {}).get(use, ())

    def draw(self, draw: Draw) -> tuple[Any, ...] | None:
        """Values for the parameters; None where they do not go together."""
        values = tuple(draw.pick(pool) for pool in self.params.values())
        return values if self.rule.valid(self.named(values)) else None

    def named(self, values: tuple[Any, ...]) -> types.SimpleNamespace:
        """``values`` by the names of the parameters."""
        return types.SimpleNamespace(**dict(zip(self.params, values, strict=True)))


def read_families(rules: Mapping[str, Rule]) -> dict[str, Family]:
    """The families of ``families.txt`` with their ``rules``, in the order of the file."""
    pools = _pools()
    families = {}
    for name, lines in sections(FAMILIES).items():
        if name not in ("frames", "given"):
            params: dict[str, tuple[Any, ...]] = {}
            for parameter, _, values in (line.partition(" ") for line in lines["param"]):
                params[parameter] = (*params.get(parameter, ()), *_values(values, pools))
            families[name] = Family(name, *lines["reads"], params, rules[name], *lines.get("unseen", ()))
    return families


@functools.cache
def sections(file: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """The sections of a file beside this one by name: lines ``# name`` and, under each, ``key value``; key -> values."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    section: dict[str, tuple[str, ...]] = {}
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(" ")
        if key == "#":
            section = found[value] = {}
        elif value and key != "##":
            section[key] = (*section.get(key, ()), value.strip())
    return found


def _values(text: str, pools: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    """The values in a ``param`` line: a JSON list, the name of a pool, or ``name[:count]`` for its first values."""
    if text.startswith("["):
        return values_of(json.loads(text))
    name, _, count = text.rstrip("]").partition("[:")
    return pools[name][: int(count)] if count else pools[name]


def _pools() -> dict[str, tuple[Any, ...]]:
    """The pools of values that ``families.txt`` names."""
    ends = ("com", "org", "net", "co.uk", "io", "edu")
    pairs = Draw("label pairs")
    listed = {"kinds": KIND_NAMES, "containers": KINDS["container"], "fields": FIELDS, "conversions": UNITS, "nouns": NOUNS,
              "names": NAMES, "strings": STRINGS, "replies": REPLIES, "made_words": english.MADE_WORDS,
              "made_names": english.MADE_NAMES, "word_changes": operators.WORD_CHANGES,
              "noun_changes": operators.NOUN_CHANGES, "number_changes": operators.NUMBER_CHANGES,
              "made_forms": operators.MADE_FORMS}  # fmt: skip
    return {
        **POOLS,
        **{name: tuple(values) for name, values in (MAPS | listed).items()},
        "kind_triples": _triples(KIND_NAMES, 400),
        "topic_triples": _triples(list(TOPICS), 300),
        "label_pairs": (*POOLS["common_labels"], *(tuple(pairs.sample(NOUNS, 2)) for _ in range(60))),
        "domains": tuple(f"{word}.{ends[i % len(ends)]}" for i, word in enumerate(STRINGS[:60])),
    }


def _triples(names: list[str], count: int) -> tuple[tuple[str, ...], ...]:
    """``count`` different choices of three of ``names``, each in alphabetical order."""
    draw, found = Draw("triples"), {}
    while len(found) < count:
        found[tuple(sorted(draw.sample(names, 3)))] = None
    return tuple(found)


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
        return self.family.named(self.values)

    def answer(self, text: str) -> str:
        """The answer to an input."""
        return self.family.rule.answer(self.params, self.family.read(text))

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
                text = self.family.rule.make(self.params, draw)
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
        expect(count > 0, "examples", "a number of at least 1", count)
        found = tuple(itertools.islice(self.stream(seed), count))
        if len(found) < count:
            raise ConfigError(f"examples: {self.name} has {len(found)} different inputs, expected {count}")
        return found
