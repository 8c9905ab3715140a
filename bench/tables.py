"""The performance tables, in Markdown, from the results of ``python -m bench generate|apply``.

A table function takes results and returns the text between its markers.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.markdown import GAP, Column, caption, duration, everything, grid, met, number, size, table, times
from bench.rows import (
    BASE,
    HEADLINES,
    Pair,
    Result,
    ResultError,
    Row,
    Verdict,
    beside_base,
    farthest,
    group,
    split_times,
    swept,
    verdicts,
)

# --- columns ---------------------------------------------------------------------------------------------------------


def _time(unit: str, scale: float) -> Column:
    def cell(_: Result, row: Row) -> str:
        return f"{number(row.us / scale)} ({number(row.ours['iqr_us'] / scale)}){row.mark}"

    return f"{unit} (IQR)", cell


def _floor(unit: str, scale: float) -> list[Column]:
    """The floor, what sets it, and the time over it."""
    return [
        (f"floor {unit}", lambda _, row: number(row.floor["us"] / scale) if row.floor else GAP),
        ("set by", lambda _, row: row.floor["by"] if row.floor else GAP),
        ("x floor", _over),
    ]


def _over(result: Result, row: Row) -> str:
    """The time over the floor, or over what else its bar refers to."""
    verdict = result.verdict(row)
    if verdict is None or verdict.of == "floor":
        return number(row.floor_ratio)
    return f"{number(verdict.ratio)} x {verdict.of}"


BAR: list[Column] = [
    ("bar", lambda result, row: v.bar if (v := result.verdict(row)) else GAP),
    ("met", lambda result, row: met(result.verdict(row))),
]
ADAPTER: Column = ("ms an adapter", lambda _, row: number(row.us / 1e3 / row.shape["descriptions"]))
FMA: Column = ("x FMA peak", lambda _, row: number(row.fma_ratio))
BYTES: Column = ("bytes", lambda _, row: size(row.floor["bytes"]) if row.floor else GAP)
RATE: Column = ("GB/s", lambda _, row: number(row.floor["bytes"] / row.us / 1e3) if row.floor else GAP)


# --- tables ----------------------------------------------------------------------------------------------------------


def generate(*results: Result) -> str:
    peak = [FMA] if all(result.peaks_hold for result in results) else []
    return table(group(results, "generate"), [_time("ms", 1e3), ADAPTER, *_floor("ms", 1e3), *BAR, *peak])


def generate_memory(*results: Result) -> str:
    entries = [(result, m) for result in results for m in result.meta.get("memory", [])]
    if not entries:
        raise ResultError(f"{', '.join(r.path.name for r in results)}: nothing under 'memory'")
    judged = {v.name: v for result in results for v in result.memory()}
    heads = ["what", "peak MiB", "weights MiB", "adapters MiB", "peak / (weights + adapters)", "bar", "met"]
    lines = [
        [m["what"], *(number(m[k]) for k in ("peak_mib", "weights_mib", "adapters_mib", "ratio")), *_memory_bar(judged, m)]
        for _, m in entries
    ]
    return grid(heads, lines) + "\n\n" + caption([p for p in group(results, "generate") if p[0].meta.get("memory")])


def _memory_bar(judged: dict[str, Verdict], entry: dict) -> list[str]:
    verdict = judged.get(entry["what"])
    return [verdict.bar if verdict else GAP, met(verdict)]


def split(*results: Result) -> str:
    """A request, part by part: milliseconds and share."""
    requests = split_times(results)
    parts = list(dict.fromkeys(part for request in requests.values() for part in request))
    lines = []
    for title, request in requests.items():
        total = sum(request.values())
        cells = [f"{number(request[p] / 1e3)} ({request[p] / total:.0%})" if p in request else GAP for p in parts]
        lines.append([title, *cells, number(total / 1e3)])
    return grid(["request", *(f"{p}, ms" for p in parts), "sum, ms"], lines) + "\n\n" + caption(group(results, "split"))


def bf16_weights(*results: Result) -> str:
    entries = [(result, e) for result in results for e in result.meta.get("bf16_weights", [])]
    if not entries:
        raise ResultError(f"{', '.join(r.path.name for r in results)}: nothing under 'bf16_weights'")
    lines = [[e["model"], e["variant"], f"{e['relative_frobenius']:.1e}"] for _, e in entries]
    return grid(["model", "variant", "relative Frobenius difference"], lines) + "\n\n" + caption(group(results, "generate"))


def lora(*results: Result) -> str:
    """The op alone."""
    return table(group(results, "lora", lambda row: not beside_base(row)), [_time("us", 1), *_floor("us", 1), *BAR])


def linear(*results: Result) -> str:
    """The op around a linear, beside the linear alone and PEFT's layers."""
    return over_base(group(results, "lora", beside_base), "us", 1)


