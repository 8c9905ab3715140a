"""The tables of ``python -m bench train``: steps through a frozen model, their memory, hypernetworks, libraries, a summary.

A table function takes the result and returns the text between its markers.
"""

from __future__ import annotations

from typing import Any

from bench.markdown import GAP, Column, caption, everything, grid, met, number, table, times
from bench.rows import BASE, Pair, Result, ResultError, Row, Verdict, group, verdicts
from bench.tables import beaten, farthest_bar, over_base

#: Ours, and the reference implementation's way, by their names in rows and in the list ``train_memory``.
OURS, HOOKS = "ours", "hooks"
Entry = dict[str, Any]


def steps(result: Result) -> str:
    """Steps with an adapter a sample, over the frozen model alone."""
    return over_base(group([result], "train"), "ms", 1e3)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(result: Result) -> str:
    """Peaks by way, what the step added to the model, and how the hooks stand to ours."""
    found = entries(result)
    ways = list(dict.fromkeys(way for entry in found for way in entry["ways"]))
    heads = [
        *("case", "with the model, MiB", *(f"{way}, peak MiB (of the step)" for way in ways)),
        *(f"{HOOKS} / ours, peak (of the step)", "bar", "met"),
    ]
    lines = []
    for entry in found:
        peaks = [_peak(entry["ways"][way]) if way in entry["ways"] else GAP for way in ways]
        hooks, ours = entry["ways"][HOOKS], entry["ways"][OURS]
        over = f"{times(hooks['peak_mib'] / ours['peak_mib'])} ({times(_added(hooks) / _added(ours))})"
        verdict = _verdict(entry)
        bar = verdict.bar if verdict else GAP
        lines.append([entry["case"], number(ours["loaded_mib"]), *peaks, over, bar, met(verdict)])
    absent = {f"{way} ({why})" for entry in found for way, why in entry["absent"].items()}
    gaps = [f"{GAP} {', '.join(sorted(absent))}."] if absent else []
    kept = not all(found["reset"] for entry in found for found in entry["ways"].values())
    note = "The system did not let peaks begin anew: they are those since the start of a process.  " if kept else ""
    return "\n\n".join([grid(heads, lines), *gaps, note + caption(group([result], "train"))])


def entries(result: Result) -> list[Entry]:
    """What was measured of memory; ResultError where nothing was, or where it cannot be so."""
    found = result.meta.get("train_memory", [])
    if not found:
        raise ResultError(f"{result.path.name}: nothing under 'train_memory'")
    for entry in found:
        for way in (HOOKS, OURS):
            if way not in entry["ways"]:
                raise ResultError(f"{result.path.name}: memory of {entry['case']}: no {way!r}")
        for way, of in entry["ways"].items():
            loaded, peak = of["loaded_mib"], of["peak_mib"]
            if not 0 < loaded < peak:
                place = f"{result.path.name}: memory of {entry['case']}, {way}"
                raise ResultError(f"{place}: expected a peak above the {loaded:g} MiB before it, got {peak:g}")
    return found


def _added(of: Entry) -> float:
    return of["peak_mib"] - of["loaded_mib"]


def _peak(of: Entry) -> str:
    return f"{number(of['peak_mib'])} ({number(_added(of))})"


def _verdict(entry: Entry) -> Verdict | None:
    """Ours beside the hooks: a bar of 1.25 is 1 / 1.25 of their peak at most."""
    if entry["bar"] is None:
        return None
    ratio = entry["ways"][OURS]["peak_mib"] / entry["ways"][HOOKS]["peak_mib"]
    text = f"{HOOKS} at least {entry['bar']:g} x ours"
    return Verdict("memory", entry["case"], ratio, 1 / entry["bar"], "", ratio, HOOKS, text)


# --- hypernetworks and libraries -------------------------------------------------------------------------------------

PARTS = {"model": "model and adapters", "hypernetwork": "hypernetwork", "update": "clip, AdamW"}


