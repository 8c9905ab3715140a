"""The figures of the study: arms, what limits the result, maps of tasks."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.records import Result
from bench.report import tables_study
from bench.report.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, VERMILION, YELLOW, Drawing
from bench.report.tables_study import ARMS, GROUPS, plain
from bench.study import scores
from bench.study.plan import LEARNABLE
from bench.study.scores import Part
from t2l_engine.research.evaluation.bootstrap import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Mapping[str, Sequence[Mapping[str, Any]]]
_KINDS = {"t2l": BLUE, "multi-task": VERMILION, "base": GREY, "icl": GREY, "oracle": GREEN}


def arms(figure: Figure, result: Result) -> None:
    """Mean of every arm on seen tasks, siblings and other skills, with intervals over tasks."""
    shown = [arm for arm in reversed(ARMS) if arm in Part.of(result.others, "unseen").arms]
    figure.set_size_inches(10.5, 0.9 + 0.27 * len(shown))
    for axes, (title, (name, group)) in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS.items(), strict=True):
        part = Part.of(result.others, name)
        for at, arm in enumerate(shown):
            if values := part.column(arm, group):
                found = interval(values)
                axes.barh(at, found.mean, color=_colour(arm), height=0.7)
                axes.plot([found.low, found.high], [at, at], color=INK, linewidth=1)
        axes.set(xlim=(0, 100), title=f"{title} ({len(part.group(group))} tasks)", xlabel="exact match, %")
        axes.set_yticks(range(len(shown)), list(map(plain, shown)))


def _colour(arm: str) -> str:
    if arm.endswith(("-shuffled", "-junk", "-constant")):
        return SKY
    return next((colour for prefix, colour in _KINDS.items() if arm.startswith(prefix)), ORANGE)


def curves(figure: Figure, result: Result) -> None:
    """What limits the result: steps, scaling, adapters reconstructed, tasks trained on, as far as it was measured."""
    panels = [_steps, _scaling]
    panels += [_kept] if "distance" in result.others else []
    panels += [_tasks] if Part.of(result.others, "varied/sibling").tasks else []
    figure.set_size_inches(2.7 * len(panels), 3.2)
    for draw, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        draw(axes, result.others)
        axes.legend(fontsize=7)


def _steps(axes: Axes, records: Records) -> None:
    colours = {"t2l": BLUE, "t2l-seed1": SKY, "multi-task": VERMILION, "multi-task-description": ORANGE}
    for run in records["training"]:
        if run["run"] in colours:
            axes.plot(*zip(*run["curve"], strict=True), color=colours[run["run"]], label=run["run"])
    axes.set(xlabel="million tokens of training", title="training loss", yscale="log")


def _scaling(axes: Axes, records: Records) -> None:
    scalings = [of["scaling"] for of in records["scaling"]]
    for arm, colour, label in (("t2l", BLUE, "matched"), ("t2l-shuffled", SKY, "another task's")):
        values = [of["scores"][arm] for of in records["scaling"]]
        axes.plot(scalings, values, "o-", color=colour, markersize=3, label=label)
    axes.axvline(2.0, color=PALE, zorder=0)
    axes.set(xlabel="scaling (trained at 2)", title="siblings, exact match in %")


def _kept(axes: Axes, records: Records) -> None:
    counts = [of["adapters"] for of in records["distance"]]
    shown = (("train", "t2l", BLUE, "learned descriptions"), ("evaluation", "t2l", ORANGE, "held-out descriptions"),
             ("train", "t2l-shuffled", SKY, "another task's"))  # fmt: skip
    for tasks, arm, colour, label in shown:
        values = [Part.of(records, f"reconstruction/{n}/{tasks}").share(arm, "base").mean for n in counts]
        axes.plot(counts, values, "o-", color=colour, markersize=3, label=label)
    axes.axhline(90, color=PALE, zorder=0)
    axes.set(xlabel="adapters reconstructed", title="oracle gain kept, %", xscale="log")
    axes.set_xticks(counts, map(str, counts), minor=False)
    axes.minorticks_off()


def _tasks(axes: Axes, records: Records) -> None:
    part = Part.of(records, "varied/sibling")
    names = {"short-L-16": 16, "short-L-32": 32, "short-L": 37, "short-L-64": 64, "short-L-90": 90}
    there = {name: count for name, count in names.items() if name in part.arms}
    for suffix, colour, label in (("", BLUE, "matched"), ("-shuffled", SKY, "another task's")):
        values = [statistics.fmean(part.column(name + suffix, "sibling")) for name in there]
        axes.plot(list(there.values()), values, "o-", color=colour, markersize=3, label=label)
    axes.set(xlabel="tasks trained on", title="siblings, %, short runs")


def maps(figure: Figure, result: Result) -> None:
    """t-SNE of descriptions and of trunk outputs; adapters as alike as their descriptions."""
    figure.set_size_inches(10.5, 3.6)
    known = result.records("map")
    common = [skill for skill, _ in Counter(task["skill"] for task in known).most_common(7)]
    colours = dict(zip(common, (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, YELLOW), strict=False))
    marks = {
        "trained": ("o", "none"), "tier train, not trained": ("x", None), "sibling": ("^", INK), "other skill": ("s", INK)
    }  # fmt: skip
    *panels, similar = figure.subplots(1, 3)
    for axes, name, title in zip(panels, ("task_emb", "trunk"), ("task embeddings", "trunk outputs"), strict=True):
        for task in known:
            mark, edge = marks[_kind(task["task"], task["tier"])]
            axes.scatter(*task[name], s=16, marker=mark, color=colours.get(task["skill"], PALE), edgecolors=edge)
        axes.set(title=f"t-SNE of {title}", xticks=[], yticks=[])
    for skill, colour in colours.items():
        panels[0].scatter([], [], s=16, color=colour, label=skill.replace("_", " "))
    for label, (mark, edge) in marks.items():
        panels[0].scatter([], [], s=16, marker=mark, color=PALE, edgecolors=edge, label=label)
    panels[0].legend(fontsize=6, loc="center left", bbox_to_anchor=(-0.55, 0.5))
    pairs = ([cosine for task in known for cosine in task["cosines"][of]] for of in ("texts", "adapters"))
    similar.scatter(*pairs, s=2, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
    (correlation,) = result.records("correlation")
    title = f"all pairs, Spearman {correlation['spearman']:.2f}"
    similar.set(xlabel="cosine of descriptions", ylabel="cosine of adapters (B A)", title=title)


def _kind(task: str, tier: str) -> str:
    """What a task is to T2L of the study."""
    trained = "trained" if task in LEARNABLE else "tier train, not trained"
    return {"train": trained, "sibling": "sibling", "novel": "other skill"}[tier]


_CODE = (__file__, tables_study.__file__, scores.__file__)
FIGURES = {
    f"study-{name}": Drawing(draw, ("study",), _CODE) for name, draw in (("arms", arms), ("curves", curves), ("maps", maps))
}
