"""Tables of what was measured: the first question of a task part by part, over the number of examples, and real tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bench.icl import words
from bench.icl.words import ALONE, DESCRIBE, GENERATE, ICL, KEPT, MERGED, OURS, PUT, WARM, Entry, Linear, entries, ms, ratio
from bench.markdown import GAP, caption, everything, grid, met, number
from bench.rows import Result, ResultError, Row

# --- the first question, part by part --------------------------------------------------------------------------------


def first(result: Result) -> str:
    """A dtype at a time: where time and operations go, every way beside ours, and what explains the difference."""
    parts = []
    for found in entries(result, "first_question"):
        row = row_of(result, found)
        title = f"**{row.shape['model']}, {found['dtype']}**"
        parts += [title, _parts(found, row), _ways(found, row), _gap(result, found, row)]
    return "\n\n".join([*parts, caption(everything([result]))])


def row_of(result: Result, found: Entry) -> Row:
    """The row of the same case: its lengths and its bar; ResultError where it, or a time that tables need, is missing."""
    for name in (OURS, ICL, WARM, KEPT, ALONE, DESCRIBE, GENERATE, PUT):
        if name not in found["parts"]:
            raise ResultError(f"{result.path.name}: first_question: {found['case']}: {name!r} was not timed")
    for row in result.rows:
        if row.case == found["case"]:
            return row
    raise ResultError(f"{result.path.name}: rows: none with case {found['case']!r}")


def tokens_of(row: Row) -> tuple[int, int]:
    """Tokens of the question, and with its examples."""
    shape = row.shape
    return shape["question"], shape["question"] + shape["shots"] * shape["shot"]


def _parts(found: Entry, row: Row) -> str:
    timed, whole = found["parts"], found["parts"][OURS]
    names = {
        DESCRIBE: f"text encoder, {row.shape['description']} tokens",
        GENERATE: "hypernetwork",
        PUT: "adapter into its slot",
        KEPT: f"question of {row.shape['question']} tokens with the adapter",
    }
    sums = {key: math.fsum(timed[name][key] for name in names) for key in ("median_us", "flops")}
    lines = [
        *([label, *_part(timed[name], whole)] for name, label in names.items()),
        ["sum of the parts", *_part(sums, whole)],
        ["**T2L, a task's first question**", *_part(whole, whole)],
    ]
    return grid(["part", "ms (IQR)", "share of the time", "GFLOP", "share of the operations", "GFLOP/s"], lines)


def _part(timed: Entry, whole: Entry) -> list[str]:
    shares = (f"{100 * timed[key] / whole[key]:.1f} %" for key in ("median_us", "flops"))
    time, operations = shares
    return [_time(timed), time, number(timed["flops"] / 1e9), operations, number(timed["flops"] / timed["median_us"] / 1e3)]


def _time(timed: Entry) -> str:
    return ms(timed["median_us"]) + (f" ({ms(timed['iqr_us'])})" if "iqr_us" in timed else "")


def _ways(found: Entry, row: Row) -> str:
    question, prompt = tokens_of(row)
    names = {
        ICL: f"ICL, no cache, {prompt} tokens",
        WARM: f"ICL, warm cache, {question} after {prompt - question} tokens",
        KEPT: "T2L per task, a later question",
        MERGED: "T2L merged, a later question",
        ALONE: "question alone, no task",
    }
    lines = []
    for name, label in names.items():
        if name not in found["measured"]:
            lines.append([label, *[GAP] * 6])
            continue
        timed, predicted = found["parts"][name], found["predicted"][name]
        beside = [words.spread(found["measured"][name]), ratio(predicted["flops"]), ratio(predicted["roofline"])]
        lines.append([label, _time(timed), *beside, number(timed["flops"] / 1e9), number(timed["gflops"])])
    heads = ["way", "ms (IQR)", "over T2L's first question, measured (5th–95th percentile)", "by operations"]
    return grid([*heads, "by least times", "GFLOP", "GFLOP/s"], lines)


def _gap(result: Result, found: Entry, row: Row) -> str:
    timed, rates = found["parts"], found["rates"]
    question, prompt = tokens_of(row)
    predicted, verdict = found["predicted"][ICL], result.verdict(row)
    bar = f"  Bar: at least {number(1 / row.bar['ratio'])} times; met: {met(verdict)}." if verdict else ""
    slope = (timed[ICL]["median_us"] - timed[ALONE]["median_us"]) / (prompt - question)
    fixed = timed[ALONE]["median_us"] - question * slope
    speed = {name: number(timed[name]["gflops"]) for name in (ICL, ALONE, KEPT)}
    shares = {name: [_share(timed[name], timed[OURS], of) for of in ("median_us", "flops")] for name in (DESCRIBE, GENERATE)}
    return (
        f"ICL takes {number(found['measured'][ICL]['median'])} times as long as T2L; by operations it would be "
        f"{number(predicted['flops'])} times, by least times at {number(rates['gflops'])} GFLOP/s and "
        f"{number(rates['gbps'])} GB/s {number(predicted['roofline'])}.  {prompt} tokens run at {speed[ICL]} GFLOP/s, "
        f"{question} alone at {speed[ALONE]}, {question} with the adapter at {speed[KEPT]}: between them a prompt takes "
        f"{ms(fixed)} ms and {ms(slope)} ms a token, and the former is no shorter for T2L.  The text encoder takes "
        f"{shares[DESCRIBE][0]} of T2L's time for {shares[DESCRIBE][1]} of its operations, the hypernetwork "
        f"{shares[GENERATE][0]} for {shares[GENERATE][1]}.{bar}"
    )


def _share(part: Entry, whole: Entry, key: str) -> str:
    return f"{number(100 * part[key] / whole[key])} %"


# --- over the number of examples -------------------------------------------------------------------------------------


def examples(result: Result) -> str:
    """Every dtype: a prompt over its number of examples beside a new task by T2L, and where they cost the same."""
    found = entries(result, "by_examples")
    heads = [
        *("dtype", "examples", "tokens", "T2L, new task, ms", "no cache, ms", "ICL / T2L, measured (5th–95th percentile)"),
        *("by operations", "warm cache, ms", "ICL / T2L, measured (5th–95th percentile)", "by operations"),
    ]
    lines = []
    for e in found:
        rivals = [
            [ms(e[time]), words.spread(e["ratio"][rival]), ratio(e["predicted"][rival])]
            for rival, time in (("icl", "icl_us"), ("icl-warm", "icl_warm_us"))
        ]
        lines.append([e["dtype"], *map(str, (e["shots"], e["tokens"])), ms(e["new_task_us"]), *rivals[0], *rivals[1]])
    notes = [f"- {dtype}: {_fewest([e for e in found if e['dtype'] == dtype])}" for dtype in _dtypes(found)]
    return "\n\n".join([grid(heads, lines), "\n".join(notes), caption(everything([result]))])


def _dtypes(found: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(e["dtype"] for e in found))


def _fewest(found: Sequence[Entry]) -> str:
    """From how many examples on T2L answers the first question sooner."""

    def ahead(value: Callable[[Entry], float]) -> str:
        slower = [e["shots"] for e in found if value(e) <= 1]
        counts = [e["shots"] for e in found if not slower or e["shots"] > max(slower)]
        return f"from {min(counts)} on" if counts else "at none of these counts"

    said = []
    for rival, name in (("icl", "without a cache"), ("icl-warm", "beside a warm cache")):
        measured = ahead(lambda e, r=rival: e["ratio"][r]["median"])
        predicted = ahead(lambda e, r=rival: e["predicted"][r])
        said.append(f"{name} {measured} (by operations {predicted})")
    return f"by number of examples T2L's first question is the faster one {' and '.join(said)}."


# --- real tasks ------------------------------------------------------------------------------------------------------

UNSEEN, TRAINED, BENCHMARK = "tasks never trained on", "trained tasks", "of the paper's benchmarks, never trained on"


def groups(result: Result) -> dict[str, list[Entry]]:
    """Tasks by what the checkpoint knows of them, in this order; groups without tasks are left out."""
    named = words.benchmarks(result)
    found: dict[str, list[Entry]] = {UNSEEN: [], TRAINED: [], BENCHMARK: []}
    for task in entries(result, "questions"):
        found[TRAINED if task["trained"] else BENCHMARK if task["task"] in named else UNSEEN].append(task)
    return {name: tasks for name, tasks in found.items() if tasks}


def linear(task: Entry) -> dict[str, Linear]:
    """Microseconds of a task by way: of its first question, and of each later one, in the mean over its questions."""
    mean = {arm: timed["all_us"] / task["questions"] for arm, timed in task["arms"].items()}
    kept, merged = mean["t2l-task"], mean["t2l-merged"]
    return {
        "icl": Linear(mean["icl"], mean["icl"]),
        "icl-cold": Linear(task["fill_us"] + mean["icl-warm"], mean["icl-warm"]),
        "icl-warm": Linear(mean["icl-warm"], mean["icl-warm"]),
        "t2l-request": Linear(task["generate_us"] + kept, task["generate_us"] + kept),
        "t2l-task": Linear(task["generate_us"] + kept, kept),
        "t2l-merged": Linear(task["generate_us"] + task["merge_us"] + merged, merged),
    }


def total(tasks: Sequence[Entry], way: str) -> float:
    """Microseconds of all questions of ``tasks``."""
    return math.fsum(linear(t)[way].total(t["questions"]) for t in tasks)


def to_first_token(tasks: Sequence[Entry], arm: str) -> float:
    """Microseconds to the first token of a task's first question; summed over ``tasks``."""
    once = math.fsum(t["generate_us"] for t in tasks) if arm == "t2l-task" else 0
    return once + math.fsum(t["arms"][arm]["first_token_us"]["median"] for t in tasks)


