"""The tables of in-context learning (ICL) beside adapters (T2L): counted costs, measured times, real tasks, token counts."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.icl.names import ICL, KEPT, MEAN, MODELS, PAPER, WARM
from bench.records import OURS, Result, ResultError
from bench.report.cells import Times
from bench.report.tables import AS_IS, Column, Each, Line, Table, records
from t2l_engine.research import costs
from t2l_engine.research.costs import LABELS

Entry = dict[str, Any]
PHASES = ("describe", "generate", "merge", "prompt", "answer")
#: Real tasks by what the bundled checkpoint knows of them.
UNSEEN, TRAINED, BENCHMARK = "tasks never trained on", "trained tasks", "of the paper's benchmarks, never trained on"
ARMS, RIVALS = ("icl", "icl-warm", "description", "t2l-task", "t2l-merged"), ("icl", "icl-cold", "icl-warm")


def entry(result: Result, kind: str, **where: Any) -> Entry:
    """The record of a kind with these fields; ResultError where there is none."""
    for found in result.records(kind):
        if where.items() <= found.items():
            return found
    raise ResultError(f"{result.path.name}: {kind}: none with {', '.join(f'{k} {v!r}' for k, v in where.items())}")


def models(result: Result, kind: str = "costs") -> list[str]:
    return list(dict.fromkeys(found["model"] for found in result.records(kind)))


def title(model: str) -> str:
    return MODELS.get(model, model)


# --- counted ---------------------------------------------------------------------------------------------------------


def _over(rival: str, ours: str, part: str) -> Callable[[Entry], Times]:
    return lambda of: Times(of["ways"][rival][part] / of["ways"][ours][part])


def _won(way: str, rival: str) -> list[Column]:
    """For which numbers of questions of a task a way costs less in all: empty for none, without an end for ever."""
    head = f"{LABELS[way]} below {LABELS[rival]}, questions"
    return [
        (f"{head} from", lambda of: (of["questions_won"][way][rival] or (None, None))[0]),
        (f"{head} to", lambda of: (of["questions_won"][way][rival] or (None, None))[1]),
    ]


WHICH: list[Column] = [("model", lambda of: title(of["model"])), ("lengths", "workload")]
COSTS: list[Column] = [
    *WHICH,
    *((name, f"lengths.{name}") for name in ("question", "shots", "shot", "answer", "description")),
    ("first question, ICL, TFLOP", lambda of: of["ways"]["icl"]["first_token"] / 1e12),
    ("first question, T2L, TFLOP", lambda of: of["ways"]["t2l-task"]["first_token"] / 1e12),
    ("to the first token, ICL / T2L", _over("icl", "t2l-task", "first_token")),
    ("in all, ICL / T2L", _over("icl", "t2l-task", "first")),
    ("first question, warm cache / T2L", _over("icl-warm", "t2l-task", "first_token")),
    ("later question, warm cache / T2L", _over("icl-warm", "t2l-task", "later")),
    *(column for way in ("t2l-task", "t2l-request") for rival in ("icl-cold", "icl-warm") for column in _won(way, rival)),
    ("examples to beat a warm cache at once", "shots_to_win.t2l-task.icl-warm"),
]
HELD = {
    "ICL, no cache, a user": "icl.per_user",
    "ICL, cached, a user": "icl-warm.per_user",
    "ICL, cached, a task": "icl-warm.per_task",
    "T2L per task, a user": "t2l-task.per_user",
    "T2L per task, a task": "t2l-task.per_task",
    "T2L merged, a task": "t2l-merged.per_task",
    "T2L, once": "t2l-task.fixed",
    **{f"a decode step reads, {LABELS[way]}": f"{way}.step_bytes" for way in ("icl", "t2l-task", "t2l-merged")},
}
MEMORY: list[Column] = [
    *WHICH,
    ("adapter, B", "adapter_bytes"),
    *((f"{head}, B", f"ways.{field}") for head, field in HELD.items()),
    ("an adapter is smaller than the cache of, tokens", "adapter_tokens"),
    ("T2L per task holds less from, tasks at a time", "tasks_to_win.t2l-task.icl-warm"),
]


def phases(result: Result) -> Iterator[Line]:
    """The first question of a task by each way, phase by phase."""
    for found in result.records("costs"):
        for name, way in found["ways"].items():
            line = {"model": title(found["model"]), "lengths": found["workload"], "way": LABELS[name]}
            for unit, text in (("flops", "GFLOP"), ("bytes", "GB")):
                parts = {phase: of[unit] / 1e9 for phase, of in way["phases"].items()}
                line |= {f"{phase}, {text}": parts.get(phase) for phase in PHASES}
                line |= {f"sum, {text}": math.fsum(parts.values())}
            yield line | {"what it is": costs.WAYS[name]}


PAPERS: list[Column] = [
    ("cell", "cell"),
    ("printed, TFLOP", "printed_tflop"),
    ("tokens it implies", "implied_tokens"),
    ("counted at, tokens", "tokens"),
    ("counted, TFLOP", "ours_tflop"),
    ("off, %", "off_percent"),
    ("its rounding allows, %", "rounding_percent"),
    ("within its rounding", lambda cell: abs(cell["off_percent"]) <= cell["rounding_percent"]),
]

# --- measured --------------------------------------------------------------------------------------------------------


def first(result: Result) -> Iterator[Line]:
    """The first question of a task by each way and its parts, beside ours: measured, by operations, by the roofline."""
    for found in result.records("first_question"):
        ours = found["parts"][OURS]
        for name, timed in found["parts"].items():
            over, predicted = found["measured"].get(name, {}), found["predicted"].get(name, {})
            yield {
                "dtype": found["dtype"],
                "what": "T2L, first question" if name == OURS else name,
                "ms": timed["median_us"] / 1e3,
                "IQR ms": timed["iqr_us"] / 1e3,
                "of T2L's time, %": 100 * timed["median_us"] / ours["median_us"],
                "GFLOP": timed["flops"] / 1e9,
                "of T2L's operations, %": 100 * timed["flops"] / ours["flops"],
                "GFLOP/s": timed["gflops"],
                **_spread("over T2L", over),
                **{f"over T2L, by {by}": Times(predicted[by]) if predicted else None for by in ("flops", "roofline")},
            }


def _spread(head: str, over: Entry) -> Line:
    """The median of a ratio, and between which values nine tenths of the rounds lie."""
    parts = {"median": head, "low": f"{head}, 5th percentile", "high": f"{head}, 95th percentile"}
    return {text: Times(over[key]) if over else None for key, text in parts.items()}


def examples(result: Result) -> Iterator[Line]:
    for found in result.records("by_examples"):
        line = {"dtype": found["dtype"], "examples": found["shots"], "tokens": found["tokens"]}
        line |= {"T2L, new task, ms": found["new_task_us"] / 1e3, "T2L, later question, ms": found["kept_us"] / 1e3}
        for rival, time in (("icl", "icl_us"), ("icl-warm", "icl_warm_us")):
            head = f"{LABELS[rival]} / T2L"
            line |= {f"{LABELS[rival]}, ms": found[time] / 1e3, **_spread(head, found["ratio"][rival])}
            line |= {f"{head}, by operations": Times(found["predicted"][rival])}
        yield line


# --- real tasks ------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """What a task costs by a way, in any unit: its first question, and each further one."""

    first: float
    later: float

    def total(self, questions: int) -> float:
        return self.first + (questions - 1) * self.later


def groups(result: Result) -> dict[str, list[Entry]]:
    """Tasks by what the checkpoint knows of them; groups without tasks are left out."""
    counted = {found["workload"] for found in result.records("costs")}
    found: dict[str, list[Entry]] = {UNSEEN: [], TRAINED: [], BENCHMARK: []}
    for task in result.records("questions"):
        found[TRAINED if task["trained"] else BENCHMARK if task["task"] in counted else UNSEEN].append(task)
    return {name: tasks for name, tasks in found.items() if tasks}


def linear(task: Entry) -> dict[str, Linear]:
    """Microseconds of a task by way: of its first question, and of each later one, in the mean over its questions."""
    mean = {arm: timed["all_us"] / task["questions"] for arm, timed in task["arms"].items()}
    kept = mean["t2l-task"]
    return {
        "icl": Linear(mean["icl"], mean["icl"]),
        "icl-cold": Linear(task["fill_us"] + mean["icl-warm"], mean["icl-warm"]),
        "icl-warm": Linear(mean["icl-warm"], mean["icl-warm"]),
        "t2l-task": Linear(task["generate_us"] + kept, kept),
    }


def to_first_token(tasks: Sequence[Entry], arm: str) -> float:
    """Microseconds to the first token of a task's first question; summed over ``tasks``."""
    once = math.fsum(t["generate_us"] for t in tasks) if arm == "t2l-task" else 0
    return once + math.fsum(t["arms"][arm]["first_token_us"]["median"] for t in tasks)


