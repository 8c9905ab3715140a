"""The tables of the study in README.md and docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.markdown import grid
from t2l_engine.evaluation.bootstrap import Interval, interval

FILE = "study.json"
#: Arm -> what it is called; the order of the tables.
ARMS = {
    "t2l": "**T2L, input only**",
    "t2l-seed1": "T2L, another seed",
    "t2l-description": "T2L, description in the prompt too",
    "t2l-shuffled": "control: another task's description",
    "t2l-seed1-shuffled": "the same, another seed",
    "t2l-description-shuffled": "the same, description in the prompt too",
    "t2l-junk": "control: random letters",
    "t2l-constant": 'control: "Answer the question."',
    "multi-task": "multi-task LoRA, input only",
    "multi-task-description": "multi-task LoRA, description in the prompt",
    "average": "average of the library",
    "arrow": "Arrow routing over the library",
    "base": "base model, input only",
    "base-description": "base model, description in the prompt",
    "icl": "base model, description and 3 examples",
    "oracle": "a LoRA for the task (oracle)",
}
SHORT = {
    "short-L-16": "L, 16 tasks",
    "short-L-32": "L, 32 tasks",
    "short-L": "L, 37 tasks (all that an adapter can learn)",
    "short-L-64": "L, 64 tasks",
    "short-L-90": "L, 90 tasks",
    "short-M": "M, 37 tasks",
    "short-S": "S, 37 tasks",
    "short-base-model": "L, 37 tasks, encoder: the base model's last token",
    "short-random": "L, 37 tasks, task encoder started at random",
    "short-quiet": "L, 37 tasks, embedding noise 0.1 instead of 0.5",
    "short-chat": "L, 37 tasks, prompts in the chat template",
    "short-one-hot": "L, 37 tasks, one-hot (no text)",
    "reconstruction-64": "L, reconstruction of 64 adapters, no SFT",
    "short-input": "L, 37 tasks, adapter from each input (Hyperdecoders)",
}
Scores = Mapping[str, Mapping[str, float]]
NOT_YET = "Not yet measured."


def column(part: Mapping[str, Any], arm: str, group: str = "all") -> list[float]:
    """Scores of ``arm`` on the tasks of ``group`` that it answered."""
    return [part["tasks"][name][arm] for name in part["groups"][group] if arm in part["tasks"][name]]


def gap(part: Mapping[str, Any], ours: str, theirs: str, group: str = "all") -> Interval | None:
    """``ours`` less ``theirs`` on the tasks of ``group``, in points; None where one of them was not measured."""
    rows = [part["tasks"][name] for name in part["groups"][group]]
    paired = [row[ours] - row[theirs] for row in rows if ours in row and theirs in row]
    return interval(paired) if paired else None


def share(part: Mapping[str, Any], arm: str, base: str, oracle: str = "oracle", group: str = "all") -> float | None:
    """Percent of the oracle's gain over ``base`` that ``arm`` has, of means over tasks."""
    values = [column(part, name, group) for name in (arm, base, oracle)]
    if not all(values) or len({len(v) for v in values}) > 1:
        return None
    ours, low, high = map(statistics.fmean, values)
    return 100 * (ours - low) / (high - low)


