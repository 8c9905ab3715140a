"""Bootstrap intervals over tasks: 95 % percentiles of 10,000 resamples with a fixed seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic over tasks with its percentile interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], counts: Sequence[float] | None = None) -> Interval:
    """The mean of ``values``, one per task; of differences of two methods on the same tasks for a paired interval.

    ``counts``: how many tasks each of ``values`` is the sum over, such as those of a family; None: one.

    Raises ValueError for no values, or another number of counts.
    """
    if not len(values):
        raise ValueError("values: expected one a task, got none")
    return _interval(tuple(map(float, values)), None if counts is None else tuple(counts))


@functools.lru_cache(maxsize=1 << 12)  # the pages of a report ask for the same ones again
def _interval(values: tuple[float, ...], counts: tuple[float, ...] | None) -> Interval:
    pairs = np.array(list(zip(values, counts or [1.0] * len(values), strict=True)))
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.divide(*pairs[drawn].sum(axis=1).T), [0.025, 0.975])
    return Interval(*map(float, (np.divide(*pairs.sum(axis=0)), low, high)))
