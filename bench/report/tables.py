"""What a table is: lines made from result files, each a dict from heading to value; and the parts that lines share.

Each becomes docs/results/tables/NAME.csv and ``python -m bench table NAME``; pages show parts of it.  Values are raw: the
heading says the unit, or ends as the field of the result file does.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table as RichTable

from bench.records import BASE, OURS, Result, ResultError, Row, Verdict
from bench.report.cells import Met, Times, cell, plain
from t2l_engine.research.evaluation.bootstrap import Interval

Line = dict[str, Any]
Entry = dict[str, Any]
Make = Callable[..., Iterable[Line]]


@dataclasses.dataclass(frozen=True)
class Table:
    """``make`` takes the results of ``sources``, all at once, or one after the other and adds the machine if ``of_each``.

    ``counted``: of nothing that a machine's speed decides.  ``optional``: there is no such table where nothing was measured.
    """

    name: str
    about: str
    sources: tuple[str, ...]
    make: Make
    of_each: bool = False
    counted: bool = False
    optional: bool = False

    def lines(self, results: Sequence[Result]) -> list[Line]:
        """All with the same headings, None under those that a line lacks; ResultError where there is no line."""
        try:
            found = self._of_each(results) if self.of_each else list(self.make(*results))
        except (KeyError, AttributeError, TypeError) as e:
            raise ResultError(f"table {self.name!r}: {type(e).__name__}: {e}") from e
        if not found:
            raise ResultError(f"{', '.join(r.path.name for r in results)}: nothing for table {self.name!r}")
        heads: list[str] = []
        for line in found:
            at = 0
            for head in line:  # one that is new stands after the one before it
                if head not in heads:
                    heads.insert(at, head)
                at = heads.index(head) + 1
        return [{head: line.get(head) for head in heads} for line in found]

    def _of_each(self, results: Sequence[Result]) -> list[Line]:
        """With the machine first, which lines of no machine leave empty; these once.  Without it where no line has any."""
        found: list[Line] = []
        for result in results:
            machine = {"machine": None if self.counted else result.machine}
            made = [machine | line for line in self.make(result)]
            found += [line for line in made if line["machine"] or line not in found]
        if any(line["machine"] for line in found):
            return found
        return [{head: value for head, value in line.items() if head != "machine"} for line in found]


#: By name; filled by ``table`` where the modules of tables are imported.
TABLES: dict[str, Table] = {}


def table(name: str, about: str, *sources: str, counted: bool = False, optional: bool = False) -> Callable[[Make], Make]:
    """Makes a table of a function; of one source it takes the result of each machine, of several those of all."""

    def register(make: Make) -> Make:
        TABLES[name] = Table(name, about, sources, make, len(sources) == 1, counted, optional)
        return make

    return register


def to_csv(lines: Sequence[Line]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(lines[0])
    writer.writerows([plain(value) for value in line.values()] for line in lines)
    return out.getvalue()


def to_terminal(about: str, lines: Sequence[Line]) -> RichTable:
    """For rich; what all lines have in common stands below instead of in columns."""
    heads = list(lines[0])
    same = [h for h in heads if len(lines) > 1 and all(line[h] == lines[0][h] for line in lines)]
    text = ", ".join(f"{h}: {cell(lines[0][h])}" for h in same if lines[0][h] is not None)
    made = RichTable(title=about, caption=f"all rows: {text}" if text else None)
    for head in heads:
        if head not in same:
            made.add_column(head, justify="left" if any(isinstance(line[head], str) for line in lines) else "right")
    for line in lines:
        made.add_row(*(cell(value).replace("**", "") for head, value in line.items() if head not in same))
    return made


# --- lines of records ---------------------------------------------------------------------------------------------------


def flat(entry: Entry, *without: str) -> Line:
    """The fields of nested dicts, but not those named ``without``; a heading is the keys on the way, in words."""
    line: Line = {}
    for key, value in entry.items():
        if key not in ("record", *without):
            head = key.replace("_", " ")
            line |= {f"{head} {rest}": v for rest, v in flat(value).items()} if isinstance(value, dict) else {head: value}
    return line


def each(kind: str, *without: str) -> Make:
    """A line for each record of a kind."""
    return lambda result: [flat(entry, *without) for entry in result.records(kind)]


def series(kind: str, *without: str) -> Make:
    """A line for each place in the lists of each record of a kind."""

    def lines(result: Result) -> Iterator[Line]:
        for entry in each(kind, *without)(result):
            count = len(next(value for value in entry.values() if isinstance(value, list)))
            yield from ({h: v[i] if isinstance(v, list) else v for h, v in entry.items()} for i in range(count))

    return lines


# --- lines of scores ----------------------------------------------------------------------------------------------------


def mean(scores: Sequence[float]) -> float | None:
    """Of scores in percent; None where nothing was measured."""
    return statistics.fmean(scores) if scores else None


def bounds(head: str, found: Interval | None) -> Line:
    """A figure and its 95 % bootstrap interval over tasks, empty where it was not measured."""
    values = (found.mean, found.low, found.high) if found else (None, None, None)
    values = [0.0 if v is not None and abs(v) < 0.005 else v for v in values]  # scores are kept to hundredths
    return dict(zip((head, f"{head}, low", f"{head}, high"), values, strict=True))


#: A claim, what was measured (None: nothing was), the least that it should be, whether its interval should be above zero.
Claim = tuple[str, Interval | None, int | None, bool]


def judged(claims: Iterable[Claim]) -> Iterator[Line]:
    """``claims`` beside their targets, without what was not measured."""
    for claim, found, least, above_zero in claims:
        if found is not None:
            target = ", ".join([f">= {least}"] * (least is not None) + ["interval > 0"] * above_zero)
            met = (least is None or found.mean >= least) and (not above_zero or found.low > 0)
            yield {
                "claim": claim,
                "target": target or "reported",
                **bounds("measured", found),
                "met": met if target else None,
            }


def curves(result: Result) -> Iterator[Line]:
    """Training losses over tokens."""
    for run in result.records("training"):
        yield from ({"run": run["run"], "million tokens": tokens, "loss": loss} for tokens, loss in run["curve"])


# --- lines of rows ------------------------------------------------------------------------------------------------------

SCALES = {"us": 1, "ms": 1e3, "s": 1e6}


def start(row: Row) -> Line:
    """What was measured."""
    return {"case": row.case, **flat(row.shape), "threads": row.threads, "cache": row.cache}


def time(row: Row, unit: str) -> Line:
    """Our median, the interquartile range, and of how many samples they are."""
    spread = {f"IQR {unit}": row.iqr_us / SCALES[unit], "rounds": row.times[OURS]["rounds"]}
    return {unit: row.us / SCALES[unit], **spread}


def said(verdict: Verdict | None) -> Met | None:
    """Whether a target is met, and whether that is within noise: nearer to it than the interquartile range."""
    return None if verdict is None else Met(("yes" if verdict.met else "no") + ", within noise" * verdict.near)


def target(verdict: Verdict | None) -> Line:
    fields = {"ratio": "ratio", "of": "of", "target": "target", "allows us": "limit", "met": "met"}
    return {head: getattr(verdict, field, None) for head, field in fields.items()} | {"verdict": said(verdict)}


def end(row: Row) -> Line:
    """Why a baseline did not run, where one did not, and the error."""
    why = {"skipped": "; ".join(f"{name}: {why}" for name, why in row.skipped.items())} if row.skipped else {}
    return why | {f"error {key}".removesuffix(" value"): value for key, value in (row.error or {}).items()}


def over(row: Row) -> Line:
    """The speedup over every baseline that ran."""
    speedups = {name: row.speedup(name) for name in row.baselines if name != BASE}
    return {f"over {name}": Times(s) for name, s in speedups.items() if s is not None}


def beside_roofline(row: Row, unit: str, **more: Any) -> Line:
    """A row with its roofline, its target, and the speedup over every baseline; percentiles where a card gave some."""
    ours, least = row.times[OURS], row.roofline or {}
    spread = {key.replace("_", " "): ours[key] for key in ("p5_us", "p95_us", "graph") if key in ours}
    roofline = {f"roofline {unit}": least["us"] / SCALES[unit] if least else None, "set by": least.get("by")}
    timed = {**start(row), **time(row, unit), **more, **spread}
    return timed | roofline | {"x roofline": row.over_roofline, **target(row.verdict), **over(row), **end(row)}


def x_base(row: Row, unit: str) -> Line:
    """The model without adapters, ours, and ours over it."""
    base = row.times[BASE]["median_us"]
    return {f"base {unit}": base / SCALES[unit], **time(row, unit), "x base": row.us / base}


def beside_base(row: Row, unit: str) -> Line:
    """A row beside the same without adapters, which every other way is beside, too."""
    base, ways = row.times[BASE]["median_us"], {}
    for name in row.baselines:
        if name != BASE:
            us = row.times[name]["median_us"]
            ways |= {f"{name} {unit}": us / SCALES[unit], f"{name} x base": us / base}
    return {**start(row), **x_base(row, unit), **target(row.verdict), **ways, **end(row)}
