"""Figures of the suite ``icl``: ratios over examples and over questions, a request phase by phase, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.icl import words
from bench.icl.words import LABELS, MEAN, PAPER, Entry, amount, entries, entry
from bench.markdown import number
from bench.palette import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, VERMILION
from bench.rows import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISTRAL = "mistral-7b"
COLOURS = {
    "icl": VERMILION,
    "icl-cold": ORANGE,
    "icl-warm": PINK,
    "t2l-request": SKY,
    "t2l-task": BLUE,
    "t2l-merged": GREEN,
}
MODELS = {"mistral-7b": BLUE, "llama-3.1-8b": ORANGE, "gemma-2-2b": GREEN, "smollm2-135m": VERMILION}
PHASES = {"describe": ORANGE, "generate": VERMILION, "merge": PINK, "prompt": SKY, "answer": PALE}


def _end(axes: Axes, x: float, y: float, text: str, colour: str, **style: object) -> None:
    """A name right of the end of a line."""
    place = {"va": "center", "fontsize": 7.5, "color": colour, "xytext": (4, 0), "annotation_clip": False}
    axes.annotate(text, (x, y), textcoords="offset points", **(place | style))


def _plain(axes: Axes, which: str, ticks: list[float]) -> None:
    """Ticks of a logarithmic axis, in plain figures."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# --- ratio over the number of examples -------------------------------------------------------------------------------


def shots(figure: Figure, result: Result) -> None:
    """The first question of a task by in-context learning over that by T2L; the measured model has a panel of its own."""
    found, known = entries(result, "by_examples"), words.models(result, "by_shots")
    timed = {e["model"] for e in found}
    panels = [[m for m in known if words.title(m) not in timed], *([m] for m in known if words.title(m) in timed)]
    figure.set_size_inches(5.0 * len(panels), 4.0)
    for axes, models in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        counts = entry(result, "by_shots", model=models[0], workload=PAPER)["shots"]
        for rival, style in (("icl", "-"), ("icl-warm", "--")):
            _shots(axes, result, models, rival, style)
        points = [e for e in found if e["model"] in map(words.title, models)]
        _measured_shots(axes, points)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        axes.text(0.99, 0.02, "above the dotted line T2L costs less", transform=axes.transAxes, ha="right", fontsize=7.5)
        what = "operations (lines), time (points)" if points else "operations"
        axes.set(
            yscale="log",
            xlabel="examples in the prompt (0: a description)",
            title=f"{', '.join(map(words.title, models))}: {what}",
        )
        axes.set_xticks(counts)
        axes.set_xlim(-0.5, max(counts) + 0.5)
    figure.axes[0].set_ylabel("first question, ICL / T2L")
    _plain(figure.axes[0], "y", [0.5, 1, 2, 5, 10, 20])


def _shots(axes: Axes, result: Result, models: list[str], rival: str, style: str) -> None:
    """A line a model; all are named at its end, and the rival over the lowest."""
    ends = []
    for model in models:
        known = entry(result, "by_shots", model=model, workload=PAPER)
        ratios = known["questions"]["1"][rival]
        axes.plot(known["shots"], ratios, color=MODELS.get(model, GREY), linestyle=style, linewidth=1.3)
        ends.append((ratios[-1], model, known["shots"]))
    for i, (y, model, counts) in enumerate(sorted(ends, reverse=True)):
        several = {"xytext": (8, 9 * ((len(ends) - 1) / 2 - i))} if len(ends) > 1 else {"xytext": (8, 0)}
        name = words.title(model) if len(ends) > 1 else LABELS[rival].removeprefix("ICL, ")
        _end(axes, counts[-1], y, name, MODELS.get(model, GREY), **several)
    if len(ends) > 1:
        known = entry(result, "by_shots", model=max(ends)[1], workload=PAPER)
        middle = known["shots"].index(6) if 6 in known["shots"] else len(known["shots"]) // 2
        place = {"ha": "right", "xytext": (-8, 8)} if rival == "icl" else {"ha": "center", "xytext": (0, 9)}
        _end(axes, known["shots"][middle], known["questions"]["1"][rival][middle], LABELS[rival], INK, **place)


