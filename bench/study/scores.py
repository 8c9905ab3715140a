"""Scores of the study's result file by part, arm and task, and statistics over tasks: paired bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from t2l_engine.research.evaluation import bootstrap
from t2l_engine.research.evaluation.bootstrap import Interval


def mean_over(unit: Callable[[str], str] | None, values: Mapping[str, float]) -> Interval | None:
    """The mean of ``values`` by task, with an interval over units: what ``unit`` says of a task, None: tasks themselves."""
    if not values:
        return None
    if unit is None:
        return bootstrap.interval(list(values.values()))
    units: dict[str, list[float]] = {}
    for task, value in values.items():
        units.setdefault(unit(task), []).append(value)
    return bootstrap.ratio([sum(of) for of in units.values()], [len(of) for of in units.values()])


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

    def gap(self, ours: str, theirs: str, group: str = "all", unit: Callable[[str], str] | None = None) -> Interval | None:
        """``ours`` less ``theirs`` on tasks of ``group`` that both answered, in points; None where there is none.

        ``unit``: what is resampled by task, None: tasks.
        """
        both = [task for task in self.group(group) if ours in task["scores"] and theirs in task["scores"]]
        return mean_over(unit, {task["task"]: task["scores"][ours] - task["scores"][theirs] for task in both})

    def share(self, arm: str, base: str) -> Interval | None:
        """Percent of the oracle's gain over ``base`` that ``arm`` has, of means over tasks; None where one is missing."""
        ours, low, high = (self.column(name) for name in (arm, base, "oracle"))
        if not ours or not len(ours) == len(low) == len(high):
            return None
        gain = [100 * (a - b) for a, b in zip(ours, low, strict=True)]
        return bootstrap.ratio(gain, [a - b for a, b in zip(high, low, strict=True)])
