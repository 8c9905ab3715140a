"""What templates call: tables and rows of results, of all machines or of one; what is not there is refused by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.records import Result, ResultError, Row
from bench.report import cells
from bench.report.tables import Line, Table

#: What a page may show of a table, of each machine; the whole is its CSV.
MOST_COLUMNS, MOST_LINES = 8, 15


class Unavailable(ResultError):
    """A result is missing or refused, which is a problem that was named already."""


class View:
    """``results``: by name, one for each machine, None where one is refused.

    ``machine``: what else is seen than what is of no machine; None: everything.
    """

    results: dict[str, list[Result] | None]
    tables: dict[str, Table]
    _lines: Callable[[str], list[Line]]
    machine: str | None = None

    def of(self, names: Sequence[str]) -> list[Result]:
        """The results of these names; Unavailable where one is missing or refused."""
        found = [self.results[name] for name in names]
        if None in found:
            raise Unavailable
        return [result for some in found for result in some if self._sees(result.machine)]

    def machines(self, name: str) -> list[View]:
        """A view of each machine that has a result of this name."""
        return [self._on(result.machine) for result in self.of([name])]

    def _on(self, machine: str | None) -> View:
        view = copy.copy(self)
        view.machine = machine
        return view

    def _sees(self, machine: str | None) -> bool:
        return None in (machine, self.machine) or machine == self.machine

    def lines(self, name: str, where: Mapping[str, Any] | None = None, least: int = 1) -> list[Line]:
        """The lines of a table in which the columns of ``where`` have the value, or one of the list, that it gives."""
        if name not in self.tables:
            raise ResultError(f"no table is named {name!r}")
        lines = self._lines(name)
        self._expect_columns(name, lines, where or ())
        lines = [line for line in lines if self._sees(line.get("machine"))]
        for head, wanted in (where or {}).items():
            lines = [line for line in lines if line[head] in (wanted if isinstance(wanted, list) else [wanted])]
        if len(lines) < least:
            raise ResultError(f"table {name!r} has no line with {where}")
        return lines

    def _expect_columns(self, name: str, lines: Sequence[Line], heads: Iterable[str]) -> None:
        for head in heads:
            if head not in lines[0]:
                raise ResultError(f"table {name!r} has no column {head!r}; it has: {', '.join(lines[0])}")

    def grid(
        self,
        name: str,
        columns: Sequence[str] | Mapping[str, str],
        where: Mapping[str, Any] | None = None,
        first: int | None = None,
    ) -> str:
        """A part of a table in Markdown: ``columns``, under other headings where a mapping gives them.

        A column of machines stands first where results are of several.
        """
        heads = dict(columns) if isinstance(columns, Mapping) else {head: head for head in columns}
        lines = self.lines(name, where)[:first]
        self._expect_columns(name, lines, heads.values())
        most = max(Counter(line.get("machine") for line in lines).values())
        if len(heads) > MOST_COLUMNS or most > MOST_LINES:
            expected = f"at most {MOST_COLUMNS} columns and {MOST_LINES} lines"
            raise ResultError(f"table {name!r}: expected {expected} on a page, got {len(heads)} and {most}")
        machines = {result.machine for result in self.of(self.tables[name].sources)}
        if "machine" in lines[0] and len(machines) > 1:
            heads = {"machine": "machine"} | heads
        return cells.grid(list(heads), [[line[head] for head in heads.values()] for line in lines])

    def value(self, name: str, column: str, where: Mapping[str, Any] | None = None) -> Any:
        """The one value of a column in the one line that ``where`` leaves."""
        lines = self.lines(name, where)
        if len(lines) > 1:
            raise ResultError(f"table {name!r}: {len(lines)} lines with {where}; expected one")
        if lines[0].get(column) is None:
            raise ResultError(f"table {name!r} has no {column!r} in the line with {where}")
        return lines[0][column]

    def row(self, source: str, name: str, by: str = "target") -> Row:
        """The row of this name (case, threads, cache) on the machine where it is worst.

        ``by``: "target", farthest from its target, or slowest where it has none; "time", slowest; else a baseline, over
        which its speedup is least.
        """
        measures = {"target": lambda row: row.verdict.over if row.verdict else row.us, "time": lambda row: row.us}
        named = [row for result in self.of([source]) for row in result.rows if row.name == name]
        found = named if by in measures else [row for row in named if row.speedup(by)]  # baselines do not run everywhere
        if not found:
            raise ResultError(f"bench/results/{source}: no row {name!r}" + f" with {by!r}" * (by not in measures))
        return max(found, key=measures.get(by, lambda row: 1 / row.speedup(by)))
