"""The tables of the study in README.md and docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.markdown import grid, provenance
from bench.study import plan
from t2l_engine.research.evaluation import bootstrap
from t2l_engine.research.evaluation.bootstrap import Interval

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
    "short-L": "L, 37 tasks (all that an adapter can learn), 600 steps of 16",
    "short-L-16": "16 tasks",
    "short-L-32": "32 tasks",
    "short-L-64": "64 tasks",
    "short-L-90": "90 tasks",
    "short-M": "variant M",
    "short-S": "variant S",
    "short-base-model": "encoder: the base model's last token",
    "short-random": "task encoder started at random",
    "short-quiet": "embedding noise 0.1 instead of 0.5",
    "short-chat": "prompts in the chat template",
    "t2l": "1,600 steps of 32 (the run compared above)",
    "short-one-hot": "one-hot: no text, so no noise, no mixing, random start",
    "short-input": "adapter from each input (Hyperdecoders): no mixing, random start",
    "reconstruction-64": "reconstruction of 64 adapters: no SFT, chat template, wider heads",
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
    return bootstrap.interval(paired) if paired else None


def share(part: Mapping[str, Any], arm: str, base: str) -> Interval | None:
    """Percent of the oracle's gain over ``base`` that ``arm`` has, of means over tasks; None where one was not measured."""
    ours, low, high = (column(part, name) for name in (arm, base, "oracle"))
    if not ours or not len(ours) == len(low) == len(high):
        return None
    gain = [100 * (a - b) for a, b in zip(ours, low, strict=True)]
    return bootstrap.ratio(gain, [a - b for a, b in zip(high, low, strict=True)])


def _mean(scores: Sequence[float]) -> str:
    """Their mean as tables print it; a dash where nothing was measured."""
    return f"{statistics.fmean(scores):.1f}" if scores else "–"


def span(found: Interval | None, form: str = "+.1f") -> str:
    return "" if found is None else f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


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
    """Means of every arm, T2L less it on siblings, containment and prompt tokens there."""
    groups = _groups(result)
    lines = []
    for arm, title in ARMS.items():
        cells = [column(part, arm, group) for part, group in groups.values()]
        if not any(cells):
            continue
        part = result["unseen"]
        about = part["arms"][arm]["groups"]["sibling"]
        lines.append(
            [
                title,
                *map(_mean, cells),
                "" if arm == "t2l" else span(gap(part, "t2l", arm, "sibling")),
                f"{about['containment']:.1f}",
                f"{about['prompt_tokens']:.0f}",
                part["arms"][arm]["form"],
            ]
        )
    heads = [
        "arm, exact match in %", *groups, "T2L less the arm, siblings [95 %]", "containment, siblings",
        "prompt tokens, siblings", "form",
    ]  # fmt: skip
    return grid(heads, lines) + "\n\n" + _caption(result)


def _caption(result: Mapping[str, Any]) -> str:
    items = [sorted(set(result[part]["items"].values())) for part in ("seen", "unseen")]
    return (
        f"Means over tasks of exact match on held-out inputs ({items[0][-1]} a seen task, {items[1][-1]} an unseen one) and "
        "three descriptions a task that were written apart from those trained on; greedy, at most 16 tokens, base model in "
        "bfloat16.  Containment: the answer stands somewhere in the text.  Brackets: 95 % bootstrap over tasks of paired "
        "differences.  Arms without adapter take the prompt form, raw or chat, that is better on validation examples.  "
        f"Another task is one of the column's own for seen tasks, one of all unseen ones for the others.  {_made(result)}"
    )


def _made(result: Mapping[str, Any]) -> str:
    threads = [result["machine"]["threads"]]
    return f"{provenance(result, threads)}.  From `bench/results/{FILE}` (`{result['command']}`)."


def short(result: Mapping[str, Any]) -> str:
    """The shorter runs beside the first of them."""
    parts, lines = result["varied"], []
    if not parts:
        return NOT_YET
    first, siblings = "short-L", parts["sibling"]
    for arm, title in SHORT.items():
        own = _trained_on(arm, parts["train"])
        seen, unseen, shuffled = column(own, arm), column(siblings, arm), column(siblings, f"{arm}-shuffled")
        if seen or unseen:
            less = ["", ""] if arm == first else [span(gap(part, arm, first)) for part in (own, siblings)]
            lines.append(
                [
                    title, f"{_mean(seen)} ({len(seen)})" if seen else _mean(seen), less[0], _mean(unseen), less[1],
                    _mean(shuffled), f"{result['runs'][arm]['seconds'] / 60:.0f}",
                ]
            )  # fmt: skip
    heads = [
        "exact match, %", f"seen by the run (of {len(parts['train']['groups']['all'])})",
        "less the first row, same tasks [95 %]",
        f"siblings ({len(siblings['groups']['all'])})", "less the first row [95 %]", "another sibling's description",
        "minutes",
    ]  # fmt: skip
    return grid(heads, lines)


