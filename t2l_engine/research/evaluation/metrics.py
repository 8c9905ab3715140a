"""Scores of one answer; intervals over tasks: 95 % percentiles of 10,000 bootstrap resamples with a fixed seed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from t2l_engine.research.tasks.folder import family_of, parse_number
from t2l_engine.text.choices import fit_temperature, softmax

_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # "-" after a digit or a letter is a hyphen
_WORD = re.compile(r"\w+")


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Equality after stripping white space; case and punctuation matter.

    >>> exact_match(" Paris", ["Paris"]), exact_match("Paris.", ["Paris"])
    (True, False)
    """
    return answer.strip() in {a.strip() for a in accepted}


def containment(answer: str, accepted: Sequence[str]) -> bool:
    """Whether ``answer`` contains an accepted answer as whole words, ignoring case.

    >>> containment("It is Paris.", ["paris"]), containment("Parisian", ["Paris"])
    (True, False)
    """
    text = answer.casefold()
    for wanted in (a.strip().casefold() for a in accepted):
        start, end = (r"(?<!\w)" if wanted[:1].isalnum() else ""), (r"(?!\w)" if wanted[-1:].isalnum() else "")
        if wanted and re.search(start + re.escape(wanted) + end, text):
            return True
    return False


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of case-folded words, the best over ``accepted``; in [0, 1].

    Not comparable to the ``rouge_score`` package, which splits words in another way and can stem them.

    >>> rouge_l("the cat sat", ["the black cat"])
    0.6666666666666666
    """
    return max(_f1(answer.casefold().strip(), a.casefold().strip()) for a in accepted)


def _f1(answer: str, accepted: str) -> float:
    words, wanted = _WORD.findall(answer), _WORD.findall(accepted)
    if not words or not wanted:
        return float(answer == accepted)  # punctuation only
    row = [0] * (len(wanted) + 1)
    for word in words:
        above = 0  # entry of the row above, one to the left
        for i, other in enumerate(wanted, start=1):
            above, row[i] = row[i], above + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(words) + len(wanted))


def last_number(text: str) -> float | None:
    """The last number in ``text``, with or without thousands separators; None if there is none.

    >>> last_number("so 3 x 400 = 1,200 apples."), last_number("none")
    (1200.0, None)
    """
    found = _NUMBER.findall(text)
    return parse_number(found[-1]) if found else None


def number_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the last number of ``answer`` is an accepted one."""
    number = last_number(answer)
    return number is not None and number in {parse_number(a) for a in accepted}


BINS = 10


def calibration(rows: Sequence[tuple[Sequence[float], Sequence[bool]]]) -> dict[str, float]:
    """How well probabilities of given answers fit: of pairs (log-probabilities, which of the answers are right).

    "calibration_error": the expected one over 10 bins of equal width (Guo et al. 2017), in [0, 1].  "brier": the mean over
    the pairs of the sum over their answers of (probability - [right])^2, in [0, 2].  Those with the suffix "_fitted" are at
    the temperature that fits the other half of the pairs, every second one; "temperature" fits all.
    """
    labelled = [(scores, [*right].index(True)) for scores, right in rows]
    halves = [fit_temperature(labelled[of::2]) for of in (1, 0)] if len(rows) > 1 else [1.0, 1.0]
    plain, fitted = ([softmax(scores, t[i % 2]) for i, (scores, _) in enumerate(rows)] for t in ((1.0, 1.0), halves))
    found = {"items": float(len(rows)), "temperature": fit_temperature(labelled)}
    for suffix, probabilities in (("", plain), ("_fitted", fitted)):
        both = [(p, right) for p, (_, right) in zip(probabilities, rows, strict=True)]
        bins: dict[int, list[float]] = {}
        for p, right in both:
            most = max(range(len(p)), key=p.__getitem__)
            bins.setdefault(min(int(p[most] * BINS), BINS - 1), []).append(p[most] - right[most])
        found[f"calibration_error{suffix}"] = sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows)
        found[f"brier{suffix}"] = sum((x - y) ** 2 for p, right in both for x, y in zip(p, right, strict=True)) / len(rows)
    return found


RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic over tasks with its percentile interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], counts: Sequence[float] | None = None) -> Interval:
    """The mean of ``values``, one per task; of differences of two methods on the same tasks for a paired interval.

    ``counts``: how many tasks each of ``values`` is the sum over, as :func:`by_family` gives them; None: one.

    Raises ValueError for no values, or another number of counts.
    """
    if not len(values):
        raise ValueError("values: expected one a task, got none")
    return _interval(tuple(map(float, values)), None if counts is None else tuple(counts))


def by_family(values: Mapping[str, float]) -> tuple[list[float], list[int]]:
    """``values`` by task -> (sum over the tasks, number of tasks) of each family.

    :func:`interval` of these draws families, each with all of its tasks, which are alike.
    """
    found: dict[str, list[float]] = {}
    for task, value in values.items():
        found.setdefault(family_of(task), []).append(value)
    return [sum(of) for of in found.values()], [len(of) for of in found.values()]


@functools.lru_cache(maxsize=1 << 12)  # the pages of a report ask for the same ones again
def _interval(values: tuple[float, ...], counts: tuple[float, ...] | None) -> Interval:
    pairs = np.array(list(zip(values, counts or [1.0] * len(values), strict=True)))
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.divide(*pairs[drawn].sum(axis=1).T), [0.025, 0.975])
    return Interval(*map(float, (np.divide(*pairs.sum(axis=0)), low, high)))
