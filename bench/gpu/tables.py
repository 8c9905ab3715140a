"""``gpu.json`` in Markdown: what was measured, on which card, what it is beside, and whether the bars are met.

python -m bench.gpu.tables FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.markdown import GAP, duration, grid, number, size, times
from bench.rows import BASE

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
#: Names of what is timed beside ours and is nobody's competitor: bounds, and ours in other forms.
COPY, APART, EAGER, OPS, HEADS = "copy", "ours, a launch a linear", "ours, from the host", "ours, ops alone", "head weights"
#: The cache of one set of operands, whatever its size.
AS_IT_COMES = "as it comes"
#: The ops' meaning in plain torch, which widens weights of 16 bits on every call.
REFERENCE = "reference"
#: What turns a description into what ours begins with: a part of a request.
ENCODER = "text encoder"
BESIDE = (COPY, APART, EAGER, OPS, BASE, REFERENCE, ENCODER)
#: Two ways to answer the first question of a user.
PER_REQUEST, THREE_SHOT = "T2L per request", "3-shot ICL"
#: As in bench.harness, which needs the engine.
OURS = "ours"
NOT_MEASURED = "Not yet measured."
SOURCE = "From `bench/results/gpu.json` (`bash bench/gpu_suite.sh OUT`)."
LEGEND = (
    "Times are medians of graph replays, a call; (host): called from the host, and compared with ours called so.  cold: "
    "sets of operands that together exceed three times the level-2 cache take turns; hot: one set again and again, where "
    "it fits in that cache; as it comes: one set, whatever its size.  copy: as many bytes, half read and half written, by "
    "the faster of a copy and a kernel, in a graph, on as many sets.  Floors are made with the best bandwidth and the "
    "matrix products of the same process, those of float32 with the faster of its own products and of three in TF32; what "
    "is hot has no floor.  reference: the ops in plain torch, no rival.  A bar that was not measured says so."
)
DRY = "A dry run on a CPU: its times mean nothing."


def load(path: Path) -> dict[str, Any]:
    """A result of the suite; ValueError for anything else."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("suite") != "gpu":
        raise ValueError(f"{path.name}: expected a result of bench/gpu_suite.sh")
    return result