def sweep(*results: Result) -> str:
    return table(group(results, "sweep"), [_time("us", 1), BYTES, RATE, *_floor("us", 1), *BAR])


def backward(*results: Result) -> str:
    return table(group(results, "backward"), [_time("us", 1), *_floor("us", 1), *BAR])


def model(*results: Result) -> str:
    """A whole model: a decoding step or a prefill."""
    return over_base(group(results, "model", lambda row: not swept(row)), "ms", 1e3)


def model_sweep(*results: Result) -> str:
    """Decoding steps over the number of different adapters in the batch."""
    return over_base(group(results, "model", swept), "ms", 1e3)


def over_base(pairs: list[Pair], unit: str, scale: float) -> str:
    """Without adapters, with ours, and with every other way; each over the time without."""

    def base(row: Row) -> float:
        return row.baselines[BASE]["median_us"]

    def beside(name: str) -> Column:
        def cell(_: Result, row: Row) -> str:
            us = row.baselines.get(name, {}).get("median_us")
            return GAP if us is None else f"{number(us / scale)} ({number(us / base(row))} x)"

        return f"{name}, {unit} (x base)", cell

    columns = [
        (f"base, {unit}", lambda _, row: number(base(row) / scale)),
        (f"ours, {unit} (IQR)", _time(unit, scale)[1]),
        ("x base", lambda _, row: number(row.us / base(row))),
        *BAR,
    ]
    return table(pairs, columns, beside)


def ceilings(*results: Result) -> str:
    """What the machine can do, before and after each suite."""
    units = {"gemm": ("gflops", "GFLOP/s"), "fma": ("gflops", "GFLOP/s"), "read": ("gbps", "GB/s"), "copy": ("gbps", "GB/s")}
    lines, drifts, left_out = [], [], []
    for result in results:
        before, after = (result.meta["ceilings"][when] for when in ("before", "after"))
        for kind, (field, unit) in units.items():
            if kind == "fma" and not result.peaks_hold:
                left_out.append(result.path.name)
                continue
            later = {_ceiling(c): c[field] for c in after[kind]}
            for c in before[kind]:
                if _ceiling(c) not in later:
                    raise ResultError(f"{result.path.name}: ceiling {kind} {_ceiling(c)} was not measured again")
                drifts.append(later[_ceiling(c)] / c[field] - 1)
                what = c["dtype"] if "dtype" in c else size(c["bytes"])
                rates = [number(c[field]), number(later[_ceiling(c)]), unit, f"{drifts[-1]:+.1%}"]
                lines.append([result.meta["suite"], kind, what, str(c["threads"]), *rates])
    heads = ["suite", "ceiling", "dtype or bytes", "threads", "before", "after", "unit", "drift"]
    worst = max(drifts, key=abs)
    no_peak = f"Multiply-adds on registers were slower than products in {', '.join(left_out)}: no peak, left out.  "
    notes = f"Largest drift: {worst:+.1%}.  {no_peak if left_out else ''}"
    return "\n\n".join([grid(heads, lines), notes + caption(everything(results))])


