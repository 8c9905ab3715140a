"""The tables of in-context learning (ICL) beside adapters (T2L): counted costs, measured times, real tasks, token counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean  # not sum: its rounding differs between Pythons, and tables are compared
from typing import NamedTuple

from bench.icl.names import ICL, KEPT, MEAN, MODELS, PAPER, WARM
from bench.records import OURS, Result
from bench.report.cells import Times
from bench.report.tables import Entry, Line, each, flat, series, table
from t2l_engine.research import costs
from t2l_engine.research.costs import LABELS

#: Real tasks by what the bundled checkpoint knows of them.
UNSEEN, TRAINED, BENCHMARK = "tasks never trained on", "trained tasks", "of the paper's benchmarks, never trained on"
RIVALS = ("icl", "icl-cold", "icl-warm")


def title(model: str) -> str:
    return MODELS.get(model, model)


# --- counted ---------------------------------------------------------------------------------------------------------


@table(
    "icl-costs",
    "Counted costs; won: the first and the last question of a task (or -, without end) that cost less",
    "icl",
    counted=True,
)
def _costs(result: Result) -> Iterator[Line]:
    for of in result.records("costs"):
        cold, warm, ours = (of["ways"][way] for way in ("icl", "icl-warm", "t2l-task"))
        yield (
            {"model": title(of["model"])}
            | flat(of, "model", "ways")
            | {
                "to the first token, ICL / T2L": Times(cold["first_token"] / ours["first_token"]),
                "in all, ICL / T2L": Times(cold["first"] / ours["first"]),
                "first question, warm cache / T2L": Times(warm["first_token"] / ours["first_token"]),
                "later question, warm cache / T2L": Times(warm["later"] / ours["later"]),
            }
        )


@table(
    "icl-ways",
    "FLOP and bytes of each way by model and lengths: of a question, by phase, and held per user, task, once",
    "icl",
    counted=True,
)
def _ways(result: Result) -> Iterator[Line]:
    for of in result.records("costs"):
        for name, way in of["ways"].items():
            line = {"model": title(of["model"]), "workload": of["workload"], "way": LABELS[name], **of["lengths"]}
            yield line | flat(way) | {"what it is": costs.WAYS[name]}


table("icl-by-shots", "Operations of ICL over T2L by examples in the prompt and questions of a task", "icl", counted=True)(
    series("by_shots")
)
table("icl-by-questions", "Operations of each way over T2L per task, by questions of a task", "icl", counted=True)(
    series("by_questions")
)
table("icl-by-context", "Bytes of keys and values by tokens in the cache, beside an adapter", "icl", counted=True)(
    series("by_context")
)
table("icl-terms", "Terms of a cost", "icl", counted=True)(each("terms"))
table("icl-paper-hypernetwork", "What the paper's cell of the hypernetwork may have left out", "icl", counted=True)(
    each("hypernetwork")
)
table("icl-paper-ratio", "Three-shot ICL over T2L", "icl", counted=True)(each("ratio"))


@table("icl-paper", "The paper's table of operations beside the closed forms", "icl", counted=True)
def _paper(result: Result) -> Iterator[Line]:
    for cell in result.records("paper"):
        yield flat(cell) | {"within its rounding": abs(cell["off_percent"]) <= cell["rounding_percent"]}


# --- measured --------------------------------------------------------------------------------------------------------


@table(
    "icl-first", "The first question of a task by each way and its parts: measured, by operations, by the roofline", "icl"
)
def _first(result: Result) -> Iterator[Line]:
    for found in result.records("first_question"):
        ours = found["parts"][OURS]
        for name, timed in found["parts"].items():
            line = {"dtype": found["dtype"], "what": "T2L, first question" if name == OURS else name, **flat(timed)}
            for key, what in (("median_us", "time"), ("flops", "operations")):
                line[f"of T2L's {what}, %"] = 100 * timed[key] / ours[key]
            ratios = {"over T2L": found["measured"].get(name, {}), "over T2L by": found["predicted"].get(name, {})}
            yield line | flat(ratios)


table("icl-examples", "The first question over the number of examples, measured", "icl")(each("by_examples"))


# --- real tasks ------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """What a task costs by a way, in any unit: its first question, and each further one."""

    first: float
    later: float


def _groups(result: Result) -> dict[str, list[Entry]]:
    """Tasks by what the checkpoint knows of them; groups without tasks are left out."""
    counted = {found["workload"] for found in result.records("costs")}
    found: dict[str, list[Entry]] = {UNSEEN: [], TRAINED: [], BENCHMARK: []}
    for task in result.records("questions"):
        found[TRAINED if task["trained"] else BENCHMARK if task["task"] in counted else UNSEEN].append(task)
    return {name: tasks for name, tasks in found.items() if tasks}


def _linear(task: Entry) -> dict[str, Linear]:
    """Microseconds of a task by way: of its first question, and of each later one, in the mean over its questions."""
    mean = {arm: timed["all_us"] / task["questions"] for arm, timed in task["arms"].items()}
    return {
        "icl": Linear(mean["icl"], mean["icl"]),
        "icl-cold": Linear(task["fill_us"] + mean["icl-warm"], mean["icl-warm"]),
        "icl-warm": Linear(mean["icl-warm"], mean["icl-warm"]),
        "t2l-task": Linear(task["generate_us"] + mean["t2l-task"], mean["t2l-task"]),
    }


@table(
    "icl-questions", "Real tasks: accuracy in percent beside times; means of a group, but ratios of its summed times", "icl"
)
def _questions(result: Result) -> Iterator[Line]:
    for name, tasks in _groups(result).items():
        yield {"task": f"mean of {len(tasks)} {name}", "group": name, "tasks": len(tasks), **_measured(tasks)}
        for task in tasks:
            ways = _linear(task)
            won = {f"questions won {r}": costs.questions_won(ways["t2l-task"], ways[r], float) for r in RIVALS}
            yield {"task": task["task"], "group": name, "tasks": 1, "dtype": task["dtype"], **_measured([task]), **won}


def _measured(tasks: Sequence[Entry]) -> Line:
    """Means over ``tasks``, with ratios of T2L."""

    def total(way: str) -> float:
        ways = ((_linear(task)[way], task["questions"]) for task in tasks)
        return math.fsum(of.first + (questions - 1) * of.later for of, questions in ways)

    lines = [
        flat(task["arms"]) | flat(task, "arms", "task", "trained", "description", "dtype", "reworded") for task in tasks
    ]
    of = {head: fmean(line[head] for line in lines) for head in lines[0]}
    if all(task["reworded"] for task in tasks):
        of["t2l-task accuracy, other wordings"] = fmean(fmean(task["reworded"].values()) for task in tasks)
    of["t2l-task first question us"] = of["t2l-task first token us median"] + of["generate us"]
    of["first token of the first question, ICL / T2L"] = of["icl first token us median"] / of["t2l-task first question us"]
    return of | {f"all questions, {rival} / T2L": Times(total(rival) / total("t2l-task")) for rival in RIVALS}


# --- at a glance -----------------------------------------------------------------------------------------------------


@table("icl-summary", "The first question of a task: examples in the prompt or an adapter", "icl")
def _summary(result: Result) -> Iterator[Line]:
    """Counted, measured, and on real tasks with accuracy beside it."""
    counted = {(of["model"], of["workload"]): of for of in result.records("costs")}
    models = dict.fromkeys(model for model, _ in counted)
    for model, workload in [("mistral-7b", PAPER), *((model, MEAN) for model in models), ("smollm2-135m", PAPER)]:
        found = counted[model, workload]
        ways, name = found["ways"], "the paper's" if workload == PAPER else workload
        first = [ways[way]["first_token"] / 1e12 for way in ("icl", "t2l-task")]
        later = [ways[way]["later_token"] for way in ("icl-warm", "t2l-task")]
        line = _glance(f"{title(model)}, counted, TFLOP", f"{name}: {_tokens(found['lengths'])}", first, later)
        yield {"machine": None} | line
    for row in result.rows:
        first, later = ([row.times[name]["median_us"] / 1e3 for name in pair] for pair in ((ICL, OURS), (WARM, KEPT)))
        name = f"{row.shape['model']} {row.shape['dtype']}, measured, ms"
        yield _glance(name, f"the paper's: {_tokens(row.shape)}", first, later)
    for group, tasks in _groups(result).items():
        of = _measured(tasks)
        first = [of[head] / 1e3 for head in ("icl first token us median", "t2l-task first question us")]
        later = [of[f"{arm} first token us median"] for arm in ("icl-warm", "t2l-task")]
        lengths = f"{of['tokens icl']:.0f} against {of['tokens t2l']:.0f} tokens"
        accuracy = [of[f"{arm} accuracy"] for arm in ("icl", "t2l-task")]
        yield _glance(f"SmolLM2-135M, {len(tasks)} {group}, ms", lengths, first, later, accuracy)


def _tokens(of: Entry) -> str:
    return f"{of['question']} + {of['shots']} x {of['shot']} tokens"


def _glance(what: str, lengths: str, first: list[float], later: list[float], accuracy: Sequence = (None, None)) -> Line:
    """Pairs are of ICL and T2L; a later question's ICL has a warm cache."""
    line = {"what": what, "lengths": lengths, "first question, ICL": first[0], "T2L": first[1]}
    line |= {"ICL / T2L": Times(first[0] / first[1]), "later question, cached ICL / T2L": Times(later[0] / later[1])}
    return line | {"accuracy, ICL, %": accuracy[0], "accuracy, T2L, %": accuracy[1]}


# --- token counts ----------------------------------------------------------------------------------------------------

table("icl-lengths", "Tokens of the benchmarks' questions and answers", "lengths")(each("length"))
table("icl-descriptions", "Tokens of task descriptions", "lengths")(each("descriptions"))
table("icl-texts", "What was counted", "lengths")(each("benchmark"))
table("icl-tokenizers", "What counted", "lengths")(each("tokenizer"))
table("icl-meanings", "What the counts mean", "lengths")(each("meaning"))
