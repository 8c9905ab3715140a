"""Plots of an evaluation; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GREY, _BLUE, _LIGHT, _RED = "#999999", "#0072b2", "#56b4e9", "#d55e00"  # safe for red-green colour blindness


def means(result: Mapping[str, Any], path: Path) -> None:
    """Write to ``path`` a bar chart of every method's mean score with 95 % intervals over tasks, one panel per task group.

    ``result``: as ``t2l evaluate --json`` writes it.  Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    from t2l_engine.research.evaluation.metrics import interval

    groups, methods = result["groups"], [*result["details"]][::-1]
    figure = Figure(figsize=(3.2 + 3 * len(groups), 1.2 + 0.28 * len(methods)), layout="tight")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axis, (group, names) in zip(axes[0], groups.items(), strict=True):
        for y, method in enumerate(methods):
            scores = [result["tasks"][name] for name in names]
            if values := [of[method] for of in scores if method in of]:
                span = interval(values)
                axis.barh(y, span.mean, color=_colour(method))
                axis.plot([span.low, span.high], [y, y], color="black", linewidth=1)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_xlim(0, 100)
        axis.set_title(f"{group} ({len(names)} tasks)", fontsize=9)
        axis.set_xlabel("score, %")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _colour(method: str) -> str:
    if method.endswith(("-shuffled", "-same-family", "-junk", "-constant")):
        return _LIGHT
    if method.startswith(("base", "icl")):
        return _GREY
    return _RED if method.startswith(("oracle", "average", "arrow", "nearest", "multi-task")) else _BLUE
