"""Values as text: cells of Markdown tables and numbers in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.records import BASE, OURS, ResultError, Row
from t2l_engine.research.evaluation.metrics import Interval

GAP = "–"
#: Limits of a table on a page.
MOST_COLUMNS, MOST_LINES = 8, 12


def number(x: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, without exponent, with commas between thousands."""
    if x is None:
        return GAP
    if x and abs(x) < 1e-4:
        return f"{x:.{digits - 2}e}"
    return f"{x:,.{0 if x == 0 else max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def duration(us: float | None) -> str:
    """Microseconds in the unit that suits them."""
    if us is None:
        return GAP
    for unit, scale in (("us", 1), ("ms", 1e3)):
        if us < 1000 * scale:
            return f"{number(us / scale)} {unit}"
    return f"{number(us / 1e6)} s"


def times(x: float | None) -> str:
    return GAP if x is None else f"{x:.2f} x"


def points(found: Interval | float | None) -> str:
    """A difference with its 95 % interval, if it has one; the minus sign never stands before zero."""
    if found is None:
        return GAP
    if isinstance(found, Interval):
        mean, low, high = (f"{x + 0.0 if abs(x) >= 0.05 else 0.0:+.1f}" for x in (found.mean, found.low, found.high))
        return f"{mean} [{low}, {high}]"
    return f"{found:+.1f}"


def cell(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Interval):
        return points(value)
    if isinstance(value, list | tuple):
        return " ".join(map(cell, value))
    return GAP if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def grid(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, columns of words set to the left; ResultError where it is too large for a page."""
    lines = list(lines)
    if len(heads) > MOST_COLUMNS or len(lines) > MOST_LINES:
        expected = f"at most {MOST_COLUMNS} columns and {MOST_LINES} lines"
        raise ResultError(f"table: expected {expected} on a page, got {len(heads)} and {len(lines)}")
    texts = [[cell(value).replace("|", r"\|").replace("<", "&lt;") for value in line] for line in lines]
    sides = ["---:" if all(_is_number(row[i]) for row in texts) else "---" for i in range(len(heads))]
    head, *rest = ("| " + " | ".join(row) + " |" for row in (heads, *texts))
    return "\n".join([head, f"|{'|'.join(sides)}|", *rest])


def _is_number(text: str) -> bool:
    """Whether the text of a cell is a number, with its unit, or empty."""
    return text[:1].isdigit() or text[:1] in "+-–"


#: Baseline -> what pages call it, where its name does not say.
LABELS = {
    "eager": "eager torch",
    "reference": "plain-torch reference",
    "batched": "batched torch",
    "gather bmm": "torch.bmm",
    "mm loop": "torch.mm loop",
    "plain bmm": "torch.bmm",
    "hooks": "forward hooks",
    "PEFT mixed": "PEFT, mixed batch",
    "vLLM, target modules": "vLLM's LoRA kernels",
}


def label(name: str | None) -> str:
    """What pages call a baseline."""
    return GAP if name is None else LABELS.get(name, name)


#: Column of a table of rows -> its value.
COLUMNS: dict[str, Callable[[Row], Any]] = {
    "machine": lambda row: row.machine,
    "case": lambda row: row.case,
    "threads": lambda row: row.threads,
    "ours": lambda row: duration(row.us),
    "IQR": lambda row: duration(row.times[OURS]["iqr_us"]),
    "best baseline": lambda row: f"{label(row.best)}, {duration(row.times[row.best]['median_us'])}" if row.best else None,
    "speedup": lambda row: times(row.speedup(row.best)) if row.best else None,
    "x roofline": lambda row: times(row.over_roofline),
    "target": lambda row: row.target_text,
    "x base": lambda row: times(1 / row.speedup(BASE)),
}


def column(row: Row, name: str) -> Any:
    """The value of a column: one of COLUMNS, the time of a baseline, "NAME x base", or "NAME / ours"."""
    if name in COLUMNS:
        return COLUMNS[name](row)
    if name.endswith(" / ours"):
        return times(row.speedup(name.removesuffix(" / ours")))
    us = {way: timed["median_us"] for way, timed in row.times.items()}
    if name.endswith(" x base"):
        return times(us[way] / us[BASE]) if (way := name.removesuffix(" x base")) in us else None
    return duration(us.get(name))


#: Names of columns, or heading -> name.
Columns = Sequence[str] | Mapping[str, str]


def row_grid(rows: Sequence[Row], columns: Columns) -> str:
    """A Markdown table of ``rows``, each column by its name; see :func:`column`."""
    names = list(columns.values() if isinstance(columns, Mapping) else columns)
    return grid(list(columns), [[column(row, name) for name in names] for row in rows])


def line_grid(lines: Sequence[Mapping[str, Any]], columns: Columns, decimals: int | None = None) -> str:
    """A Markdown table of the lines of a table; ``decimals``: of numbers, None: three significant digits."""
    names = list(columns.values() if isinstance(columns, Mapping) else columns)
    fixed = lambda value: f"{value:.{decimals}f}" if isinstance(value, float) and decimals is not None else value  # noqa: E731
    return grid(list(columns), [[fixed(line[name]) for name in names] for line in lines])
