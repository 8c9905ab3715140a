"""Values as text: cells of Markdown, of the terminal, of CSV files, and numbers in sentences.

Tables hold raw values, in the unit of their heading.  CSV files get four digits, readers three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

GAP = "–"


class Times(float):
    """A speedup; Markdown shows it bold where the baseline is faster."""


def number(x: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, without exponent, with commas between thousands."""
    if x is None:
        return GAP
    if x and abs(x) < 1e-4:
        return f"{x:.{digits - 2}e}"
    return f"{x:,.{0 if x == 0 else max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{number(count)} {unit}"
        count /= 1024
    return f"{number(count)} GiB"


def duration(us: float) -> str:
    """Microseconds in the unit that suits them."""
    for unit, scale in (("us", 1), ("ms", 1e3)):
        if us < 1000 * scale:
            return f"{number(us / scale)} {unit}"
    return f"{number(us / 1e6)} s"


def times(x: float) -> str:
    return f"{number(x)} x"


def percent(x: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * x:.0f} %"


def cell(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, Times):
        return times(value) if value >= 1 else f"**{times(value)}**"
    if isinstance(value, float):
        return number(value)
    return GAP if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def plain(value: Any) -> str:
    """A value for a CSV file."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else _whole(value)


def _whole(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures are set to the right."""
    lines = [[text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ") for text in line] for line in lines]
    figures = [all(re.match(r"\**[\d–+-]", line[i]) for line in lines) for i in range(len(heads))]
    text = ["| " + " | ".join(row) + " |" for row in (heads, *lines)]
    return "\n".join([text[0], "|" + "|".join("---:" if f else "---" for f in figures) + "|", *text[1:]])
