"""Long tables, for ``python -m bench table``: lists of lines from heading to value, raw, in the unit of the heading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table as RichTable

from bench.records import OURS, Result, ResultError, Row
from bench.report.cells import cell
from bench.report.data import Data

Line = dict[str, Any]
#: Derived tables by name: what they show, and what makes them.
DERIVED: dict[str, tuple[str, Callable[[Data], list[Line]]]] = {}


def derived(name: str, about: str) -> Callable:
    """Registers what makes the derived table ``name``."""

    def register(make: Callable[[Data], list[Line]]) -> Callable[[Data], list[Line]]:
        DERIVED[name] = (about, make)
        return make

    return register


def flat(entry: Line, *without: str) -> Line:
    """The fields of nested dicts, but those in ``without``; a heading is the path of keys, in words."""
    line: Line = {}
    for key, value in entry.items():
        if key not in ("record", *without):
            head = key.replace("_", " ")
            line |= {f"{head} {rest}": v for rest, v in flat(value).items()} if isinstance(value, dict) else {head: value}
    return line


def _row_line(row: Row) -> Line:
    """One row of times with everything that was measured beside it."""
    line = {"case": row.case, **flat(row.shape), "threads": row.threads, "cache": row.cache}
    line |= {"us": row.us, "IQR us": row.times[OURS]["iqr_us"], "rounds": row.times[OURS]["rounds"]}
    line |= {f"{name} us": row.times[name]["median_us"] for name in row.times if name != OURS}
    line |= {"best baseline": row.best, "speedup": row.best and row.speedup(row.best)}
    line |= {"roofline us": row.roofline and row.roofline["us"], "x roofline": row.over_roofline, "target": row.target_text}
    why = "; ".join(f"{name}: {reason}" for name, reason in row.skipped.items())
    return line | {"skipped": why or None, **flat({"error": row.error} if row.error else {})}


def _lines(result: Result, name: str) -> list[Line]:
    rows = [_row_line(row) for row in result.rows if row.group == name]
    return [{"machine": result.machine} | line for line in rows or map(flat, result.others.get(name, ()))]


def names(data: Data) -> list[str]:
    """The names of all tables: SUITE.GROUP of rows, SUITE.KIND of records, and the derived ones."""
    found = {f"{stem.partition('.')[0]}.{row.group}" for stem, of in data.found.items() for row in of.rows}
    found |= {f"{stem.partition('.')[0]}.{kind}" for stem, of in data.found.items() for kind in of.others}
    return sorted(found) + sorted(DERIVED)


def lines(data: Data, name: str) -> list[Line]:
    """The table, all lines with the same headings; ResultError where it is unknown."""
    if name in DERIVED:
        found = DERIVED[name][1](data)
    elif name in names(data):
        suite, _, kind = name.partition(".")
        found = [line for result in data.results(suite) for line in _lines(result, kind)]
    else:
        raise ResultError(f"table: expected one of {', '.join(names(data))}; got {name!r}")
    heads = list(dict.fromkeys(head for line in found for head in line))
    return [{head: line.get(head) for head in heads} for line in found]


def to_terminal(title: str, lines: Sequence[Line]) -> RichTable:
    """For rich; what all lines have in common stands below instead of in columns."""
    heads = list(lines[0])
    same = [h for h in heads if len(lines) > 1 and all(line[h] == lines[0][h] for line in lines)]
    text = ", ".join(f"{h}: {cell(lines[0][h])}" for h in same if lines[0][h] is not None)
    made = RichTable(title=title, caption=f"all rows: {text}" if text else None)
    for head in heads:
        if head not in same:
            made.add_column(head, justify="left" if any(isinstance(line[head], str) for line in lines) else "right")
    for line in lines:
        made.add_row(*(cell(value) for head, value in line.items() if head not in same))
    return made
