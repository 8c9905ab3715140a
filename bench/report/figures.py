"""The figures of docs/figures, one a page, each drawn from the lines of one table.  matplotlib is imported only to draw.

The same lines give the same bytes: no dates, no random ids, matplotlib's own defaults whatever the user's are.  Every file
carries the stamp of its table and of this code, so that an old figure is found without drawing it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.icl.names import MEAN, PAPER
from bench.records import ATTACHED, BASE, HOOKS, OURS, OURS_ALL
from bench.report.cells import duration, number
from bench.report.tables import Line, to_csv
from bench.report.tables_study import ARMS, GROUPS
from bench.serving_arms import EIGHT, MANY, PEFT, STOCK, STOCK_QV
from t2l_engine.research.costs import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, and greys.
SKY, ORANGE, GREEN, PINK, YELLOW, BLUE, VERMILION = "#56B4E9 #E69F00 #009E73 #CC79A7 #F0E442 #0072B2 #D55E00".split()
INK, GREY, PALE = "#1a1a1a", "#8a8a8a", "#d9d9d9"
#: Ways to apply adapters.
WAYS = {BASE: PALE, OURS: SKY, "merged": GREY, "PEFT mixed": ORANGE, "PEFT single": YELLOW}
WAYS |= {HOOKS: ORANGE, "hooks, PEFT base": YELLOW, "plain bmm": GREEN}
STYLE = {
    "svg.hashsalt": "t2l_engine",
    "svg.fonttype": "path",  # the same picture whatever fonts the reader has
    "font.size": 9,
    "savefig.facecolor": "white",  # readable on dark pages too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def _bars(axes: Axes, names: Sequence[str], scale: bool = False) -> None:
    """Horizontal bars from the top down; without a scale where every bar says its value."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if not scale:
        axes.set_xticks([])
        axes.spines.bottom.set_visible(False)


def latency_split(figure: Figure, lines: Sequence[Line]) -> None:
    """The parts of a request as shares of its time, which stands at the end of the bar."""
    parts = [head for head in lines[0] if head.endswith(" ms") and head != "sum ms"]
    figure.set_size_inches(8, 1.2 + 0.36 * len(lines))
    axes = figure.subplots()
    for y, line in enumerate(lines):
        left = 0.0
        for part, colour in zip(parts, (SKY, ORANGE, GREEN, PINK, YELLOW), strict=True):
            share = 100 * (line[part] or 0) / line["sum ms"]
            axes.barh(y, share, left=left, color=colour, edgecolor="white", height=0.7)
            if share >= 7:
                axes.text(left + share / 2, y, f"{share:.0f} %", ha="center", va="center", fontsize=7.5)
            left += share
        axes.text(101, y, duration(1e3 * line["sum ms"]), va="center")
    about = [head for head in itertools.takewhile(lambda head: head not in parts, lines[0]) if head != "machine"]
    names = [", ".join(_words(head, line[head]) for head in about if line[head]) for line in lines]
    _bars(axes, _on_machines(names, lines), scale=True)
    axes.set(xlim=(0, 112), xlabel="share of the time, %", xticks=range(0, 101, 20))
    axes.spines.bottom.set_bounds(0, 100)
    figure.legend(axes.containers[: len(parts)], [p.removesuffix(" ms") for p in parts], loc="outside upper center", ncols=5)


def _words(head: str, value: object) -> str:
    """The value alone where it explains itself."""
    return f"{value} {head if value != 1 else head.removesuffix('s')}" if isinstance(value, int) else str(value)


def _on_machines(names: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """With the machine below each name, where the lines are of several."""
    several = len({line.get("machine") for line in lines}) > 1
    return [f"{name}\n{line['machine']}" if several else name for name, line in zip(names, lines, strict=True)]


def _by_way(figure: Figure, lines: Sequence[Line], panels: Sequence[tuple[str, Sequence[str], str]]) -> None:
    """Panels of a label, the ways, and what the heading of a way ends in, each with a group of bars for each line."""
    figure.set_size_inches(9, 1 + 0.6 * len(lines))
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, ways, heading) in zip(places, panels, strict=True):
        for i, way in enumerate(ways):
            head = heading if way == OURS and heading in lines[0] else f"{way} {heading}"
            values = [line.get(head) or 0 for line in lines]
            at = [y + 0.84 * ((i + 0.5) / len(ways) - 0.5) for y in range(len(lines))]
            bars = axes.barh(at, values, height=0.8 / len(ways), color=WAYS[way], label=way)
            axes.bar_label(bars, [number(value) if value else "not run" for value in values], padding=2, fontsize=6.5)
        _bars(axes, _on_machines([line["case"] for line in lines], lines))
        axes.set_xlabel(label)
        axes.margins(x=0.12)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def decode(figure: Figure, lines: Sequence[Line]) -> None:
    """A step of the whole model with ours and with every other way, over the same without adapters."""
    _by_way(figure, lines, [("times the step without adapters", (OURS, "PEFT mixed", "PEFT single", "merged"), "x base")])


def training(figure: Figure, lines: Sequence[Line]) -> None:
    """A step by each way to apply an adapter a sample: its time over that of the frozen model, and MiB at the peak."""
    ways = (OURS, HOOKS, "hooks, PEFT base", "plain bmm")
    panels = [("times the step without adapters", ways, "x base"), ("MiB at the peak", (BASE, *ways), "peak MiB")]
    _by_way(figure, lines, panels)


