"""Tables of training steps, their memory, what is learned, and what the compiler makes of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

from bench.kernels import designed_blocks, parts
from bench.records import HOOKS, OURS, Result, ResultError, memory_verdict
from bench.report.cells import Times
from bench.report.tables import Entry, Line, beside_base, each, end, flat, over, start, table, target, time, x_base


@table(
    "train", "Training steps with an adapter a sample, over the frozen model alone, and the peak memory of each way", "train"
)
def _steps(result: Result) -> Iterator[Line]:
    held = {entry["case"]: entry for entry in result.records("train_memory")}
    for row in result.rows:
        if row.group == "train":
            if row.case not in held:
                raise ResultError(f"{result.path.name}: train_memory: nothing of {row.case}")
            times = {f"{HOOKS} / {OURS}, time": Times(row.speedup(HOOKS))}
            yield beside_base(row, "ms") | times | _memory(result, held[row.case])


def _memory(result: Result, entry: Entry) -> Line:
    """Peaks by way, and what of them the step added; ResultError where that is nothing."""
    line: Line = {}
    for way, of in entry["ways"].items():
        loaded, peak = of["loaded_mib"], of["peak_mib"]
        if not 0 < loaded < peak:
            place = f"{result.path.name}: memory of {entry['case']}, {way}"
            raise ResultError(f"{place}: expected a peak above the {loaded:g} MiB before it, got {peak:g}")
        line |= {f"{way} peak MiB": peak, f"{way} of the step MiB": peak - loaded}
    for head, of in (("peak memory", "peak MiB"), ("memory of the step", "of the step MiB")):
        line[f"{HOOKS} / {OURS}, {head}"] = Times(line[f"{HOOKS} {of}"] / line[f"{OURS} {of}"])
    verdict = memory_verdict(entry)
    line |= {f"memory {head}": target(verdict)[head] for head in ("target", "met")}
    return line | {"memory skipped": "; ".join(f"{way}: {why}" for way, why in entry["skipped"].items()) or None}


@table("train-hypernetworks", "Whole training steps of hypernetworks, and their parts timed alone", "train")
def _hypernetworks(result: Result) -> Iterator[Line]:
    timed = {entry["case"]: entry["parts"] for entry in result.records("train_parts")}
    for row in result.rows:
        if row.group == "sft step":
            line = {**start(row), **x_base(row, "ms")}
            for name in ("model", "hypernetwork", "update"):
                us = timed[row.case][name]["median_us"]
                line |= {f"{name} ms": us / 1e3, f"{name} %": 100 * us / row.us}
            yield line | end(row)


@table("train-library", "Training steps of several adapters in one batch, beside one task at a time", "train")
def _library(result: Result) -> Iterator[Line]:
    for row in result.rows:
        if row.group == "library":
            each_task = {"ms a task": row.us / 1e3 / row.shape["tasks"]}
            yield start(row) | time(row, "ms") | each_task | over(row) | end(row)


@table("learn", "Adapters of eight tasks, and what hypernetworks that reconstruct them keep", "learn")
def _arms(result: Result) -> Iterator[Line]:
    """A share of the gain: a score less the base model's, over the same of the adapters."""
    arms = result.records("arm")
    base, best = arms[:2]
    for arm in arms:
        line = flat(arm, "settings")
        for metric in ("exact_match", "loss"):
            gain = 100 * (arm[metric] - base[metric]) / (best[metric] - base[metric])
            line[f"{metric.replace('_', ' ')}, % of the gain"] = None if arm in (base, best) else gain
        yield line


table("learn-tasks", "Exact match, in percent, and loss on the test examples of each task", "learn")(each("scores"))
table("learn-library", "The time of a larger library of adapters", "learn")(each("library"))


@table("kernels", "The CUDA kernels as nvcc compiles them; blocks of an SM, by registers alone", "kernels")
def _kernels(result: Result) -> Iterator[Line]:
    for of in result.records("kernel"):
        more = {"dtype": parts(of["kernel"])[1], "blocks designed for": designed_blocks(of["kernel"])}
        more["products"] = ", ".join(f"{count} {opcode}" for opcode, count in sorted(of["products"].items()))
        yield flat(of, "products") | more
