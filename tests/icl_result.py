"""A result of the suite ``icl`` of few models, lengths and tasks: closed forms as the suite counts them, made-up times."""

import copy
import functools
import json

from bench.icl import costs, paper, words
from bench.icl.costs import MEAN, PAPER
from t2l_engine.research import costs as flops

MODELS, BENCHMARKS = ("mistral-7b", "gemma-2-2b", "smollm2-135m"), ("gsm8k", "humaneval")
SHOTS = (0, 1, 3, 8)
#: Milliseconds of what is timed.
TIMES = {
    "ours": 50.0,
    words.ICL: 175.0,
    words.WARM: 42.0,
    words.KEPT: 40.0,
    words.MERGED: 38.0,
    words.ALONE: 37.0,
    "part: text encoder": 8.0,
    "part: hypernetwork": 1.0,
    "part: into its slot": 0.5,
}


@functools.cache
def _counted():
    made = {}
    for model in MODELS:
        setup = flops.known_setup(model)
        loads = {"paper": (PAPER, PAPER.description), **costs.workloads(model)}
        for name in ("paper", *BENCHMARKS, MEAN):
            load, instruction = loads[name]
            made.setdefault("costs", []).append(costs.cost(model, name, setup, load))
            made.setdefault("by_shots", []).append(costs.by_shots(model, name, setup, load, instruction))
        made.setdefault("by_questions", []).append(costs.by_questions(model, MEAN, setup, loads[MEAN][0]))
        made.setdefault("by_context", []).append(costs.by_context(model, setup))
    for name, entry in (*costs.terms(), *paper.entries()):
        made.setdefault(name, []).append(entry)
    return json.loads(json.dumps(made))


def _timing(ms):
    return {"median_us": 1e3 * ms, "iqr_us": 1e3 * ms / 20, "rounds": 30}


def _spread(ratio):
    return {"median": ratio, "low": round(0.9 * ratio, 3), "high": round(1.1 * ratio, 3)}


def _measured(dtype, scale):
    times = {name: ms * scale for name, ms in TIMES.items()}
    shape = {"model": "SmolLM2-135M", "dtype": dtype, "question": 59, "shots": 3, "shot": 80, "description": 35}
    others = [name for name in times if name != "ours" and not name.startswith("part")]
    row = {
        **{"case": f"first question, {dtype}", "group": "icl", "shape": shape, "threads": 2, "cache": None},
        "ours": _timing(times["ours"]),
        "floor": {"us": 3e4, "by": "flops", "flops": 1e10, "bytes": 1e8, "gflops": 200.0, "gbps": 20.0},
        "bar": {"ratio": 0.3333, "of": words.ICL, "met": True},
        "baselines": {name: _timing(times[name]) for name in others},
        "error": {"value": 1e-6, "bound": 1e-5, "measure": "logits"},
    }
    first = {
        **{"case": row["case"], "dtype": dtype, "threads": 2, "rates": {"gflops": 200.0, "gbps": 20.0}},
        "parts": {name: _timing(ms) | {"flops": int(1e8 * ms), "gflops": 100.0} for name, ms in times.items()},
        "measured": {name: _spread(round(times[name] / times["ours"], 4)) for name in others},
        "predicted": {name: {"flops": 4.87, "roofline": 4.5} for name in others},
    }
    by_examples = [
        {
            **{"model": "SmolLM2-135M", "dtype": dtype, "threads": 2, "shots": n, "tokens": 59 + 80 * n},
            **{"new_task_us": 5e4, "kept_us": 4e4, "icl_us": 3.7e4 * (1 + n), "icl_warm_us": 3.7e4 + 3e3 * n},
            "ratio": {"icl": _spread(0.74 * (1 + n)), "icl-warm": _spread(0.74 + 0.06 * n)},
            "predicted": {"icl": 0.93 * (1 + n), "icl-warm": 0.93 + 0.03 * n},
        }
        for n in SHOTS
    ]
    return row, first, by_examples


def _task(name, trained, right, *, tokens=100, icl_ms=60.0):
    """``right``: accuracy of ICL, of the description alone, and of T2L."""
    accuracy = dict(zip(("icl", "description", "t2l-task"), right, strict=True))
    accuracy |= {"icl-warm": right[0], "t2l-merged": right[2]}
    ms = {"icl": icl_ms, "icl-warm": 45.0, "t2l-task": 44.0, "t2l-merged": 42.0, "description": 50.0}
    arms = {
        arm: {
            **{"accuracy": accuracy[arm], "tokens": 2.0, "all_us": 50 * 1e3 * ms[arm]},
            "first_token_us": {"median": 500 * ms[arm], "low": 400 * ms[arm], "high": 600 * ms[arm]},
            "answer_us": {"median": 1e3 * ms[arm], "low": 900 * ms[arm], "high": 1100 * ms[arm]},
        }
        for arm in ms
    }
    return {
        **{
            "task": name,
            "trained": trained,
            "description": "Do it.",
            "reworded": {"Do so.": 20.0},
            "questions": 50,
            "threads": 2,
            "dtype": "bfloat16",
        },
        "tokens": {"icl": tokens, "t2l": 40.0, "description": 30.0, "prefix": tokens - 20, "encoder": 12},
        **{"generate_us": 10e3, "merge_us": 4e3, "fill_us": 30e3, "arms": arms},
        "same_answers": {"icl-warm": 49, "t2l-merged": 48},
    }


def lists():
    """All but what files of every suite have; the caller may change it."""
    made = copy.deepcopy(_counted())
    timed = [_measured("float32", 1.0), _measured("bfloat16", 0.5)]
    made["rows"] = [row for row, _, _ in timed]
    made["first_question"] = [first for _, first, _ in timed]
    made["by_examples"] = [entry for _, _, entries in timed for entry in entries]
    made["questions"] = [
        _task("copy_last", False, (40.0, 2.0, 90.0)),
        _task("lower_case", True, (70.0, 0.0, 60.0)),
        _task("choose", True, (50.0, 0.0, 80.0), icl_ms=40.0),
        _task("gsm8k", False, (30.0, 10.0, 4.0), tokens=430, icl_ms=250.0),
    ]
    return made
