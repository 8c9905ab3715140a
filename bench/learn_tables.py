"""The tables of ``python -m bench learn``: adapters of eight tasks, what reconstruction keeps, and the time of a library."""

from __future__ import annotations

from typing import Any

from bench.markdown import grid, provenance

FILE = "learn.json"


def _line(name: str, of: dict[str, Any], kept: dict[str, float] | None, more: list[str]) -> list[str]:
    shares = ["", ""] if kept is None else [f"{kept['exact_match']:.1f} %", f"{kept['loss']:.1f} %"]
    return [name, f"{of['exact_match']:.1f}", shares[0], f"{of['loss']:.3f}", shares[1], *more]


def whole(result: dict[str, Any]) -> str:
    """Scores, shares kept, distances and sizes; below it every task."""
    oracle = result["oracle"]
    heads = [
        "", "exact match, %", "of the gain", "loss", "of the gain", "L1", "relative error of B A", "values", "training, s",
    ]  # fmt: skip
    lines = [_line("base model, input only", result["base"], None, [""] * 4)]
    lines.append(_line("an adapter a task", oracle, None, ["", "", f"{oracle['values']:,}", f"{oracle['seconds']:.0f}"]))
    for target, of in result["reconstruction"].items():
        more = [f"{of['l1']:.3g}", f"{of['relative_error']:.3f}", f"{of['parameters']:,}", f"{of['seconds']:.0f}"]
        lines.append(_line(f"reconstruction, {target}", of, of["kept"], more))
    forms = list(result["reconstruction"])
    tasks = [
        [
            f"`{name}`",
            *(f"{of['tasks'][name]['exact_match']:.1f}" for of in (result["base"], oracle)),
            *(f"{result['reconstruction'][form]['tasks'][name]['exact_match']:.1f}" for form in forms),
        ]
        for name in oracle["tasks"]
    ]
    return "\n\n".join(
        [
            grid(heads, lines),
            grid(["exact match, %", "base", "an adapter a task", *forms], tasks),
            _time(result),
            _caption(result),
        ]
    )


def summary(result: dict[str, Any]) -> str:
    """Shares kept and the time of a library, in sentences."""
    oracle, base = result["oracle"], result["base"]
    kept = [
        f"{form} {of['kept']['exact_match']:.1f} % (of the gain in loss {of['kept']['loss']:.1f} %)"
        for form, of in result["reconstruction"].items()
    ]
    first = (
        f"Adapters for {oracle['adapters']} tasks made by code take SmolLM2-135M from {base['exact_match']:.1f} to "
        f"{oracle['exact_match']:.1f} % exact match on inputs not trained on.  A hypernetwork trained to reproduce them "
        f"from their descriptions keeps of that gain: {', '.join(kept)}.  {_time(result)}"
    )
    return f"{first}  From `bench/results/{FILE}`."


def _time(result: dict[str, Any]) -> str:
    found = result.get("library")
    if found is None:
        return "A larger library was not measured."
    samples = found["settings"]["samples_per_task"]
    return (
        f"A library of {found['adapters']} adapters ({found['steps_each']} steps of {samples} examples each, "
        f"{found['settings']['tasks_per_batch']} tasks in a batch) took {found['seconds'] / 60:.0f} minutes of steps, "
        f"{found['tokens'] / found['seconds']:.0f} tokens/s."
    )


def _caption(result: dict[str, Any]) -> str:
    return (
        f"Base model in bfloat16, greedy answers, test examples of the tasks, the description each adapter learned.  "
        f"{provenance(result, [result['machine']['threads']])}.  `{result['command']}`."
    )
