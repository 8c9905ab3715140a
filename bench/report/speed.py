"""Tables of generating and applying adapters, and of what every suite has: targets, misses, losses, ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bench.records import BASE, PREALLOCATED, Result, ResultError, Row, Verdict, ceiling_key, memory_verdict
from bench.report.cells import Times
from bench.report.tables import (
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
    return columns


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
            yield {"group": group, "baseline": name, "cases": len(found), "lost": lost, "worst": 1 / worst, "case": case}


#: What a newcomer asks: words, case, threads, cache, and the baseline that does the same work.
HEADLINES = (
    (
        *("Adapters for Mistral-7B from one sentence", "mistral-7b L bfloat16, 1 description", 2, None),
        *("eager", "one module at a time, as the paper's code does"),
    ),
    (
        *("LoRA around one linear of 4096 features: 64 tokens, 64 different adapters", "serve_64x64", 1, "warm"),
        *("gather bmm", "a gathered batched product"),
    ),
    (
        *("Decode step of SmolLM2-135M: 8 rows, an adapter each", "decode 8 rows, q,v, bfloat16", 2, None),
        *("PEFT mixed", "PEFT, mixed batch"),
    ),
    (
        *("Training step of 8 samples, 128 tokens, an adapter each", "q,v, 128 tokens, bfloat16", 2, None),
        *("hooks", "forward hooks, as the paper's code does"),
    ),
    (
        *("First answer to a new task", "first question of a new task, 59 against 299 tokens, bfloat16", 2, None),
        *("ICL, no cache", "three examples in the prompt"),
    ),
)


def _headlines(*results: Result) -> Iterable[Line]:
    for what, case, threads, cache, baseline, words in HEADLINES:
        found = [r for result in results for r in result.rows if (r.case, r.threads, r.cache) == (case, threads, cache)]
        if len(found) != 1 or baseline not in found[0].times:
            raise ResultError(f"speed: expected one row of {case!r}, {threads} threads, beside {baseline!r}")
        yield {"what": what, "row": found[0], "words": words, "baseline us": found[0].speedup(baseline) * found[0].us}


def _same(*names: str) -> list[Column]:
    return [(name, name) for name in names]


def _rate(row: Row) -> float | None:
    return row.roofline["bytes"] / row.us / 1e3 if row.roofline else None


#: Of a whole model, without the sweep over the number of adapters.
steps = rows("model", lambda row: "adapters" not in row.shape)

TABLES = (
    Table(
        "generate",
        "Generating adapters: from task embedding to A and B in memory",
        ("generate",),
        _generate,
        [
            CASE,
            SHAPE,
            *WHERE,
            *time("ms"),
            ("output", lambda row: PREALLOCATED.split()[0] if PREALLOCATED in row.case else "fresh"),
            ("ms an adapter", lambda row: row.us / 1e3 / row.shape["descriptions"]),
            ROUNDS,
            SPREAD,
            *roofline("ms"),
            *TARGET,
            ("x FMA peak", "over_peak"),
            OVER,
            SKIPPED,
            *ERROR,
        ],
    ),
    Table(
        "generate-memory",
        "Peak memory of generating, beside weights and adapters",
        ("generate",),
        records("memory"),
        [
            ("what", "what"),
            *((f"{name} MiB", f"{name}_mib") for name in ("peak", "weights", "adapters")),
            ("peak / (weights + adapters)", lambda e: memory_verdict(e).ratio),
            ("target", lambda e: memory_verdict(e).target),
            ("met", lambda e: memory_verdict(e).met),
        ],
    ),
    Table(
        "bf16-weights",
        "Adapters from weights in bfloat16, relative Frobenius difference to those from float32",
        ("generate",),
        records("bf16_weights"),
        [*_same("model", "variant"), ("relative Frobenius difference", "relative_frobenius")],
    ),
    Table(
        "split",
        "From a sentence to its first use, part by part",
        ("generate",),
        requests,
        [
            *_same("model", "variant", "dtype", "descriptions", "threads"),
            Each(_parts),
            ("sum ms", lambda r: sum(r["parts"].values()) / 1e3),
        ],
    ),
    Table(
        "lora",
        "The LoRA op alone: every token with the adapter of its row",
        ("apply",),
        rows("lora", lambda row: BASE not in row.times),
        [CASE, SHAPE, *WHERE, *time("us"), ROUNDS, SPREAD, *roofline("us"), *TARGET, OVER, SKIPPED, *ERROR],
    ),
    Table(
        "linear",
        "A linear with its adapters, beside the linear alone",
        ("apply",),
        rows("lora", lambda row: BASE in row.times),
        [CASE, SHAPE, *WHERE, *over_base("us"), SKIPPED, *ERROR],
    ),
    Table(
        "sweep",
        "The same tokens with more and more different adapters",
        ("apply",),
        rows("sweep"),
        [
            *(CASE, SHAPE, *WHERE, *time("us"), ("bytes", "roofline.bytes"), ("GB/s", _rate)),
            *(*roofline("us"), OVER, SKIPPED, *ERROR),
        ],
    ),
    Table(
        "backward",
        "Forward and backward, with gradients in x, A and B",
        ("apply",),
        rows("backward"),
        [CASE, SHAPE, *WHERE, *time("us"), *roofline("us"), OVER, SKIPPED, *ERROR],
    ),
    Table(
        "model",
        "A step of a whole model with an adapter per row, beside the model without adapters",
        ("apply",),
        steps,
        [CASE, SHAPE, *WHERE, *over_base("ms"), SKIPPED, *ERROR],
    ),
    Table(
        "model-sweep",
        "Decode steps over the number of different adapters in the batch",
        ("apply",),
        rows("model", lambda row: "adapters" in row.shape),
        [CASE, SHAPE, *WHERE, *over_base("ms"), SKIPPED, *ERROR],
    ),
    Table(
        "speed",
        "What a newcomer asks",
        SUITES,
        _headlines,
        [
            *(
                ("what", "what"),
                ("case", "row.name"),
                ("us", "row.us"),
                ("baseline", "words"),
                ("baseline us", "baseline us"),
            ),
            ("speedup", lambda e: Times(e["baseline us"] / e["row"].us)),
            *((head, f"row.verdict.{head}") for head in ("ratio", "of", "target", "met")),
        ],
    ),
    Table(
        "misses",
        "Every target that is missed, the farthest first",
        SUITES,
        _misses,
        [
            *(("group", "group"), ("case", "name"), ("measured", "value"), ("allowed", "limit")),
            ("unit", lambda v: v.unit or "x"),
            *_same("ratio", "of", "target"),
            ("over by %", lambda v: 100 * (v.over - 1)),
        ],
    ),
    Table(
        "losses",
        "Every case in which another way is faster, the largest loss first",
        COMPARED,
        _losses,
        [
            *(("group", lambda c: c[0].group), ("case", lambda c: c[0].name), ("baseline", lambda c: c[1])),
            *(("ours us", lambda c: c[0].us), ("baseline us", lambda c: c[0].us * c[2])),
            ("ours / baseline", lambda c: 1 / c[2]),
        ],
    ),
    Table(
        "beaten",
        "Baselines that are faster than ours somewhere",
        COMPARED,
        _beaten,
        [*_same("group", "baseline", "cases", "lost"), ("ours / baseline at most", "worst"), ("case", "case")],
    ),
    Table(
        "totals",
        "Targets and comparisons by suite",
        SUITES,
        _totals,
        _same("suite", "targets", "missed", "comparisons", "lost"),
    ),
    Table(
        "ceilings",
        "What the machine reached before and after each run, in GFLOP/s and GB/s",
        SUITES,
        _ceilings,
        [
            *_same("suite", "kind", "dtype", "bytes", "threads", "unit"),
            *(
                ("before", "rate"),
                ("after", "later"),
                ("drift %", lambda c: c["later"] and 100 * (c["later"] / c["rate"] - 1)),
            ),
            ("is a peak", "holds"),
        ],
    ),
)
