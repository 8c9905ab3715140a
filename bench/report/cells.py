"""Values as text: cells of Markdown, of the terminal, of CSV files, and numbers in sentences.

Tables hold raw values, in the unit of their heading.  CSV files get four digits, readers three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

GAP = "–"


class Times(float):
    """A speedup; Markdown shows it bold where the baseline is faster."""


class Met(str):
    """Whether a target is met, "yes" or "no", and what more is to be said of it; Markdown shows a miss bold."""


def number(x: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, without exponent, with commas between thousands."""
    if x is None:
        return GAP
    if x and abs(x) < 1e-4:
        return f"{x:.{digits - 2}e}"
    return f"{x:,.{0 if x == 0 else max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def duration(us: float) -> str:
    """Microseconds in the unit that suits them."""
    for unit, scale in (("us", 1), ("ms", 1e3)):
        if us < 1000 * scale:
            return f"{number(us / scale)} {unit}"
    return f"{number(us / 1e6)} s"


def times(x: float) -> str:
    return f"{number(x)} x"


def cell(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, Met):
        return f"**no**{value[2:]}" if value.startswith("no") else str(value)
    if isinstance(value, Times):
        return times(value) if value >= 1 else f"**{times(value)}**"
    if isinstance(value, float):
        return number(value)
    return GAP if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def plain(value: Any) -> str:
    """A value for a CSV file."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return " ".join("-" if v is None else str(v) for v in value)
    return "" if value is None else str(value)


def grid(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are set to the right."""
    sides = ["---" if any(isinstance(line[i], str | bool) for line in lines) else "---:" for i in range(len(heads))]
    texts = [[cell(v).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ") for v in line] for line in lines]
    head, *rest = ("| " + " | ".join(row) + " |" for row in (heads, *texts))
    return "\n".join([head, f"|{'|'.join(sides)}|", *rest])
