"""Result files of ``python -m bench generate|apply``, read and judged: what tables and figures are made from.

Times are in microseconds.  Ratios, speed-ups and verdicts are computed anew from the times.  Refused by name: a file whose
own verdict differs, whose error is beyond its bound, that holds a part of a suite, or was made at another size than "full".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: The baseline that is the model without adapters: what a bar may refer to, nobody's competitor.
BASE = "base"
#: A verdict may differ from the file's where both are this close to the bar: the file's times are rounded.
ROUNDING = 1e-3


class ResultError(ValueError):
    """A result file that is missing, broken, or does not hold what a table needs; the message names it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; the fields are those of the file."""

    case: str
    group: str
    shape: dict[str, Any]
    threads: int
    cache: str | None
    ours: dict[str, float]
    floor: dict[str, Any] | None
    bar: dict[str, Any] | None
    baselines: dict[str, dict[str, Any]]
    error: dict[str, Any] | None
    fma_ratio: float | None

    @property
    def us(self) -> float:
        return self.ours["median_us"]

    @property
    def name(self) -> str:
        """The case with what else tells rows apart."""
        cache = f", {self.cache}" if self.cache else ""
        return f"{self.case}, {self.threads} thread{'s' if self.threads > 1 else ''}{cache}"

    @property
    def floor_ratio(self) -> float | None:
        return self.us / self.floor["us"] if self.floor else None

    def speedup(self, baseline: str) -> float | None:
        """Time of the baseline over ours; None where it did not run."""
        median = self.baselines.get(baseline, {}).get("median_us")
        return None if median is None else median / self.us

    @property
    def mark(self) -> str:
        """A dagger where the middle half of the samples spreads over more than a quarter of the median."""
        return " †" if self.ours["iqr_us"] > self.us / 4 else ""

    def rivals(self) -> dict[str, float]:
        """Speed-up over each other way that ran: not over the model without adapters, nor over ours into fresh memory."""
        speedups = {name: self.speedup(name) for name in self.baselines if name not in (BASE, FRESH)}
        return {name: s for name, s in speedups.items() if s is not None}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A figure beside its bar.  ``value`` and ``limit`` share a unit; ``over`` is value / limit: met up to 1."""

    group: str
    name: str
    value: float
    limit: float
    unit: str
    ratio: float
    of: str
    bar: str

    @property
    def over(self) -> float:
        return self.value / self.limit

    @property
    def met(self) -> bool:
        return self.over <= 1


#: In the case of a row that generates over earlier adapters, and what the same call into fresh memory is beside it.
KEPT, FRESH = "kept memory", "fresh memory"


@dataclasses.dataclass(frozen=True)
class Result:
    """One result file; ``meta`` is all of it but the rows."""

    path: Path
    meta: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def peaks_hold(self) -> bool:
        """Whether multiply-adds on registers were nowhere slower than products: else they are no peak, and not shown."""
        before = self.meta["ceilings"]["before"]
        gemm = {(c["dtype"], c["threads"]): c["gflops"] for c in before["gemm"]}
        return all(c["gflops"] >= gemm.get((c["dtype"], c["threads"]), 0) for c in before["fma"])

    def verdict(self, row: Row) -> Verdict | None:
        """The row beside its bar, or None where it has none; ResultError where the bar refers to nothing measured."""
        if row.bar is None:
            return None
        of, plus = row.bar["of"], row.bar.get("plus_us") or 0
        unit = self._reference(row, of)
        text = f"{row.bar['ratio']:g} x {of}" + (f" + {plus:g} us" if plus else "")
        return Verdict(row.group, row.name, row.us, row.bar["ratio"] * unit + plus, "us", row.us / unit, of, text)

    def _reference(self, row: Row, of: str) -> float:
        """The time that a ratio of 1 means."""
        if of == "floor" and row.floor:
            return row.floor["us"]
        if of == "one description":
            many, fewer = row.shape.get("descriptions"), {"descriptions": 1}
            same = [r for r in self.rows if (r.shape, r.threads, r.cache) == (row.shape | fewer, row.threads, row.cache)]
            single = [r for r in same if (KEPT in r.case) == (KEPT in row.case)]
            if len(single) == 1 and many:
                return single[0].us * many
        if row.baselines.get(of, {}).get("median_us"):
            return row.baselines[of]["median_us"]
        raise ResultError(f"{self.path.name}: {row.name}: a bar of {of!r}, which the file does not hold")

    def memory(self) -> list[Verdict]:
        return [
            Verdict("memory", m["what"], m["ratio"], m["bar"], "", m["ratio"], "weights + adapters", f"{m['bar']:g} x")
            for m in self.meta.get("memory", [])
            if m.get("bar") is not None
        ]


Pair = tuple[Result, Row]


