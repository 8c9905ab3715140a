"""What a table is: entries of result files, and a value of each for every heading.

Each becomes docs/results/tables/NAME.csv and ``python -m bench table NAME``; pages show parts of it.  Values are raw, in the
unit that their heading states.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table as RichTable

from bench.records import BASE, OURS, Result, ResultError, Row
from bench.report.cells import Times, cell, plain

#: A heading, and the value under it: a function of the entry, or the way to a field of it, such as "shape.dtype".
Column = tuple[str, "str | Callable[[Any], Any]"]
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Each:
    """Stands among columns for those that only the entries tell, such as one for each baseline."""

    columns: Callable[[list], list[Column]]


#: Of entries that are lines already, all with the same headings.
AS_IS = Each(lambda found: [(head, operator.itemgetter(head)) for head in found[0]])


@dataclasses.dataclass(frozen=True)
class Table:
    """``entries`` of the results named ``sources`` (in this order), and a line of ``columns`` for each."""

    name: str
    about: str
    sources: tuple[str, ...]
    entries: Callable[..., Iterable[Any]]
    columns: Sequence[Column | Each]

    def lines(self, results: Sequence[Result]) -> list[Line]:
        """A dict per entry, from heading to value; ResultError where there is no entry."""
        found = list(self.entries(*results))
        if not found:
            raise ResultError(f"{', '.join(r.path.name for r in results)}: nothing for table {self.name!r}")
        columns = [c for part in self.columns for c in (part.columns(found) if isinstance(part, Each) else [part])]
        try:
            return [{head: _value(entry, field) for head, field in columns} for entry in found]
        except (KeyError, AttributeError, TypeError) as e:
            raise ResultError(f"table {self.name!r}: {type(e).__name__}: {e}") from e


def _value(entry: Any, field: str | Callable[[Any], Any]) -> Any:
    if callable(field):
        return field(entry)
    for key in field.split("."):
        entry = None if entry is None else entry.get(key) if isinstance(entry, dict) else getattr(entry, key)
    return entry


def to_csv(lines: Sequence[Line]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(lines[0])
    writer.writerows([plain(value) for value in line.values()] for line in lines)
    return out.getvalue()


def to_terminal(table: Table, lines: Sequence[Line]) -> RichTable:
    """For rich; what all lines have in common stands below instead of in columns."""
    heads = list(lines[0])
    same = [h for h in heads if len(lines) > 1 and all(line[h] == lines[0][h] for line in lines)]
    text = ", ".join(f"{h}: {cell(lines[0][h])}" for h in same if lines[0][h] is not None)
    made = RichTable(title=table.about, caption=f"all rows: {text}" if text else None)
    for head in heads:
        if head not in same:
            made.add_column(head, justify="left" if any(isinstance(line[head], str) for line in lines) else "right")
    for line in lines:
        made.add_row(*(cell(value).replace("**", "") for head, value in line.items() if head not in same))
    return made


# --- entries and columns that tables of rows share ----------------------------------------------------------------------


def rows(group: str, keep: Callable[[Row], bool] = lambda row: True) -> Callable[..., list[Row]]:
    """Entries: the rows of a group for which ``keep`` holds."""
    return lambda *results: [row for result in results for row in result.rows if row.group == group and keep(row)]


def records(kind: str) -> Callable[..., list[dict[str, Any]]]:
    """Entries: the records of a kind."""
    return lambda *results: [entry for result in results for entry in result.records(kind)]


def _shape(found: list[Row]) -> list[Column]:
    return [(key.replace("_", " "), f"shape.{key}") for key in dict.fromkeys(k for row in found for k in row.shape)]


def _over(found: list[Row]) -> list[Column]:
    def column(name: str) -> Column:
        return f"over {name}", lambda row: None if row.speedup(name) is None else Times(row.speedup(name))

    return [column(name) for name in _baselines(found)]


def _skipped(found: list[Row]) -> list[Column]:
    """Why a baseline did not run, where one did not."""
    if not any(row.skipped for row in found):
        return []
    return [("skipped", lambda row: "; ".join(f"{name}: {why}" for name, why in row.skipped.items()) or None)]


def _spread(found: list[Row]) -> list[Column]:
    """What only runs on a card have: percentiles, and whether a graph was replayed."""
    if not any("p5_us" in row.times[OURS] for row in found):
        return []
    return [(key.replace("_", " "), f"times.{OURS}.{key}") for key in ("p5_us", "p95_us", "graph")]


def _baselines(found: list[Row]) -> list[str]:
    names = dict.fromkeys(name for row in found for name in row.baselines)
    return [name for name in names if name != BASE]


def base_us(row: Row) -> float:
    return row.times[BASE]["median_us"]


def time(unit: str) -> list[Column]:
    """Our median and interquartile range."""
    scale = SCALES[unit]
    return [(f"{unit}", lambda row: row.us / scale), (f"IQR {unit}", lambda row: row.iqr_us / scale)]


def roofline(unit: str) -> list[Column]:
    """The roofline, what sets it, and the time over it."""
    scale = SCALES[unit]
    us = ("us", lambda row: row.roofline["us"] / scale if row.roofline else None)
    return [(f"roofline {unit}", us[1]), ("set by", "roofline.by"), ("x roofline", "over_roofline")]


def over_base(unit: str) -> list[Column | Each]:
    """The model without adapters, ours over it, and every other way over it."""
    scale = SCALES[unit]

    def ways(found: list[Row]) -> list[Column]:
        def columns(name: str) -> list[Column]:
            def us(row: Row) -> float | None:
                return row.times[name]["median_us"] if name in row.times else None

            return [
                (f"{name} {unit}", lambda row: us(row) and us(row) / scale),
                (f"{name} x base", lambda row: us(row) and us(row) / base_us(row)),
            ]

        return [column for name in _baselines(found) for column in columns(name)]

    base: list[Column] = [(f"base {unit}", lambda row: base_us(row) / scale), *time(unit)]
    return [*base, ("x base", lambda row: row.us / base_us(row)), *TARGET, Each(ways)]


SCALES = {"us": 1, "ms": 1e3, "s": 1e6}
CASE: Column = ("case", "case")
WHERE: list[Column] = [("threads", "threads"), ("cache", "cache")]
TARGET: list[Column] = [
    ("ratio", "verdict.ratio"),
    ("of", "verdict.of"),
    ("target", "verdict.target"),
    ("allows us", "verdict.limit"),
    ("met", "verdict.met"),
]
ERROR: list[Column] = [("error", "error.value"), ("error bound", "error.bound"), ("error measure", "error.measure")]
#: The fields of the shapes; the speedup over every baseline; the reasons why some did not run; percentiles on a card.
SHAPE, OVER, SKIPPED, SPREAD = Each(_shape), Each(_over), Each(_skipped), Each(_spread)
#: How often it was timed.
ROUNDS: Column = ("rounds", lambda row: row.times[OURS]["rounds"])