def rivals(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that do what ours does in another way."""
    return [name for name in names if name not in BESIDE and name != OURS]


def first_question(way: str) -> str:
    """The case of answering it in one of these ways."""
    return f"first question, {way}"


# --- columns ---------------------------------------------------------------------------------------------------------


def _us(timing: dict[str, Any]) -> str:
    host = "" if timing.get("graph") else " (host)"
    return f"{number(timing['median_us'])}{host}"


def _spread(row: Row) -> str:
    return f"{number(row['ours']['p5_us'])} to {number(row['ours']['p95_us'])}"


def bar_text(bar: dict[str, Any] | None) -> str:
    """A bar in words."""
    if bar is None:
        return GAP
    plus = bar.get("plus_us") or 0
    if not bar["ratio"]:
        return f"{plus:g} us"
    return f"{bar['ratio']:g} x {bar['of']}" + (f" + {plus:g} us" if plus else "")


def verdict(row: Row) -> str:
    """Whether the bar is met, and what is faster."""
    bar = row["bar"]
    words = [] if bar is None else ["met" if bar["met"] else "**not met**"]
    if row["ours"].get("note") and not row["ours"]["graph"]:
        words.append("**not captured**")
    if row["lost"]:
        words.append(f"**lost** to {', '.join(row['lost'])}")
    return "; ".join(words) or GAP


def _beside(name: str) -> Column:
    """How many times as long ``name`` takes."""

    def cell(row: Row) -> str:
        timing = row["baselines"].get(name, {})
        if "speedup" not in timing:
            return GAP
        return times(timing["speedup"]) + ("" if timing.get("graph") else " (host)")

    return f"over {name}", cell


def _time(name: str) -> Column:
    """The time of ``name`` itself."""

    def cell(row: Row) -> str:
        timing = row["baselines"].get(name, {})
        return _us(timing) if "median_us" in timing else GAP

    return f"{name}, us", cell


def _x_base(row: Row) -> str:
    base = row["baselines"][BASE].get("median_us")
    return GAP if base is None else number(row["ours"]["median_us"] / base)


CASE: Column = ("case", lambda row: row["case"])
CACHE: Column = ("cache", lambda row: row["cache"] or GAP)
MINE: list[Column] = [
    ("ours, us", lambda row: _us(row["ours"])),
    ("p5 to p95", _spread),
    ("replays", lambda row: str(row["ours"]["rounds"])),
]
FLOOR: list[Column] = [
    ("bytes", lambda row: size(row["floor"]["bytes"]) if row["floor"] else GAP),
    ("floor, us", lambda row: number(row["floor"]["us"]) if row["floor"] else GAP),
    ("x floor", lambda row: number(row.get("floor_ratio"))),
    ("x copy", lambda row: number(row.get("copy_ratio"))),
]
IN_CONTEXT: list[Column] = [
    (f"FLOPs, {THREE_SHOT}", lambda row: times(row["shape"]["flops_in_context"] / row["floor"]["flops"])),
    ("memory a user", lambda row: size(row["shape"]["user_bytes"])),
    (f"memory, {THREE_SHOT}", lambda row: size(row["shape"]["user_bytes_in_context"])),
]
VERDICT: list[Column] = [("bar", lambda row: bar_text(row["bar"])), ("verdict", verdict)]
X_BASE: Column = ("x base", _x_base)
ERROR: Column = ("error (bound)", lambda row: f"{row['error']['value']:.1e} ({row['error']['bound']:.1e})")

#: Group of rows -> its title, and the columns between ours and the rivals.
GROUPS: dict[str, tuple[str, list[Column]]] = {
    "decode": ("Batched LoRA, decode", FLOOR),
    "prefill": ("Batched LoRA, prefill", FLOOR),
    "generate": ("Generating adapters", FLOOR),
    "compiled": ("Generating adapters beside torch.compile", FLOOR),
    "linear": ("A linear with its adapters", [_time(BASE), X_BASE]),
    "model": ("A decode step of a whole model", [_time(BASE), X_BASE, *FLOOR]),
    "icl": ("The first question of a user, beside in-context learning", [_time(BASE), X_BASE, *IN_CONTEXT, *FLOOR]),
}
#: Group of rows -> what its table says below.
NOTES = {
    "icl": "One user, and the token counts that the paper's FLOPs imply: a question of 59 tokens, 299 with three examples, "
    "a description of 35.  Per request: text encoder, hypernetwork, and the question's prefill with the adapter.  Memory: "
    "keys and values of a user, and weights that are the user's own; text encoder and hypernetwork, 1 GB, serve all users.  "
    "Expected of an H100 before one had run this, from sizes alone: every prefill reads 14.2 GB of weights, 4.7 ms "
    "at 3 TB/s; 299 tokens are 4.2 TFLOP, 7 ms at 600 TFLOP/s.  So in-context learning should take 1.2 to 1.6 times as "
    "long as ours, far from the 4.9 times of its FLOPs: reading the weights dominates.  A decode step of 64 rows should "
    "gain a tenth at most."
}


# --- tables ----------------------------------------------------------------------------------------------------------


def group_table(result: dict[str, Any], group: str) -> str | None:
    """The rows of a group, or None where there are none."""
    found = [row for row in result.get("rows", []) if row["group"] == group]
    if not found:
        return None
    names = list(dict.fromkeys(name for row in found for name in row["baselines"]))
    forms = [_time(name) for name in names if name in (APART, EAGER, OPS, REFERENCE, ENCODER)]
    columns = [CASE, CACHE, *MINE, *forms, *GROUPS[group][1], *map(_beside, rivals(names)), *VERDICT, ERROR]
    columns = [c for c in columns if c is CASE or any(c[1](row) != GAP for row in found)]
    lines = grid([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in found])
    why = {
        f"{name}: {baseline['absent']}"
        for row in found
        for name, baseline in row["baselines"].items()
        if "absent" in baseline
    }
    notes = [NOTES[group]] if group in NOTES else []
    return "\n\n".join([lines, *notes, *([f"{GAP} {'; '.join(sorted(why))}."] if why else [])])


def bars(result: dict[str, Any]) -> str:
    """Every bar, met or not or not measured, and every loss."""
    judged = [row for row in result.get("rows", []) if row["bar"] or row["lost"]]
    columns = [CASE, CACHE, MINE[0], ("ratio", lambda row: number(row["ratio"])), *VERDICT]
    lines = [[cell(row) for _, cell in columns] for row in judged]
    known = {(row["group"], row["case"], row["cache"]) for row in judged if row["bar"]}
    missing = [bar for bar in result.get("expected", []) if (bar["group"], bar["case"], bar["cache"]) not in known]
    lines += [[bar["case"], bar["cache"], GAP, GAP, bar_text(bar), "not measured"] for bar in missing]
    return grid([title for title, _ in columns], lines) if lines else NOT_MEASURED


def energy(result: dict[str, Any]) -> str:
    """Power, clocks and joules."""
    heads = ("case", "counted", "us each", "mJ each", "W", "SM MHz", "memory MHz")
    keys = ("us_each", "mj_each", "watts", "sm_mhz", "memory_mhz")
    entries = result.get("energy", [])
    if not entries:
        return NOT_MEASURED
    return grid(heads, [[e["case"], _counted(e), *(number(e.get(key)) for key in keys)] for e in entries])


def _counted(entry: dict[str, Any]) -> str:
    unit, count = entry["unit"], entry["count"]
    return f"{count} {unit}{'' if count == 1 else 's'}" if unit else GAP


def question(result: dict[str, Any]) -> str | None:
    """What the first question of a user costs in both ways, in one line, or None where that was not measured."""
    rows = [row for row in result.get("rows", []) if row["case"] == first_question(PER_REQUEST)]
    timings = [(row["ours"], other) for row in rows if "median_us" in (other := row["baselines"].get(THREE_SHOT, {}))]
    if not timings:
        return None
    spent = {e["case"]: e["mj_each"] / 1e3 for e in result.get("energy", []) if e["unit"] == "question"}
    joules = [spent.get(first_question(way)) for way in (PER_REQUEST, THREE_SHOT)]
    ours, theirs = (timing["median_us"] for timing in timings[0])
    if None in joules:
        words, less = ["", ""], ""
    else:
        words, less = [f" and {number(j)} J" for j in joules], f", {number(joules[1] / joules[0])} x the energy"
    return (
        f"First question of a user, 7B-shaped model: {duration(ours)}{words[0]} with a description (text encoder, adapter, "
        f"prefill), {duration(theirs)}{words[1]} with three examples: {number(theirs / ours)} x the time{less}."
    )


def checks(result: dict[str, Any]) -> str:
    """What is no time: graphs, streams, the emulator."""
    entries = result.get("checks", [])
    if not entries:
        return NOT_MEASURED
    return grid(
        ("check", "passed", "detail"), [[e["check"], "yes" if e["passed"] else "**no**", e["detail"]] for e in entries]
    )


def steps(result: dict[str, Any]) -> str:
    """How every step of the run ended."""
    lines = [[s["name"], s["status"], f"{s['seconds']:.1f}", s.get("why", "")] for s in result["steps"]]
    return grid(("step", "status", "seconds", ""), lines)


def caption(result: dict[str, Any]) -> str:
    """Card, driver, versions, date and commit."""
    machine, versions = result.get("machine", {}), result.get("versions", {})
    card = machine.get("gpu") or "no GPU"
    parts = [card, *(f"{name} {version}" for name, version in versions.items() if version)]
    commit = "no commit" if result["commit"] is None else f"commit {result['commit']}"
    return f"{', '.join(parts)}; {result['date']}, {commit}{' with uncommitted changes' if result['dirty'] else ''}."


def committed(path: Path) -> dict[str, Any]:
    """The result of a card among the committed ones, or nothing where no card has run the suite yet."""
    if not path.exists():
        return {}
    result = load(path)
    if result["size"] != "full":
        raise ValueError(f"{path.name}: expected the result of a card, got one of size {result['size']!r}")
    return result


def summary(result: dict[str, Any]) -> str:
    """Bars and losses, and a first question, for the README."""
    if not result:
        return NOT_MEASURED
    return "\n\n".join(filter(None, [bars(result), question(result), f"{caption(result)}  {SOURCE}"]))


def everything(result: dict[str, Any]) -> str:
    """All of a result but its title, for docs/results.md."""
    return whole(result).partition("\n\n")[2].rstrip() + f"\n\n{SOURCE}" if result else NOT_MEASURED


def whole(result: dict[str, Any]) -> str:
    """All of a result as one document, a dry run's too."""
    dry = [] if result["size"] == "full" else [DRY]
    parts = ["# GPU suite", *dry, caption(result), LEGEND, "#### Steps", steps(result), "#### Bars and losses", bars(result)]
    for group, (title, _) in GROUPS.items():
        table = group_table(result, group)
        parts += [f"#### {title}", table] if table else []
    parts += ["#### Energy", energy(result), "#### Checks", checks(result)]
    for kind, title in (("failed", "Failed"), ("left_out", "Left out")):
        lines = [f"- {e['step']}: {e['case']}: {e.get('error') or e.get('why')}" for e in result.get(kind, [])]
        parts += [f"#### {title}", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(whole(load(Path(sys.argv[1]))))
