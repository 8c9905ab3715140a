"""Tables of generating and applying adapters, and of what every suite has: targets, misses, losses, ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from bench.records import BASE, PREALLOCATED, Result, Row, Verdict, ceiling_key, memory_verdict
from bench.report.tables import (
    AS_IS,
    CASE,
    ERROR,
    OVER,
    ROUNDS,
    SHAPE,
    SKIPPED,
    SPREAD,
    TARGET,
    WHERE,
    Column,
    Each,
    Line,
    Table,
    over_base,
    records,
    roofline,
    rows,
    time,
)

SUITES = ("generate", "apply", "train", "icl")
#: Of whose rows every other time is that of a rival.  In icl others answer a later question, which is less work.
COMPARED = ("generate", "apply", "train")


def _generate(*results: Result) -> list[Row]:
    """Without the peak of multiply-adds where products of the run were faster."""
    found = [(result, row) for result in results for row in rows("generate")(result)]
    return [row if result.peaks_hold else dataclasses.replace(row, peak_gflops=None) for result, row in found]


def requests(*results: Result) -> list[dict[str, Any]]:
    """A request each, with its parts' microseconds."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows("split")(*results):
        shape = {key: value for key, value in row.shape.items() if key != "part"} | {"threads": row.threads}
        found.setdefault(tuple(shape.items()), {**shape, "parts": {}})["parts"][row.shape["part"]] = row.us
    return list(found.values())


def _parts(found: list[dict[str, Any]]) -> list[Column]:
    columns: list[Column] = []
    for name in dict.fromkeys(part for request in found for part in request["parts"]):
        columns.append((f"{name} ms", lambda r, name=name: r["parts"][name] / 1e3 if name in r["parts"] else None))
        columns.append((f"{name} %", lambda r, name=name: 100 * r["parts"].get(name, 0) / sum(r["parts"].values())))
    return [*columns, ("sum ms", lambda r: sum(r["parts"].values()) / 1e3)]


def _ceilings(*results: Result) -> Iterable[dict[str, Any]]:
    for result in results:
        after = {ceiling_key(c): c for c in result.records("ceiling") if c["when"] == "after"}
        for c in result.records("ceiling"):
            if c["when"] == "before":
                unit = "gflops" if "gflops" in c else "gbps"
                later = after.get(ceiling_key(c), {}).get(unit)
                holds = result.peaks_hold if c["kind"] == "fma" else None
                yield {**c, "suite": result.run["suite"], "unit": unit, "rate": c[unit], "later": later, "holds": holds}


def _drift(ceiling: dict[str, Any]) -> float | None:
    return ceiling["later"] and 100 * (ceiling["later"] / ceiling["rate"] - 1)


def _misses(*results: Result) -> list[Verdict]:
    """The farthest first."""
    return sorted((v for result in results for v in result.verdicts() if not v.met), key=lambda v: -v.over)


def _rivals(result: Result) -> list[tuple[Row, str, float]]:
    return [(row, name, s) for row in result.rows for name, s in row.rivals().items()]


def _losses(*results: Result) -> list[tuple[Row, str, float]]:
    """The largest first."""
    return sorted((c for result in results for c in _rivals(result) if c[2] < 1), key=lambda c: c[2])


def _totals(*results: Result) -> Iterable[Line]:
    """Counts of targets and of comparisons, by suite and of all."""
    for name, some in [*((result.run["suite"], [result]) for result in results), ("all", results)]:
        judged = [v for result in some for v in result.verdicts()]
        compared = [c for result in some if result.run["suite"] in COMPARED for c in _rivals(result)]
        lost = sum(s < 1 for _, _, s in compared)
        missed = sum(not v.met for v in judged)
        yield {"suite": name, "targets": len(judged), "missed": missed, "comparisons": len(compared), "lost": lost}


def _beaten(*results: Result) -> Iterable[Line]:
    """Each baseline that is faster than ours anywhere."""
    cases: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for result in results:
        for row, name, s in _rivals(result):
            cases.setdefault((row.group, name), []).append((s, row.name))
    for (group, name), found in cases.items():
        worst, case = min(found)
        if worst < 1:
            lost = sum(s < 1 for s, _ in found)
            line = {"group": group, "baseline": name, "cases": len(found), "lost": lost}
            yield line | {"ours / baseline at most": 1 / worst, "case": case}


def _same(*names: str) -> list[Column]:
    return [(name, name) for name in names]


def _rate(row: Row) -> float | None:
    return row.roofline["bytes"] / row.us / 1e3 if row.roofline else None


def _op(name: str, about: str, suite: str, entries: Callable[..., Iterable[Any]], unit: str, *more: Column) -> Table:
    """Of rows beside a roofline."""
    ours = [CASE, SHAPE, *WHERE, *time(unit), *more, ROUNDS, SPREAD, *roofline(unit), *TARGET]
    return Table(name, about, (suite,), entries, [*ours, OVER, SKIPPED, *ERROR])