def questions(result: Result) -> Iterator[Line]:
    """Every real task, accuracy beside time, after the means of its group; ratios of a group are of summed times."""
    for name, tasks in groups(result).items():
        yield {"task": f"mean of {len(tasks)} {name}", **_measured(name, tasks)}
        yield from ({"task": task["task"], **_measured(name, [task])} for task in tasks)


def _measured(group: str, tasks: Sequence[Entry]) -> Line:
    def mean(value: Callable[[Entry], float]) -> float:
        return statistics.fmean(map(value, tasks))  # not sum: its rounding differs between Pythons, and tables are compared

    def by_arm(head: str, value: Callable[[Entry], float]) -> Line:
        return {head.format(arm): mean(lambda t, a=arm: value(t["arms"][a])) for arm in ARMS}

    def total(way: str) -> float:
        return math.fsum(linear(t)[way].total(t["questions"]) for t in tasks)

    ways = linear(tasks[0])
    won = {rival: costs.questions_won(ways["t2l-task"], ways[rival], float) for rival in RIVALS if len(tasks) == 1}
    early = {arm: to_first_token(tasks, arm) for arm in ("icl", "t2l-task")}
    return {
        "group": group,
        "questions": sum(t["questions"] for t in tasks),
        **{f"prompt tokens, {name}": mean(lambda t, n=name: t["tokens"][n]) for name in ("icl", "t2l")},
        **by_arm("accuracy, {}, %", operator.itemgetter("accuracy")),
        "accuracy, t2l-task, other wordings, %": _reworded(tasks),
        **by_arm("answer tokens, {}", operator.itemgetter("tokens")),
        **by_arm("ms a question, {}", lambda arm: arm["answer_us"]["median"] / 1e3),
        **{f"ms to the first token, {arm}": us / len(tasks) / 1e3 for arm, us in early.items()},
        **{f"ms once, {once}": mean(lambda t, o=once: t[f"{o}_us"] / 1e3) for once in ("generate", "merge", "fill")},
        "first token of the first question, ICL / T2L": Times(early["icl"] / early["t2l-task"]),
        **{f"all questions, {rival} / T2L": Times(total(rival) / total("t2l-task")) for rival in RIVALS},
        **{f"T2L ahead of {rival}, questions from": (won.get(rival) or (None, None))[0] for rival in RIVALS},
        **{f"T2L ahead of {rival}, questions to": (won.get(rival) or (None, None))[1] for rival in RIVALS},
        **{f"same answers, {arm}": sum(t["same_answers"][arm] for t in tasks) for arm in ("icl-warm", "t2l-merged")},
    }


