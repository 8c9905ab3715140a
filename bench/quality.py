"""The quality tables: exact match per task, from the file that ``t2l evaluate --json`` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable

FILE = "smollm2-135m-quality.json"
ARMS = {
    "t2l": "T2L, input only",
    "t2l-shuffled": "T2L, another task's description",
    "base-raw": "base, description in prompt (raw)",
    "base-raw-3shot": "base, description + 3 examples",
    "base-chat": "base, description in chat",
}


def _groups(result: dict) -> tuple[list[str], dict[bool, list[str]]]:
    """The arms of the result, and task names by whether they were trained on, best gain over the zero-shot base first."""
    scores, trained = result["tasks"], set(result["trained_tasks"])
    by_gain = sorted(scores, key=lambda n: scores[n]["base-raw"] - scores[n]["t2l"])
    return [a for a in ARMS if a in result["mean"]], {
        seen: [n for n in by_gain if (n in trained) == seen] for seen in (True, False)
    }


def _line(name: str, scores: dict, arms: list[str]) -> str:
    return f"| {name} | " + " | ".join(f"{scores[a]:.1f}" for a in arms) + " |"


def _mean_line(result: dict, names: list[str], seen: bool, arms: list[str]) -> str:
    title = "trained tasks" if seen else "tasks never trained on, siblings of trained skills"
    mean = {a: statistics.fmean(result["tasks"][n][a] for n in names) for a in arms}
    return _line(f"**mean of {len(names)} {title}**", mean, arms)


def _table(result: dict, pick: Callable[[dict, list[str]], list[str]]) -> str:
    arms, groups = _groups(result)
    rows = ["| task | " + " | ".join(ARMS[a] for a in arms) + " |", "|---|" + "---:|" * len(arms)]
    for seen, names in groups.items():
        rows.append(_mean_line(result, names, seen, arms))
        rows += [_line(n, result["tasks"][n], arms) for n in pick(result["tasks"], names)]
    return "\n".join(rows) + "\n\n" + _caption(result, groups[True])


def _caption(result: dict, trained: list[str]) -> str:
    scores = result["tasks"]
    gained = sum(scores[n]["t2l"] - scores[n]["base-raw"] >= 20 for n in trained)
    lost = sum(scores[n]["t2l"] < scores[n]["base-raw-3shot"] for n in scores)
    items = sorted(set(result["items"].values()))
    return (
        f"Exact match in percent on {items[0]} to {items[-1]} held-out items a task, one unseen description each, greedy, "
        f"scaling {result['scaling']:g}, base model in {result['dtype']}; a standard error is up to 7 points.  "
        f"T2L gains 20 points or more over the base model's zero-shot prompt on {gained} of {len(trained)} trained tasks "
        f"and is below the three-example prompt on {lost} of all {len(scores)}.  From `bench/results/{FILE}`."
    )


def whole(result: dict) -> str:
    """Both groups whole."""
    return _table(result, lambda scores, names: names)


def summary(result: dict) -> str:
    """The two means, and of each group the three best gains and the three worst losses against three examples."""

    def pick(scores: dict, names: list[str]) -> list[str]:
        worst = sorted(names, key=lambda n: scores[n]["t2l"] - scores[n]["base-raw-3shot"])[:3]
        return names[:3] + [n for n in reversed(worst) if n not in names[:3]]

    return _table(result, pick)