def _beside(name: str, about: str, entries: Callable[..., Iterable[Any]], unit: str) -> Table:
    """Of rows beside the same without adapters."""
    return Table(name, about, ("apply",), entries, [CASE, SHAPE, *WHERE, *over_base(unit), SKIPPED, *ERROR])


def _output(row: Row) -> str:
    return PREALLOCATED.split()[0] if PREALLOCATED in row.case else "fresh"


#: Of a whole model, without the sweep over the number of adapters.
steps = rows("model", lambda row: "adapters" not in row.shape)
sweep = rows("model", lambda row: "adapters" in row.shape)
alone, around = (rows("lora", lambda row, base=base: (BASE in row.times) == base) for base in (False, True))

EACH: Column = ("ms an adapter", lambda row: row.us / 1e3 / row.shape["descriptions"])
OUTPUT: Column = ("output", _output)
PEAK: Column = ("x FMA peak", "over_peak")
RATE: list[Column] = [
    ("bytes", "roofline.bytes"),
    ("GB/s", lambda row: row.roofline["bytes"] / row.us / 1e3 if row.roofline else None),
]
PARTS = [*_same("model", "variant", "dtype", "descriptions", "threads"), Each(_parts)]
MEMORY: list[Column] = [
    *(("what", "what"), *((f"{name} MiB", f"{name}_mib") for name in ("peak", "weights", "adapters"))),
    ("peak / (weights + adapters)", lambda e: memory_verdict(e).ratio),
    *((head, lambda e, head=head: getattr(memory_verdict(e), head)) for head in ("target", "met")),
]
WEIGHTS: list[Column] = [*_same("model", "variant"), ("relative Frobenius difference", "relative_frobenius")]
MISS: list[Column] = [
    *(("group", "group"), ("case", "name"), ("measured", "value"), ("allowed", "limit"), ("unit", lambda v: v.unit or "x")),
    *(*_same("ratio", "of", "target"), ("over by %", lambda v: 100 * (v.over - 1))),
]
LOSS: list[Column] = [
    *(("group", lambda c: c[0].group), ("case", lambda c: c[0].name), ("baseline", lambda c: c[1])),
    *(("ours us", lambda c: c[0].us), ("baseline us", lambda c: c[0].us * c[2]), ("ours / baseline", lambda c: 1 / c[2])),
]
CEILING: list[Column] = [
    *_same("suite", "kind", "dtype", "bytes", "threads", "unit"),
    *(("before", "rate"), ("after", "later"), ("drift %", _drift), ("is a peak", "holds")),
]


def _of_any(kind: str) -> Callable[..., Iterable[Any]]:
    return lambda *results: [entry for result in results for entry in result.others.get(kind, [])]


POWER = _same("case", "unit", "count", "us_each", "mj_each", "watts", "sm_mhz", "memory_mhz")
CHECK = _same("case", "cache", "ours_us", "do_bench_cudagraph_us")
#: Tables that only runs of a card have.
OF_A_CARD = (
    Table("energy", "Power, clocks and millijoules on a card", SUITES, _of_any("energy"), POWER),
    Table("cross-check", "Our times beside triton's do_bench_cudagraph", SUITES, _of_any("cross_check"), CHECK),
)
TABLES = (
    _op("generate", "Generating adapters, from task embedding to A and B", "generate", _generate, "ms", OUTPUT, EACH, PEAK),
    Table("generate-memory", "Peak memory of generating", ("generate",), records("memory"), MEMORY),
    Table("bf16-weights", "Adapters from bfloat16 weights", ("generate",), records("bf16_weights"), WEIGHTS),
    Table("split", "From a sentence to its first use, part by part", ("generate",), requests, PARTS),
    _op("lora", "The LoRA op alone: every token with the adapter of its row", "apply", alone, "us"),
    _op("sweep", "The same tokens with more and more different adapters", "apply", rows("sweep"), "us", *RATE),
    _op("backward", "Forward and backward, with gradients in x, A and B", "apply", rows("backward"), "us"),
    _beside("linear", "A linear with its adapters, beside the linear alone", around, "us"),
    _beside("model", "A step of a whole model with an adapter per row, beside the model without", steps, "ms"),
    _beside("model-sweep", "Decode steps over the number of different adapters in the batch", sweep, "ms"),
    Table("misses", "Every target that is missed, the farthest first", SUITES, _misses, MISS),
    Table("losses", "Every case in which another way is faster, the largest loss first", COMPARED, _losses, LOSS),
    Table("beaten", "Baselines that are faster than ours somewhere", COMPARED, _beaten, [AS_IS]),
    Table("totals", "Targets and comparisons by suite", SUITES, _totals, [AS_IS]),
    Table("ceilings", "What the machine reached before and after each run", SUITES, _ceilings, CEILING),
)
