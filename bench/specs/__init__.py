"""The study of unseen sentences: T2L on thousands of specifications made by code.  ``python -m bench specs``."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Record
    from bench.specs.runs import Specifications


def records(work: Path, specifications: Specifications) -> Iterator[Record]:
    """Every record of the result file but the run line; evaluations and tuning runs that were made before are read.

    ``specifications``: those of the plan, whose tasks are in ``work``.  Where runs of the plan have not been trained, what
    they are needed for is left out, and the first record names them.
    """
    from bench import judging  # here: tables read names of this package without them
    from bench.harness import BenchError, record
    from bench.specs import adapting, plan, runs
    from t2l_engine.hypernetwork.folder import WEIGHTS_NAME

    without = [name for name in runs.lacking(work) if name in plan.STUDY]
    if plan.T2L in without:
        raise BenchError(f"--work: expected the finished run {plan.T2L} in {work}, found none with the plan's settings")
    there = lambda arms: [arm for arm in arms if plan.NEEDS.get(arm) not in without]  # noqa: E731
    weights = hashlib.sha256((runs.rounded(plan.T2L, work) / WEIGHTS_NAME).read_bytes()).hexdigest()
    yield record("plan", checkpoint=weights, held_out_evaluations=plan.PLAN["held_out_evaluations"], lacking=without)
    for new in ("value", "combination"):
        yield record(
            "siblings", new=new, tasks=[placed.spec.name for placed in specifications.held_out if placed.new == new]
        )
    earlier = [name for name in plan.EARLIER if name not in without]
    for part in plan.PARTS:
        if runs.folder_of(work, part).is_dir():  # tasks of other origin are the user's to bring
            found = runs.judged(part, work, arms=there(plan.ARMS))
            for name in earlier if part in plan.SUITE_PARTS else ():
                for task, scores in runs.judged(part, work, name, [plan.T2L])["tasks"].items():
                    found["tasks"][task][name] = scores[plan.T2L]
            yield from judging.part_records(part, found)
            yield record(
                "two_answers", part=part, tasks=runs.with_two_answers(runs.folder_of(work, part), [*found["tasks"]])
            )
    if plan.LIBRARY not in without:
        for split, wordings in itertools.product(plan.SPLITS, plan.WORDINGS):
            both, unseen = (plan.T2L, "oracle"), (split, wordings) == plan.UNSEEN
            found = runs.stored(work, split, wordings, there(plan.STORED_ARMS) if unseen else both)
            if unseen:
                yield from judging.part_records(plan.STORED, found)
                two = runs.with_two_answers(runs.folder_of(work, plan.TRAINED), [*found["tasks"]])
                yield record("two_answers", part=plan.STORED, tasks=two)
            means = {arm: round(found["summary"]["all"]["mean"][arm], 2) for arm in both}
            yield record("stored", split=split, wordings=wordings, scores=means)
    yield from adapting.rates(work, specifications)
    yield from trained(work, [name for name in plan.STUDY if name not in without])


def trained(work: Path, names: Iterable[str]) -> Iterator[Record]:
    """``training`` records of the finished runs ``names``."""
    from bench import training
    from bench.specs import plan, runs

    for name in names:
        run = plan.RUNS[name]
        yield training.trained(name, run, work / name, len(runs.learnt(run, work)[1]) if run.other else None)
