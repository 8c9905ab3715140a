"""Intervals by resampling tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over tasks with a percentile interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of ``values``, one a task, and its bootstrap interval over tasks (percentiles of 10,000 resampled means).

    Give differences of two arms on the same tasks for a paired interval.  Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("values: expected one a task, got none")
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))
