"""A cost as a sum of named terms, each with its unit and the source of its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

#: A multiply-add is two FLOPs, as in the paper's tables.
FLOP, BYTE = "FLOP", "byte"


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a cost: ``value`` in ``unit`` (FLOP or byte); ``source``: formula or paper."""

    name: str
    value: int
    unit: str
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """An immutable sum of terms of one unit; terms of equal names are added.

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
        """FLOP or byte; None for an empty cost, which can be added to either."""
        return self.terms[0].unit if self.terms else None

    def __getitem__(self, name: str) -> int:
        """The value of the term ``name``; 0 if there is none."""
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
    """A cost of one term in FLOP; empty if ``value`` is 0."""
    return Cost((Term(name, value, FLOP, source),) if value else ())


def byte(name: str, value: int, source: str) -> Cost:
    """A cost of one term in bytes; empty if ``value`` is 0."""
    return Cost((Term(name, value, BYTE, source),) if value else ())


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())
