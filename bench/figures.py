"""The figures of docs/figures: what each is drawn from, and how.  matplotlib is imported only to draw.

The same data give the same bytes: no dates, no random ids, matplotlib's own defaults whatever the user's are.  Every file
carries the stamp of its data, so that an old figure is found without drawing it.  Colours are Okabe and Ito's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import palette, rows
from bench.icl import figures as icl
from bench.icl import words
from bench.markdown import duration, number
from bench.palette import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, VERMILION, YELLOW
from bench.rows import BASE, HEADLINES, Result, ResultError, group, split_times
from bench.study import figures as study
from bench.study import tables as study_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "t2l_engine",
    "svg.fonttype": "path",  # the same picture whatever fonts the reader has
    "font.size": 9,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",  # readable on dark pages too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def drawing_version(name: str) -> str:
    """SHA-256 of the code that draws figure ``name``: this file, the colours, and what selects and draws its rows."""
    files = (__file__, palette.__file__, *FIGURES[name].code)
    code = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    return hashlib.sha256(code.encode()).hexdigest()


# --- roofline --------------------------------------------------------------------------------------------------------


def roofline(figure: Figure, *results: Result) -> None:
    """Arithmetic intensity against GFLOP/s of all ``generate`` and ``lora`` rows, one panel per number of threads."""
    pairs = [p for name in ("generate", "lora") for p in group(results, name) if p[1].floor]
    threads = sorted({row.threads for _, row in pairs})
    dtypes = sorted({str(row.shape.get("dtype")) for _, row in pairs}, reverse=True)
    colours = dict(zip(dtypes, itertools.cycle((BLUE, VERMILION, GREEN, PINK)), strict=False))
    figure.set_size_inches(5.2 * len(threads), 4.8)
    panels = figure.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        here = [p for p in pairs if p[1].threads == count]
        for _, row in here:
            colour = colours[str(row.shape.get("dtype"))]
            face = "none" if row.cache == "cold" else colour
            axes.scatter(*_point(row), s=26, marker=MARKERS[row.group], edgecolors=colour, facecolors=face, zorder=3)
        _roofs(axes, results, count, colours, [_point(row)[0] for _, row in here])
        _point_labels(axes, results, count)
        axes.set(xscale="log", yscale="log", title=f"{count} thread{'s' if count > 1 else ''}", xlabel="FLOP a byte")
    panels[0].set_ylabel("GFLOP/s")
    _roofline_legend(figure, colours)


MARKERS = {"generate": "o", "lora": "s"}


def _point(row: rows.Row) -> tuple[float, float]:
    return row.floor["flops"] / row.floor["bytes"], row.floor["flops"] / row.us / 1e3


def _ceilings(results: Sequence[Result], kind: str, field: str, key: str, threads: int) -> dict:
    """Median over what was measured before and after each suite, by dtype or bytes."""
    found: dict = {}
    for result in results:
        for when in ("before", "after"):
            for entry in result.meta["ceilings"][when][kind]:
                if entry["threads"] == threads:
                    found.setdefault(entry[key], []).append(entry[field])
    if not found:
        names = ", ".join(r.path.name for r in results)
        raise ResultError(f"{names}: no ceiling {kind!r} with {threads} threads")
    return {k: statistics.median(v) for k, v in found.items()}


def _roofs(axes: Axes, results: Sequence[Result], threads: int, colours: dict, intensity: list[float]) -> None:
    low, high = min(intensity) / 8, max(intensity) * 2.5  # left of the points is room for the names of the slopes
    reads = _ceilings(results, "read", "gbps", "bytes", threads)
    machine = results[0].meta["machine"]
    cache = (machine["l2_mib"] or 0) * 2**20 * min(1, threads / machine["cores"])  # of the cores in use
    level2 = max((b for b in reads if b <= cache), default=min(reads))
    kinds = ("gemm", "fma") if all(result.peaks_hold for result in results) else ("gemm",)
    peaks = {kind: _ceilings(results, kind, "gflops", "dtype", threads) for kind in kinds}
    top = max(max(p.values()) for p in peaks.values())
    for label, count in (("DRAM", max(reads)), ("L2", level2)):
        rate = reads[count]
        axes.plot([low, top / rate], [low * rate, top], color=GREY, linewidth=1, zorder=1)
        along = {"rotation": math.degrees(math.atan(rate)), "rotation_mode": "anchor", "transform_rotates_text": True}
        axes.text(low * 1.1, low * 1.4 * rate, f"{label} {number(rate)} GB/s", fontsize=7, **along)
    for dtype in {dtype: None for rates in peaks.values() for dtype in rates}:
        known = sorted((rates[dtype], kind) for kind, rates in peaks.items() if dtype in rates)
        for rate, kind in known:
            style = {"color": colours.get(dtype, GREY), "linestyle": {"gemm": "-", "fma": "--"}[kind]}
            axes.plot([rate / reads[level2], high], [rate, rate], linewidth=1, zorder=1, **style)
            below = len(known) > 1 and (rate, kind) == known[0]
            place = {"xytext": (3, 0), "va": "top" if below else "bottom", "annotation_clip": False}
            text = f"{kind.upper()} {number(rate)}"
            axes.annotate(text, (high, rate), textcoords="offset points", fontsize=7, **place)


def _point_labels(axes: Axes, results: Sequence[Result], threads: int) -> None:
    """Names of the headline rows measured with ``threads``, below right of their points."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]
    for headline in HEADLINES:
        if headline.group in MARKERS:
            found = [p for p in headline.matching(results) if p[1].threads == threads and p[1].floor]
            if found:
                point = _point(rows.farthest(found)[1])
                name = {"text": headline.short, "fontsize": 7, "path_effects": halo, "zorder": 4}
                axes.annotate(xy=point, xytext=(5, -8), textcoords="offset points", **name)


