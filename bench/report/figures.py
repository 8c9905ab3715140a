"""The figures of docs/figures.  matplotlib is imported only to draw.

The same data give the same bytes: no dates, no random ids, matplotlib's own defaults whatever the user's are.  Every file
carries the stamp of its data, so that an old figure is found without drawing it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import records
from bench.records import BASE, OURS, Result, ResultError, Row
from bench.report import figures_icl, figures_study, figures_train, speed, style
from bench.report.cells import duration, number
from bench.report.style import BLUE, GREEN, GREY, ORANGE, PALE, PINK, SKY, VERMILION, YELLOW, Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- roofline --------------------------------------------------------------------------------------------------------


def roofline(figure: Figure, *results: Result) -> None:
    """Arithmetic intensity against GFLOP/s of all ``generate`` and ``lora`` rows, one panel per number of threads."""
    rows = [row for result in results for row in result.rows if row.group in MARKERS and row.roofline]
    if not rows:
        raise ResultError("roofline: no rows of the groups generate and lora")
    threads = sorted({row.threads for row in rows})
    dtypes = sorted({str(row.shape.get("dtype")) for row in rows}, reverse=True)
    colours = dict(zip(dtypes, itertools.cycle((BLUE, VERMILION, GREEN, PINK)), strict=False))
    figure.set_size_inches(5.2 * len(threads), 4.8)
    panels = figure.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        here = [row for row in rows if row.threads == count]
        for row in here:
            colour = colours[str(row.shape.get("dtype"))]
            face = "none" if row.cache == "cold" else colour
            axes.scatter(*_point(row), s=26, marker=MARKERS[row.group], edgecolors=colour, facecolors=face, zorder=3)
        _roofs(axes, results, count, colours, [_point(row)[0] for row in here])
        _point_labels(axes, here)
        axes.set(xscale="log", yscale="log", title=f"{count} thread{'s' if count > 1 else ''}", xlabel="FLOP a byte")
    panels[0].set_ylabel("GFLOP/s")
    _roofline_legend(figure, colours)


MARKERS = {"generate": "o", "lora": "s"}
#: Named points: their text, group, and what their shapes hold.
NAMED = [
    (f"Mistral x{count}", "generate", {"model": "mistral-7b", "variant": "L", "dtype": dtype, "descriptions": count})
    for dtype in ("float32", "bfloat16")
    for count in (1, 64)
] + [
    (f"{tokens}x{adapters}", "lora", {"tokens": tokens, "adapters": adapters, "layout": "r_out"})
    for tokens, adapters in ((8, 8), (64, 64), (512, 8))
]


def _point(row: Row) -> tuple[float, float]:
    return row.roofline["flops"] / row.roofline["bytes"], row.roofline["flops"] / row.us / 1e3


def _ceilings(results: Sequence[Result], kind: str, field: str, key: str, threads: int) -> dict:
    """Median over what was measured before and after each suite, by dtype or bytes."""
    found: dict = {}
    for result in results:
        for entry in result.records("ceiling"):
            if (entry["kind"], entry["threads"]) == (kind, threads):
                found.setdefault(entry[key], []).append(entry[field])
    if not found:
        names = ", ".join(r.path.name for r in results)
        raise ResultError(f"{names}: no ceiling {kind!r} with {threads} threads")
    return {k: statistics.median(v) for k, v in found.items()}


def _roofs(axes: Axes, results: Sequence[Result], threads: int, colours: dict, intensity: list[float]) -> None:
    low, high = min(intensity) / 8, max(intensity) * 2.5  # left of the points is room for the names of the slopes
    reads = _ceilings(results, "read", "gbps", "bytes", threads)
    machine = results[0].run["machine"]
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
            line = {"color": colours.get(dtype, GREY), "linestyle": {"gemm": "-", "fma": "--"}[kind]}
            axes.plot([rate / reads[level2], high], [rate, rate], linewidth=1, zorder=1, **line)
            below = len(known) > 1 and (rate, kind) == known[0]
            place = {"xytext": (3, 0), "va": "top" if below else "bottom", "annotation_clip": False}
            text = f"{kind.upper()} {number(rate)}"
            axes.annotate(text, (high, rate), textcoords="offset points", fontsize=7, **place)


def _point_labels(axes: Axes, rows: Sequence[Row]) -> None:
    """Names below right of some points; of several that match the one farthest from its target."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]
    for text, group, shape in NAMED:
        found = [row for row in rows if row.group == group and shape.items() <= row.shape.items() and row.verdict]
        if found:
            point = _point(max(found, key=lambda row: row.verdict.over))
            name = {"text": text, "fontsize": 7, "path_effects": halo, "zorder": 4}
            axes.annotate(xy=point, xytext=(5, -8), textcoords="offset points", **name)


