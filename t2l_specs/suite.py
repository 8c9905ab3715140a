"""The suite: families, the specifications drawn from them, their task splits, and their tasks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from t2l_engine.files.errors import expect
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Task
from t2l_specs import rules
from t2l_specs.draw import Draw
from t2l_specs.family import Family, Specification, read_families
from t2l_specs.wordings import FRAMES, HELD_FRAMES, wordings
from t2l_specs.wordings import further as further_wordings

FAMILIES: dict[str, Family] = read_families(rules.LISTS | rules.WORDS | rules.RECORDS | rules.TEXTS | rules.COMPOSED)
#: Version of families, phrases, words and rules: another one makes another suite.
VERSION = 2
SPECIFICATIONS, EXAMPLES = 2400, 60
#: Descriptions of a task, of which the last HELD_OUT are held out.
DESCRIPTIONS, HELD_OUT = len(FRAMES) + len(HELD_FRAMES), len(HELD_FRAMES)
#: Most specifications of a family that is held out whole, of one seed.
_MOST_OUT_OF_FAMILY = 6
#: Draws of parameters without a new specification, after which a family has no more.
_MAX_DRAWS = 60
#: Share of a parameter's values, and of the pairs of operators, that training never has, in 256ths.
_KEPT = 16
#: Every so many specifications, a family has one of trained values in a new combination, which is held out.
_COMBINED = 8
#: Examples of a specification that its digest covers.
_DIGESTED = 16
#: Probe inputs of each specification, by which the behaviour of those of a kind is compared.
_PROBES = 32


@dataclasses.dataclass(frozen=True)
class Placed:
    """A specification with its task split; ``new``: in-family, whether a "value" or only the "combination" is new."""

    spec: Specification
    task_split: str
    new: str = ""


def suite(specifications: int = SPECIFICATIONS, seed: int = 0) -> list[Placed]:
    """The first ``specifications`` of :func:`stream`; at least one of each family.

    Raises ConfigError if there are not so many.
    """
    enough = type(specifications) is int and specifications >= len(FAMILIES)
    expect(enough, "specifications", f"a number of at least {len(FAMILIES)}, the families", specifications)
    found = list(itertools.islice(stream(seed), specifications))
    expect(len(found) == specifications, "specifications", f"at most {len(found)}", specifications)
    return found


def stream(seed: int) -> Iterator[Placed]:
    """Different specifications of all families, in turns, until there are no more.

    No two of them give the same answers to the probe inputs of both, whatever their families; and no specification
    of train gives the answers that a held-out one gives to its own probe inputs.
    """
    draws = {name: Draw(f"{seed}/specifications/{name}") for name in FAMILIES}
    made: dict[str, list[Placed]] = {name: [] for name in FAMILIES}
    known = _Known(seed)
    while draws:
        for name in list(draws):
            full = FAMILIES[name].held_out and len(made[name]) == _MOST_OUT_OF_FAMILY
            new = () if full else filter(known.add, _candidates(FAMILIES[name], draws[name], made[name], seed))
            placed = next(iter(new), None)
            if placed is None:
                del draws[name]
            else:
                made[name].append(placed)
                yield placed


def task(spec: Specification, examples: int, seed: int, further: int = 0) -> Task:
    """The task of a specification: DESCRIPTIONS and ``further`` descriptions, those held out last; ``examples`` examples.

    Raises ConfigError if it has fewer inputs, or its family no phrases of further descriptions.
    """
    first = next(spec.stream(seed))  # of split train
    quoted = first.input, first.outputs[0]
    trained, held = wordings(spec, seed, quoted)
    more = further_wordings(spec, seed, quoted, (*trained, *held), further)
    return Task(spec.name, (*trained, *more, *held), spec.examples(examples, seed))


def digest(spec: Specification, seed: int) -> str:
    """16 hex digits of SHA-256 over descriptions, and inputs, answers and splits of the first examples."""
    made = task(spec, _DIGESTED, seed)
    rows = [made.name, made.descriptions, [(e.input, e.outputs, e.split) for e in made.examples]]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def leaks(tasks: Iterable[tuple[str, Task]]) -> list[str]:
    """Descriptions that are held out and yet trained: ``"task: description"``, given (task split, task) of a suite.

    Held out are all descriptions of in-family and out-of-family tasks, and the last HELD_OUT of train.
    """
    tasks = list(tasks)
    trained = {normalise(text) for split, t in tasks if split == "train" for text in t.descriptions[:-HELD_OUT]}
    return [
        f"{t.name}: {text}"
        for split, t in tasks
        for text in (t.descriptions[-HELD_OUT:] if split == "train" else t.descriptions)
        if normalise(text) in trained
    ]


class _Known:
    """The specifications so far, with their answers to their own probe inputs."""

    def __init__(self, seed: int):
        self.seed = seed
        self._values: set[tuple[str, tuple[Any, ...]]] = set()
        self._of_kind: dict[str, list[tuple[Placed, list[tuple[Any, str]]]]] = {}

    def add(self, placed: Placed) -> bool:
        """Whether ``placed`` is unlike all before it; it is then one of them."""
        spec = placed.spec
        if (spec.family.name, spec.values) in self._values:
            return False
        probes, trained = _probes(spec, self.seed), placed.task_split == "train"
        others = self._of_kind.setdefault(spec.family.reads, [])
        for other, other_probes in others:
            # Two are alike if both answer the probes of the other; a trained and a held-out one, if the trained one does.
            other_trained = other.task_split == "train"
            answered = trained > other_trained or _agrees(other.spec, probes)
            if answered and (trained < other_trained or _agrees(spec, other_probes)):
                return False
        self._values.add((spec.family.name, spec.values))
        others.append((placed, probes))
        return True


def _probes(spec: Specification, seed: int) -> list[tuple[Any, str]]:
    """The probe inputs of ``spec``, as they are read, with its answers."""
    return [(spec.family.read(e.input), e.outputs[0]) for e in spec.examples(_PROBES, seed)]


def _agrees(spec: Specification, probes: list[tuple[Any, str]]) -> bool:
    answer_of, params = spec.family.rule.answer, spec.params  # asked some million times
    return all(answer_of(params, read) == answer for read, answer in probes)


def _candidates(family: Family, draw: Draw, before: list[Placed], seed: int) -> Iterator[Placed]:
    """Draws of ``family`` after those ``before``; in turns, those of trained values in a new combination come first.

    Where the parameters are operators, a new combination has a pair of them that training never has.
    """
    apart = family.rule.operators
    several = sum(len(pool) > 1 for pool in family.params.values()) > 1
    if several and not family.held_out and len(before) % _COMBINED == _COMBINED - 1:
        trained = [placed.spec.values for placed in before if placed.task_split == "train"]
        pools = {name: [values[i] for values in trained] for i, name in enumerate(family.params)}
        for values in _draws(dataclasses.replace(family, params=pools), draw):
            if not apart or _has_kept_pair(family, values, seed):
                yield Placed(Specification(family, values, len(before)), "in-family", "combination")
    for values in _draws(family, draw):
        placed = _placed(Specification(family, values, len(before)), seed)
        if not (apart and placed.task_split == "train" and _has_kept_pair(family, values, seed)):
            yield placed


def _draws(family: Family, draw: Draw) -> Iterator[tuple[Any, ...]]:
    return (values for _ in range(_MAX_DRAWS) if (values := family.draw(draw)) is not None)


def _placed(spec: Specification, seed: int) -> Placed:
    if spec.family.held_out:
        return Placed(spec, "out-of-family")
    pools = zip(spec.family.params.items(), spec.values, strict=True)
    kept = any(_kept(value, pool, f"{seed}/{spec.family.name}/{name}") for (name, pool), value in pools)
    return Placed(spec, "in-family", "value") if kept else Placed(spec, "train")


def _kept(value: Any, pool: Sequence[Any], where: str) -> bool:
    """Whether training never has ``value`` of a parameter; of a pool of n values at most n / 4 are kept."""
    kept = [other for other in pool if _by_hash(f"{where}/{other!r}")]
    return value in kept[: len(pool) // 4]


def _has_kept_pair(family: Family, values: tuple[Any, ...], seed: int) -> bool:
    """Whether training never has some two of the ``values`` of different parameters together."""
    pairs = itertools.combinations(zip(family.params, values, strict=True), 2)
    return any(_by_hash(f"{seed}/{family.name}/{pair!r}") for pair in pairs)


def _by_hash(what: str) -> bool:
    """True for a share of _KEPT of all texts."""
    return hashlib.sha256(what.encode()).digest()[0] < _KEPT
