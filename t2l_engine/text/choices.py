"""Probabilities of a few given answers: from log-probabilities, and the temperature that calibrates them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """``softmax(scores / temperature)``."""
    greatest = max(scores)
    weights = [math.exp((score - greatest) / temperature) for score in scores]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]


def fit_temperature(labelled: Sequence[tuple[Sequence[float], int]]) -> float:
    """The temperature in [0.01, 100] that makes right answers likeliest (Guo et al. 2017, section 4.2).

    ``labelled``: pairs of scores and the index of the right one.  Raises ValueError for none.
    """
    if not labelled:
        raise ValueError("labelled: expected at least one pair, got none")
    low, high = math.log(0.01), math.log(100)
    for _ in range(50):  # the likelihood is concave in 1 / temperature: its slope changes its sign once
        middle = (low + high) / 2
        slope = 0.0
        for scores, right in labelled:
            probabilities = softmax(scores, math.exp(middle))
            slope += scores[right] - math.fsum(p * s for p, s in zip(probabilities, scores, strict=True))
        low, high = (low, middle) if slope >= 0 else (middle, high)
    return math.exp(low)
