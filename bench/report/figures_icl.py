"""Figures of the suite ``icl``: ratios over examples and over questions, a request phase by phase, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.icl.names import MEAN, PAPER
from bench.records import Result
from bench.report import tables_icl
from bench.report.cells import number
from bench.report.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, VERMILION, Drawing
from bench.report.tables_icl import PHASES, Entry, entry, models, title
from t2l_engine.research.costs import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISTRAL = "mistral-7b"
WAYS = dict(zip(LABELS, (VERMILION, ORANGE, PINK, SKY, BLUE, GREEN), strict=True))
COLOURS = {"mistral-7b": BLUE, "llama-3.1-8b": ORANGE, "gemma-2-2b": GREEN, "smollm2-135m": VERMILION}
#: Phase -> colour, and what it is called.
SHOWN = {
    "describe": (ORANGE, "text encoder"),
    "generate": (VERMILION, "hypernetwork"),
    "merge": (PINK, "merge into the weights"),
    "prompt": (SKY, "read the prompt"),
    "answer": (PALE, "rest of the answer"),
}


def _end(axes: Axes, x: float, y: float, text: str, colour: str, **style: object) -> None:
    """A name right of the end of a line."""
    place = {"va": "center", "fontsize": 7.5, "color": colour, "xytext": (4, 0), "annotation_clip": False}
    axes.annotate(text, (x, y), textcoords="offset points", **(place | style))


def _plain(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic axis, in plain figures."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _bytes(value: float) -> str:
    from matplotlib.ticker import EngFormatter

    return EngFormatter("B")(float(f"{value:.3g}"))


# --- ratio over the number of examples -------------------------------------------------------------------------------


def shots(figure: Figure, result: Result) -> None:
    """The first question of a task by in-context learning over that by T2L; the measured model has a panel of its own."""
    found, known = result.records("by_examples"), models(result, "by_shots")
    timed = {e["model"] for e in found}
    panels = [[m for m in known if title(m) not in timed], *([m] for m in known if title(m) in timed)]
    figure.set_size_inches(5.0 * len(panels), 4.0)
    for axes, chosen in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        counts = entry(result, "by_shots", model=chosen[0], workload=PAPER)["shots"]
        for rival, style in (("icl", "-"), ("icl-warm", "--")):
            _shots(axes, result, chosen, rival, style)
        points = [e for e in found if e["model"] in map(title, chosen)]
        _measured_shots(axes, points)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        axes.text(0.99, 0.02, "above the dotted line T2L costs less", transform=axes.transAxes, ha="right", fontsize=7.5)
        what = "operations (lines), time (points)" if points else "operations"
        axes.set(yscale="log", xlabel="examples in the prompt (0: a description)")
        axes.set_title(f"{', '.join(map(title, chosen))}: {what}")
        axes.set_xticks(counts)
        axes.set_xlim(-0.5, max(counts) + 0.5)
    figure.axes[0].set_ylabel("first question, ICL / T2L")
    _plain(figure.axes[0], "y", [0.5, 1, 2, 5, 10, 20])


def _shots(axes: Axes, result: Result, chosen: list[str], rival: str, style: str) -> None:
    """A line a model; all are named at its end, and the rival over the lowest."""
    ends = []
    for model in chosen:
        known = entry(result, "by_shots", model=model, workload=PAPER)
        ratios = known["questions"]["1"][rival]
        axes.plot(known["shots"], ratios, color=COLOURS.get(model, GREY), linestyle=style, linewidth=1.3)
        ends.append((ratios[-1], model, known["shots"]))
    for i, (y, model, counts) in enumerate(sorted(ends, reverse=True)):
        several = {"xytext": (8, 9 * ((len(ends) - 1) / 2 - i))} if len(ends) > 1 else {"xytext": (8, 0)}
        name = title(model) if len(ends) > 1 else LABELS[rival].removeprefix("ICL, ")
        _end(axes, counts[-1], y, name, COLOURS.get(model, GREY), **several)
    if len(ends) > 1:
        known = entry(result, "by_shots", model=max(ends)[1], workload=PAPER)
        middle = known["shots"].index(6)
        place = {"ha": "right", "xytext": (-8, 8)} if rival == "icl" else {"ha": "center", "xytext": (0, 9)}
        _end(axes, known["shots"][middle], known["questions"]["1"][rival][middle], LABELS[rival], INK, **place)


def _measured_shots(axes: Axes, found: list[Entry]) -> None:
    """Medians with nine tenths of the rounds; not without examples, where the prompt says nothing of the task."""
    dtypes = list(dict.fromkeys(e["dtype"] for e in found))
    for i, (dtype, marker, colour) in enumerate(zip(dtypes, "os", (BLUE, INK), strict=False)):
        some = [e for e in found if e["dtype"] == dtype and e["shots"]]
        for rival in ("icl", "icl-warm"):
            ratios = [e["ratio"][rival] for e in some]
            middle = [r["median"] for r in ratios]
            bars = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            x = [e["shots"] + 0.14 * (2 * i - len(dtypes) + 1) for e in some]
            style = {"markersize": 4, "linewidth": 0, "elinewidth": 0.9, "color": colour, "marker": marker}
            axes.errorbar(x, middle, bars, label=dtype if rival == "icl" else None, **style)
    if dtypes:
        axes.legend(loc="upper left", title="time, 5th to 95th percentile", title_fontsize=7.5, fontsize=7.5)


# --- ratio over the number of questions ------------------------------------------------------------------------------


def questions(figure: Figure, result: Result) -> None:
    """What all questions of a task cost beside an adapter kept for the task: a panel a model, in percent more or less."""
    known = models(result, "by_questions")
    figure.set_size_inches(9.2, 3.1 * -(-len(known) // 2) + 0.4)
    panels = figure.subplots(-(-len(known) // 2), min(2, len(known)), sharex=True, sharey=True, squeeze=False)
    for axes, model in zip(panels.flat, known, strict=False):
        found = entry(result, "by_questions", model=model, workload=MEAN)
        for way, ratios in found["ratios"].items():
            more = [100 * (ratio - 1) for ratio in ratios]
            axes.plot(found["questions"], more, color=WAYS[way], linewidth=1.4, label=LABELS[way])
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        axes.set(xscale="log", title=title(model))
        axes.set_yscale("asinh", linear_width=0.7)
    for axes in panels[:, 0]:
        ticks = [-5, -2, -1, 0, 1, 2, 5, 10, 30, 100, 300]
        axes.yaxis.set_ticks(ticks, [f"{tick:+g} %".replace("-", "−") if tick else "T2L per task" for tick in ticks])
        axes.yaxis.set_ticks([], minor=True)
    for axes in panels[-1]:
        axes.set_xlabel("questions of a task")
        _plain(axes, "x", [1, 10, 100, 1000, 10000])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=7.5)
    figure.suptitle(f"Operations beside T2L per task, {MEAN}, answers included", fontsize=9.5)


# --- a request, phase by phase ---------------------------------------------------------------------------------------


def request(figure: Figure, result: Result) -> None:
    """The operations of a task's first question by each way, stacked by phase; a panel for each of two lengths."""
    from matplotlib.patches import Patch

    figure.set_size_inches(9.2, 4.2)
    for axes, workload in zip(figure.subplots(2, 1), (PAPER, MEAN), strict=True):
        found = entry(result, "costs", model=MISTRAL, workload=workload)
        ways = found["ways"]
        for y, about in enumerate(ways.values()):
            left = 0.0
            for phase in PHASES:
                width = about["phases"].get(phase, {"flops": 0})["flops"] / 1e12
                axes.barh(y, width, left=left, height=0.72, color=SHOWN[phase][0], edgecolor="white", linewidth=0.4)
                left += width
            over = about["first"] / ways["t2l-task"]["first"]
            axes.text(left, y, f" {number(left)} TFLOP ({number(over)} x T2L per task)", va="center", fontsize=7.5)
        of, name = found["lengths"], "lengths implied by the paper" if workload == PAPER else workload
        shown = f"question {of['question']}, {of['shots']} examples of {of['shot']}, answer {of['answer']}"
        axes.set(yticks=range(len(ways)), yticklabels=[LABELS[way] for way in ways], xticks=[])
        axes.set_title(f"{name}, tokens: {shown}")
        axes.set_xlim(0, 1.25 * max(way["first"] for way in ways.values()) / 1e12)
        axes.spines.bottom.set_visible(False)  # every bar says its sum
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
    keys = [Patch(color=colour, label=text) for colour, text in SHOWN.values()]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=7.5)
    figure.suptitle(f"First question of a task, {title(MISTRAL)}, operations by phase", fontsize=9.5)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(figure: Figure, result: Result) -> None:
    """Keys and values over the length of a context beside an adapter, and a user's share of all that is held."""
    figure.set_size_inches(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    _contexts(left, result)
    _shares(right, result)
    for axes in (left, right):
        low, high = axes.get_ylim()
        ticks = [t for t in (m * 10**n for n in range(3, 13) for m in (1, 2, 5)) if low <= t <= high]
        ticks = ticks if len(ticks) < 9 else [t for t in ticks if str(t)[0] == "1"]
        axes.yaxis.set_ticks(ticks, list(map(_bytes, ticks)))
        axes.yaxis.set_ticks([], minor=True)


def _contexts(axes: Axes, result: Result) -> None:
    seen: dict[tuple, list[Entry]] = {}
    for found in result.records("by_context"):  # models with the same figures share a line
        seen.setdefault((*found["tokens"], *found["kv"], found["adapter"]), []).append(found)
    for found, *same in seen.values():
        colour, adapter = COLOURS.get(found["model"], GREY), found["adapter"]
        tokens, held = zip(*((n, kv) for n, kv in zip(found["tokens"], found["kv"], strict=True) if n), strict=True)
        axes.plot(tokens, held, color=colour, linewidth=1.4)
        _end(axes, tokens[-1], held[-1], "\n".join(title(of["model"]) for of in (found, *same)), colour)
        axes.plot([tokens[0], tokens[-1]], [adapter] * 2, color=colour, linewidth=0.9, linestyle="--")
        crossing = entry(result, "costs", model=found["model"], workload=PAPER)["adapter_tokens"]
        axes.plot([crossing], [adapter], "o", color=colour, markersize=5)
        _end(axes, tokens[-1], adapter, f"adapter {_bytes(adapter)},\nless than {crossing} tokens", colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", title="Keys and values, and one adapter")
    _plain(axes, "x", [16, 128, 1024, 16384])


def _shares(axes: Axes, result: Result) -> None:
    """All that is held beside the weights over the number of tasks, a user each, divided by users."""
    found = entry(result, "costs", model=MISTRAL, workload=MEAN)
    counts = sorted({round(10 ** (i / 16)) for i in range(49)})
    for way in ("icl-cold", "t2l-task"):
        about = found["ways"][way]
        each = about["per_user"] + about["per_task"]
        shares = [each + about["fixed"] / n for n in counts]
        axes.plot(counts, shares, color=WAYS[way], linewidth=1.4)
        name = "ICL, cached" if way == "icl-cold" else LABELS[way]
        _end(axes, counts[-1], shares[-1], f"{name}\n{_bytes(shares[-1])}", WAYS[way])
        if way == "t2l-task" and (least := found["tasks_to_win"][way]["icl-cold"]):
            at = each + about["fixed"] / least
            axes.plot([least], [at], "o", color=WAYS[way], markersize=5)
            _end(axes, least, at, f"from {least} tasks on", WAYS[way], xytext=(5, 7))
    axes.set(xscale="log", yscale="log", xlabel="tasks at a time, a user each")
    axes.set_title(f"Bytes a user in all, {title(MISTRAL)}, {MEAN}")
    _plain(axes, "x", [1, 10, 100, 1000])


_DRAWN = {"icl-shots": shots, "icl-questions": questions, "icl-request": request, "icl-memory": memory}
FIGURES = {name: Drawing(draw, ("icl",), (__file__, tables_icl.__file__)) for name, draw in _DRAWN.items()}