def mean(tasks: Sequence[Entry], value: Callable[[Entry], float]) -> float:
    return statistics.fmean(map(value, tasks))  # not sum: its rounding differs between Pythons, and tables are compared


def accuracy(tasks: Sequence[Entry], arm: str) -> str:
    return f"{mean(tasks, lambda t: t['arms'][arm]['accuracy']):.1f}"


def reworded(tasks: Sequence[Entry]) -> str:
    """Accuracy with adapters of other descriptions of the same tasks; a gap where a task has none."""
    if not all(task["reworded"] for task in tasks):
        return GAP
    return f"{mean(tasks, lambda t: mean([*t['reworded'].values()], float)):.1f}"


def question(tasks: Sequence[Entry], arm: str) -> str:
    """Milliseconds of one question to its last token: the median, in the mean over tasks."""
    return ms(mean(tasks, lambda t: t["arms"][arm]["answer_us"]["median"]))


def ratios(tasks: Sequence[Entry]) -> list[str]:
    """In-context learning over T2L: the first token of the first question, and all questions beside every cache."""
    ours = total(tasks, "t2l-task")
    early = to_first_token(tasks, "icl") / to_first_token(tasks, "t2l-task")
    return [ratio(early), *(ratio(total(tasks, rival) / ours) for rival in ("icl", "icl-cold", "icl-warm"))]


