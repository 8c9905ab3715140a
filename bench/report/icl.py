"""Examples in the prompt (in-context learning, ICL) beside adapters (T2L): the table of the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bench.icl.names import ICL, KEPT, MEAN, MODELS, PAPER, WARM
from bench.records import OURS
from bench.report.data import Data
from bench.report.tables import Line, derived

LATER = "later question, cached ICL / T2L"
#: Of ICL and of T2L.
Pair = tuple[float, ...]
TRAINED, UNSEEN, BENCHMARKS = "trained tasks", "tasks never trained on", "of the paper's benchmarks, never trained on"


def tasks(data: Data) -> dict[str, list[Line]]:
    """The measured tasks by what the paper's checkpoint was trained on."""
    counted = {of["workload"] for of in data.records("icl", "costs")}
    found: dict[str, list[Line]] = {TRAINED: [], UNSEEN: [], BENCHMARKS: []}
    for task in data.records("icl", "questions"):
        found[TRAINED if task["trained"] else BENCHMARKS if task["task"] in counted else UNSEEN].append(task)
    return found


def measured(group: list[Line]) -> Line:
    """Means over tasks: milliseconds to the first token, tokens of a prompt, accuracy in percent."""

    def mean(arm: str, field: str) -> float:
        return fmean(task["arms"][arm][field] for task in group)

    first = {arm: fmean(task["arms"][arm]["first_token_us"]["median"] for task in group) / 1e3 for arm in group[0]["arms"]}
    ours = first["t2l-task"] + fmean(task["generate_us"] for task in group) / 1e3
    return {
        "tokens": f"{fmean(task['tokens']['icl'] for task in group):.0f} against "
        f"{fmean(task['tokens']['t2l'] for task in group):.0f} tokens",
        "first": (first["icl"], ours),
        "later": (first["icl-warm"], first["t2l-task"]),
        "accuracy": (mean("icl", "accuracy"), mean("t2l-task", "accuracy")),
    }


@derived("prompt-or-adapter", "The first question of a task by examples in the prompt, and by an adapter")
def summary(data: Data) -> list[Line]:
    """Operations as counted, in TFLOP, and times to the first token, in milliseconds; pairs are of ICL and T2L."""
    costs = {(of["model"], of["workload"]): of for of in data.records("icl", "costs")}
    lines = []
    for model, workload in [("mistral-7b", PAPER), *((model, MEAN) for model in MODELS), ("smollm2-135m", PAPER)]:
        of = costs[model, workload]
        first = tuple(of["ways"][way]["first_token"] / 1e12 for way in ("icl", "t2l-task"))
        later = tuple(of["ways"][way]["later_token"] for way in ("icl-warm", "t2l-task"))
        lines.append(_line(f"{MODELS[model]}, counted, TFLOP", _tokens(of["lengths"]), first, later))
    for row in data.rows("icl", group="icl"):
        first, later = (tuple(row.times[name]["median_us"] / 1e3 for name in pair) for pair in ((ICL, OURS), (WARM, KEPT)))
        lines.append(_line(f"{row.shape['model']} {row.shape['dtype']}, ms", _tokens(row.shape), first, later))
    for name, group in tasks(data).items():
        of = measured(group)
        lines.append(_line(f"{len(group)} {name}, ms", of["tokens"], of["first"], of["later"], of["accuracy"]))
    return lines


def _tokens(of: Line) -> str:
    return f"{of['question']} + {of['shots']} x {of['shot']} tokens"


def _line(what: str, lengths: str, first: Pair, later: Pair, accuracy: Sequence[float | None] = (None, None)) -> Line:
    heads = ("what", "lengths", "ICL", "T2L", "ICL / T2L", LATER, "accuracy ICL, %", "accuracy T2L, %")
    return dict(zip(heads, (what, lengths, *first, first[0] / first[1], later[0] / later[1], *accuracy), strict=True))
