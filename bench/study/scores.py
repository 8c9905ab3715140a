"""Scores of the study's result file by part, arm and task, and statistics over tasks: paired bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from t2l_engine.research.evaluation import bootstrap
from t2l_engine.research.evaluation.bootstrap import Interval


@dataclasses.dataclass(frozen=True)
class Part:
    """One evaluation: records of kind ``scores``, one a task, and those of kind ``arm`` by arm."""

    tasks: Sequence[Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def of(records: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Part:
        """Part ``name`` of the records by kind; empty where it was not measured."""
        tasks, arms = ([r for r in records.get(kind, ()) if r["part"] == name] for kind in ("scores", "arm"))
        return Part(tasks, {r["arm"]: r for r in arms})

    def only(self, names: Collection[str]) -> Part:
        """The same with those of its tasks that are among ``names``."""
        return Part([task for task in self.tasks if task["task"] in names], self.arms)

    def group(self, group: str) -> list[Mapping[str, Any]]:
        return [task for task in self.tasks if group in task["groups"]]

    def column(self, arm: str, group: str = "all") -> list[float]:
        """Scores of ``arm`` on the tasks of ``group`` that it answered, in percent."""
        return [task["scores"][arm] for task in self.group(group) if arm in task["scores"]]

    def gap(self, ours: str, theirs: str, group: str = "all") -> Interval | None:
        """``ours`` less ``theirs`` on tasks of ``group`` that both answered, in points; None where there is none."""
        scores = [task["scores"] for task in self.group(group)]
        paired = [of[ours] - of[theirs] for of in scores if ours in of and theirs in of]
        return bootstrap.interval(paired) if paired else None

    def share(self, arm: str, base: str) -> Interval | None:
        """Percent of the oracle's gain over ``base`` that ``arm`` has, of means over tasks; None where one is missing."""
        ours, low, high = (self.column(name) for name in (arm, base, "oracle"))
        if not ours or not len(ours) == len(low) == len(high):
            return None
        gain = [100 * (a - b) for a, b in zip(ours, low, strict=True)]
        return bootstrap.ratio(gain, [a - b for a, b in zip(high, low, strict=True)])