def questions(result: Result) -> str:
    """Every real task, accuracy beside time, with means by group."""
    heads = [
        *(
            "task",
            "prompt tokens, ICL",
            "T2L",
            "accuracy, ICL",
            "description only",
            "T2L",
            "T2L merged",
            "T2L, worded otherwise",
        ),
        *("answer tokens, ICL", "T2L"),
        *("ms a question, no cache", "warm cache", "T2L per task", "T2L merged", "ms once, T2L"),
        *("first token of the first question, ICL / T2L", "all questions, no cache", "cold cache", "warm cache"),
        *("T2L ahead of no cache", "of a cold cache", "of a warm cache"),
    ]
    lines = []
    for name, tasks in groups(result).items():
        lines.append([f"**mean of {len(tasks)} {name}**", *_measured(tasks), *[GAP] * 3])
        lines += [[task["task"], *_measured([task]), *_ahead(task)] for task in tasks]
    every = entries(result, "questions")
    source = f"{conditions(every)}  {caption(everything([result]))}"
    return "\n\n".join([grid(heads, lines), f"{lost(every)}  {_alike(every)}", source])


def _measured(tasks: Sequence[Entry]) -> list[str]:
    return [
        *(f"{mean(tasks, lambda t, n=name: t['tokens'][n]):.0f}" for name in ("icl", "t2l")),
        *(accuracy(tasks, arm) for arm in ("icl", "description", "t2l-task", "t2l-merged")),
        reworded(tasks),
        *(f"{mean(tasks, lambda t, a=arm: t['arms'][a]['tokens']):.1f}" for arm in ("icl", "t2l-task")),
        *(question(tasks, arm) for arm in ("icl", "icl-warm", "t2l-task", "t2l-merged")),
        ms(mean(tasks, lambda t: t["generate_us"])),
        *ratios(tasks),
    ]


def _ahead(task: Entry) -> list[str]:
    ways = linear(task)
    return [words.when(words.won(ways["t2l-task"], ways[rival])) for rival in ("icl", "icl-cold", "icl-warm")]


def lost(tasks: Sequence[Entry]) -> str:
    """On how many tasks T2L answers less well or later, with the worst of each."""

    def gap(task: Entry) -> float:
        return task["arms"]["icl"]["accuracy"] - task["arms"]["t2l-task"]["accuracy"]

    slower = []
    for rival, name in (("icl", "no cache"), ("icl-cold", "a cold cache"), ("icl-warm", "a warm cache")):
        over = {t["task"]: total([t], "t2l-task") / total([t], rival) for t in tasks}
        slower.append(f"than {name} on {_worst({k: v for k, v in over.items() if v > 1}, '{} times the time at most')}")
    worse = _worst({t["task"]: gap(t) for t in tasks if gap(t) > 0}, "{} points at most")
    return (
        f"Of {len(tasks)} tasks T2L is less accurate than three examples on {worse}; over all questions of a task it is "
        f"slower {words.listed(slower)}."
    )


def _worst(found: dict[str, float], how: str) -> str:
    """How many, and the largest."""
    if not found:
        return "none"
    name = max(found, key=lambda task: found[task])
    return f"{len(found)} ({how.format(number(found[name]))}: {name})"


def _alike(tasks: Sequence[Entry]) -> str:
    asked = sum(t["questions"] for t in tasks)
    warm, merged = (sum(t["same_answers"][arm] for t in tasks) for arm in ("icl-warm", "t2l-merged"))
    return f"Of {asked} answers {warm} are alike with a warm cache and without, {merged} merged and beside the weights."


def conditions(tasks: Sequence[Entry]) -> str:
    """How the questions were asked, and how far an accuracy is to be trusted."""
    counts = [t["questions"] for t in tasks]
    asked = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    error = 100 * (0.25 / min(counts)) ** 0.5
    return (
        f"{asked} questions a task, base model in {tasks[0]['dtype']}, greedy; accuracy is exact match in percent, a "
        f"standard error is up to {number(error)} points.  In bold: in-context learning is faster."
    )
