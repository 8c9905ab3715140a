"""Tables of training steps, their memory, what is learned, and what the compiler makes of the CUDA kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.kernels import designed_blocks, parts
from bench.records import HOOKS, OURS, Result, ResultError, Row, memory_verdict
from bench.report import tables
from bench.report.cells import Times
from bench.report.tables import CASE, ERROR, OVER, SHAPE, SKIPPED, WHERE, Column, Each, Line, Table, records, rows, time

Entry = dict[str, Any]

# --- steps -----------------------------------------------------------------------------------------------------------


def memory(*results: Result) -> list[Entry]:
    """Peaks of training steps; ResultError where one cannot be so."""
    found = records("train_memory")(*results)
    for entry in found:
        for way, of in entry["ways"].items():
            if not 0 < (loaded := of["loaded_mib"]) < (peak := of["peak_mib"]):
                place = f"{results[0].path.name}: memory of {entry['case']}, {way}"
                raise ResultError(f"{place}: expected a peak above the {loaded:g} MiB before it, got {peak:g}")
    return found


def _added(entry: Entry, way: str) -> float:
    return entry["ways"][way]["peak_mib"] - entry["ways"][way]["loaded_mib"]


def _ways(found: list[Entry]) -> list[Column]:
    def columns(way: str) -> list[Column]:
        return [
            (f"{way} peak MiB", lambda e: e["ways"][way]["peak_mib"] if way in e["ways"] else None),
            (f"{way} of the step MiB", lambda e: _added(e, way) if way in e["ways"] else None),
        ]

    return [column for way in dict.fromkeys(way for e in found for way in e["ways"]) for column in columns(way)]


def _more(entry: Entry) -> Times:
    """Peak of hooks over ours."""
    return Times(entry["ways"][HOOKS]["peak_mib"] / entry["ways"][OURS]["peak_mib"])


def _target(entry: Entry) -> tuple[str, bool] | tuple[None, None]:
    verdict = memory_verdict(entry)
    return (verdict.target, verdict.met) if verdict else (None, None)


def _steps(*results: Result) -> list[Row]:
    """Steps with the record of their memory in the shape; ResultError where it was not measured."""
    held = {entry["case"]: entry for entry in memory(*results)}
    steps = rows("train")(*results)
    if missing := [row.case for row in steps if row.case not in held]:
        raise ResultError(f"{results[0].path.name}: train_memory: nothing of {missing[0]}")
    return [dataclasses.replace(row, shape=row.shape | {"memory": held[row.case]}) for row in steps]


def _hypernetworks(*results: Result) -> list[Row]:
    """Whole steps with the times of their parts among their own."""
    timed = {entry["case"]: entry["parts"] for entry in records("train_parts")(*results)}
    return [dataclasses.replace(row, times=row.times | timed[row.case]) for row in rows("sft step")(*results)]


def _part(name: str, title: str) -> list[Column]:
    return [
        (f"{title} ms", lambda row: row.times[name]["median_us"] / 1e3),
        (f"{title} %", lambda row: 100 * row.times[name]["median_us"] / row.us),
    ]


X_BASE: Column = ("x base", lambda row: row.us / tables.base_us(row))
BASE_MS: Column = ("base ms", lambda row: tables.base_us(row) / 1e3)


# --- what is learned ---------------------------------------------------------------------------------------------------


def _arms(result: Result) -> list[Entry]:
    """Arms with the share of the gain that they keep: a score less the base model's, over the same of the adapters."""
    arms = result.records("arm")
    base, best = arms[:2]

    def kept(arm: Entry, metric: str) -> float | None:
        return None if arm in (base, best) else 100 * (arm[metric] - base[metric]) / (best[metric] - base[metric])

    return [{**arm, "kept": {metric: kept(arm, metric) for metric in ("exact_match", "loss")}} for arm in arms]


def _tasks(result: Result) -> list[Line]:
    found: dict[str, Line] = {}
    for entry in result.records("scores"):
        found.setdefault(entry["task"], {"task": entry["task"]})[entry["arm"]] = entry["exact_match"]
    return list(found.values())


def _scores(found: list[Line]) -> list[Column]:
    return [(f"{arm} %", arm) for arm in found[0] if arm != "task"]


