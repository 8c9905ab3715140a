"""Tables of what is counted: costs by model and lengths, phases, memory, the paper's table, token statistics, terms.

A table function takes results and returns the text between its markers.
"""

from __future__ import annotations

import itertools
from typing import Any

from bench.icl import words
from bench.icl.words import LABELS, MEAN, PAPER, Entry, amount, entries, entry, ratio, tflop, when
from bench.markdown import GAP, grid, number
from bench.rows import Result
from t2l_engine.research import costs as flops

# --- costs -----------------------------------------------------------------------------------------------------------


def costs(result: Result) -> str:
    """A table a model: every benchmark, and when an adapter costs less."""
    heads = [
        *("lengths", "question", "examples", "answer", "description"),
        *("first question, ICL, TFLOP", "T2L, TFLOP", "to the first token, ICL / T2L", "in all, ICL / T2L"),
        "later question, warm cache, ICL / T2L",
        *("T2L per task beats a cold cache", "a warm cache", "T2L per request beats a cold cache", "a warm cache"),
        "examples to beat a warm cache at once",
    ]
    parts = []
    for model in words.models(result):
        lines = [_cost(found) for found in entries(result, "costs") if found["model"] == model]
        parts += [f"**{words.title(model)}**", grid(heads, lines)]
    return "\n\n".join([*parts, words.counted(result)])


def _cost(found: Entry) -> list[str]:
    lengths, ways, beats = found["lengths"], found["ways"], found["questions_won"]
    icl, ours, fewest = ways["icl"], ways["t2l-task"], found["shots_to_win"]["t2l-task"]["icl-warm"]
    shots = f"{lengths['shots']} x {lengths['shot']}" if lengths["shot"] else "none"
    return [
        words.lengths_of(found["workload"]),
        str(lengths["question"]),
        shots,
        *(str(lengths[name]) for name in ("answer", "description")),
        *(tflop(way["first_token"]) for way in (icl, ours)),
        *(ratio(icl[part] / ours[part]) for part in ("first_token", "first")),
        ratio(ways["icl-warm"]["later"] / ours["later"]),
        *(when(beats[way][rival]) for way in ("t2l-task", "t2l-request") for rival in ("icl-cold", "icl-warm")),
        GAP if fewest is None else str(fewest),
    ]


def phases(result: Result) -> str:
    """The first question of a task on Mistral-7B at the paper's lengths, phase by phase."""
    ways = entry(result, "costs", model="mistral-7b", workload=PAPER)["ways"]
    named = words.phases_of(ways)
    lines = []
    for name, way in ways.items():
        parts = [way["phases"].get(phase) for phase in named]
        sums = {unit: sum(phase[unit] for phase in way["phases"].values()) for unit in ("flops", "bytes")}
        lines.append([LABELS[name], flops.WAYS[name], *map(_phase, parts), _phase(sums)])
    heads = ["way", "what it is", *(f"{phase}, GFLOP (GB)" for phase in named), "sum, GFLOP (GB)"]
    return grid(heads, lines) + "\n\n" + words.counted(result)


def _phase(phase: Entry | None) -> str:
    return GAP if phase is None else f"{number(phase['flops'] / 1e9)} ({number(phase['bytes'] / 1e9)})"


def memory(result: Result) -> str:
    """Bytes beside the language model's weights."""
    heads = [
        *("model", "lengths", "ICL, no cache: a user", "ICL, cached: a user", "a task", "T2L per task: a user", "a task"),
        *("T2L merged: a task", "T2L, once", "an adapter is smaller than keys and values from, tokens"),
        *("T2L per task holds less from, tasks at a time", "a decode step reads: ICL", "T2L per task", "T2L merged"),
    ]
    lines = []
    for model, name in itertools.product(words.models(result), (PAPER, MEAN)):
        found = entry(result, "costs", model=model, workload=name)
        ways, least = found["ways"], found["tasks_to_win"]["t2l-task"]["icl-warm"]
        held = [
            ("icl", "per_user"),
            *itertools.product(("icl-warm", "t2l-task"), ("per_user", "per_task")),
            *(("t2l-merged", "per_task"), ("t2l-task", "fixed")),
        ]
        lines.append(
            [
                words.title(model),
                words.lengths_of(name),
                *(amount(ways[way][what], "B") for way, what in held),
                f"{found['adapter_tokens']:,}",
                "never" if least is None else str(least),
                *(amount(ways[way]["step_bytes"], "B") for way in ("icl", "t2l-task", "t2l-merged")),
            ]
        )
    return grid(heads, lines) + "\n\n" + words.counted(result)


# --- the paper's table -----------------------------------------------------------------------------------------------


def paper(result: Result) -> str:
    """Each printed cell beside the closed form, what the hypernetwork's may have left out, and the lengths it implies."""
    heads = [
        *("cell", "printed, TFLOP", "tokens it implies", "counted at", "counted, TFLOP", "off"),
        *("its rounding allows", "within its rounding"),
    ]
    lines = [
        [
            cell["cell"],
            f"{cell['printed_tflop']:f}".rstrip("0"),
            GAP if cell["implied_tokens"] is None else f"{cell['implied_tokens']:.2f}",
            GAP if cell["tokens"] is None else f"{cell['tokens']} tokens",
            number(cell["ours_tflop"]),
            f"{'-' if cell['off_percent'] < 0 else '+'}{number(abs(cell['off_percent']))} %",
            f"{number(cell['rounding_percent'])} %",
            _verdict(cell),
        ]
        for cell in entries(result, "paper")
    ]
    notes = "\n".join(f"- {note}" for note in (_hypernetwork(result), _ratios(result), _real_lengths(result)))
    return "\n\n".join([grid(heads, lines), notes, words.counted(result)])


