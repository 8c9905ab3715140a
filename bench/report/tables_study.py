"""The tables of the study: arms, tasks, claims beside their targets, controls, runs."""

from __future__ import annotations

from collections.abc import Iterator

from bench.records import Result
from bench.report.tables import Claim, Line, Make, bounds, curves, each, flat, judged, mean, table
from bench.study import plan
from bench.study.scores import Part
from t2l_engine.research.evaluation.bootstrap import interval

#: Arm -> what it is called; the order of the tables.
ARMS = {
    "t2l": "T2L, input only",
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


@table("study-arms", "Exact match by arm, mean over tasks", "study")
def _arms(result: Result) -> Iterator[Line]:
    unseen = Part.of(result.others, "unseen")
    for arm, name in ARMS.items():
        scores = {head: Part.of(result.others, part).column(arm, group) for head, (part, group) in GROUPS.items()}
        if any(scores.values()):
            line = {"arm": name}
            for head, values in scores.items():
                line |= bounds(f"{head}, %", interval(values) if values else None) | {f"{head}, %": mean(values)}
            line |= bounds("T2L less the arm, siblings", None if arm == "t2l" else unseen.gap("t2l", arm, "sibling"))
            about = flat(unseen.arms[arm]["groups"]["sibling"], "score")
            line |= {f"{head}, siblings": value for head, value in about.items()}
            yield line | {"prompt template": unseen.arms[arm]["form"]}


@table("study-claims", "Claims of the study beside their targets, with 95 % intervals over tasks", "study")
def _judged(result: Result) -> Iterator[Line]:
    """Targets were fixed before the runs."""
    return judged(_claims(result))


def _claims(result: Result) -> Iterator[Claim]:
    seen, unseen, kept = (Part.of(result.others, name) for name in ("seen", "unseen", "reconstruction/16/train"))
    yield "reconstruction of 16 adapters: oracle gain kept, %", kept.share("t2l", "base"), 90, False
    for ours, seed in SEEDS.items():
        for base in ("base", "icl"):
            claim = f"seen tasks with headroom: share of the oracle's gain over {ARMS[base]}{seed}, %"
            yield claim, seen.share(ours, base), 80, False
    for ours, seed in SEEDS.items():
        yield f"siblings: matched less shuffled{seed}", unseen.gap(ours, f"{ours}-shuffled", "sibling"), 20, True
        for theirs, least, above_zero in (("base-description", None, True), ("icl", None, True), (RIVAL, -3, False)):
            yield f"siblings: T2L less {ARMS[theirs]}{seed}", unseen.gap(ours, theirs, "sibling"), least, above_zero
    claim = "siblings: T2L less multi-task LoRA, the description in both prompts"
    yield claim, unseen.gap("t2l-description", RIVAL, "sibling"), 0, False
    for theirs in ("base-description", "icl", "t2l-shuffled"):
        yield f"unseen skills: T2L less {ARMS[theirs]}", unseen.gap("t2l", theirs, "novel"), None, False


def _tasks(part: str) -> Make:
    """Every task of a part with every arm."""
    return lambda result: [flat(task, "part") for task in Part.of(result.others, part).tasks]


table("study-seen", "Tasks that were trained on, held-out inputs and descriptions", "study")(_tasks("seen"))
table("study-unseen", "Tasks that nothing but the oracles was trained on", "study")(_tasks("unseen"))


@table("study-reconstruction", "Reconstruction by number of adapters", "study")
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


@table(
    "study-short", "Shorter runs that vary one thing, beside the first of them, on tasks that both were trained on", "study"
)
def varied(result: Result) -> Iterator[Line]:
    train, siblings = (Part.of(result.others, f"varied/{group}") for group in ("train", "sibling"))
    first, minutes = "short-L", {run["run"]: run["seconds"] / 60 for run in result.records("training")}
    for arm, name in VARIED.items():
        own = train.only(plan.chosen(plan.LEARNABLE, plan.count(plan.RUNS[arm])))
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


@table("study-lengths", "T2L and the multi-task LoRA with descriptions, siblings, by length of training", "study")
def lengths(result: Result) -> Iterator[Line]:
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


@table(
    "study-wordings",
    "What wording costs: how far descriptions tell tasks apart, and learned ones instead of held-out ones",
    "study",
)
def wordings(result: Result) -> Iterator[Line]:
    """``within``: variance of embeddings within a task, %; the next three: how often one held out is nearest to its task."""
    (of,) = result.records("wordings")
    held, learned = (Part.of(result.others, name).column("t2l") for name in ("seen", "learned"))
    more = bounds("learned less held-out descriptions", interval([a - b for a, b in zip(learned, held, strict=True)]))
    yield flat(of) | {"T2L on seen tasks, held-out": mean(held), "T2L on seen tasks, learned": mean(learned)} | more


@table("study-requests", "One request at a time", "study")
def requests(result: Result) -> Iterator[Line]:
    known = {of["arm"]: of for of in result.records("request")}
    for arm, of in known.items():
        yield flat(of) | {"arm": ARMS[arm], "over T2L": of["seconds"] / known["t2l"]["seconds"]}


table("study-curves", "Training loss over tokens", "study")(curves)
table("study-runs", "What was trained", "study")(each("training", "curve", "validation"))
table("study-scalings", "Siblings at other scalings than trained with", "study")(each("scaling"))
table("study-benchmarks", "The paper's ten benchmarks", "study")(each("benchmark"))
table("study-steered", "One input under several descriptions", "study")(each("steered"))
table("study-map", "t-SNE of task embeddings and of trunk outputs", "study")(each("map", "cosines"))


@table("study-card", "What the bundled checkpoint itself scores beside the rivals, for its model card", "study")
def card(result: Result) -> Iterator[Line]:
    for part, group, name in (
        ("seen", "all", f"trained tasks, {{}} of the {len(plan.LEARNABLE)}, unseen inputs and descriptions"),
        ("unseen", "sibling", "unseen siblings of trained tasks, {}"),
        ("unseen", "novel", "tasks of other skills, {}"),
    ):
        shipped, other = Part.of(result.others, f"shipped/{part}"), Part.of(result.others, part)
        ours = shipped.column("t2l", group)
        theirs = {f"{ARMS[arm]}, %": mean(other.column(arm, group)) for arm in ("multi-task", RIVAL, "icl", "oracle")}
        shuffled = mean(shipped.column("t2l-shuffled", group))
        name = {"tasks": name.format(len(ours))}
        yield {**name, "this checkpoint, %": mean(ours), "another task's description, %": shuffled, **theirs}