def lengths(result: Mapping[str, Any]) -> str:
    """T2L beside its rival after parts of their training."""
    rival, lines = "multi-task-description", []
    for ours, theirs in plan.LENGTHS:
        part = result["lengths"].get(ours) if ours != "t2l" else result["unseen"]
        if part is None or rival not in part["arms"]:
            continue
        about = [result["runs"][name] for name in (ours, theirs)]
        lines.append(
            [
                " / ".join(f"{of['tokens'] / 1e6:.2f}" for of in about),
                " / ".join(f"{of['curve'][-1][1]:.2f}" for of in about),
                *(_mean(column(part, arm, "sibling")) for arm in ("t2l", rival)),
                span(gap(part, "t2l", rival, "sibling")),
            ]
        )
    heads = [
        "million tokens of training, T2L / rival", "last training loss", "T2L, siblings, %",
        f"{_plain(rival)}, siblings, %", "T2L less the rival [95 %]",
    ]  # fmt: skip
    return grid(heads, lines)


def _trained_on(run: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """``part`` of tasks of LEARNABLE with those alone that ``run`` was trained on."""
    names = set(plan.chosen(plan.LEARNABLE, plan.RUNS[run].count))
    return {"tasks": part["tasks"], "groups": {"all": [name for name in part["groups"]["all"] if name in names]}}


def claims(result: Mapping[str, Any]) -> str:
    """The bars, fixed before the runs, and what came out."""
    unseen, seen = result["unseen"], result["seen"]
    lines: list[list[str]] = []

    def claim(title: str, bar: str, found: Interval | None, met: Callable[[Interval], bool] | None, unit: str = "") -> None:
        """One row; none for what was not measured."""
        if found is not None:
            text = f"{found.mean:.1f} % [{found.low:.1f}, {found.high:.1f}]" if unit else span(found)
            verdict = "" if met is None else "met" if met(found) else "**missed**"
            lines.append([title, bar, text, verdict])

    kept = result["reconstruction"].get("16/train")
    if kept:
        title = "reconstruction of 16 adapters: oracle gain kept"
        claim(title, ">= 90 %", share(kept, "t2l", "base"), lambda f: f.mean >= 90, "%")
    for ours, seed in (("t2l", ""), ("t2l-seed1", ", another seed")):
        for base in ("base", "icl"):
            title = f"seen tasks with headroom: share of the oracle's gain over {_plain(base)}{seed}"
            claim(title, ">= 80 %", share(seen, ours, base), lambda f: f.mean >= 80, "%")
    for ours, seed in (("t2l", ""), ("t2l-seed1", ", another seed")):
        less = lambda theirs, ours=ours: gap(unseen, ours, theirs, "sibling")  # noqa: E731
        claim(
            f"siblings: matched less shuffled{seed}", ">= 20", less(f"{ours}-shuffled"), lambda f: f.mean >= 20 and f.low > 0
        )
        for theirs in ("base-description", "icl"):
            claim(f"siblings: T2L less {_plain(theirs)}{seed}", "> 0, interval too", less(theirs), lambda f: f.low > 0)
        rival = "multi-task-description"
        claim(f"siblings: T2L less {_plain(rival)}{seed}", ">= -3", less(rival), lambda f: f.mean >= -3)
    both = gap(unseen, "t2l-description", "multi-task-description", "sibling")
    claim("siblings: T2L less multi-task LoRA, the description in both prompts", ">= 0", both, lambda f: f.mean >= 0)
    for theirs in ("base-description", "icl", "t2l-shuffled"):
        claim(f"unseen skills: T2L less {_plain(theirs)}", "reported", gap(unseen, "t2l", theirs, "novel"), None)
    return grid(["claim", "bar", "measured [95 %]", ""], lines)


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
                *(_mean(column(trained, arm)) for arm in ("base", "oracle")),
                span(kept[0], ".1f"),
                *(f"{kept[i].mean:.1f}" for i in (2, 1)),
                f"{run['validation'][-1]:.3f}",
                f"{of['relative_error']:.3f}",
                f"{2 * of['parameters'] / 1e6:.1f} / {2 * of['library_values'] / 1e6:.1f}",
                f"{run['seconds'] / 60:.0f}",
            ]
        )
    if not lines:
        return NOT_YET
    heads = [
        "adapters", "base, %", "oracle, %", "gain kept, %: descriptions learned [95 %]", "held-out descriptions",
        "another task's description", "L1 of z-scores", "relative error of B A", "MB in bf16: network / library", "minutes",
    ]  # fmt: skip
    return grid(heads, lines)