def _roofline_legend(figure: Figure, colours: dict) -> None:
    from matplotlib.lines import Line2D

    def key(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **({"linestyle": "none", "markersize": 5} | style))

    keys = [key(dtype, marker="o", color=colour) for dtype, colour in colours.items()]
    keys += [key("generation", marker="o", color=GREY), key("LoRA, hot", marker="s", color=GREY)]
    keys += [key("LoRA, cold", marker="s", color=GREY, markerfacecolor="none")]
    keys += [key("matrix product", linestyle="-", color=GREY), key("multiply-adds in registers", linestyle="--", color=GREY)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=7.5)


# --- bars ------------------------------------------------------------------------------------------------------------


def latency_split(figure: Figure, *results: Result) -> None:
    """The parts of a request as shares of its time, which stands at the end of the bar."""
    requests = split_times(results)
    parts = list(dict.fromkeys(part for request in requests.values() for part in request))
    figure.set_size_inches(8, 1.2 + 0.36 * len(requests))
    axes = figure.subplots()
    for y, request in enumerate(requests.values()):
        left, total = 0.0, sum(request.values())
        for part, colour in zip(parts, itertools.cycle((SKY, ORANGE, GREEN, PINK, YELLOW)), strict=False):
            share = 100 * request.get(part, 0) / total
            axes.barh(y, share, left=left, color=colour, edgecolor="white", height=0.7, label=part if y == 0 else None)
            if share >= 7:
                axes.text(left + share / 2, y, f"{share:.0f} %", ha="center", va="center", fontsize=7.5)
            left += share
        axes.text(101, y, duration(total), va="center")
    axes.set(yticks=range(len(requests)), yticklabels=list(requests), xlim=(0, 112), xlabel="share of the time, %")
    axes.set_xticks(range(0, 101, 20))
    axes.spines.bottom.set_bounds(0, 100)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(parts))


def decode(figure: Figure, *results: Result) -> None:
    """A step of the whole model without adapters, with ours and with every other way: a panel per case."""
    pairs = group(results, "model", lambda row: not rows.swept(row))
    names = [BASE, "ours", *dict.fromkeys(n for _, row in pairs for n in row.baselines if n != BASE)]
    columns = min(2, len(pairs))
    lines = -(-len(pairs) // columns)
    figure.set_size_inches(4.6 * columns, lines * (0.5 + 0.24 * len(names)))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (_, row) in zip(panels, pairs, strict=False):
        times = {name: row.us if name == "ours" else row.baselines.get(name, {}).get("median_us") for name in names}
        for y, (name, us) in enumerate(times.items()):
            if us is None:
                axes.text(0, y, " not run", va="center", fontsize=7.5)
                continue
            axes.barh(y, us / 1e3, height=0.7, color={BASE: PALE, "ours": SKY}.get(name, ORANGE))
            ratio = f" ({number(us / times[BASE])} x)" if name != BASE and times[BASE] else ""
            axes.text(us / 1e3, y, f" {duration(us)}{ratio}", va="center", fontsize=7.5)
        axes.set(yticks=range(len(names)), yticklabels=names, title=row.name, xticks=[])
        axes.spines.bottom.set_visible(False)  # every bar says its time
        axes.set_xlim(0, 1.45 * max(us for us in times.values() if us) / 1e3)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
    for axes in panels:  # what is left of the grid
        axes.set_axis_off()


# --- files -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What draws a figure, the names of the results that it is drawn from, and the code beside this file that it is of."""

    draw: Callable[..., None]
    sources: tuple[str, ...]
    code: tuple[str, ...] = (rows.__file__,)


FIGURES = {
    "roofline": Drawing(roofline, ("generate", "apply")),
    "latency-split": Drawing(latency_split, ("generate", "apply")),
    "decode": Drawing(decode, ("apply",)),
    **{name: Drawing(draw, ("icl",), (icl.__file__, words.__file__)) for name, draw in icl.FIGURES.items()},
    **{
        f"study-{name}": Drawing(draw, ("study",), (study.__file__, study_tables.__file__))
        for name, draw in study.FIGURES.items()
    },
}


def files(name: str, results: Sequence[Result], stamp: str) -> dict[str, bytes]:
    """The figure as file name -> contents, each with ``stamp`` in its metadata; ResultError where data are missing."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(layout="constrained")
        FIGURES[name].draw(figure, *results)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": "bench.figures", "Description": stamp})
        figure.savefig(png, format="png", metadata={"Software": None, "Description": stamp})
    return {f"{name}.svg": svg.getvalue(), f"{name}.png": png.getvalue()}
