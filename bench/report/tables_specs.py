"""The tables of the study of unseen sentences: arms by tier, claims beside their targets, families, runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from bench.records import Result
from bench.report.tables import Claim, Line, bounds, curves, each, judged, mean, table
from bench.specs.plan import (
    AGAIN,
    DESCRIBED,
    DEVELOPMENT,
    EARLIER,
    EVEN,
    HELD_OUT,
    LIBRARY,
    PARTS,
    RANKS,
    RIVAL,
    RUNS,
    STORED,
    SUITE_PARTS,
    T2L,
)
from bench.study.scores import Part, mean_over
from t2l_engine.research.evaluation.bootstrap import interval
from t2l_engine.research.tasks.specs.suite import FAMILIES

#: Arm -> what it is called; the order of the tables.
ARMS = {
    "t2l": "T2L, from the description",
    "t2l-examples": "T2L, from the description and 3 examples",
    "t2l-examples-6": "T2L, from the description and 6 examples",
    "t2l-shuffled": "control: another task's description",
    "t2l-examples-shuffled": "control: another task's description and examples",
    "t2l-junk": "control: random letters",
    "t2l-constant": 'control: "Answer the question."',
    DESCRIBED: "T2L, description in the prompt, too",
    RIVAL: "multi-task LoRA, description in the prompt",
    "nearest": f"nearest by its descriptions of {RUNS[LIBRARY].other['tasks']} stored adapters",
    "oracle": "oracle: an adapter trained on the task alone",
    "base": "base model, input only",
    "base-description": "base model, description in the prompt",
    "icl": "base model, description and 3 examples",
    "icl-6": "base model, description and 6 examples",
}
#: Arms of the tables that have no room for all.
SHOWN = ("t2l", "t2l-shuffled", "t2l-examples", RIVAL, "icl")
#: Small run -> the one thing that it changes.
CHANGED = {
    "small": "nothing: Muon, learning rate 1e-3, from nothing",
    "small-adamw": "AdamW",
    "small-fast": "learning rate 2.5e-3",
    "small-slow": "learning rate 5e-4",
    "small-warm": "start: reconstruction of 128 adapters",
}
#: Split of the inputs -> what is new in it.
INPUTS = {"train": "trained", "val": "new, in trained layouts", "test": "new, in new layouts"}
#: Part of the result -> what its tasks are to the checkpoint.
TIERS = {
    "trained": "trained tasks",
    "development": "development tasks, of tier train and not trained",
    "sibling": "unseen siblings",
    "novel": "unseen families",
    "other": "tasks of other origin",
}


def scores(part: Part, arms: Iterable[str]) -> Line:
    """Mean of each arm over the tasks of ``part``."""
    return {f"{ARMS[arm]}, %": mean(part.column(arm)) for arm in arms}


def family(task: str) -> str:
    """The family of a specification, by its name; a task of other origin has none and is its own."""
    return task.rpartition("-")[0] or task


@table("specs-arms", "Exact match by arm and tier, mean over specifications", "specs")
def _arms(result: Result) -> Iterator[Line]:
    parts = {part: Part.of(result.others, part) for part in PARTS}
    for arm, name in ARMS.items():
        line: Line = {"arm": name}
        for part, tier in TIERS.items():
            values = parts[part].column(arm)
            line |= bounds(f"{tier}, %", interval(values) if values else None)
        for part in ("sibling", "novel"):
            gap = None if arm == "t2l" else parts[part].gap("t2l", arm)
            line |= bounds(f"T2L less the arm, {TIERS[part]}", gap)
        if arm in parts["sibling"].arms:
            line["prompt tokens, unseen siblings"] = parts["sibling"].arms[arm]["groups"]["all"]["prompt_tokens"]
        if any(value is not None for value in list(line.values())[1:]):
            yield line


@table("specs-first", "The first set of held-out specifications, where T2L is the run t2l-second", "specs-first")
@table("specs-second", "The second set of held-out specifications, where T2L is the run t2l-fourth", "specs-second")
def _earlier_set(result: Result) -> Iterator[Line]:
    for arm, name in ARMS.items():
        line: Line = {"arm": name}
        for tier in HELD_OUT:
            scored = Part.of(result.others, tier)
            if values := scored.column(arm):
                gap = None if arm == "t2l" else scored.gap("t2l", arm)
                line |= {f"{TIERS[tier]}, %": mean(values), **bounds(f"T2L less the arm, {TIERS[tier]}", gap)}
        if len(line) > 1:
            yield line


@table("specs-claims", "Claims of the study of unseen sentences beside their targets, 95 % intervals over tasks", "specs")
def _judged(result: Result) -> Iterator[Line]:
    """Targets, of intervals over tasks, were fixed before the runs.  Two claims came later, with the target of the one
    before: of families with more than two answers, and of as many tokens.  Beside them intervals over families.
    """
    for line, wide in zip(judged(_claims(result, None)), judged(_claims(result, family)), strict=True):
        low, high = wide["measured, low"], wide["measured, high"]
        over = {"over families": f"{low:.1f} to {high:.1f}", "over families, low": low, "over families, high": high}
        yield line | over | {"met over families": wide["met"]}


def _claims(result: Result, unit: Callable[[str], str] | None) -> Iterator[Claim]:
    """``unit``: what intervals are over, see :func:`mean_over`."""
    trained, _, sibling, novel, other = (Part.of(result.others, part) for part in PARTS)
    more = _by_answers(result, "novel")["more"]
    gap = functools.partial(Part.gap, unit=unit)
    right = {task["task"]: task["scores"]["t2l"] for task in trained.tasks if "t2l" in task["scores"]}
    yield "trained tasks: right, %", mean_over(unit, right), 85, False
    yield "unseen siblings: right less another task's description", gap(sibling, "t2l", "t2l-shuffled"), 50, False
    yield "unseen siblings: T2L less base model, description and 3 examples", gap(sibling, "t2l", "icl"), None, True
    yield "unseen siblings: T2L less base model, description and 6 examples", gap(sibling, "t2l", "icl-6"), None, False
    yield "unseen families: right less another task's description", gap(novel, "t2l", "t2l-shuffled"), 12, True
    claim = "unseen families, tasks with more than two answers: right less another task's description"
    yield claim, gap(more, "t2l", "t2l-shuffled"), 12, True
    claim = "unseen families, tasks with more than two answers: T2L less base model, description and 3 examples"
    yield claim, gap(more, "t2l", "icl"), None, False
    claim = "unseen families: T2L from description and 3 examples, less the base model with them in the prompt"
    yield claim, gap(novel, "t2l-examples", "icl"), -5, False
    yield "tasks of other origin: right less another task's description", gap(other, "t2l", "t2l-shuffled"), 15, True
    for tier, part in (("siblings", sibling), ("families", novel)):
        yield f"unseen {tier}: T2L less multi-task LoRA, description in the prompt", gap(part, "t2l", RIVAL), -3, False
        claim = f"unseen {tier}: T2L less multi-task LoRA, description in the prompt, as many tokens"
        yield claim, gap(part, EVEN, RIVAL), -3, False
        claim = f"unseen {tier}: T2L less multi-task LoRA, the description in both prompts"
        yield claim, gap(part, DESCRIBED, RIVAL), 0, False


@table("specs-new", "Unseen siblings by what is new in them", "specs")
def _new(result: Result) -> Iterator[Line]:
    sibling = Part.of(result.others, "sibling")
    for of in result.records("siblings"):
        part = sibling.only(of["tasks"])
        yield {"new": f"a {of['new']}", "tasks": len(part.tasks), **scores(part, SHOWN)}


@table("specs-answers", "Tasks with two different answers, where a guess is right half of the time, and the others", "specs")
def _answers(result: Result) -> Iterator[Line]:
    measured = {of["part"] for of in result.records("two_answers")}
    for part in [part for part in (*SUITE_PARTS, STORED) if part in measured]:
        for answers, own in _by_answers(result, part).items():
            line = {"tier": TIERS.get(part, "trained tasks with a LoRA of their own")}
            line |= {"different answers": answers, "tasks": len(own.tasks)}
            line |= scores(own, [arm for arm in (*SHOWN, "oracle") if arm in own.arms])
            yield line | bounds("right less another task's description", own.gap("t2l", "t2l-shuffled"))


def _by_answers(result: Result, part: str) -> dict[str, Part]:
    """Tasks of ``part`` by how many different answers their examples have."""
    of = Part.of(result.others, part)
    (two,) = [{*record["tasks"]} for record in result.records("two_answers") if record["part"] == part]
    return {"two": of.only(two), "more": of.only({task["task"] for task in of.tasks} - two)}


@table("specs-families", "Every family by tier: mean over its specifications", "specs")
def _families(result: Result) -> Iterator[Line]:
    for part, tier in TIERS.items():
        tasks = Part.of(result.others, part)
        for name in FAMILIES:
            own = tasks.only({task["task"] for task in tasks.tasks if family(task["task"]) == name})
            if own.tasks:
                shown = [arm for arm in SHOWN if arm != RIVAL]
                yield {"tier": tier, "family": name, "tasks": len(own.tasks), **scores(own, shown)}


@table("specs-stored", "Trained tasks with an adapter of their own beside T2L", "specs", optional=True)
def _stored(result: Result) -> Iterator[Line]:
    part = Part.of(result.others, STORED)
    for arm in ARMS:
        if right := part.column(arm):
            gap = None if arm == "oracle" else part.gap(arm, "oracle")
            yield {"arm": ARMS[arm], **bounds("right, %", interval(right)), **bounds("less the oracle", gap)}


@table("specs-lost", "T2L and an adapter of the task's own by what is new: inputs and wordings", "specs", optional=True)
def _lost(result: Result) -> Iterator[Line]:
    """Tasks of the library; an oracle reads no wording."""
    for of in result.others.get("stored", ()):
        shown = {ARMS[arm]: of["scores"].get(arm) for arm in ("t2l", "oracle")}
        means = {f"{arm}, %": mean for arm, mean in shown.items()}
        yield {"inputs": INPUTS[of["split"]], "wordings": of["wordings"], **means}


@table("specs-tokens", "T2L on the way, and beside it: tokens trained on, and exact match", "specs", optional=True)
def _tokens(result: Result) -> Iterator[Line]:
    """From the description.  Tokens are those of a run and of all that it started from; without runs that lack them."""
    trained = {run["run"]: run for run in result.others.get("training", ())}
    for name in (*EARLIER, T2L, DESCRIBED, RIVAL):
        chain = [name]
        while before := trained.get(chain[-1], {}).get("initial"):
            chain.append(before)
        if not trained.keys() >= set(chain):
            continue
        parts = {part: Part.of(result.others, part).column(name) for part in SUITE_PARTS}
        yield {
            "run": name,
            "million tokens": round(sum(trained[run]["tokens"] for run in chain) / 1e6, 2),
            **{f"{TIERS[part]}, %": mean(scores) for part, scores in parts.items() if scores},
        }


@table("specs-seeds", "T2L's first run with two seeds, beside the multi-task LoRA", "specs", "robustness", optional=True)
def _seeds(specs: Result, robustness: Result | None = None) -> Iterator[Line]:
    for part in SUITE_PARTS if robustness else ():
        again = {of["task"]: of["scores"] for of in Part.of(robustness.others, part).tasks if AGAIN in of["scores"]}
        known = [of for of in Part.of(specs.others, part).tasks if of["task"] in again]
        if known:
            scored = Part([{**of, "scores": of["scores"] | again[of["task"]]} for of in known], {})
            yield {
                "tier": TIERS[part],
                "tasks": len(known),
                **{f"{name}, %": mean(scored.column(name)) for name in (EVEN, AGAIN)},
                **bounds(f"{AGAIN} less {EVEN}", scored.gap(AGAIN, EVEN)),
                **bounds(f"{AGAIN} less another task's description", scored.gap(AGAIN, f"{AGAIN}-shuffled")),
                **bounds(f"{EVEN} less multi-task LoRA", scored.gap(EVEN, RIVAL)),
                **bounds(f"{AGAIN} less multi-task LoRA", scored.gap(AGAIN, RIVAL)),
            }


@table("specs-ranks", "The multi-task LoRA by its rank, development tasks", "robustness", optional=True)
def _ranks(result: Result) -> Iterator[Line]:
    scored = Part.of(result.others, DEVELOPMENT)
    for run in result.records("training"):
        if run["run"] in RANKS:
            line = {"rank": run["settings"]["rank"], "steps": run["steps"], "million tokens": round(run["tokens"] / 1e6, 2)}
            line |= {"loss of the last twentieth": run["curve"][-1][1]}
            line |= bounds("right, %", interval(scored.column(run["run"])))
            yield line | bounds("less rank 8", scored.gap(run["run"], "multi-task-8"))


@table("specs-card", "What the bundled checkpoint of the study scores, for its model card", "specs")
def _card(result: Result) -> Iterator[Line]:
    for name, tier in TIERS.items():
        part = Part.of(result.others, name)
        if part.tasks:
            yield {
                "specifications": f"{tier}, {len(part.tasks)}",
                **scores(part, [arm for arm in SHOWN if arm in part.arms]),
            }


@table("specs-costs", "A task once, and a question of it to its first token: unseen siblings", "costs", optional=True)
def _costs(result: Result) -> Iterator[Line]:
    """Once: text read and adapter in its slot; or what all prompts of a task begin with in a cache."""
    for of in result.records("cost"):
        count, tokens = of["examples"], of["tokens"]
        shown = f"description and {count} examples" if count else "description"
        ways = {
            "T2L": (tokens["read"], of["make_us"], tokens["question"], of["adapted_us"]),
            "in the prompt": (0, 0, tokens["prompt"], of["prompt_us"]),
            "in the prompt, cached": (
                tokens["prefix"],
                of["fill_us"],
                round(tokens["prompt"] - tokens["prefix"], 1),
                of["warm_us"],
            ),
        }
        for way, (once, once_us, asked, asked_us) in ways.items():
            yield {
                "shown": shown,
                "way": way,
                "tokens, once": once,
                "ms, once": round(once_us / 1e3, 2),
                "tokens, a question": asked,
                "ms, a question": round(asked_us / 1e3, 2),
            }


@table("specs-rates", "Learning rates of tuning: mean of the lowest validation losses of development tasks", "specs")
def _rates(result: Result) -> Iterator[Line]:
    for of in result.records("rates"):
        lowest = {f"lowest loss at {rate}": loss for rate, loss in of["lowest"].items()}
        yield {"start": of["start"], "examples": of["budget"], "tasks": of["tasks"]} | lowest


table("specs-curves", "Training loss over tokens, specifications", "specs")(curves)


@table("specs-small", "Small runs that change one thing at a time: loss of a twentieth of the steps", "small", optional=True)
def _small(result: Result) -> Iterator[Line]:
    runs = {run["run"]: run for run in result.others.get("training", ())}
    for name, changed in CHANGED.items():
        if name in runs:
            curve = [loss for _, loss in runs[name]["curve"]]
            at = {
                f"loss, {share} % of {runs[name]['steps']} steps": curve[len(curve) * share // 100 - 1]
                for share in (25, 50, 100)
            }
            yield {"changed": changed, "tasks": runs[name]["tasks"], **at}


table("specs-runs", "What was trained on specifications", "specs")(each("training", "curve", "validation"))
