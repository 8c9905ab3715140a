"""Plots of an evaluation; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Colours by kind of method; safe for red-green colour blindness.
_COLOURS = {"generated": "#0072b2", "baseline": "#56b4e9", "base": "#999999", "other": "#d55e00"}


def means(result: Mapping[str, Any], path: Path) -> None:
    """Write to ``path`` a bar chart of every method's mean score with 95 % intervals over tasks, one panel per task group.

    ``result``: as ``t2l evaluate --json`` writes it.  Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from t2l_engine.research.evaluation.bootstrap import interval

    groups, scores = result["groups"], result["tasks"]
    methods = list(result["details"])
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(3.2 + 3 * len(groups), 1.2 + 0.28 * len(methods)), sharey=True, squeeze=False
    )
    for axis, (group, names) in zip(axes[0], groups.items(), strict=True):
        for y, method in enumerate(reversed(methods)):
            values = [scores[name][method] for name in names if method in scores[name]]
            if values:
                span = interval(values)
                axis.barh(y, span.mean, color=_COLOURS[_kind(method)])
                axis.plot([span.low, span.high], [y, y], color="black", linewidth=1)
        axis.set_yticks(range(len(methods)), list(reversed(methods)))
        axis.set_xlim(0, 100)
        axis.set_title(f"{group} ({len(names)} tasks)", fontsize=9)
        axis.set_xlabel("score, %")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _kind(method: str) -> str:
    if method.endswith(("-shuffled", "-junk", "-constant")):
        return "baseline"
    if method.startswith(("base", "icl")):
        return "base"
    if method in ("oracle", "average", "arrow", "nearest") or method.startswith("multi-task"):
        return "other"
    return "generated"
