"""The figure of training: time and peak memory of a step by each way to apply an adapter a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import records
from bench.records import BASE, HOOKS, OURS, Result
from bench.report import tables_train
from bench.report.cells import number
from bench.report.style import GREEN, ORANGE, PALE, SKY, YELLOW, Drawing
from bench.report.tables import rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {BASE: PALE, OURS: SKY, "plain bmm": GREEN, HOOKS: ORANGE, "hooks, PEFT base": YELLOW}


def training(figure: Figure, *results: Result) -> None:
    """Two panels, a group of bars for each case: seconds, and GiB at the peak."""
    seconds = {row.case: {way: of["median_us"] / 1e6 for way, of in row.times.items()} for row in rows("train")(*results)}
    peaks = {e["case"]: {way: of["peak_mib"] / 1024 for way, of in e["ways"].items()} for e in tables_train.memory(*results)}
    figure.set_size_inches(9, 1 + 0.75 * len(seconds))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, found, label in zip(panels, (seconds, peaks), ("s a step", "GiB at the peak"), strict=True):
        for y, case in enumerate(seconds):
            for i, (way, colour) in enumerate(COLOURS.items()):
                if (value := found[case].get(way)) is not None:
                    place = y + 0.17 * (i - (len(COLOURS) - 1) / 2)
                    axes.barh(place, value, height=0.16, color=colour, label=way if y == 0 else None)
                    axes.text(value, place, f" {number(value)}", va="center", fontsize=6.5)
        axes.set(yticks=range(len(seconds)), yticklabels=list(seconds), xlabel=label, xticks=[])
        axes.spines.bottom.set_visible(False)  # every bar says its value
        axes.set_xlim(0, 1.12 * max(value for of in found.values() for value in of.values()))
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS))


FIGURES = {"training": Drawing(training, ("train",), (__file__, records.__file__, tables_train.__file__))}
