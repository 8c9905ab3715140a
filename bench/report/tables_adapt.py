"""The tables of tuning on a user's examples: starts beside PEFT's, claims beside their targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.records import Result
from bench.report.tables import Claim, Line, bounds, judged, mean, table
from bench.report.tables_specs import ARMS, TIERS
from bench.specs.plan import HELD_OUT, RIVAL
from t2l_engine.research.evaluation.bootstrap import Interval, interval, ratio

PEFT, OURS = "peft", "generated-examples"
#: Start of tuning -> what it is called.
STARTS = {
    PEFT: "PEFT's: A at random, B zero",
    "generated": "generated from the description",
    OURS: "generated from description and examples",
    "nearest": "stored adapter with the nearest descriptions",
    RIVAL: ARMS[RIVAL],
}
Losses = Sequence[tuple[int, float]]
#: How near to PEFT's lowest loss a start has come: within so much of the way that PEFT's comes down.
NEAR = {"within 5 %": 0.05, "within 1 %": 0.01, "lowest": 0.0}


def _by_start(result: Result, tiers: Sequence[str] = HELD_OUT) -> dict[int, dict[str, list[Line]]]:
    """By budget and start a line for each task of ``tiers``, in one order: the mean of its seeds.

    Each is beside PEFT's start, and where it is there, OURS, with the same seed.
    """
    own = [of for of in result.records("adapted") if of["tier"] in tiers]
    peft, ours = (
        {(of["budget"], of["task"], of["seed"]): of for of in own if of["start"] == start} for start in (PEFT, OURS)
    )
    found: dict[int, dict[str, dict[str, list[Line]]]] = {}
    for of in own:
        key = of["budget"], of["task"], of["seed"]
        theirs = peft[key]
        other = next((by for (*task, seed), by in peft.items() if (*task,) == key[:2] and seed != key[2]), None)
        lowest = min(loss for _, loss in of["losses"])
        kept = first(of["losses"], lowest)
        line = {
            "right": of["right"],
            "more": of["right"] - theirs["right"],
            "loss before": of["losses"][0][1],
            "lowest loss": lowest,
            "kept": kept,
            "last": 100.0 * (kept == of["losses"][-1][0]),
        }
        for name, share in NEAR.items():
            target = near(theirs["losses"], share)
            line |= {
                f"loss, {name}": target,
                f"steps, {name}": first(of["losses"], target),
                f"PEFT's steps, {name}": first(theirs["losses"], target),
                f"reached, {name}": 100.0 * (lowest <= target),
            }
            line |= {f"other seed's steps, {name}": first(other["losses"], target)} if other else {}
        line |= {"before": of["before"]} if "before" in of else {}
        line |= {"less": ours[key]["right"] - of["right"]} if key in ours else {}
        found.setdefault(of["budget"], {}).setdefault(of["start"], {}).setdefault(of["task"], []).append(line)
    return {
        budget: {start: [_means(tasks[task]) for task in sorted(tasks)] for start, tasks in starts.items()}
        for budget, starts in found.items()
    }


def _means(lines: Sequence[Line]) -> Line:
    return {name: statistics.fmean(line[name] for line in lines) for name in lines[0]} | {"seeds": len(lines)}


def _column(tasks: Sequence[Line], name: str) -> list[float]:
    return [of[name] for of in tasks]


def near(losses: Losses, share: float) -> float:
    """A loss near the lowest: ``share`` of the way to that of the start.

    The lowest itself is the best of many noisy validations, which an equal start need not reach.  Much of the way down is
    the format of the answers: within a twentieth of it a loss can still be several times the lowest.
    """
    lowest = min(loss for _, loss in losses)
    return lowest + share * max(0.0, losses[0][1] - lowest)


def first(losses: Losses, target: float) -> int:
    """The first step whose loss is at most ``target``, or the last step."""
    return next((step for step, loss in losses if loss <= target), losses[-1][0])


@table("adapt", "Tuning on a user's examples by where it starts, unseen specifications", "adapt")
def _starts(result: Result) -> Iterator[Line]:
    """Means over tasks; losses are of validation examples.  Steps: to PEFT's lowest loss, or near it, see :data:`NEAR`; a
    start that never comes there counts with all.  PEFT's other seed: the steps that it takes to the same losses.

    Differences are to the other start with the same seeds, of which some starts have fewer.
    """
    for tier, among in ({"both": HELD_OUT} | {TIERS[tier]: (tier,) for tier in HELD_OUT}).items():
        for budget, starts in _by_start(result, among).items():
            for start, tasks in starts.items():
                other, beside = start != PEFT, "less" in tasks[0] and start != OURS
                yield {
                    "tier": tier,
                    "examples": budget,
                    "start": STARTS[start],
                    "tasks": len(tasks),
                    "seeds": tasks[0]["seeds"],
                    "right before, %": mean(_column(tasks, "before")) if "before" in tasks[0] else None,
                    **bounds("right, %", interval(_column(tasks, "right"))),
                    **bounds("right, less PEFT's start", interval(_column(tasks, "more")) if other else None),
                    **bounds("right, generated start less this", interval(_column(tasks, "less")) if beside else None),
                    **{name: mean(_column(tasks, name)) for name in ("loss before", "lowest loss")},
                    "step kept": mean(_column(tasks, "kept")),
                    "best at the last step, %": mean(_column(tasks, "last")),
                    **{
                        f"{what}, {name}": mean(_column(tasks, f"{what}, {name}"))
                        for name in NEAR
                        for what in ("loss", "steps")
                    },
                    **{f"tasks that reach it, {name}, %": mean(_column(tasks, f"reached, {name}")) for name in NEAR},
                    **{f"PEFT's other seed, {name}": _other_seed(tasks, name) for name in NEAR},
                    **{key: bound for name in NEAR for key, bound in _of_pefts(tasks, name, other).items()},
                }


def _other_seed(tasks: Sequence[Line], name: str) -> float | None:
    column = f"other seed's steps, {name}"
    return mean(_column(tasks, column)) if column in tasks[0] else None


def _of_pefts(tasks: Sequence[Line], name: str, other: bool) -> Line:
    steps, of_peft = _column(tasks, f"steps, {name}"), _column(tasks, f"PEFT's steps, {name}")
    return bounds(f"of PEFT's steps, {name}", ratio(steps, of_peft) if other and any(of_peft) else None)


@table("adapt-claims", "Claims of tuning on a user's examples beside their targets, 95 % intervals over tasks", "adapt")
def _judged(result: Result) -> Iterator[Line]:
    """Of the start that ``t2l adapt`` has with this checkpoint: from description and examples."""
    return judged(_claims(result))


def _claims(result: Result) -> Iterator[Claim]:
    for budget, starts in _by_start(result).items():
        yield f"{budget} examples: right, generated start less PEFT's", interval(_column(starts[OURS], "more")), None, True
        for name in NEAR:
            of = ratio(_column(starts[OURS], f"steps, {name}"), _column(starts[OURS], f"PEFT's steps, {name}"))
            saved = Interval(100 - 100 * of.mean, 100 - 100 * of.high, 100 - 100 * of.low)
            yield (
                f"{budget} examples: steps saved to PEFT's lowest loss{'' if name == 'lowest' else ', ' + name}, %",
                saved,
                50,
                False,
            )


@table("adapt-rates", "Learning rates of `t2l adapt` at its own settings, development tasks", "rates", optional=True)
def _rates(result: Result) -> Iterator[Line]:
    """Means over tasks.  Losses, and the step that is kept: of what ``t2l adapt`` holds out; right: of test items."""
    tried = result.records("plan")[0]["rates"]["tried"]
    by_name: dict[str, dict[str, Line]] = {name: {} for name in tried}
    for of in result.records("rate"):
        by_name[of["settings"]][of["task"]] = of
    first = by_name[next(iter(tried))]
    for name, tasks in by_name.items():
        column = lambda what, tasks=tasks: [tasks[task][what] for task in sorted(tasks)]  # noqa: E731
        less = [tasks[task]["right"] - first[task]["right"] for task in sorted(tasks)]
        yield {
            "learning rate": tried[name]["learning_rate"],
            "min_delta": tried[name]["min_delta"],
            "tasks": len(tasks),
            "examples": max(of["examples"] + of["held_out"] for of in tasks.values()),
            **bounds("right, %", interval(column("right"))),
            **bounds("right, less the first row", interval(less) if tasks is not first else None),
            **{what.replace("_", " "): mean(column(what)) for what in ("loss_before", "loss_after", "steps", "best_step")},
        }
