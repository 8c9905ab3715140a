"""The figures of the study."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench.palette import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, VERMILION, YELLOW
from bench.study.plan import LEARNABLE
from bench.study.tables import ARMS, column, share
from t2l_engine.research.evaluation.bootstrap import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {"t2l": BLUE, "multi-task": VERMILION, "base": GREY, "icl": GREY, "oracle": GREEN}


def arms(figure: Figure, result: Mapping[str, Any]) -> None:
    """Mean of every arm on seen tasks, siblings and other skills, with intervals over tasks."""
    panels = {
        "seen, with headroom": ("seen", "all"),
        "unseen siblings": ("unseen", "sibling"),
        "unseen skills": ("unseen", "novel"),
    }
    shown = [arm for arm in ARMS if arm in result["unseen"]["arms"]]
    figure.set_size_inches(10.5, 0.9 + 0.27 * len(shown))
    for axes, (title, (name, group)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        part = result[name]
        for at, arm in enumerate(reversed(shown)):
            values = column(part, arm, group)
            if values:
                found = interval(values)
                axes.barh(at, found.mean, color=_colour(arm), height=0.7)
                axes.plot([found.low, found.high], [at, at], color=INK, linewidth=1)
        axes.set(xlim=(0, 100), title=f"{title} ({len(part['groups'][group])} tasks)", xlabel="exact match, %")
        axes.set_yticks(range(len(shown)), [ARMS[arm].replace("*", "") for arm in reversed(shown)])


def _colour(arm: str) -> str:
    if arm.endswith(("-shuffled", "-junk", "-constant")):
        return SKY
    return next((colour for prefix, colour in _KINDS.items() if arm.startswith(prefix)), ORANGE)


def curves(figure: Figure, result: Mapping[str, Any]) -> None:
    """What limits the result: steps, scaling, adapters reconstructed, tasks trained on, as far as it was measured."""
    panels = [_steps, _scaling]
    panels += [_kept] if result["distances"] else []
    panels += [_tasks] if result["varied"] else []
    figure.set_size_inches(2.7 * len(panels), 3.2)
    for draw, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        draw(axes, result)
        axes.legend(fontsize=7)


def _steps(axes: Axes, result: Mapping[str, Any]) -> None:
    for name, colour in (("t2l", BLUE), ("t2l-seed1", SKY), ("multi-task", VERMILION), ("multi-task-description", ORANGE)):
        if name in result["runs"]:
            axes.plot(*zip(*result["runs"][name]["curve"], strict=True), color=colour, label=name)
    axes.set(xlabel="million tokens of training", title="training loss", yscale="log")


def _scaling(axes: Axes, result: Mapping[str, Any]) -> None:
    of = result["scalings"]
    for arm, colour, label in (("t2l", BLUE, "matched"), ("t2l-shuffled", SKY, "another task's")):
        axes.plot([float(s) for s in of], [of[s][arm] for s in of], "o-", color=colour, markersize=3, label=label)
    axes.axvline(2.0, color=PALE, zorder=0)
    axes.set(xlabel="scaling (trained at 2)", title="siblings, exact match in %")


def _kept(axes: Axes, result: Mapping[str, Any]) -> None:
    counts = [int(count) for count in result["distances"]]
    shown = (("train", "t2l", BLUE, "learned descriptions"), ("evaluation", "t2l", ORANGE, "held-out descriptions"),
             ("train", "t2l-shuffled", SKY, "another task's"))  # fmt: skip
    for tasks, arm, colour, label in shown:
        values = [share(result["reconstruction"][f"{count}/{tasks}"], arm, "base").mean for count in counts]
        axes.plot(counts, values, "o-", color=colour, markersize=3, label=label)
    axes.axhline(90, color=PALE, zorder=0)
    axes.set(xlabel="adapters reconstructed", title="oracle gain kept, %", xscale="log")
    axes.set_xticks(counts, map(str, counts), minor=False)
    axes.minorticks_off()


def _tasks(axes: Axes, result: Mapping[str, Any]) -> None:
    part = result["varied"]["sibling"]
    names = {"short-L-16": 16, "short-L-32": 32, "short-L": 37, "short-L-64": 64, "short-L-90": 90}
    there = {name: count for name, count in names.items() if name in part["arms"]}
    for suffix, colour, label in (("", BLUE, "matched"), ("-shuffled", SKY, "another task's")):
        values = [statistics.fmean(column(part, name + suffix, "sibling")) for name in there]
        axes.plot(list(there.values()), values, "o-", color=colour, markersize=3, label=label)
    axes.set(xlabel="tasks trained on", title="siblings, %, short runs")


def maps(figure: Figure, result: Mapping[str, Any]) -> None:
    """t-SNE of descriptions and of trunk outputs; adapters as alike as their descriptions."""
    figure.set_size_inches(10.5, 3.6)
    of = result["maps"]
    common = [skill for skill, _ in Counter(of["skills"]).most_common(7)]
    colours = dict(zip(common, (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, YELLOW), strict=False))
    marks = {
        "trained": ("o", "none"), "tier train, not trained": ("x", None), "sibling": ("^", INK), "other skill": ("s", INK)
    }  # fmt: skip
    *panels, similar = figure.subplots(1, 3)
    for axes, name, title in zip(panels, ("task_emb", "trunk"), ("task embeddings", "trunk outputs"), strict=True):
        for task, skill, tier, (x, y) in zip(of["tasks"], of["skills"], of["tiers"], of[name], strict=True):
            mark, edge = marks[_kind(task, tier)]
            axes.scatter(x, y, s=16, marker=mark, color=colours.get(skill, PALE), edgecolors=edge)
        axes.set(title=f"t-SNE of {title}", xticks=[], yticks=[])
    for skill, colour in colours.items():
        panels[0].scatter([], [], s=16, color=colour, label=skill.replace("_", " "))
    for label, (mark, edge) in marks.items():
        panels[0].scatter([], [], s=16, marker=mark, color=PALE, edgecolors=edge, label=label)
    panels[0].legend(fontsize=6, loc="center left", bbox_to_anchor=(-0.55, 0.5))
    texts, deltas = of["similarities"]
    similar.scatter(texts, deltas, s=2, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
    similar.set(
        xlabel="cosine of descriptions", ylabel="cosine of adapters (B A)", title=f"all pairs, Spearman {of['spearman']:.2f}"
    )


def _kind(task: str, tier: str) -> str:
    """What a task is to T2L of the study."""
    trained = "trained" if task in LEARNABLE else "tier train, not trained"
    return {"train": trained, "sibling": "sibling", "novel": "other skill"}[tier]


FIGURES = {"arms": arms, "curves": curves, "maps": maps}