def _ceiling(entry: dict) -> tuple:
    return entry.get("dtype"), entry.get("bytes"), entry["threads"]


def misses(*results: Result) -> str:
    """Every figure that misses its bar, the farthest first."""
    judged = verdicts(results)
    missed = sorted((v for v in judged if not v.met), key=lambda v: -v.over)
    heads = ["group", "case", "measured", "bar allows", "ratio", "bar", "over by"]
    lines = [grid(heads, map(_miss, missed))] if missed else []
    return "\n\n".join([*lines, f"{len(missed)} of {len(judged)} bars are missed.  {caption(everything(results))}"])


def _miss(v: Verdict) -> list[str]:
    measured = [duration(v.value), duration(v.limit)] if v.unit == "us" else [f"{number(v.value)} x", f"{number(v.limit)} x"]
    return [v.group, v.name, *measured, f"{number(v.ratio)} x {v.of}", v.bar, f"{v.over - 1:+.1%}"]


def losses(*results: Result) -> str:
    """Every case in which another way is faster, the largest loss first."""
    compared = [(row, name, s) for result in results for row in result.rows for name, s in row.rivals().items()]
    lost = sorted((c for c in compared if c[2] < 1), key=lambda c: c[2])
    heads = ["group", "case", "baseline", "ours", "baseline's", "ours / baseline's"]
    lines = [[r.group, r.name, name, duration(r.us), duration(r.us * s), f"{number(1 / s)} x"] for r, name, s in lost]
    count = f"A baseline is faster in {len(lost)} of {len(compared)} comparisons."
    return "\n\n".join([*([grid(heads, lines)] if lost else []), f"{count}  {caption(everything(results))}"])


def speed(*results: Result) -> str:
    """What a newcomer wants to know; always with the figure farthest from its bar and every baseline that beats ours."""
    lines = []
    for headline in HEADLINES:
        result, row = farthest(headline.matching(results))
        verdict, rivals = result.verdict(row), row.rivals()
        nearest = min(rivals, key=rivals.get) if rivals else None
        lines.append(
            [
                headline.label,
                row.name,
                duration(row.us) + row.mark,
                GAP if verdict is None else f"{number(verdict.ratio)} x {verdict.of}",
                GAP if verdict is None else verdict.bar,
                met(verdict),
                GAP if nearest is None else f"{times(rivals[nearest])} {nearest}",
            ]
        )
    return "\n\n".join(
        [
            grid(["what", "case", "time", "ratio", "bar", "met", "faster than the next best by"], lines),
            "\n".join([farthest_bar(verdicts(results)), *beaten(results)]),
            caption(everything(results)),
        ]
    )


def farthest_bar(judged: Sequence[Verdict]) -> str:
    """How many bars are missed, and which is the farthest beyond its own."""
    v = max(judged, key=lambda v: v.over)
    missed = sum(not v.met for v in judged)
    side = f"{v.over - 1:.0%} over" if not v.met else f"{1 - v.over:.0%} under"
    return (
        f"- Of {len(judged)} bars {missed} are missed.  Farthest from its bar: {v.group}, {v.name}, "
        f"at {number(v.ratio)} x {v.of} where {v.bar} is the bar: {side}."
    )


def beaten(results: Sequence[Result]) -> list[str]:
    """A line per baseline that is faster than ours anywhere."""
    worst: dict[str, list[tuple[float, str]]] = {}
    for result in results:
        for row in result.rows:
            for name, s in row.rivals().items():
                worst.setdefault(f"{row.group}, {name}", []).append((s, row.name))
    lines = []
    for title, cases in worst.items():
        lost = [c for c in cases if c[0] < 1]
        if lost:
            s, case = min(lost)
            often = f"in {len(lost)} of {len(cases)} cases"
            lines.append(f"- Faster than ours: {title}, {often}, at most {number(1 / s)} times ({case}).")
    return lines or ["- No baseline is faster than ours in any case."]
