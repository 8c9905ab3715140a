"""Output of ``t2l cost``: a JSON document, and its rendering as tables and sentences."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from t2l_engine.cli.common import console
from t2l_engine.files.errors import short_repr
from t2l_engine.research import costs

#: Labels of ways within sentences, without commas.
SENTENCE_LABELS = costs.LABELS | {
    "icl": "ICL without a cache",
    "icl-cold": "ICL with a cold cache",
    "icl-warm": "ICL with a warm cache",
}
#: Pairs (way, rival) with a stated break-even number of questions.
PAIRS = (
    *(("t2l-task", rival) for rival in ("icl", "icl-cold", "icl-warm")),
    *(("t2l-request", rival) for rival in ("icl", "icl-warm")),
    ("t2l-merged", "t2l-task"),
)
RIVALS = ("icl", "icl-cold", "icl-warm")
MAX_SHOTS, COLUMNS = 1024, 100
_PREFIXES = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: ""}
_NUMBERS = {1e12: "trillion ", 1e9: "billion ", 1e6: "million ", 1: ""}
_TIMES = {1: "s", 1e-3: "ms", 1e-6: "us", 1e-9: "ns"}


def document(
    setup: costs.Setup, load: costs.Workload, questions: int, users: int, tasks: int, rates: tuple[float, float] | None
) -> dict[str, Any]:
    """All results as JSON values; ``rates``: FLOP/s and bytes/s; None: no times."""
    made = costs.ways(setup, load)

    def seconds(request: costs.Request) -> float:
        return request.seconds(*rates)

    def won(measure: costs.serving.Measure) -> list[dict[str, Any]]:
        pairs = {(a, b): costs.questions_won(made[a], made[b], measure) for a, b in PAIRS}
        return [{"way": a, "rival": b, "questions": found and list(found)} for (a, b), found in pairs.items()]

    def way(w: costs.Way) -> dict[str, Any]:
        times = rates and {
            "first_token": w.first.seconds(*rates, first_token=True),
            "first_question": seconds(w.first),
            "later_question": seconds(w.later),
            "questions": w.total(questions, seconds),
        }
        return {
            "what": costs.WAYS[w.name],
            "flop_to_first_token": w.first.flops(first_token=True),
            "flop_first_question": w.first.flops(),
            "flop_later_question": w.later.flops(),
            "flop_questions": w.total(questions),
            "ratio": w.total(questions) / made["t2l-task"].total(questions),
            "decode_step_bytes": w.step_bytes(setup, users, tasks),
            "memory_bytes": w.memory(users, tasks),
            "least_seconds": times,
            "first": [_phase(phase) for phase in w.first.phases],
            "later": [_phase(phase) for phase in w.later.phases],
        }

    shots = {r: costs.shots_to_win(setup, load, "t2l-task", r, questions=questions, limit=MAX_SHOTS) for r in RIVALS}
    return {
        "workload": dataclasses.asdict(load),
        "questions": questions,
        "users": users,
        "tasks": tasks,
        "rates": rates and {"flops_per_second": rates[0], "bytes_per_second": rates[1]},
        "ways": {name: way(w) for name, w in made.items()},
        "questions_won": won(costs.serving.all_flops),
        "questions_won_in_least_time": rates and won(seconds),
        "shots_to_win": shots,
        "tasks_to_win": {r: costs.tasks_to_win(made["t2l-task"], made[r], Fraction(users, tasks)) for r in RIVALS},
        "tokens_of_adapter": costs.tokens_of_adapter(setup),
    }


def _phase(phase: costs.Phase) -> dict[str, Any]:
    return {"name": phase.name, "flops": phase.flops.to_json(), "bytes": phase.bytes.to_json()}


# --- numbers as text ---------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """``value`` with three significant digits; with an exponent from 10^6.

    >>> digits(0), digits(4.1974), digits(0.04571), digits(999.7), digits(12345), digits(12345678)
    ('0', '4.20', '0.0457', '1,000', '12,300', '1.23e+07')
    """
    value = float(f"{value:.3g}")
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def amount(value: float, what: str, units: Mapping[float, str] = _PREFIXES) -> str:
    """``value`` of unit ``what`` with a suitable prefix.

    >>> amount(6815744, "B"), amount(999.9e6, "B")
    ('6.82 MB', '1.00 GB')
    """
    scale = _scale(value, units)
    return f"{digits(value / scale)} {units[scale]}{what}"


def _scale(value: float, units: Mapping[float, str]) -> float:
    """The largest of ``units`` that is at most ``value`` as printed; the smallest if there is none."""
    value = float(f"{value:.3g}")
    return max((unit for unit in units if unit <= value), default=min(units))


def _column(values: list[float], what: str, units: Mapping[float, str] = _PREFIXES) -> tuple[str, list[str]]:
    """(common unit of ``values``, the values in that unit)."""
    scale = _scale(max(values), units)
    return units[scale] + what, [digits(value / scale) for value in values]


def _count(number: float, what: str) -> str:
    return f"{number:,.3f}".rstrip("0").rstrip(".") + f" {what}{'' if number == 1 else 's'}"


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _text(name: str) -> str:
    """A name from an option or a file, made printable and bounded in length."""
    return name if name.isprintable() and len(name) <= 120 else short_repr(name)


# --- tables ------------------------------------------------------------------------------------------------------------


def render(about: Mapping[str, Any]) -> None:
    """Print the setup, a table of the ways, one of roofline times if rates were given, and break-even points."""
    from rich.table import Table

    screen, ways = console(), about["ways"]
    facts = Table.grid(padding=(0, 2))
    for fact in _facts(about):
        facts.add_row(*fact)
    screen.print(facts, "")

    def show(*columns: tuple[str, tuple[str, list[str]]]) -> None:
        table = Table("")
        for head, (unit, _) in columns:
            table.add_column(f"{head}\n{unit}", justify="right")
        for i, name in enumerate(ways):
            table.add_row(costs.LABELS[name], *(cells[i] for _, (_, cells) in columns))
        screen.print(table)

    def of(key: str) -> list[float]:
        return [way[key] for way in ways.values()]

    number = _count(about["questions"], "question").replace(" ", "\n")
    show(
        ("to the\nfirst token", _column(of("flop_to_first_token"), "FLOP")),
        ("later\nquestion", _column(of("flop_later_question"), "FLOP")),
        (number, _column(of("flop_questions"), "FLOP")),
        ("beside T2L\nper task", ("ratio", [digits(ratio) for ratio in of("ratio")])),
        ("decode\nstep reads", _column(of("decode_step_bytes"), "B")),
        ("memory beside\nthe weights", _column(of("memory_bytes"), "B")),
    )
    screen.print(
        "First token: of a task's first question; filling a warm cache before it is not counted.\n"
        "Later question, questions: prompts and answers.\n"
        f"Decode step and memory: {_count(about['users'], 'user')} at a time, {_count(about['tasks'], 'task')} among them.\n"
    )
    if about["rates"]:
        times, rate = of("least_seconds"), about["rates"]
        given = f"{digits(rate['flops_per_second'] / 1e12)} TFLOP/s and {digits(rate['bytes_per_second'] / 1e9)} GB/s"
        screen.print(f"Roofline time at {given}, one question at a time (computed, not measured):")
        show(
            ("to the\nfirst token", _column([time["first_token"] for time in times], "", _TIMES)),
            ("first\nquestion", _column([time["first_question"] for time in times], "", _TIMES)),
            ("later\nquestion", _column([time["later_question"] for time in times], "", _TIMES)),
            (number, _column([time["questions"] for time in times], "", _TIMES)),
        )
        screen.print()
    for line in _verdicts(about):
        screen.print("\n".join(textwrap.wrap(line, COLUMNS, subsequent_indent="    ")))


def _facts(about: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, net, encoder, load = about["model"], about["hypernetwork"], about["encoder"], about["workload"]
    window = f", windows of {model['window']:,} tokens" if model["window"] else ""
    origin = f" of {_text(net['checkpoint'])}" if net["checkpoint"] else ""
    shots = f"{_count(load['shots'], 'shot')} of {load['shot']:,}"
    lengths = (name for name in ("question", "answer", "description", "instruction", "system") if load[name])
    yield "language model", f"{_text(model['name'])}, {_parameters(model)}, {model['dtype']} ({amount(model['bytes'], 'B')})"
    yield "keys and values", f"{model['cache_dtype']}, {amount(model['cache_bytes_per_token'], 'B')} a token{window}"
    yield "hypernetwork", f"{net['variant']}{origin}, {_parameters(net)}, 2 bytes each"
    yield "adapter", f"rank {net['rank']} on {_list(net['modules'])}, {amount(about['adapter']['bytes'], 'B')}"
    if encoder["bytes_per_value"]:
        yield "text encoder", f"{_text(encoder['name'])}, {_parameters(encoder)}, 2 bytes each"
    else:
        yield "text encoder", "the language model itself"
    yield "tokens", ", ".join((shots, *(f"{name} {load[name]:,}" for name in lengths)))


def _parameters(part: Mapping[str, Any]) -> str:
    return amount(part["parameters"], "parameters", _NUMBERS)


# --- sentences ---------------------------------------------------------------------------------------------------------


def _verdicts(about: Mapping[str, Any]) -> Iterable[str]:
    task = SENTENCE_LABELS["t2l-task"]
    yield "FLOPs, prompts and answers of all questions of a task:"
    yield from map(_won, about["questions_won"])
    questions, shot = _count(about["questions"], "question"), about["workload"]["shot"]
    for rivals, shots in _grouped(about["shots_to_win"]):
        what = f"- With {questions} {task} costs less than {rivals}"
        if shots is None:
            yield f"{what} with no number of shots up to {MAX_SHOTS:,}: ICL costs as much or less."
        else:
            least = f"from {_count(shots, 'shot')} of {shot:,} tokens on" if shots else "even without shots"
            yield f"{what} {least}."
    if about["questions_won_in_least_time"]:
        yield "Roofline time at these rates, all questions of a task:"
        yield from map(_won, about["questions_won_in_least_time"])
    yield "Memory beside the weights:"
    size, tokens = amount(about["adapter"]["bytes"], "B"), about["tokens_of_adapter"]
    yield f"- An adapter ({size}) is smaller than the keys and values of {_count(tokens, 'token')}, but not of fewer."
    each = _count(about["users"] / about["tasks"], "user")
    parts = "text encoder and hypernetwork" if about["encoder"]["bytes_per_value"] else "hypernetwork"
    for rivals, tasks in _grouped(about["tasks_to_win"]):
        what = f"- With {each} a task {task} holds less than {rivals}"
        if tasks is None:
            yield f"{what} at no number of tasks: ICL holds as much or less."
        else:
            yield f"{what} from {_count(tasks, 'task')} at a time on ({parts} {amount(about['generator_bytes'], 'B')})."
    yield "Computed from configurations; answer quality is not considered."


def _won(pair: Mapping[str, Any]) -> str:
    way, rival = SENTENCE_LABELS[pair["way"]], SENTENCE_LABELS[pair["rival"]]
    if pair["questions"] is None:
        return f"- {way} costs as much as {rival} or more at every number of questions."
    (first, last), both = pair["questions"], f"- {way} costs less than {rival}"
    if last is not None:
        return f"{both} up to {_count(last, 'question')}, as much or more beyond."
    if first == 1:
        return f"{both} at every number of questions."
    return f"{both} from {first:,} questions on, as much or more before."


def _grouped(found: Mapping[str, int | None]) -> list[tuple[str, int | None]]:
    """[(rivals with equal values as text, value)]."""
    groups: dict[int | None, list[str]] = {}
    for rival, answer in found.items():
        groups.setdefault(answer, []).append(SENTENCE_LABELS[rival])
    return [(_list(rivals), answer) for answer, rivals in groups.items()]