def hypernetworks(result: Result) -> str:
    """Whole steps, and their parts timed alone, with their share of the whole."""

    def part(name: str) -> Column:
        def cell(_: Result, row: Row) -> str:
            us = _part(result, row, name)
            return f"{number(us / 1e3)} ({us / row.us:.0%})"

        return f"{PARTS[name]}, ms (share)", cell

    base: Column = ("base, ms", lambda _, row: number(row.baselines[BASE]["median_us"] / 1e3))
    over: Column = ("x base", lambda _, row: number(1 / row.speedup(BASE)))
    return table(group([result], "sft step"), [base, _whole("whole step"), over, *map(part, PARTS)])


def _whole(title: str) -> Column:
    return f"{title}, ms (IQR)", lambda _, row: f"{number(row.us / 1e3)} ({number(row.ours['iqr_us'] / 1e3)}){row.mark}"


def _part(result: Result, row: Row, name: str) -> float:
    """Microseconds of a part of the step of ``row``."""
    for entry in result.meta.get("train_parts", []):
        if entry["case"] == row.case and name in entry["parts"]:
            return entry["parts"][name]["median_us"]
    raise ResultError(f"{result.path.name}: train_parts: {row.case}: {name!r} was not timed")


def library(result: Result) -> str:
    """Steps of several adapters in one batch, beside a step for each."""
    each: Column = ("ms a task", lambda _, row: number(row.us / 1e3 / row.shape["tasks"]))
    return table(group([result], "library"), [_whole("one batch"), each])


# --- the README ------------------------------------------------------------------------------------------------------


def summary(result: Result) -> str:
    """Steps and memory at a glance, every kind of case in which ours loses, and what else a newcomer wants to know."""
    found = {entry["case"]: entry for entry in entries(result)}
    heads = [
        *("a step of 8 samples, 8 adapters", "frozen base", "ours", "x base", "bar", "met"),
        *(f"{HOOKS} / ours, time", "peak memory", "bar", "met"),
    ]
    lines = [_line(pair, found) for pair in group([result], "train")]
    judged = verdicts([result]) + [v for entry in found.values() if (v := _verdict(entry))]
    points = [farthest_bar(judged), *beaten([result]), _hypernetwork(result), _libraries(result)]
    return "\n\n".join([grid(heads, lines), "\n".join(points), caption(everything([result]))])


def _line(pair: Pair, found: dict[str, Entry]) -> list[str]:
    result, row = pair
    if row.case not in found:
        raise ResultError(f"{result.path.name}: train_memory: nothing of {row.case}")
    entry, verdict = found[row.case], result.verdict(row)
    held = _verdict(entry)
    more = entry["ways"][HOOKS]["peak_mib"] / entry["ways"][OURS]["peak_mib"]
    return [
        row.case,
        f"{number(row.baselines[BASE]['median_us'] / 1e3)} ms",
        f"{number(row.us / 1e3)} ms{row.mark}",
        number(1 / row.speedup(BASE)),
        verdict.bar if verdict else GAP,
        met(verdict),
        times(row.speedup(HOOKS)),
        times(more),
        f"{entry['bar']:g} x" if held else GAP,
        met(held),
    ]


def _hypernetwork(result: Result) -> str:
    shares = [(_part(result, row, "hypernetwork") / row.us, row) for _, row in group([result], "sft step")]
    (least, first), (most, last) = (choose(shares, key=lambda s: s[0]) for choose in (min, max))
    return (
        f"- Of a whole step that trains a hypernetwork of the bundled size, the hypernetwork takes {least:.0%} "
        f"({first.case}) to {most:.0%} ({last.case})."
    )


def _libraries(result: Result) -> str:
    rows = [row for _, row in group([result], "library", lambda row: row.shape["tasks"] > 1)]
    each = [f"{times(1 / (row.us / row.baselines[way]['median_us']))} ({row.case})" for row in rows for way in row.baselines]
    return f"- Adapters of several tasks trained in one batch, over one task at a time: {', '.join(each)}."