def _roofline_legend(figure: Figure, colours: dict) -> None:
    from matplotlib.lines import Line2D

    def key(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **({"linestyle": "none", "markersize": 5} | style))

    keys = [key(dtype, marker="o", color=colour) for dtype, colour in colours.items()]
    keys += [key("generation", marker="o", color=GREY), key("LoRA, warm", marker="s", color=GREY)]
    keys += [key("LoRA, cold", marker="s", color=GREY, markerfacecolor="none")]
    keys += [key("matrix product", linestyle="-", color=GREY), key("multiply-adds in registers", linestyle="--", color=GREY)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=7.5)


# --- bars ------------------------------------------------------------------------------------------------------------


def latency_split(figure: Figure, *results: Result) -> None:
    """The parts of a request as shares of its time, which stands at the end of the bar."""
    requests = {
        ", ".join(_words(key, value) for key, value in request.items() if key != "parts"): request["parts"]
        for request in speed.requests(*results)
    }
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


def _words(key: str, value: object) -> str:
    """A field of a shape in words: the value alone where it explains itself."""
    if not isinstance(value, int):
        return str(value)
    return f"{value} {key if value != 1 else key.removesuffix('s')}"


def decode(figure: Figure, *results: Result) -> None:
    """A step of the whole model without adapters, with ours and with every other way: a panel per case."""
    rows = speed.steps(*results)
    names = [BASE, OURS, *dict.fromkeys(name for row in rows for name in row.baselines if name != BASE)]
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure.set_size_inches(4.6 * columns, lines * (0.5 + 0.24 * len(names)))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, row in zip(panels, rows, strict=False):
        times = {name: row.times.get(name, {}).get("median_us") for name in names}
        for y, (name, us) in enumerate(times.items()):
            if us is None:
                axes.text(0, y, " not run", va="center", fontsize=7.5)
                continue
            axes.barh(y, us / 1e3, height=0.7, color={BASE: PALE, OURS: SKY}.get(name, ORANGE))
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

CODE = (__file__, records.__file__, speed.__file__)
#: Modules with figures of their own.
MODULES = (figures_train, figures_icl, figures_study)
FIGURES: dict[str, Drawing] = {
    "roofline": Drawing(roofline, ("generate", "apply"), CODE),
    "latency-split": Drawing(latency_split, ("generate",), CODE),
    "decode": Drawing(decode, ("apply",), CODE),
    **{name: drawing for module in MODULES for name, drawing in module.FIGURES.items()},
}


def drawing_version(name: str) -> str:
    """SHA-256 of the code that draws figure ``name``."""
    code = "".join(Path(file).read_text(encoding="utf-8") for file in (style.__file__, *FIGURES[name].code))
    return hashlib.sha256(code.encode()).hexdigest()


def svg(name: str, results: Sequence[Result], stamp: str) -> str:
    """The figure, with ``stamp`` in its metadata; ResultError where data are missing."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style.STYLE)
        figure = Figure(layout="constrained")
        FIGURES[name].draw(figure, *results)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "bench report", "Description": stamp})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