def steered(result: Mapping[str, Any]) -> str:
    """One input under several descriptions."""
    lines = [[f"`{row['input']}`", row["description"], f"`{row['answer']}`"] for row in result["steered"]]
    return grid(["input", "description", "answer"], lines)


def wordings(result: Mapping[str, Any]) -> str:
    """How far descriptions alone tell the tasks apart, and what learned descriptions score instead of held-out ones."""
    of = result["wordings"]
    heads = {"embeddings": "embeddings", "random": "random task encoder", "discriminant": "`task_init: discriminant`"}
    cells = ["nearest to the right task", *(f"{of[name]:.1f}" for name in heads)]
    told = grid(["held-out descriptions of 37 tasks, %", *heads.values()], [cells])
    told += f"\n\nOf the variance of learned descriptions' embeddings {of['within']:.1f} % is between those of one task."
    held, learned = (column(result[part], "t2l") for part in ("seen", "learned"))
    more = bootstrap.interval([a - b for a, b in zip(learned, held, strict=True)])
    heads = ["T2L on seen tasks, exact match in %", "held-out descriptions", "learned descriptions", "more [95 %]"]
    line = [f"the same inputs of {len(held)} tasks", _mean(held), _mean(learned), span(more)]
    return told + "\n\n" + grid(heads, [line])


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
    shown = ("t2l", "t2l-shuffled", "multi-task", "multi-task-description", "base", "base-description", "icl")
    lines = [
        [
            name,
            str(of["items"][name]),
            f"{of['majority'][name]:.1f}" if name in of["majority"] else "–",
            *(f"{row[arm]:.1f}" if arm in row else "–" for arm in shown),
        ]
        for name, row in of["tasks"].items()
    ]
    most = max(of["items"].values())
    text = f"A standard error of a score near 50 % of {most} items is {50 / most**0.5:.1f} points."
    return grid(["benchmark, %", "items", "majority position", *(_plain(arm) for arm in shown)], lines) + "\n\n" + text


def requests(result: Mapping[str, Any]) -> str:
    """Prompt tokens and time of one request."""
    about = result["requests"]
    of = about["arms"]
    base = of["t2l"]["seconds"]
    lines = [
        [_plain(arm), f"{row['prompt_tokens']:.0f}", f"{1e3 * row['seconds']:.0f}", f"{row['seconds'] / base:.2f}"]
        for arm, row in of.items()
    ]
    text = (
        f"{about['requests']} requests over the siblings, the first description of each task: the median over requests of "
        f"the fastest of {about['rounds']} rounds, in which the ways take turns.  {_made(result)}"
    )
    heads = [f"one request, {about['new_tokens']} tokens generated", "prompt tokens", "ms", "over T2L"]
    return grid(heads, lines) + "\n\n" + text


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
            lines.append([ARMS[arm], *map(_mean, cells), f"{tokens:.0f}"])
    found = gap(result["unseen"], "t2l", "t2l-shuffled", "sibling")
    text = (
        f"Exact match in percent, means over tasks; on unseen siblings the right description is worth {span(found)} points "
        "over another task's (95 % bootstrap over tasks).  All arms, controls and misses: "
        f"[docs/results.md](docs/results.md#the-study).  From `bench/results/{FILE}`."
    )
    return grid(["arm", *groups, "prompt tokens"], lines) + "\n\n" + text


def card(result: Mapping[str, Any]) -> str:
    """What the bundled file itself scores beside the rivals, for its model card."""
    beside = ("multi-task", "multi-task-description", "icl", "oracle")
    lines = []
    for part, group, title in (
        ("seen", "all", f"trained tasks, {{}} of the {len(plan.LEARNABLE)}, unseen inputs and descriptions"),
        ("unseen", "sibling", "unseen siblings of trained tasks, {}"),
        ("unseen", "novel", "tasks of other skills, {}"),
    ):
        ours = [column(result["shipped"][part], arm, group) for arm in ("t2l", "t2l-shuffled")]
        theirs = [column(result[part], arm, group) for arm in beside]
        lines.append([title.format(len(ours[0])), *map(_mean, (*ours, *theirs))])
    heads = ["exact match, %", "this checkpoint", "the same, another task's description", *(_plain(arm) for arm in beside)]
    return grid(heads, lines)
