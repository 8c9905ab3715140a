"""The tables of the study: arms, tasks, claims beside their targets, controls, runs; and the few lines that pages show."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator, Sequence

from bench.records import Result
from bench.report.tables import AS_IS, Column, Line, Table, records
from bench.study import plan
from bench.study.scores import Part
from t2l_engine.research.evaluation.bootstrap import Interval, interval

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
    "multi-task": "control: multi-task LoRA without description",
    "multi-task-description": "multi-task LoRA, description in the prompt",
    "average": "average of the library",
    "arrow": "Arrow routing over the library",
    "base": "base model, input only",
    "base-description": "base model, description in the prompt",
    "icl": "base model, description and 3 examples",
    "oracle": "a LoRA for the task (oracle)",
}
#: What tasks are to T2L -> part of the result, and group of its tasks.
GROUPS = {
    "seen, with headroom": ("seen", "all"),
    "unseen siblings": ("unseen", "sibling"),
    "unseen skills": ("unseen", "novel"),
}
VARIED = {
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
RIVAL = "multi-task-description"
SEEDS = {"t2l": "", "t2l-seed1": ", another seed"}


def plain(arm: str) -> str:
    """The name of an arm without emphasis."""
    return ARMS[arm].replace("*", "")


def mean(scores: Sequence[float]) -> float | None:
    """Of scores in percent; None where nothing was measured."""
    return statistics.fmean(scores) if scores else None


def bounds(head: str, found: Interval | None) -> Line:
    """A figure and its 95 % bootstrap interval over tasks, empty where it was not measured."""
    values = (found.mean, found.low, found.high) if found else (None, None, None)
    return dict(zip((head, f"{head}, low", f"{head}, high"), values, strict=True))


def arms(result: Result) -> Iterator[Line]:
    unseen = Part.of(result.others, "unseen")
    for arm, name in ARMS.items():
        scores = {head: Part.of(result.others, part).column(arm, group) for head, (part, group) in GROUPS.items()}
        if not any(scores.values()):
            continue
        about = unseen.arms[arm]["groups"]["sibling"]
        yield {
            "arm": name,
            **{f"{head}, %": mean(values) for head, values in scores.items()},
            **bounds("T2L less the arm, siblings", None if arm == "t2l" else unseen.gap("t2l", arm, "sibling")),
            "containment, siblings, %": about["containment"],
            "ROUGE-L, siblings, %": about["rouge_l"],
            "prompt tokens, siblings": about["prompt_tokens"],
            "prompt template": unseen.arms[arm]["form"],
        }


def claims(result: Result) -> Iterator[Line]:
    """Targets that were fixed before the runs; without what was not measured."""
    for claim, target, found, met in _claims(result):
        if found is not None:
            yield {"claim": claim, "target": target, **bounds("measured", found), "met": None if met is None else met(found)}


def _claims(result: Result) -> Iterator[tuple[str, str, Interval | None, Callable[[Interval], bool] | None]]:
    seen, unseen, kept = (Part.of(result.others, name) for name in ("seen", "unseen", "reconstruction/16/train"))
    name = "reconstruction of 16 adapters: oracle gain kept, %"
    yield name, ">= 90", kept.share("t2l", "base"), lambda f: f.mean >= 90
    for ours, seed in SEEDS.items():
        for base in ("base", "icl"):
            name = f"seen tasks with headroom: share of the oracle's gain over {plain(base)}{seed}, %"
            yield name, ">= 80", seen.share(ours, base), lambda f: f.mean >= 80
    for ours, seed in SEEDS.items():
        shuffled = unseen.gap(ours, f"{ours}-shuffled", "sibling")
        yield f"siblings: matched less shuffled{seed}", ">= 20, interval > 0", shuffled, lambda f: f.mean >= 20 and f.low > 0
        for theirs in ("base-description", "icl"):
            name, found = f"siblings: T2L less {plain(theirs)}{seed}", unseen.gap(ours, theirs, "sibling")
            yield name, "interval > 0", found, lambda f: f.low > 0
        name, found = f"siblings: T2L less {plain(RIVAL)}{seed}", unseen.gap(ours, RIVAL, "sibling")
        yield name, ">= -3", found, lambda f: f.mean >= -3
    name = "siblings: T2L less multi-task LoRA, the description in both prompts"
    yield name, ">= 0", unseen.gap("t2l-description", RIVAL, "sibling"), lambda f: f.mean >= 0
    for theirs in ("base-description", "icl", "t2l-shuffled"):
        yield f"unseen skills: T2L less {plain(theirs)}", "reported", unseen.gap("t2l", theirs, "novel"), None


def tasks(name: str) -> Callable[[Result], Iterator[Line]]:
    """Every task of a part with every arm."""

    def lines(result: Result) -> Iterator[Line]:
        part = Part.of(result.others, name)
        for tier in ("train", "sibling", "novel"):
            for task in sorted(part.group(tier), key=operator.itemgetter("task")):
                scores = {f"{arm}, %": task["scores"].get(arm) for arm in part.arms}
                yield {"task": task["task"], "tier": tier, "items": task["items"], **scores}

    return lines


def reconstruction(result: Result) -> Iterator[Line]:
    trained = {run["run"]: run for run in result.records("training")}
    for of in result.records("distance"):
        count = of["adapters"]
        learned, fresh = (Part.of(result.others, f"reconstruction/{count}/{tasks}") for tasks in ("train", "evaluation"))
        run = trained[f"reconstruction-{count}"]
        yield {
            "adapters": count,
            **{f"{arm}, %": mean(learned.column(arm)) for arm in ("base", "oracle")},
            **bounds("gain kept, learned descriptions, %", learned.share("t2l", "base")),
            **bounds("gain kept, held-out descriptions, %", fresh.share("t2l", "base")),
            "gain kept, another task's description, %": learned.share("t2l-shuffled", "base").mean,
            "L1 of z-scores": run["validation"][-1],
            "relative error of B A": of["relative_error"],
            "network MB in bfloat16": 2 * of["parameters"] / 1e6,
            "library MB in bfloat16": 2 * of["library_values"] / 1e6,
            "minutes": run["seconds"] / 60,
        }


def varied(result: Result) -> Iterator[Line]:
    """Shorter runs beside the first of them, on tasks that both were trained on."""
    train, siblings = (Part.of(result.others, f"varied/{group}") for group in ("train", "sibling"))
    first, minutes = "short-L", {run["run"]: run["seconds"] / 60 for run in result.records("training")}
    for arm, name in VARIED.items():
        own = train.only(plan.chosen(plan.LEARNABLE, plan.RUNS[arm].count))
        seen, unseen = own.column(arm), siblings.column(arm)
        if seen or unseen:
            less = [None if arm == first else part.gap(arm, first) for part in (own, siblings)]
            yield {
                "run": name,
                "seen tasks": len(seen),
                "seen, %": mean(seen),
                **bounds("seen, less the first row", less[0]),
                "siblings, %": mean(unseen),
                **bounds("siblings, less the first row", less[1]),
                "another sibling's description, %": mean(siblings.column(f"{arm}-shuffled")),
                "minutes": minutes[arm],
            }


def lengths(result: Result) -> Iterator[Line]:
    """T2L beside its rival after parts of their training."""
    trained = {run["run"]: run for run in result.records("training")}
    for ours, theirs in plan.LENGTHS:
        part = Part.of(result.others, "unseen" if ours == "t2l" else f"lengths/{ours}")
        if RIVAL in part.arms:
            both = {"T2L": trained[ours], "rival": trained[theirs]}
            yield {
                **{f"million tokens, {name}": of["tokens"] / 1e6 for name, of in both.items()},
                **{f"last training loss, {name}": of["curve"][-1][1] for name, of in both.items()},
                "T2L, siblings, %": mean(part.column("t2l", "sibling")),
                "rival, siblings, %": mean(part.column(RIVAL, "sibling")),
                **bounds("T2L less the rival", part.gap("t2l", RIVAL, "sibling")),
            }


def wordings(result: Result) -> Iterator[Line]:
    """How far descriptions alone tell tasks apart, and what learned descriptions score instead of held-out ones."""
    (of,) = result.records("wordings")
    held, learned = (Part.of(result.others, name).column("t2l") for name in ("seen", "learned"))
    told = {"embeddings": "embeddings", "random": "random task encoder", "discriminant": "task_init: discriminant"}
    values = {f"held-out descriptions nearest to the right task, {name}": of[key] for key, name in told.items()}
    values["variance of learned descriptions' embeddings within a task"] = of["within"]
    values |= {"T2L on seen tasks, held-out descriptions": mean(held), "the same, learned descriptions": mean(learned)}
    yield from ({"what": what, "%": value, "%, low": None, "%, high": None} for what, value in values.items())
    more = interval([a - b for a, b in zip(learned, held, strict=True)])
    yield {"what": "learned less held-out descriptions, points", **bounds("%", more)}


def requests(result: Result) -> Iterator[Line]:
    known = result.records("request")
    ours = next(of["seconds"] for of in known if of["arm"] == "t2l")
    for of in known:
        took = {"ms": 1e3 * of["seconds"], "over T2L": of["seconds"] / ours}
        yield {"arm": plain(of["arm"]), "prompt tokens": of["prompt_tokens"], "new tokens": of["new_tokens"], **took}


def _examples(run: dict) -> int:
    """Examples of a step."""
    of = run["settings"]
    return of["tasks_per_batch"] * of.get("samples_per_task", 1) * of["accumulation"]


def _shown(*arms: str) -> list[Column]:
    return [(f"{plain(arm)}, %", f"scores.{arm}") for arm in arms]


SCALINGS: list[Column] = [("scaling", "scaling"), *_shown("t2l", "t2l-shuffled")]
BENCHMARKS: list[Column] = [("benchmark", "task"), ("items", "items"), ("majority position, %", "majority")]
BENCHMARKS += _shown("t2l", "t2l-shuffled", "multi-task", RIVAL, "base", "base-description", "icl")
RUNS: list[Column] = [
    ("run", "run"),
    ("tasks", lambda run: run["tasks"] or "all"),
    ("steps", "steps"),
    ("examples a step", _examples),
    ("million tokens", lambda run: run["tokens"] / 1e6 or None),
    ("minutes", lambda run: run["seconds"] / 60),
]
STEERED: list[Column] = [(field, field) for field in ("input", "description", "answer")]


def card(result: Result) -> Iterator[Line]:
    """What the bundled file itself scores beside the rivals, for its model card."""
    for part, group, name in (
        ("seen", "all", f"trained tasks, {{}} of the {len(plan.LEARNABLE)}, unseen inputs and descriptions"),
        ("unseen", "sibling", "unseen siblings of trained tasks, {}"),
        ("unseen", "novel", "tasks of other skills, {}"),
    ):
        shipped, other = Part.of(result.others, f"shipped/{part}"), Part.of(result.others, part)
        ours = shipped.column("t2l", group)
        theirs = {f"{plain(arm)}, %": mean(other.column(arm, group)) for arm in ("multi-task", RIVAL, "icl", "oracle")}
        shuffled = mean(shipped.column("t2l-shuffled", group))
        name = {"tasks": name.format(len(ours))}
        yield {**name, "this checkpoint, %": mean(ours), "another task's description, %": shuffled, **theirs}


_TABLES = (
    ("arms", "Exact match by arm, mean over tasks", arms, [AS_IS]),
    ("claims", "Claims of the study beside their targets, with 95 % intervals over tasks", claims, [AS_IS]),
    ("seen", "Tasks that were trained on, held-out inputs and descriptions", tasks("seen"), [AS_IS]),
    ("unseen", "Tasks that nothing but the oracles was trained on", tasks("unseen"), [AS_IS]),
    ("reconstruction", "Reconstruction by number of adapters", reconstruction, [AS_IS]),
    ("short", "Shorter runs that vary one thing", varied, [AS_IS]),
    ("lengths", "T2L and the multi-task LoRA with descriptions, siblings, by length of training", lengths, [AS_IS]),
    ("wordings", "What wording costs", wordings, [AS_IS]),
    ("scalings", "Siblings at other scalings than trained with", records("scaling"), SCALINGS),
    ("benchmarks", "The paper's ten benchmarks", records("benchmark"), BENCHMARKS),
    ("requests", "One request at a time", requests, [AS_IS]),
    ("runs", "What was trained", records("training"), RUNS),
    ("steered", "One input under several descriptions", records("steered"), STEERED),
    ("card", "The bundled checkpoint", card, [AS_IS]),
)
TABLES = [Table(f"study-{name}", about, ("study",), entries, columns) for name, about, entries, columns in _TABLES]