def _measured_shots(axes: Axes, found: list[Entry]) -> None:
    """Medians with nine tenths of the rounds; not without examples, where the prompt says nothing of the task."""
    dtypes = list(dict.fromkeys(e["dtype"] for e in found))
    for i, (dtype, marker) in enumerate(zip(dtypes, "os^", strict=False)):
        some = [e for e in found if e["dtype"] == dtype and e["shots"]]
        for rival in ("icl", "icl-warm"):
            ratios = [e["ratio"][rival] for e in some]
            middle = [r["median"] for r in ratios]
            bars = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            x = [e["shots"] + 0.14 * (2 * i - len(dtypes) + 1) for e in some]
            style = {"markersize": 4, "linewidth": 0, "elinewidth": 0.9, "color": (BLUE, INK, GREEN)[i]}
            axes.errorbar(x, middle, bars, marker=marker, label=dtype if rival == "icl" else None, **style)
    if dtypes:
        axes.legend(loc="upper left", title="time, 5th to 95th percentile", title_fontsize=7.5, fontsize=7.5)


# --- ratio over the number of questions ------------------------------------------------------------------------------


def questions(figure: Figure, result: Result) -> None:
    """What all questions of a task cost beside an adapter kept for the task: a panel a model, in percent more or less."""
    models = words.models(result, "by_questions")
    figure.set_size_inches(9.2, 3.1 * -(-len(models) // 2) + 0.4)
    panels = figure.subplots(-(-len(models) // 2), min(2, len(models)), sharex=True, sharey=True, squeeze=False)
    for axes, model in zip(panels.flat, models, strict=False):
        found = entry(result, "by_questions", model=model, workload=MEAN)
        for way, ratios in found["ratios"].items():
            more = [100 * (ratio - 1) for ratio in ratios]
            axes.plot(found["questions"], more, color=COLOURS[way], linewidth=1.4, label=LABELS[way])
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        axes.set(xscale="log", title=words.title(model))
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
    figure.set_size_inches(9.2, 4.2)
    panels = figure.subplots(2, 1)
    for axes, workload in zip(panels, (PAPER, MEAN), strict=True):
        found = entry(result, "costs", model=MISTRAL, workload=workload)
        ways = found["ways"]
        named = [name for name in PHASES if name in words.phases_of(ways)]
        for y, about in enumerate(ways.values()):
            left = 0.0
            for phase in named:
                width = about["phases"].get(phase, {"flops": 0})["flops"] / 1e12
                axes.barh(y, width, left=left, height=0.72, color=PHASES[phase], edgecolor="white", linewidth=0.4)
                left += width
            over = about["first"] / ways["t2l-task"]["first"]
            axes.text(left, y, f" {number(left)} TFLOP ({number(over)} x T2L per task)", va="center", fontsize=7.5)
        lengths = found["lengths"]
        shown = (
            f"question {lengths['question']}, {lengths['shots']} examples of {lengths['shot']}, answer {lengths['answer']}"
        )
        title = f"{words.lengths_of(workload)}, tokens: {shown}"
        axes.set(yticks=range(len(ways)), yticklabels=[LABELS[way] for way in ways], title=title, xticks=[])
        axes.set_xlim(0, 1.25 * max(way["first"] for way in ways.values()) / 1e12)
        axes.spines.bottom.set_visible(False)  # every bar says its sum
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
    figure.legend(handles=_keys(), loc="outside lower center", ncols=len(PHASES), fontsize=7.5)
    figure.suptitle(f"First question of a task, {words.title(MISTRAL)}, operations by phase", fontsize=9.5)


def _keys() -> list:
    from matplotlib.patches import Patch

    what = {
        "describe": "text encoder",
        "generate": "hypernetwork",
        "merge": "merge into the weights",
        "prompt": "read the prompt",
        "answer": "rest of the answer",
    }
    return [Patch(color=colour, label=what[phase]) for phase, colour in PHASES.items()]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(figure: Figure, result: Result) -> None:
    """Keys and values over the length of a context beside an adapter, and a user's share of all that is held."""
    figure.set_size_inches(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    _contexts(left, result)
    _shares(right, result)


def _contexts(axes: Axes, result: Result) -> None:
    known = entries(result, "by_context")
    seen: dict[tuple, list[str]] = {}
    for found in known:  # models with the same figures share a line
        seen.setdefault((*found["tokens"], *found["kv"], found["adapter"]), []).append(found["model"])
    for models in seen.values():
        found, colour = entry(result, "by_context", model=models[0]), MODELS.get(models[0], GREY)
        tokens, held = zip(*((n, kv) for n, kv in zip(found["tokens"], found["kv"], strict=True) if n), strict=True)
        axes.plot(tokens, held, color=colour, linewidth=1.4)
        _end(axes, tokens[-1], held[-1], "\n".join(map(words.title, models)), colour)
        adapter = found["adapter"]
        axes.plot([tokens[0], tokens[-1]], [adapter] * 2, color=colour, linewidth=0.9, linestyle="--")
        crossing = entry(result, "costs", model=models[0], workload=PAPER)["adapter_tokens"]
        axes.plot([crossing], [adapter], "o", color=colour, markersize=5)
        _end(axes, tokens[-1], adapter, f"adapter {amount(adapter, 'B')},\nless than {crossing} tokens", colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", title="Keys and values, and one adapter")
    _plain(axes, "x", [16, 128, 1024, 16384])
    _bytes(axes)


def _shares(axes: Axes, result: Result) -> None:
    """All that is held beside the weights over the number of tasks, a user each, divided by users."""
    found = entry(result, "costs", model=MISTRAL, workload=MEAN)
    counts = sorted({round(10 ** (i / 16)) for i in range(49)})
    for way in ("icl-cold", "t2l-task"):
        about = found["ways"][way]
        each = about["per_user"] + about["per_task"]
        shares = [each + about["fixed"] / n for n in counts]
        axes.plot(counts, shares, color=COLOURS[way], linewidth=1.4)
        name = "ICL, cached" if way == "icl-cold" else LABELS[way]
        _end(axes, counts[-1], shares[-1], f"{name}\n{amount(shares[-1], 'B')}", COLOURS[way])
        if least := (found["tasks_to_win"][way]["icl-cold"] if way == "t2l-task" else None):
            at = each + about["fixed"] / least
            axes.plot([least], [at], "o", color=COLOURS[way], markersize=5)
            _end(axes, least, at, f"from {least} tasks on", COLOURS[way], xytext=(5, 7))
    axes.set(xscale="log", yscale="log", xlabel="tasks at a time, a user each")
    axes.set_title(f"Bytes a user in all, {words.title(MISTRAL)}, {MEAN}")
    _plain(axes, "x", [1, 10, 100, 1000])
    _bytes(axes)


def _bytes(axes: Axes) -> None:
    """Ticks at powers of ten, and between them where these are few."""
    low, high = axes.get_ylim()
    decades = [10.0**n for n in range(3, 13)]
    between = sum(low <= d <= high for d in decades) < 3
    ticks = [t for d in decades for t in ((d, 2 * d, 5 * d) if between else (d,)) if low <= t <= high]
    axes.yaxis.set_ticks(ticks, [amount(t, "B").replace(".00", "").replace(".0", "") for t in ticks])
    axes.yaxis.set_ticks([], minor=True)


FIGURES = {"icl-shots": shots, "icl-questions": questions, "icl-request": request, "icl-memory": memory}
