"""Closed forms for the models of released checkpoints, at the token statistics of the ten benchmarks."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.harness import Record, record
from bench.icl.names import MEAN
from bench.records import read
from bench.source import ROOT
from t2l_engine.research import costs
from t2l_engine.research.costs import Setup, Way, Workload
from t2l_engine.research.costs.known import PAPER

LENGTHS = ROOT / "bench" / "results" / "lengths.jsonl"
SHOTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
QUESTIONS = tuple(round(10 ** (i / 8)) for i in range(33))  # to 10,000
OURS, RIVALS = ("t2l-request", "t2l-task", "t2l-merged"), ("icl", "icl-cold", "icl-warm")


def workloads(model: str) -> dict[str, tuple[Workload, int]]:
    """By benchmark, and at their mean: lengths as ``model``'s tokenizer counts them; with each, a description in the prompt.

    A shot is a third of the text of three examples in T2L's own evaluation, which has none for HumanEval.  An answer has one
    token more than its text: the end of its turn.
    """
    known, means = read(LENGTHS), {}
    described = {of["of"]: of for of in known.records("descriptions")}
    for of in known.records("length"):
        if of["model"] == model:
            means[of["benchmark"]] = {
                "question": of["question"]["mean"],
                "answer": of["answer"]["mean"] + 1,
                "shot": of["examples"]["mean"] / 3 if of["examples"] else 0,
                "description": described[of["benchmark"]]["encoder"]["mean"],
                "instruction": described[of["benchmark"]][model]["mean"],
            }
    fields = next(iter(means.values()))
    means[MEAN] = {field: statistics.fmean(m[field] for m in means.values()) for field in fields}
    whole = {name: {field: round(value) for field, value in values.items()} for name, values in means.items()}
    instructions = {name: values.pop("instruction") for name, values in whole.items()}
    return {name: (Workload(shots=3, **values), instructions[name]) for name, values in whole.items()}


def entries() -> Iterator[Record]:
    yield from terms()
    for model in costs.known_setups():
        setup = costs.known_setup(model)
        loads = {"paper": (PAPER, PAPER.description), **workloads(model)}
        for name, (load, instruction) in loads.items():
            yield cost(model, name, setup, load)
            yield by_shots(model, name, setup, load, instruction)
        yield by_questions(model, MEAN, setup, loads[MEAN][0])
        yield by_context(model, setup)


def terms() -> Iterator[Record]:
    """Every named term of a cost with its unit and source, and its value for Mistral-7B at the paper's lengths."""
    both = costs.ways(costs.known_setup("mistral-7b"), PAPER)
    seen = {}
    for way in ("icl", "t2l-task", "t2l-merged"):
        for phase in both[way].first.phases:
            for term in (*phase.flops.terms, *phase.bytes.terms):
                seen.setdefault((phase.name, term.name, term.unit), {"way": way, "phase": phase.name, **vars(term)})
    yield from (record("terms", **entry) for entry in seen.values())


def cost(model: str, name: str, setup: Setup, load: Workload) -> Record:
    made = costs.ways(setup, load)

    def beside(of: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        return {way: {rival: of(way, rival) for rival in RIVALS} for way in OURS}

    return record(
        "costs",
        model=model,
        workload=name,
        lengths=vars(load),
        parameters=setup.decoder.num_parameters,
        adapter_bytes=setup.adapter_bytes,
        generator_bytes=setup.generator_bytes,
        adapter_tokens=costs.tokens_of_adapter(setup),
        ways={way: _way(setup, made[way]) for way in costs.WAYS},
        questions_won=beside(lambda way, rival: costs.questions_won(made[way], made[rival])),
        shots_to_win=beside(lambda way, rival: costs.shots_to_win(setup, load, way, rival)),
        tasks_to_win=beside(lambda way, rival: costs.tasks_to_win(made[way], made[rival])),
    )


def _way(setup: Setup, way: Way) -> dict[str, Any]:
    return {
        "first": way.first.flops(),
        "later": way.later.flops(),
        "first_token": way.first.flops(first_token=True),
        "later_token": way.later.flops(first_token=True),
        "phases": {phase.name: {"flops": phase.flops.total, "bytes": phase.bytes.total} for phase in way.first.phases},
        "step_bytes": way.step_bytes(setup, 1, 1),
        "per_user": way.per_user,
        "per_task": way.per_task,
        "fixed": way.fixed,
    }


def by_shots(model: str, name: str, setup: Setup, load: Workload, instruction: int) -> Record:
    """Cost of in-context learning over that of an adapter kept per task, over the number of shots.

    Without shots the description, of ``instruction`` tokens, is in the prompt: the cheapest rival that knows the task.
    """
    none = {"shots": 0, "instruction": instruction}
    at = [costs.ways(setup, dataclasses.replace(load, **({"shots": n} if n else none))) for n in SHOTS]
    ratios = {
        str(questions): {
            rival: [round(w[rival].total(questions) / w["t2l-task"].total(questions), 4) for w in at] for rival in RIVALS
        }
        for questions in (1, 10, 100)
    }
    return record("by_shots", model=model, workload=name, shots=list(SHOTS), questions=ratios)


def by_questions(model: str, name: str, setup: Setup, load: Workload) -> Record:
    """Cost of every way over that of an adapter kept per task, over the number of questions; three shots."""
    made = costs.ways(setup, load)
    kept = made.pop("t2l-task")
    ratios = {way: [round(of.total(n) / kept.total(n), 4) for n in QUESTIONS] for way, of in made.items()}
    return record("by_questions", model=model, workload=name, questions=list(QUESTIONS), ratios=ratios)


def by_context(model: str, setup: Setup) -> Record:
    """Bytes that a user holds: keys and values over the length of the context, and one adapter beside them."""
    tokens = [0, *(2**i for i in range(4, 15))]
    held = {"adapter": setup.adapter_bytes, "generator": setup.generator_bytes}
    return record("by_context", model=model, tokens=tokens, kv=[setup.kv(n) for n in tokens], **held)
