"""What all figures share: colours, Okabe and Ito's and greys, and the style."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

SKY, ORANGE, GREEN, PINK, YELLOW, BLUE, VERMILION = "#56B4E9 #E69F00 #009E73 #CC79A7 #F0E442 #0072B2 #D55E00".split()
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
class Drawing:
    """``draw(figure, *results)``, the names of those results, and the files of code whose change makes it old."""

    draw: Callable[..., None]
    sources: tuple[str, ...]
    code: tuple[str, ...]