#: Ways to serve; others are grey.
SERVED = {BASE: PALE, OURS: SKY, OURS_ALL: BLUE, ATTACHED: GREEN, STOCK_QV: ORANGE, STOCK: VERMILION, PEFT: YELLOW}


def serving(figure: Figure, lines: Sequence[Line]) -> None:
    """Tokens per second of every way to serve, for 8 requests and for 64."""
    machines = list(dict.fromkeys(line["machine"] for line in lines))
    figure.set_size_inches(9.5, 3.2 * len(machines))
    places = figure.subplots(len(machines), 2, squeeze=False).flat
    for axes, (machine, case) in zip(places, itertools.product(machines, (EIGHT, MANY)), strict=True):
        arms = [line for line in lines if (line["machine"], line["case"]) == (machine, case) and line["tokens/s"]]
        values = [line["tokens/s"] for line in arms]
        colours = [SERVED.get(line["arm"], GREY) for line in arms]
        axes.bar_label(axes.barh(range(len(arms)), values, height=0.75, color=colours), map(number, values), padding=2)
        _bars(axes, [line["arm"] for line in arms])
        axes.set(title=f"{case}\n{machine}" if len(machines) > 1 else case, xlabel="tokens per second")
        axes.margins(x=0.14)


#: Phases of a request: the heading of their operations, colour, and what they are called.
PHASES = {
    "phases describe flops": (ORANGE, "text encoder"),
    "phases generate flops": (VERMILION, "hypernetwork"),
    "phases merge flops": (PINK, "merge into the weights"),
    "phases prompt flops": (SKY, "read the prompt"),
    "phases answer flops": (PALE, "rest of the answer"),
}


def request(figure: Figure, lines: Sequence[Line]) -> None:
    """The operations of a task's first question by each way, stacked by phase; a panel for each of two lengths."""
    figure.set_size_inches(9.2, 4.2)
    for axes, lengths in zip(figure.subplots(2, 1), (PAPER, MEAN), strict=True):
        ways = [line for line in lines if (line["model"], line["workload"]) == ("Mistral-7B", lengths)]
        (ours,) = (line for line in ways if line["way"] == LABELS["t2l-task"])
        left = [0.0] * len(ways)
        for head, (colour, text) in PHASES.items():
            widths = [(line[head] or 0) / 1e12 for line in ways]
            axes.barh(range(len(ways)), widths, left=left, height=0.72, color=colour, edgecolor="white", label=text)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, line in enumerate(ways):
            text = f" {number(left[y])} TFLOP ({number(line['first'] / ours['first'])} x T2L per task)"
            axes.text(left[y], y, text, va="center", fontsize=7.5)
        _bars(axes, [line["way"] for line in ways])
        name = "lengths implied by the paper" if lengths == PAPER else lengths
        shown = "question {question}, {shots} examples of {shot}, answer {answer}".format_map(ours)
        axes.set_title(f"{name}, tokens: {shown}")
        axes.set_xlim(0, 1.25 * max(left))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=7.5)
    figure.suptitle("First question of a task, Mistral-7B, operations by phase", fontsize=9.5)


def arms(figure: Figure, lines: Sequence[Line]) -> None:
    """Mean of every arm on seen tasks, siblings and other skills, with intervals over tasks."""
    figure.set_size_inches(10.5, 0.9 + 0.27 * len(lines))
    arm_of = {name: arm for arm, name in ARMS.items()}
    for axes, title in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS, strict=True):
        for y, line in enumerate(lines):
            mean, low, high = (line[f"{title}, %{end}"] for end in ("", ", low", ", high"))
            if mean is not None:
                axes.barh(y, mean, color=_colour(arm_of[line["arm"]]), height=0.7)
                axes.plot([low, high], [y, y], color=INK, linewidth=1)
        _bars(axes, [line["arm"] for line in lines], scale=True)
        axes.set(xlim=(0, 100), title=title, xlabel="exact match, %")


def _colour(arm: str) -> str:
    if arm.endswith(("-shuffled", "-junk", "-constant")):
        return SKY
    kinds = {"t2l": BLUE, "multi-task": VERMILION, "base": GREY, "icl": GREY, "oracle": GREEN}
    return next((colour for prefix, colour in kinds.items() if arm.startswith(prefix)), ORANGE)


#: What draws a figure, and the table that it draws.
FIGURES: dict[str, tuple[Callable[[Figure, Sequence[Line]], None], str]] = {
    "latency-split": (latency_split, "split"),
    "decode": (decode, "model"),
    "training": (training, "train"),
    "serving": (serving, "serving"),
    "icl-request": (request, "icl-ways"),
    "study-arms": (arms, "study-arms"),
}


def stamp(name: str, lines: Sequence[Line]) -> str:
    """What a figure is made from: SHA-256 of its table as CSV, and of the code that draws."""
    made = {f"{FIGURES[name][1]}.csv": to_csv(lines).encode(), Path(__file__).name: Path(__file__).read_bytes()}
    return ", ".join(f"{of} sha256:{hashlib.sha256(data).hexdigest()}" for of, data in made.items())


def svg(name: str, lines: Sequence[Line]) -> str:
    """The figure, with its stamp in the metadata."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(layout="constrained")
        FIGURES[name][0](figure, lines)
        out = io.StringIO()
        metadata = {"Date": None, "Creator": "bench report", "Description": stamp(name, lines)}
        figure.savefig(out, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