def span(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _groups(result: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Heads of columns -> part of the result and group of tasks."""
    seen, unseen = result["seen"], result["unseen"]
    count = lambda part, group: len(part["groups"][group])  # noqa: E731
    return {
        f"seen, with headroom ({count(seen, 'all')})": (seen, "all"),
        f"unseen siblings ({count(unseen, 'sibling')})": (unseen, "sibling"),
        f"unseen skills ({count(unseen, 'novel')})": (unseen, "novel"),
    }


def arms(result: Mapping[str, Any]) -> str:
    """Means of every arm, T2L less it on siblings, prompt tokens."""
    groups = _groups(result)
    lines = []
    for arm, title in ARMS.items():
        cells = [column(part, arm, group) for part, group in groups.values()]
        if not any(cells):
            continue
        part = result["unseen"]
        tokens = part["arms"][arm]["groups"].get("sibling", {}).get("prompt_tokens") if arm in part["arms"] else None
        lines.append(
            [
                title,
                *(f"{statistics.fmean(c):.1f}" if c else "–" for c in cells),
                "" if arm == "t2l" else span(gap(part, "t2l", arm, "sibling")),
                f"{tokens:.0f}" if tokens else "–",
                part["arms"][arm]["form"] if arm in part["arms"] else "–",
            ]
        )
    heads = ["arm, exact match in %", *groups, "T2L less the arm, siblings [95 %]", "prompt tokens, siblings", "form"]
    return grid(heads, lines) + "\n\n" + _caption(result)


def _caption(result: Mapping[str, Any]) -> str:
    items = [sorted(set(result[part]["items"].values())) for part in ("seen", "unseen")]
    return (
        f"Means over tasks of exact match on held-out inputs ({items[0][-1]} a seen task, {items[1][-1]} an unseen one) and "
        "three descriptions a task that were written apart from those trained on; greedy, at most 16 tokens, base model in "
        "bfloat16.  Brackets: 95 % bootstrap over tasks of paired differences.  Arms without adapter take the prompt form, "
        f"raw or chat, that is better on validation examples.  From `bench/results/{FILE}`; `{result['command']}`."
    )


def short(result: Mapping[str, Any]) -> str:
    """The shorter runs, which vary one thing each."""
    parts, lines = result["varied"], []
    if not parts:
        return NOT_YET
    siblings = parts["sibling"]
    for arm, title in SHORT.items():
        columns = (column(parts["train"], arm), column(siblings, arm), column(siblings, f"{arm}-shuffled"))
        if any(columns):
            less = span(gap(siblings, "short-L", arm)) if arm != "short-L" else ""
            cells = [f"{statistics.fmean(c):.1f}" if c else "–" for c in columns]
            lines.append([title, *cells, less, f"{result['runs'][arm]['seconds'] / 60:.0f}"])
    seen, unseen = (len(parts[group]["groups"]["all"]) for group in ("train", "sibling"))
    heads = [
        "exact match, %", f"seen ({seen})", f"siblings ({unseen})", "siblings, another task's description",
        "37 tasks, L less this run, siblings [95 %]", "minutes",
    ]  # fmt: skip
    return grid(heads, lines)


def claims(result: Mapping[str, Any]) -> str:
    """The bars, fixed before the runs, and what came out."""
    unseen, seen = result["unseen"], result["seen"]
    rows: list[tuple[str, str, str | None, bool | None]] = []
    kept = result["reconstruction"].get("16/train")
    if kept:
        value = share(kept, "t2l", "base")
        rows.append(("reconstruction of 16 adapters: oracle gain kept", ">= 90 %", f"{value:.1f} %", value >= 90))
    for base in ("base", "icl"):
        value = share(seen, "t2l", base)
        title = f"seen tasks with headroom: share of the oracle's gain over {_plain(base)}"
        rows.append((title, ">= 80 %", f"{value:.1f} %", value >= 80))
    for ours in ("t2l", "t2l-seed1"):
        seed = "" if ours == "t2l" else ", another seed"
        if ours not in unseen["arms"]:
            continue
        found = gap(unseen, ours, f"{ours}-shuffled", "sibling")
        rows.append((f"siblings: matched less shuffled{seed}", ">= 20", span(found), found.mean >= 20 and found.low > 0))
        for theirs in ("base-description", "icl"):
            found = gap(unseen, ours, theirs, "sibling")
            rows.append((f"siblings: T2L less {_plain(theirs)}{seed}", "> 0, interval too", span(found), found.low > 0))
        found = gap(unseen, ours, "multi-task-description", "sibling")
        if found:
            rows.append(
                (f"siblings: T2L less {_plain('multi-task-description')}{seed}", ">= -3", span(found), found.mean >= -3)
            )
    found = gap(unseen, "t2l-description", "multi-task-description", "sibling")
    if found:
        rows.append(("siblings: both with the description in the prompt", ">= 0", span(found), found.mean >= 0))
    for theirs in ("base-description", "icl", "t2l-shuffled"):
        rows.append(
            (f"unseen skills: T2L less {_plain(theirs)}", "reported", span(gap(unseen, "t2l", theirs, "novel")), None)
        )
    verdict = {True: "met", False: "**missed**", None: ""}
    return grid(["claim", "bar", "measured", ""], [[c, bar, text or "", verdict[met]] for c, bar, text, met in rows])


def _plain(arm: str) -> str:
    return ARMS[arm].replace("*", "").removeprefix("control: ")


def per_task(part_name: str, shown: Sequence[str]) -> Callable[[Mapping[str, Any]], str]:
    """A table of every task of a part, some arms beside each other."""

    def table(result: Mapping[str, Any]) -> str:
        part = result[part_name]
        there = [arm for arm in shown if arm in part["arms"]]
        tiers = [g for g in ("train", "sibling", "novel") if g in part["groups"]]
        lines = []
        for tier in tiers:
            for name in sorted(part["groups"][tier]):
                row = part["tasks"][name]
                lines.append([f"`{name}`", tier, *(f"{row[arm]:.1f}" if arm in row else "–" for arm in there)])
        return grid(["exact match, %", "tier", *(_plain(arm) for arm in there)], lines)

    return table


_BESIDE = ("t2l", "t2l-shuffled", "multi-task", "multi-task-description", "icl", "oracle")
seen_tasks, unseen_tasks = per_task("seen", _BESIDE), per_task("unseen", _BESIDE)


def reconstruction(result: Mapping[str, Any]) -> str:
    """Share of the gain kept, errors and bytes by number of adapters."""
    lines = []
    for count, of in result["distances"].items():
        trained, fresh = (result["reconstruction"][f"{count}/{tasks}"] for tasks in ("train", "evaluation"))
        kept = [share(part, arm, "base") for part in (trained, fresh) for arm in ("t2l", "t2l-shuffled")]
        run = result["runs"][f"reconstruction-{count}"]
        lines.append(
            [
                count,
                f"{statistics.fmean(column(trained, 'base')):.1f}",
                f"{statistics.fmean(column(trained, 'oracle')):.1f}",
                *(f"{value:.1f}" for value in (kept[0], kept[2], kept[1])),
                f"{run['validation'][-1]:.3f}",
                f"{of['relative_error']:.3f}",
                f"{2 * of['parameters'] / 1e6:.1f} / {2 * of['library_values'] / 1e6:.1f}",
                f"{run['seconds'] / 60:.0f}",
            ]
        )
    if not lines:
        return NOT_YET
    heads = [
        "adapters", "base, %", "oracle, %", "gain kept, %: descriptions learned", "held-out descriptions",
        "another task's description", "L1 of z-scores", "relative error of B A", "MB in bf16: network / library", "minutes",
    ]  # fmt: skip
    return grid(heads, lines)


def steered(result: Mapping[str, Any]) -> str:
    """One input under several descriptions."""
    lines = [[f"`{row['input']}`", row["description"], f"`{row['answer']}`"] for row in result["steered"]]
    return grid(["input", "description", "answer"], lines)


def wordings(result: Mapping[str, Any]) -> str:
    """How far descriptions alone tell the tasks apart."""
    of = result["wordings"]
    heads = {"embeddings": "embeddings", "random": "random task encoder", "discriminant": "`task_init: discriminant`"}
    cells = ["nearest to the right task", *(f"{of[name]:.1f}" for name in heads)]
    return grid(["held-out descriptions of 37 tasks, %", *heads.values()], [cells])


def scalings(result: Mapping[str, Any]) -> str:
    """Matched and shuffled at other scalings."""
    of = result["scalings"]
    lines = [
        [title, *(f"{of[s][arm]:.1f}" for s in of)]
        for arm, title in (("t2l", "matched"), ("t2l-shuffled", "another task's description"))
    ]
    return grid(["siblings, exact match in %, at scaling", *(f"{float(s):g}" for s in of)], lines)


def benchmarks(result: Mapping[str, Any]) -> str:
    """The paper's ten benchmarks."""
    of = result["benchmarks"]
    if not of:
        return NOT_YET
    shown = ("t2l", "t2l-shuffled", "multi-task", "base", "base-description", "icl")
    lines = [
        [
            name,
            str(of["items"][name]),
            f"{of['majority'][name]:.1f}" if name in of["majority"] else "–",
            *(f"{row[arm]:.1f}" if arm in row else "–" for arm in shown),
        ]
        for name, row in of["tasks"].items()
    ]
    return grid(["benchmark, %", "items", "majority position", *(_plain(arm) for arm in shown)], lines)


def requests(result: Mapping[str, Any]) -> str:
    """Prompt tokens and time of one request."""
    of = result["requests"]
    base = of["t2l"]["seconds"]
    lines = [
        [_plain(arm), f"{row['prompt_tokens']:.0f}", f"{1e3 * row['seconds']:.0f}", f"{row['seconds'] / base:.2f}"]
        for arm, row in of.items()
    ]
    return grid(["one request, 16 tokens generated", "prompt tokens", "ms", "over T2L"], lines)


def runs(result: Mapping[str, Any]) -> str:
    """Steps, tokens and time of what was trained."""
    lines = []
    for name, run in result["runs"].items():
        s = run["settings"]
        size = str(run["tasks"] or "all")
        rows = s["tasks_per_batch"] * s.get("samples_per_task", 1) * s["accumulation"]
        tokens = f"{run['tokens'] / 1e6:.2f}" if run["tokens"] else "–"
        lines.append([f"`{name}`", size, f"{run['steps']:,}", str(rows), tokens, f"{run['seconds'] / 60:.0f}"])
    return grid(["run", "tasks", "steps", "examples a step", "million tokens", "minutes"], lines)


def summary(result: Mapping[str, Any]) -> str:
    """The few rows of README.md."""
    names = ("t2l", "t2l-shuffled", "multi-task", "multi-task-description", "base-description", "icl", "oracle")
    groups = _groups(result)
    lines = []
    for arm in names:
        cells = [column(part, arm, group) for part, group in groups.values()]
        if any(cells):
            tokens = result["unseen"]["arms"][arm]["groups"]["sibling"]["prompt_tokens"]
            lines.append([ARMS[arm], *(f"{statistics.fmean(c):.1f}" if c else "–" for c in cells), f"{tokens:.0f}"])
    found = gap(result["unseen"], "t2l", "t2l-shuffled", "sibling")
    text = (
        f"Exact match in percent, means over tasks; on unseen siblings the right description is worth {span(found)} points "
        "over another task's (95 % bootstrap over tasks).  All arms, controls and misses: "
        f"[docs/results.md](docs/results.md#the-study).  From `bench/results/{FILE}`."
    )
    return grid(["arm", *groups, "prompt tokens"], lines) + "\n\n" + text