def _reworded(tasks: Sequence[Entry]) -> float | None:
    """Accuracy by other descriptions of the same tasks, where all have some."""
    if all(task["reworded"] for task in tasks):
        return statistics.fmean(statistics.fmean(task["reworded"].values()) for task in tasks)
    return None


# --- at a glance -----------------------------------------------------------------------------------------------------


def summary(result: Result) -> Iterator[Line]:
    """The first question of a task counted, measured, and on real tasks with accuracy beside it."""
    at = [("mistral-7b", PAPER), *((model, MEAN) for model in models(result)), ("smollm2-135m", PAPER)]
    for model, workload in at:
        found = entry(result, "costs", model=model, workload=workload)
        ways, name = found["ways"], "the paper's" if workload == PAPER else workload
        first = [ways[way]["first_token"] / 1e12 for way in ("icl", "t2l-task")]
        later = [ways[way]["later_token"] for way in ("icl-warm", "t2l-task")]
        yield _glance(f"{title(model)}, counted, TFLOP", f"{name}: {_tokens(found['lengths'])}", first, later)
    for row in result.rows:
        first, later = ([row.times[name]["median_us"] / 1e3 for name in pair] for pair in ((ICL, OURS), (WARM, KEPT)))
        name = f"{row.shape['model']} {row.shape['dtype']}, measured, ms"
        yield _glance(name, f"the paper's: {_tokens(row.shape)}", first, later)
    for group, tasks in groups(result).items():
        first = [to_first_token(tasks, arm) / len(tasks) / 1e3 for arm in ("icl", "t2l-task")]
        later = [math.fsum(t["arms"][arm]["first_token_us"]["median"] for t in tasks) for arm in ("icl-warm", "t2l-task")]
        about = _measured(group, tasks)
        lengths = f"{about['prompt tokens, icl']:.0f} against {about['prompt tokens, t2l']:.0f} tokens"
        accuracy = [about[f"accuracy, {arm}, %"] for arm in ("icl", "t2l-task")]
        yield _glance(f"SmolLM2-135M, {len(tasks)} {group}, ms", lengths, first, later, accuracy)