TABLES = (
    Table(
        "train-summary",
        "Training steps beside their memory: eight samples with eight adapters",
        ("train",),
        _steps,
        [
            *(CASE, BASE_MS, *time("ms"), X_BASE, ("target", "verdict.target"), ("met", "verdict.met")),
            (f"{HOOKS} / {OURS}, time", lambda row: Times(row.speedup(HOOKS))),
            (f"{OURS} peak MiB", f"shape.memory.ways.{OURS}.peak_mib"),
            (f"{HOOKS} / {OURS}, peak memory", lambda row: _more(row.shape["memory"])),
            ("memory target", lambda row: _target(row.shape["memory"])[0]),
            ("memory met", lambda row: _target(row.shape["memory"])[1]),
        ],
    ),
    Table(
        "train",
        "Training steps with an adapter a sample, over the frozen model alone",
        ("train",),
        rows("train"),
        [CASE, SHAPE, *WHERE, *tables.over_base("ms"), SKIPPED, *ERROR],
    ),
    Table(
        "train-memory",
        "Peak memory of a training step, a process for each way",
        ("train",),
        memory,
        [
            CASE,
            ("with the model MiB", f"ways.{OURS}.loaded_mib"),
            Each(_ways),
            (f"{HOOKS} / {OURS}, peak", _more),
            (f"{HOOKS} / {OURS}, of the step", lambda e: Times(_added(e, HOOKS) / _added(e, OURS))),
            ("target", lambda e: _target(e)[0]),
            ("met", lambda e: _target(e)[1]),
            ("skipped", lambda e: "; ".join(f"{way}: {why}" for way, why in e["skipped"].items()) or None),
        ],
    ),
    Table(
        "train-hypernetworks",
        "Whole training steps of hypernetworks, and their parts timed alone",
        ("train",),
        _hypernetworks,
        [
            *(CASE, *((name, f"shape.{name}") for name in ("model", "variant", "tokens", "dtype")), ("threads", "threads")),
            *(BASE_MS, *time("ms"), X_BASE),
            *_part("model", "model and adapters"),
            *_part("hypernetwork", "hypernetwork"),
            *_part("update", "clip and AdamW"),
            *ERROR,
        ],
    ),
    Table(
        "train-library",
        "Training steps of several adapters in one batch, beside one task at a time",
        ("train",),
        rows("library"),
        [
            *(CASE, SHAPE, *WHERE, *time("ms")),
            ("ms a task", lambda row: row.us / 1e3 / row.shape["tasks"]),
            *(OVER, SKIPPED, *ERROR),
        ],
    ),
    Table(
        "learn",
        "Adapters of eight tasks, and what hypernetworks that reconstruct them keep",
        ("learn",),
        _arms,
        [
            *(("arm", "arm"), ("exact match %", "exact_match"), ("of the gain %", "kept.exact_match")),
            *(("loss", "loss"), ("of the gain in loss %", "kept.loss"), ("L1", "l1")),
            *(("relative error of B A", "relative_error"), ("values", "values"), ("training s", "seconds")),
        ],
    ),
    Table(
        "learn-tasks",
        "Exact match on the test examples of each task, in percent",
        ("learn",),
        _tasks,
        [("task", "task"), Each(_scores)],
    ),
    Table(
        "learn-library",
        "The time of a larger library of adapters",
        ("learn",),
        records("library"),
        [
            *(("adapters", "adapters"), ("steps each", "steps_each")),
            ("examples a task and step", "settings.samples_per_task"),
            ("tasks in a batch", "settings.tasks_per_batch"),
            ("minutes of steps", lambda e: e["seconds"] / 60),
            ("tokens/s", lambda e: e["tokens"] / e["seconds"]),
        ],
    ),
    Table(
        "kernels",
        "The CUDA kernels as nvcc compiles them; blocks of an SM, by registers alone",
        ("kernels",),
        records("kernel"),
        [
            *(("arch", "arch"), ("kernel", "kernel"), ("dtype", lambda u: parts(u["kernel"])[1])),
            *(("registers", "registers"), ("blocks", "blocks")),
            ("blocks designed for", lambda u: designed_blocks(u["kernel"])),
            *((name, name) for name in ("spills", "stack", "instructions")),
            *(("global atomics", "global_atomics"), ("static shared bytes", "static_shared"), ("LDGSTS", "async_copies")),
            ("products", lambda u: ", ".join(f"{n} {opcode}" for opcode, n in sorted(u["products"].items()))),
        ],
    ),
)
