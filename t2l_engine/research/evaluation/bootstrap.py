"""Bootstrap intervals over tasks: percentiles of 10,000 resamples with a fixed seed."""

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


def interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of ``values``, one per task; of differences of two methods on the same tasks for a paired interval.

    Raises ValueError for no values.
    """
    if not len(values):
        raise ValueError("values: expected one a task, got none")
    return _of_mean(tuple(map(float, values)), level, seed)


@functools.lru_cache(maxsize=1 << 12)  # the pages of a report ask for the same ones again
def _of_mean(values: tuple[float, ...], level: float, seed: int) -> Interval:
    array = np.asarray(values, dtype=np.float64)
    return _interval(float(array.mean()), array[_resampled(len(array), seed)].mean(axis=1), level)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The sum of ``numerators`` over the sum of ``denominators``, one of each per task; ``mean`` is the quotient.

    Raises ValueError for no values, unequal numbers of them, or denominators that sum to zero.
    """
    above, below = (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
    if not len(above) or len(above) != len(below):
        raise ValueError(f"denominators: expected one a task as numerators, got {len(below)} beside {len(above)}")
    if not below.sum():
        raise ValueError("denominators: expected a sum other than zero")
    chosen = _resampled(len(above), seed)
    sums = below[chosen].sum(axis=1)
    kept = sums != 0
    return _interval(float(above.sum() / below.sum()), above[chosen].sum(axis=1)[kept] / sums[kept], level)


def _resampled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _interval(value: float, resampled: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