def _tokens(of: Entry) -> str:
    return f"{of['question']} + {of['shots']} x {of['shot']} tokens"


def _glance(what: str, lengths: str, first: list[float], later: list[float], accuracy: Sequence = (None, None)) -> Line:
    """Pairs are of ICL and T2L; a later question's ICL has a warm cache."""
    line = {"what": what, "lengths": lengths, "first question, ICL": first[0], "T2L": first[1]}
    line |= {"ICL / T2L": Times(first[0] / first[1]), "later question, cached ICL / T2L": Times(later[0] / later[1])}
    return line | {"accuracy, ICL, %": accuracy[0], "accuracy, T2L, %": accuracy[1]}


# --- token counts ----------------------------------------------------------------------------------------------------


def _counts(head: str, key: str) -> list[Column]:
    return [(f"{head}, {part}", f"{key}.{part}") for part in ("mean", "p5", "p95")]


COUNTS: list[Column] = [("benchmark", "benchmark"), ("model", lambda of: title(of["model"]))]
COUNTS += [c for part in ("question", "shot", "examples", "answer") for c in _counts(part, part)]


def _descriptions(found: list[Entry]) -> list[Column]:
    return [c for key in ("encoder", *MODELS) if key in found[0] for c in _counts(title(key), key)]


def _fields(*names: str) -> list[Column]:
    return [(name.replace("_", " "), name) for name in names]


LEFT_OUT = ("ours_tflop", "with_padded_columns_tflop", "heads_percent", "times_printed", "trunk_of_one_layer_tflop")
ABOUT_DESCRIPTIONS = [*_fields("of", "count"), Each(_descriptions)]
_ICL = (
    ("summary", "The first question of a task: examples in the prompt or an adapter", summary, [AS_IS]),
    ("costs", "Counted costs by model and lengths", records("costs"), COSTS),
    ("phases", "The first question of a task by phase, counted", phases, [AS_IS]),
    ("memory", "Bytes beside the language model's weights, counted", records("costs"), MEMORY),
    ("paper", "The paper's table of operations beside the closed forms", records("paper"), PAPERS),
    ("paper-hypernetwork", "What its cell may have left out", records("hypernetwork"), _fields(*LEFT_OUT)),
    ("paper-ratio", "Three-shot ICL over T2L", records("ratio"), _fields("printed", "corrected", "ours")),
    ("first", "The first question of a task, measured, with its parts", first, [AS_IS]),
    ("examples", "The first question over the number of examples, measured", examples, [AS_IS]),
    ("questions", "Real tasks: accuracy beside time", questions, [AS_IS]),
    ("terms", "Terms of a cost", records("terms"), _fields("phase", "name", "way", "value", "unit", "source")),
)
_COUNTED = (
    ("lengths", "Tokens of the benchmarks' questions and answers", records("length"), COUNTS),
    ("descriptions", "Tokens of task descriptions", records("descriptions"), ABOUT_DESCRIPTIONS),
    ("texts", "What was counted", records("benchmark"), _fields("benchmark", "items", "train_items", "license")),
    ("tokenizers", "What counted", records("tokenizer"), _fields("name", "from", "vocabulary", "sha256")),
    ("meanings", "What the counts mean", records("meaning"), _fields("of", "text")),
)
TABLES = [
    Table(f"icl-{name}", about, (source,), entries, columns)
    for source, tables in (("icl", _ICL), ("lengths", _COUNTED))
    for name, about, entries, columns in tables
]
