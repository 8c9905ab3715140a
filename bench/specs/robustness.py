"""The study's first T2L with another seed, and its multi-task LoRA with other ranks.  ``python -m bench robustness``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.harness import Record, record
from bench.specs import runs, trained
from bench.specs.plan import AGAIN, DEVELOPMENT, PLAN, RANKS, RIVAL, ROBUSTNESS, SUITE_PARTS, T2L

#: Arms of the run AGAIN.
AGAIN_ARMS = (T2L, "t2l-shuffled")


def records(work: Path) -> Iterator[Record]:
    """Every record of the result file but the run line, from the runs that are finished; tasks are in ``work``.

    ``scores`` records: of AGAIN on all tiers of the suite, of RANKS on development tasks alone, by the names of runs.
    """
    lacking = [name for name in runs.lacking(work) if name in ROBUSTNESS]
    yield record("plan", held_out_evaluations=PLAN["held_out_evaluations"], lacking=lacking)
    for part in SUITE_PARTS:
        scores: dict[str, dict[str, float]] = {}
        for name in RANKS if part == DEVELOPMENT else ():
            if name not in lacking:
                for task, of in runs.judged(part, work, name, [RIVAL])["tasks"].items():
                    scores.setdefault(task, {})[name] = round(of[RIVAL], 2)
        if AGAIN not in lacking:
            for task, of in runs.judged(part, work, AGAIN, AGAIN_ARMS)["tasks"].items():
                again = {arm.replace(T2L, AGAIN): round(of[arm], 2) for arm in AGAIN_ARMS}
                scores[task] = scores.get(task, {}) | again
        yield from (record("scores", part=part, task=task, groups=["all"], scores=of) for task, of in scores.items())
    yield from trained(work, [name for name in ROBUSTNESS if name not in lacking])