def _verdict(cell: Entry) -> str:
    if abs(cell["off_percent"]) <= cell["rounding_percent"]:
        return "yes"
    tokens = cell["implied_tokens"]
    if tokens is None:
        return f"**no**, {number(1 + cell['off_percent'] / 100)} times" if cell["off_percent"] > 100 else "**no**"
    fits = abs(round(tokens) - tokens) <= tokens * cell["rounding_percent"] / 100
    return f"**no**; {round(tokens)} tokens would be" if fits else "**no**; no whole number of tokens would be"


def _hypernetwork(result: Result) -> str:
    (about,) = entries(result, "hypernetwork")
    printed = next(c for c in entries(result, "paper") if c["cell"].startswith("hypernetwork"))
    tera, one_layer = printed["printed_tflop"], about["trunk_of_one_layer_tflop"]
    rounded = abs(one_layer / tera - 1) <= printed["rounding_percent"] / 100
    both = about["ours_tflop"], about["with_padded_columns_tflop"]
    useful, padded = (amount(1e12 * x, "FLOP") for x in both)
    few, many = (number(x / tera) for x in both)
    return (
        f"Hypernetwork: printed are {amount(1e12 * tera, 'FLOP')}, counted {useful}, or {padded} with the padded columns of "
        f"the heads that the reference computes: {few} and {many} times the printed figure.  The heads are "
        f"{number(about['heads_percent'])} % of ours.  The trunk of one layer without heads takes "
        f"{amount(1e12 * one_layer, 'FLOP')}, which {'is' if rounded else 'is not'} the printed figure within its rounding: "
        "our reading, not a statement of the authors."
    )


def _ratios(result: Result) -> str:
    (both,) = entries(result, "ratio")
    return (
        f"Ratio of three-shot in-context learning to T2L: {number(both['printed'])} printed, "
        f"{number(both['corrected'])} with our hypernetwork in the printed sum, {number(both['ours'])} counted."
    )


def _real_lengths(result: Result) -> str:
    implied = entry(result, "costs", model="mistral-7b", workload=PAPER)["lengths"]
    costs = entries(result, "costs")
    shown = [c for c in costs if c["workload"] not in (PAPER, MEAN) and c["lengths"]["shot"]]
    means = [c for c in costs if c["workload"] == MEAN]
    shortest = min(shown, key=lambda c: c["lengths"]["question"])
    question, prompt = (_range([of(c["lengths"]) for c in means]) for of in (lambda n: n["question"], _prompt))
    return (
        f"Lengths: counted at {implied['question']} tokens a question and {_prompt(implied)} with three examples.  In the "
        f"mean of the benchmarks these are {question} and {prompt}, by tokenizer; the shortest mean question of a benchmark "
        f"has {shortest['lengths']['question']} tokens ({shortest['workload']}, {words.title(shortest['model'])}).  There "
        f"the ratio to the first token is {_range([_to_first_token(c) for c in means])} at the mean lengths, and "
        f"{_range([_to_first_token(c) for c in shown])} over models and the {len({c['workload'] for c in shown})} "
        "benchmarks that T2L shows examples for."
    )


def _prompt(lengths: Entry) -> int:
    return lengths["question"] + lengths["shots"] * lengths["shot"]


def _to_first_token(found: Entry) -> float:
    return found["ways"]["icl"]["first_token"] / found["ways"]["t2l-task"]["first_token"]


def _range(values: list[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


# --- token counts, terms ---------------------------------------------------------------------------------------------


def token_counts(known: dict[str, Any]) -> str:
    """Tokens of questions, examples, answers and descriptions, by tokenizer."""
    counters, named = list(known["tokenizers"]), known["benchmarks"]
    parts = []
    for model in (name for name in counters if name in words.MODELS):
        parted = ("question", "shot", "examples", "answer")
        lines = [
            [name, str(about["items"]), *(_statistics(about[model][part]) for part in parted)]
            for name, about in named.items()
        ]
        heads = ["benchmark", "questions", "question", "a train item as example", "T2L's three examples", "answer"]
        parts += [f"**{words.title(model)}**: {known['tokenizers'][model]['from']}", grid(heads, lines)]
    lines = [
        [name, str(group["count"]), *(_statistics(group[counter]) for counter in counters)]
        for name, group in known["descriptions"].items()
    ]
    heads = ["task", "descriptions", *("text encoder" if c not in words.MODELS else words.title(c) for c in counters)]
    commit = "no commit" if known["commit"] is None else f"commit {known['commit']}"
    changed = " with uncommitted changes" if known["dirty"] else ""
    source = f"{known['date']}, {commit}{changed}.  From `bench/results/lengths.json` (`{known['command']}`)."
    licences = ", ".join(f"{name} {about['license']}" for name, about in named.items())
    return "\n\n".join(
        [*parts, "**Descriptions of tasks**", grid(heads, lines), f"Licences of the texts: {licences}.  {source}"]
    )


def _statistics(counts: dict[str, float] | None) -> str:
    """The mean, and the 5th to the 95th percentile where they differ."""
    if counts is None:
        return GAP
    low, high = (f"{counts[key]:g}" for key in ("p5", "p95"))
    return f"{counts['mean']:g}" if low == high else f"{counts['mean']:g} ({low}–{high})"


def terms(result: Result) -> str:
    """Every term of a cost, with its value for Mistral-7B at the paper's lengths."""
    units = {"FLOP": "FLOP", "byte": "B"}
    lines = [
        [term["phase"], term["name"], LABELS[term["way"]], amount(term["value"], units[term["unit"]]), term["source"]]
        for term in entries(result, "terms")
    ]
    heads = ["phase", "term", "as in", "Mistral-7B at the lengths implied by the paper", "formula, source"]
    return grid(heads, lines) + "\n\n" + words.counted(result)
