"""A cost as a sum of named terms: every number says what it is, in which unit, and where its formula comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

#: One unit a multiply-add would halve every figure: here a multiply and an add are two operations, as in the paper's tables.
FLOP, BYTE = "FLOP", "byte"


@dataclasses.dataclass(frozen=True)
class Term:
    """One share of a cost: ``value`` in ``unit`` (FLOP or byte); ``source``: its formula, or the paper that states it."""

    name: str
    value: int
    unit: str
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """An immutable sum of terms of one unit; terms of one name are added up.

    >>> cost = flop("attention", 12, "Vaswani et al. 2017") + flop("MLP", 30, "Shazeer 2020") * 2
    >>> cost.total, cost["MLP"], cost.unit
    (72, 60, 'FLOP')
    """

    terms: tuple[Term, ...] = ()

    @property
    def total(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def unit(self) -> str | None:
        """None of an empty cost, which may be added to either."""
        return self.terms[0].unit if self.terms else None

    def __getitem__(self, name: str) -> int:
        """The value of a term; 0 where the cost has no such share."""
        return sum(term.value for term in self.terms if term.name == name)

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        if self.terms and other.terms and self.unit != other.unit:
            raise ValueError(f"cost: expected terms in {self.unit}, got {other.unit}")
        merged: dict[str, Term] = {}
        for term in (*self.terms, *other.terms):
            known = merged.get(term.name)
            merged[term.name] = dataclasses.replace(term, value=term.value + (known.value if known else 0))
        return Cost(tuple(merged.values()))

    def __mul__(self, count: int) -> Cost:
        return Cost(tuple(dataclasses.replace(term, value=term.value * count) for term in self.terms))

    __rmul__ = __mul__

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(term) for term in self.terms]


def flop(name: str, value: int, source: str) -> Cost:
    """A cost of one term in operations, or none where ``value`` is 0."""
    return Cost((Term(name, value, FLOP, source),) if value else ())


def byte(name: str, value: int, source: str) -> Cost:
    """A cost of one term in bytes, or none where ``value`` is 0."""
    return Cost((Term(name, value, BYTE, source),) if value else ())


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())
