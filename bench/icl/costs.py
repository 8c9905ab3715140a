"""Closed forms for the models of released checkpoints, at the token statistics of the ten benchmarks and at the paper's.

Beside the paper's own table (arXiv 2506.06105, appendix I), which gives no token counts.  Of those of ``costs.PAPER``,
59 and 299 fit best where a token costs two operations a weight; attention and logits are counted here, too.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.harness import Record, record
from bench.icl.names import MEAN
from bench.records import ROOT, read
from t2l_engine.hypernetwork.network import hypernet_flops
from t2l_engine.research import costs
from t2l_engine.research.costs import PAPER, Setup, Way, Workload, hypernetwork_for

LENGTHS = ROOT / "bench" / "results" / "lengths.jsonl"
OURS, RIVALS = ("t2l-request", "t2l-task", "t2l-merged"), ("icl", "icl-cold", "icl-warm")
TERA = 1e12
#: TFLOP as the paper prints them.
HYPERNET, T2L, ICL = 0.000005, 0.856, 4.177


def workloads(model: str) -> dict[str, Workload]:
    """By benchmark, and at their mean: lengths as ``model``'s tokenizer counts them.

    A shot is a third of the text of three examples in T2L's own evaluation, which has none for HumanEval.  An answer has one
    token more than its text: the end of its turn.
    """
    known, means = read(LENGTHS), {}
    described = {of["of"]: of for of in known.records("descriptions")}
    for of in (of for of in known.records("length") if of["model"] == model):
        about = described[of["benchmark"]]
        means[of["benchmark"]] = {
            "question": of["question"]["mean"],
            "answer": of["answer"]["mean"] + 1,
            "shot": of["examples"]["mean"] / 3 if of["examples"] else 0,
            "description": about["encoder"]["mean"],
        }
    fields = next(iter(means.values()))
    means[MEAN] = {field: statistics.fmean(m[field] for m in means.values()) for field in fields}
    whole = {name: {field: round(value) for field, value in values.items()} for name, values in means.items()}
    return {name: Workload(shots=3, **of) for name, of in whole.items()}


def entries() -> Iterator[Record]:
    for model in costs.KNOWN["model"]:
        setup = costs.known_setup(model)
        for name, load in {"paper": PAPER, **workloads(model)}.items():
            yield record("costs", model=model, workload=name, lengths=vars(load), **cost(setup, load))


def cost(setup: Setup, load: Workload) -> dict[str, Any]:
    made = costs.ways(setup, load)

    def beside(of: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        return {way: {rival: of(way, rival) for rival in RIVALS} for way in OURS}

    return {
        "parameters": setup.model.parameters,
        "adapter_bytes": setup.adapter_bytes,
        "generator_bytes": setup.generator_bytes,
        "ways": {name: _way(setup, way) for name, way in made.items()},
        "questions_won": beside(lambda way, rival: costs.questions_won(made[way], made[rival])),
        "tasks_to_win": beside(lambda way, rival: costs.tasks_to_win(made[way], made[rival])),
    }


def _way(setup: Setup, way: Way) -> dict[str, Any]:
    flops = {"first": way.first.flops(), "later": way.later.flops()}
    flops |= {f"{name}_token": getattr(way, name).flops(first_token=True) for name in ("first", "later")}
    phases = {name: {"flops": flops, "bytes": moved} for name, (flops, moved) in way.first.phases.items()}
    held = dict(zip(("per_user", "per_task", "fixed"), way.held, strict=True))
    return {**flops, "phases": phases, "step_bytes": setup.weights(1) + sum(way.step), **held}


# --- the paper's table -----------------------------------------------------------------------------------------------


def paper() -> Iterator[Record]:
    """Every cell beside the closed form at the stated counts."""
    setup, prompt = costs.known_setup("mistral-7b"), PAPER.question + PAPER.prefix
    config = hypernetwork_for(setup.model, setup.encoder, variant="M")  # heads shared by all layers
    parts, one_layer = (hypernet_flops(dataclasses.replace(config, num_layers=n)) for n in (config.num_layers, 1))
    base, icl = setup.model.flops(PAPER.question), setup.model.flops(prompt)
    described, hypernet = setup.encoder.flops(PAPER.description), sum(parts.values())
    ours = base + described + hypernet + 2 * PAPER.question * config.adapter_values
    cells = (  # TFLOP as printed, and the unit of the last digit; what is counted here, of how many tokens
        ("language model, question alone", 0.827, 1e-3, base, PAPER.question),
        ("text encoder (gte-large)", 0.029, 1e-3, described, PAPER.description),
        ("hypernetwork (variant M)", HYPERNET, 1e-6, hypernet, None),
        ("T2L in all", T2L, 1e-3, ours, None),
        ("3-shot in-context learning", ICL, 1e-3, icl, prompt),
    )
    for name, printed, unit, value, tokens in cells:
        off, rounding = (round(100 * part, 3) for part in (value / TERA / printed - 1, unit / printed / 2))
        counts = {"tokens": tokens, "off_percent": off, "rounding_percent": rounding}
        yield record("paper", cell=name, printed_tflop=printed, ours_tflop=value / TERA, **counts)
    # What the hypernetwork's cell may have left out.
    about = {
        "heads_percent": round(100 * parts["heads"] / hypernet, 2),
        "trunk_of_one_layer_tflop": one_layer["trunk"] / TERA,
    }
    yield record("hypernetwork", ours_tflop=hypernet / TERA, **about)
    corrected = ICL * TERA / (T2L * TERA + hypernet)
    ratios = {"printed": ICL / T2L, "corrected": corrected, "ours": icl / ours}
    yield record("ratio", **{name: round(value, 4) for name, value in ratios.items()})