def load(path: Path) -> Result:
    """The result file at ``path``; ResultError where it cannot be believed."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_row(r) for r in meta.pop("rows"))
        result = Result(path, meta, rows)
        if meta["suite"] != path.stem or meta["size"] != "full":
            wanted = f"suite {path.stem!r} of size 'full'"
            raise ResultError(f"{path.name}: expected {wanted}, got suite {meta['suite']!r} of size {meta['size']!r}")
        if "--only" in meta["command"]:
            raise ResultError(f"{path.name}: expected a whole suite, got a part of it: {meta['command']}")
        _believe(result)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ResultError(f"{path.name}: not a result file of python -m bench: {type(e).__name__}: {e}") from e
    return result


def _row(fields: dict[str, Any]) -> Row:
    optional = ("fma_ratio",)
    return Row(**{f.name: fields.get(f.name) if f.name in optional else fields[f.name] for f in dataclasses.fields(Row)})


def _believe(result: Result) -> None:
    seen = set()
    for row in result.rows:
        if row.name in seen:
            raise ResultError(f"{result.path.name}: {row.name}: two rows")
        seen.add(row.name)
        if row.error and not row.error["value"] <= row.error["bound"]:
            value, bound = row.error["value"], row.error["bound"]
            raise ResultError(f"{result.path.name}: {row.name}: error {value:g} is beyond its bound {bound:g}")
        verdict = result.verdict(row)
        if verdict and verdict.met != row.bar["met"] and abs(verdict.over - 1) > ROUNDING:
            says = f"the file says met = {row.bar['met']}, its times say {verdict.over:.3f} x the bar"
            raise ResultError(f"{result.path.name}: {row.name}: {says}")


def beside_base(row: Row) -> bool:
    """Whether the linear's own product, or the model around it, is in the time."""
    return BASE in row.baselines


def swept(row: Row) -> bool:
    """Of a whole model: whether the row belongs to the sweep over the number of adapters."""
    return "adapters" in row.shape


def group(results: Sequence[Result], name: str, keep: Callable[[Row], bool] | None = None) -> list[Pair]:
    """The rows of a group for which ``keep`` holds; ResultError where there is none."""
    pairs = [(result, row) for result in results for row in result.rows if row.group == name]
    found = [p for p in pairs if keep is None or keep(p[1])]
    if not found:
        which = f", of {len(pairs)}, that this shows" if pairs else ""
        raise ResultError(f"{', '.join(r.path.name for r in results)}: no rows of group {name!r}{which}")
    return found


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Everything that has a bar."""
    judged = [v for result in results for row in result.rows if (v := result.verdict(row))]
    return judged + [v for result in results for v in result.memory()]


def split_times(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Time of each part of a request: its description -> part -> microseconds."""
    table: dict[str, dict[str, float]] = {}
    for result, row in group(results, "split"):
        if "part" not in row.shape:
            raise ResultError(f"{result.path.name}: {row.name}: shape names no part")
        shape = [describe(k, v) for k, v in row.shape.items() if k != "part"]
        title = ", ".join([*shape, describe("threads", row.threads)])
        table.setdefault(title, {})[row.shape["part"]] = row.us
    return table


def describe(key: str, value: Any) -> str:
    """A field of a shape in words: the value alone where it explains itself."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:g} {key.replace('_', ' ') if value != 1 else key.removesuffix('s').replace('_', ' ')}"


def farthest(pairs: Sequence[Pair]) -> Pair:
    """The row farthest from its bar, or from its floor where it has no bar."""

    def over(pair: Pair) -> float:
        verdict = pair[0].verdict(pair[1])
        return verdict.over if verdict else pair[1].floor_ratio or 0

    return max(pairs, key=over)


@dataclasses.dataclass(frozen=True)
class Headline:
    """A row that a newcomer wants.  Of several that match (threads) tables show the farthest from its bar.

    Rows that were timed with nothing beside them do not match: they state a second bar of a time that has a row already.
    """

    label: str
    short: str
    group: str
    where: dict[str, Any]
    cache: str | None = None
    kept: bool = False

    def matching(self, results: Sequence[Result]) -> list[Pair]:
        """ResultError where no row matches."""
        pairs = [p for p in group(results, self.group) if p[1].baselines]
        pairs = [p for p in pairs if self.cache in (None, p[1].cache) and (KEPT in p[1].case) == self.kept]
        found = [p for p in pairs if self.where.items() <= p[1].shape.items()]
        if not found:
            wanted = ", ".join(f"{k} {v}" for k, v in self.where.items())
            raise ResultError(f"{', '.join(r.path.name for r in results)}: no row of group {self.group!r} with {wanted}")
        return found


def _generated(dtype: str, count: int, kept: bool) -> Headline:
    sentences = "one sentence" if count == 1 else f"{count} sentences"
    where = {"model": "mistral-7b", "variant": "L", "dtype": dtype, "descriptions": count}
    memory = f", {KEPT}" if kept else ""
    return Headline(f"adapters for Mistral-7B from {sentences}{memory}", f"Mistral x{count}", "generate", where, kept=kept)


def _applied(tokens: int, adapters: int, cache: str = "hot") -> Headline:
    where = {"tokens": tokens, "adapters": adapters, "layout": "r_out"}  # as attach() stores B
    label = f"one linear, {tokens} tokens, {adapters} adapters, {cache}"
    return Headline(label, f"{tokens}x{adapters}", "lora", where, cache=cache)


def _step(phase: str, modules: str, dtype: str) -> Headline:
    label = f"{phase} of SmolLM2-135M, an adapter per row, {modules}"
    return Headline(label, phase, "model", {"phase": phase, "modules": modules, "dtype": dtype})


HEADLINES = (
    *(_generated(dtype, *way) for dtype in ("float32", "bfloat16") for way in ((1, False), (64, False), (64, True))),
    *(_applied(*size) for size in ((8, 8), (64, 64), (64, 64, "cold"), (512, 8))),
    *(_step(phase, "q,v", dtype) for phase in ("decode", "prefill") for dtype in ("float32", "bfloat16")),
    *(_step("decode", "all linears", dtype) for dtype in ("float32", "bfloat16")),
)
