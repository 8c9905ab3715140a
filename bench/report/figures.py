"""The figures of docs/figures, at most one a page: horizontal bars, of one machine.  matplotlib is imported only to draw.

Equal data give equal bytes.  Every file carries a stamp of its data and of this code, so that an old figure is found without
drawing it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.icl.names import MEAN, PAPER
from bench.records import BASE, OURS
from bench.report.cells import number
from bench.report.data import Data
from bench.serving_methods import EIGHT, MANY
from t2l_engine.research.costs import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The class of CPUs that figures of times are of.
MACHINE = "intel-amx"
#: Okabe and Ito's colours, and greys.
SKY, ORANGE, GREEN, PINK, YELLOW = "#56B4E9 #E69F00 #009E73 #CC79A7 #F0E442".split()
INK, GREY, PALE = "#1a1a1a", "#8a8a8a", "#d9d9d9"
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


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: a bar for each label, or a group or a stack of bars.

    ``series``: name -> a value for each label, in the unit of ``axis``.  ``target``: where a dashed line stands.
    """

    title: str
    axis: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    stacked: bool = False
    target: float | None = None


def decode(data: Data) -> list[Panel]:
    """Steps of a whole model with an adapter a row, over the same steps without adapters."""
    panels = []
    for modules, target in (("q,v", 1.05), ("all linears", 1.15)):
        rows = data.rows("apply", MACHINE, group="model", modules=modules, rows=8)
        ways = (OURS, "PEFT mixed", "merged")
        series = {way: [row.times[way]["median_us"] / row.times[BASE]["median_us"] for row in rows] for way in ways}
        labels = [f"{row.shape['phase']}, {row.shape['dtype']}" for row in rows]
        panels.append(Panel(f"adapters on {modules}", "times the step without adapters", labels, series, target=target))
    return panels


def serving(data: Data) -> list[Panel]:
    """Tokens per second of every way to serve a batch."""
    panels = []
    for case in (EIGHT, MANY):
        row = data.row("serving", MACHINE, case=case)
        tokens = row.shape["requests"] * row.shape["new"]
        values = [tokens / of["median_us"] * 1e6 for of in row.times.values()]
        panels.append(Panel(case, "tokens per second", list(row.times), {"": values}))
    return panels


#: Phases of a request, as records name them -> what they are called.
PHASES = {
    "describe": "text encoder",
    "generate": "hypernetwork",
    "merge": "merge into the weights",
    "prompt": "read the prompt",
    "answer": "rest of the answer",
}


def prompt_or_adapter(data: Data) -> list[Panel]:
    """Operations of a task's first question on Mistral-7B by each way, by phase."""
    panels = []
    for workload, title in ((PAPER, "lengths of the paper"), (MEAN, "mean of ten benchmarks")):
        (of,) = data.records("icl", "costs", model="mistral-7b", workload=workload)
        ways = list(of["ways"].values())
        phases = {
            text: [way["phases"].get(phase, {}).get("flops", 0) / 1e12 for way in ways] for phase, text in PHASES.items()
        }
        panels.append(Panel(title, "TFLOP", [LABELS[way] for way in of["ways"]], phases, stacked=True))
    return panels


#: Figure -> its panels.
FIGURES: dict[str, Callable[[Data], list[Panel]]] = {
    "decode": decode,
    "serving": serving,
    "prompt-or-adapter": prompt_or_adapter,
}


def stamp(name: str, data: Data) -> str:
    """What a figure is made from: SHA-256 of its panels, and of the code that draws."""
    panels = json.dumps([dataclasses.asdict(panel) for panel in FIGURES[name](data)]).encode()
    made = {"data": panels, "code": Path(__file__).read_bytes()}
    return ", ".join(f"{of} sha256:{hashlib.sha256(text).hexdigest()}" for of, text in made.items())


def svg(name: str, data: Data) -> str:
    """The figure, with its stamp in the metadata."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = FIGURES[name](data)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        bars = max(len(panel.labels) * (1 if panel.stacked else len(panel.series)) for panel in panels)
        figure = Figure(figsize=(9, 1.4 + 0.26 * bars), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel)
        if len(panels[0].series) > 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": "bench report", "Description": stamp(name, data)}
        )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw(axes: Axes, panel: Panel) -> None:
    """Bars from the top down, each group or stack with its value at the end."""
    colours = (SKY, ORANGE, GREEN, PINK, YELLOW)
    count, places = len(panel.series), range(len(panel.labels))
    ends = [0.0] * len(panel.labels)
    for i, (name, values) in enumerate(panel.series.items()):
        if panel.stacked:
            axes.barh(places, values, left=ends, height=0.7, color=colours[i], edgecolor="white", label=name)
            ends = [a + b for a, b in zip(ends, values, strict=True)]
            continue
        at = [y + 0.84 * ((i + 0.5) / count - 0.5) for y in places]
        colour = colours[i] if count > 1 else [SKY if label.startswith(OURS) else GREY for label in panel.labels]
        bars = axes.barh(at, values, height=0.8 / count, color=colour, label=name)
        axes.bar_label(bars, [number(value) for value in values], padding=2, fontsize=7)
    if panel.stacked:
        for y, end in zip(places, ends, strict=True):
            axes.text(end, y, f" {number(end)}", va="center", fontsize=7)
    if panel.target:
        axes.axvline(panel.target, color=INK, linewidth=0.8, linestyle="--")
    axes.set_yticks(places, panel.labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel.labels) - 0.4, -0.6)
    axes.set(title=panel.title, xlabel=panel.axis)
    axes.margins(x=0.14)
