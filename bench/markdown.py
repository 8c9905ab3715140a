"""Markdown of measurements: cells, grids, the footnote on gaps, captions.

Columns come from the rows: the fields of their shapes that differ, and every baseline that any of them has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from bench.rows import BASE, Pair, Result, Row, Verdict

GAP = "–"
#: Fields of a shape that keep their column where all rows agree.
ALWAYS = ("model", "variant", "dtype", "descriptions")

Column = tuple[str, Callable[[Result, Row], str]]

ERROR: Column = (
    "error (bound)",
    lambda _, row: f"{row.error['value']:.1e} ({row.error['bound']:.1e})" if row.error else GAP,
)


# --- cells -----------------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three significant digits, without exponent."""
    if x is None:
        return GAP
    return f"{x:,.{0 if x == 0 else min(6, max(0, 2 - math.floor(math.log10(abs(x)))))}f}"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{number(count)} {unit}"
        count /= 1024
    return f"{number(count)} GiB"


def duration(us: float) -> str:
    return f"{number(us)} us" if us < 1000 else f"{number(us / 1000)} ms"


def times(x: float | None) -> str:
    """A speed-up; in bold where the baseline is faster."""
    return GAP if x is None else f"{number(x)} x" if x >= 1 else f"**{number(x)} x**"


def met(verdict: Verdict | None) -> str:
    return GAP if verdict is None else "yes" if verdict.met else "**no**"


def _value(x: object) -> str:
    return GAP if x is None else f"{x:g}" if isinstance(x, float) else str(x)


# --- grids -----------------------------------------------------------------------------------------------------------


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures are set to the right."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    figures = [all(re.match(r"[\d*–+-]", line[i]) for line in lines) for i in range(len(heads))]
    text = ["| " + " | ".join(row) + " |" for row in (heads, *lines)]
    return "\n".join([text[0], "|" + "|".join("---:" if f else "---" for f in figures) + "|", *text[1:]])


def speedup_over(baseline: str) -> Column:
    return f"over {baseline}", lambda _, row: times(row.speedup(baseline))


def table(pairs: list[Pair], columns: list[Column], beside: Callable[[str], Column] = speedup_over) -> str:
    """Shape, ``columns``, one column ``beside`` per baseline, error; without columns of ours that are empty throughout."""
    shape, same = _shape(pairs)
    baselines = list(dict.fromkeys(name for _, row in pairs for name in row.baselines if name != BASE))
    ours = [c for c in [*shape, *columns] if any(c[1](*pair) != GAP for pair in pairs)]
    error = [ERROR] if any(row.error for _, row in pairs) else []
    columns = [*ours, *map(beside, baselines), *error]
    lines = grid([title for title, _ in columns], ([cell(*pair) for _, cell in columns] for pair in pairs))
    return "\n\n".join([lines, *_gaps(pairs, baselines), same + caption(pairs)])


def _shape(pairs: list[Pair]) -> tuple[list[Column], str]:
    """Columns that tell the rows apart, and a sentence on what they have in common."""
    rows = [row for _, row in pairs]
    keys = list(dict.fromkeys(k for row in rows for k in row.shape))
    differ = [k for k in keys if k in ALWAYS or len({_value(row.shape.get(k)) for row in rows}) > 1]
    columns: list[Column] = [(k.replace("_", " "), lambda _, row, k=k: _value(row.shape.get(k))) for k in differ]
    bars = [row.bar and row.bar["of"] for row in rows]
    cells = [[_value(row.shape.get(k)) for k in differ] for row in rows]
    apart = {(*shape, row.threads, row.cache, of) for shape, row, of in zip(cells, rows, bars, strict=True)}
    if len(apart) < len(rows) or not differ:
        columns.insert(0, ("case", lambda _, row: row.case))
    columns += [("threads", lambda _, row: str(row.threads)), ("cache", lambda _, row: row.cache or GAP)]
    same = ", ".join(f"{k.replace('_', ' ')} {_value(rows[0].shape[k])}" for k in keys if k not in differ)
    return columns, f"All rows: {same}.  " if same else ""


def _gaps(pairs: list[Pair], baselines: Sequence[str]) -> list[str]:
    """The footnote on baselines that did not run, or nothing."""
    reasons = [
        f"{name} ({row.baselines[name]['absent'] if name in row.baselines else 'not part of the case'})"
        for name in baselines
        for _, row in pairs
        if row.speedup(name) is None
    ]
    return [f"{GAP} {', '.join(dict.fromkeys(reasons))}."] if reasons else []


def everything(results: Iterable[Result]) -> list[Pair]:
    return [(result, row) for result in results for row in result.rows]


def caption(pairs: Iterable[Pair]) -> str:
    """Machine, threads, instruction set, versions, date, commit, file and command of every result among ``pairs``."""
    results: dict[str, tuple[dict, set[int]]] = {}
    for result, row in pairs:
        results.setdefault(result.path.name, (result.meta, set()))[1].add(row.threads)
    runs: dict[str, list[str]] = {}  # suites of one run of one machine share a sentence
    for name, (meta, threads) in results.items():
        runs.setdefault(provenance(meta, sorted(threads)), []).append(f"`bench/results/{name}` (`{meta['command']}`)")
    return "  ".join(f"{run}.  From {' and '.join(files)}." for run, files in runs.items())


def provenance(meta: dict, threads: list[int]) -> str:
    """Machine, threads, versions, date and commit of a result."""
    machine = meta["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    commit = "no commit" if meta["commit"] is None else f"commit {meta['commit']}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {number(machine['memory_gib'])} GiB, {machine['isa']}, "
        f"{' and '.join(map(str, threads))} thread{'s' if threads[-1] > 1 else ''}; {versions}; {meta['date']}, "
        f"{commit}{' with uncommitted changes' if meta['dirty'] else ''}"
    )
