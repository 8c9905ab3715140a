"""Scores of one answer against values found by hand, and intervals over tasks."""

import dataclasses
import doctest
import math
import random

import pytest

from t2l_engine.research.evaluation import metrics
from t2l_engine.research.evaluation.metrics import (
    Interval,
    by_family,
    containment,
    exact_match,
    interval,
    last_number,
    number_match,
    rouge_l,
)
from t2l_engine.research.tasks.folder import family_of


def test_examples_run():
    result = doctest.testmod(metrics)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("answer, accepted, exact, contained", [
    ("Paris", ["Paris"], True, True), (" Paris\t\n", ["\u00a0Paris"], True, True), ("paris", ["Paris"], False, True),
    ("Paris.", ["Paris"], False, True), ("It is (Paris)!", ["Rome", "Paris"], False, True),
    ("Parisian", ["Paris"], False, False),
    ("in New  York", ["New York"], False, False),  # white space inside counts
    ("", ["Paris"], False, False),
    ("", [""], True, False),  # what is empty stands nowhere
    ("anything", ["", " "], False, False), ("STRASSE", ["Straße"], False, True),
    ("Der Straßenname", ["Straße"], False, False), ("Ångström", ["ångström"], False, True),
    ("答えは東京 です", ["東京"], False, False),  # no word of its own: scripts without spaces
    ("東京", ["東京"], True, True),
    ("What? :-)", [":-)"], False, True),  # no word: anywhere
    ("a.b", ["a*b", "a.b"], True, True),
    ("axb", ["a.b"], False, False),  # no pattern
    ("3 of 12", ["1"], False, False), ("12", ["12"], True, True),
])  # fmt: skip
def test_exact_match_and_containment(answer, accepted, exact, contained):
    assert exact_match(answer, accepted) is exact and containment(answer, accepted) is contained


@pytest.mark.parametrize("answer, accepted, expected", [
    ("police killed the gunman", ["police kill the gunman"], 2 * 3 / 8),
    ("the gunman kill police", ["police kill the gunman"], 2 * 2 / 8),  # in order: "the gunman"
    ("a b c d", ["a c d b"], 2 * 3 / 8), ("a a a", ["a"], 2 * 1 / 4),
    ("a", ["x y z", "a b", "b a c"], 2 * 1 / 3),  # the best
    ("The CAT, sat!", ["the cat sat"], 1.0), ("naïve Straße", ["NAÏVE STRASSE"], 1.0),
    ("it's 3.5", ["it s 3 5"], 1.0),  # punctuation separates
    ("x", ["y"], 0.0), ("", ["a"], 0.0), ("a", [""], 0.0), ("", [""], 1.0),
    ("?", ["!"], 0.0),  # without a word: equality
    (" ?", ["?"], 1.0), ("?", [""], 0.0),
])  # fmt: skip
def test_rouge_l(answer, accepted, expected):
    assert rouge_l(answer, accepted) == expected


@pytest.mark.parametrize("text, expected", [
    ("", None), ("none", None), ("-", None), ("42", 42.0), ("so 3 x 400 = 1,200 apples.", 1200.0),
    ("1,234,567.89", 1234567.89),
    ("#### 1,000,", 1000.0),  # a comma of the sentence
    ("3, 4", 4.0), ("it costs $5.", 5.0), ("$-5.50!", -5.5), ("-7", -7.0), ("x=-7", -7.0), ("+3", 3.0), (".5", 0.5),
    ("-.5", -0.5),
    ("5-3", 3.0),  # a hyphen, no sign
    ("10-12 apples", 12.0), ("2 - 3", 3.0), ("half: 50%", 50.0), ("3rd", 3.0), ("٣", 3.0), ("x²", None),
    ("9" * 400, None),  # beyond what a float holds
])  # fmt: skip
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize("answer, accepted, expected", [
    ("The answer is 1,200.", ["1200"], True),
    ("The answer is 1200.00", ["1,200"], True), ("12 and then 13", ["12"], False), ("12", ["11", "12"], True),
    ("-12", ["12"], False), ("no number", ["12"], False), ("", ["0"], False),
    ("1000", ["1e3"], True),  # an accepted number is read as in the task's file
    ("3", ["1e3"], False), ("9" * 400, ["9" * 400], False),
])  # fmt: skip
def test_number_match(answer, accepted, expected):
    assert number_match(answer, accepted) is expected


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_is_deterministic_and_contains_the_mean():
    draw = random.Random(0)
    values = [draw.gauss(10, 5) for _ in range(6)]
    found = interval(values)
    assert found == interval(tuple(values)) and found.low < found.mean < found.high
    assert found.mean == pytest.approx(sum(values) / 6) and min(values) <= found.low and found.high <= max(values)
    moved, scaled = interval([v + 7 for v in values]), interval([2 * v for v in values])
    for name in dataclasses.asdict(found):
        assert getattr(moved, name) == pytest.approx(getattr(found, name) + 7)
        assert getattr(scaled, name) == pytest.approx(2 * getattr(found, name))


def test_interval_resamples_with_replacement():
    """Means of two tasks, 0 and 100: 0 in a quarter of the draws, 50 in a half, 100 in a quarter."""
    assert interval([0.0, 100.0]) == Interval(50.0, 0.0, 100.0)


def test_interval_errors():
    with pytest.raises(ValueError, match="^values: expected one a task, got none"):
        interval([])
    with pytest.raises(ValueError, match="zip"):
        interval([1.0], [1, 2])


def test_values_may_be_sums_over_several_tasks():
    above, below = [3.0, 0.0, 9.0], [4, 2, 6]
    found = interval(above, below)
    assert found.mean == 1.0 and found.low < 1 < found.high
    assert interval([2.0 * b for b in below], below) == Interval(2.0, 2.0, 2.0)  # paired: nothing varies
    assert interval([1.0, 4.0], [1, 2]) == Interval(5 / 3, 1.0, 2.0)  # either task alone is the widest there is


def test_families_are_drawn_with_all_of_their_tasks():
    """Of two families either alone is the widest there is; the mean is that over tasks."""
    assert [family_of(name) for name in ("keep_kind-007", "a-b-1000", "syn_plural", "arc-easy", "x-1.5")] == [
        "keep_kind", "a-b", "syn_plural", "arc-easy", "x-1.5",
    ]  # fmt: skip
    values = {"a-000": 0.0, "b-000": 10.0, "a-001": 20.0, "a-002": 40.0}
    assert by_family(values) == ([60.0, 10.0], [3, 1])
    assert interval(*by_family(values)) == Interval(17.5, 10.0, 20.0)
    alone = {"x": 1.0, "y": 5.0, "z": 3.0}  # tasks without a family are one each
    assert interval(*by_family(alone)) == interval([1.0, 5.0, 3.0])


def test_calibration():
    """By hand: 3 of 4 answers at 0.8 are right, and 1 of 2 at 0.6; then a fit that undoes a factor of the scores."""
    rows = [([math.log(p), math.log(1 - p)], [right, not right]) for p, right in
            [(0.8, True), (0.8, True), (0.8, True), (0.8, False), (0.6, True), (0.6, False)]]  # fmt: skip
    found = metrics.calibration(rows)
    assert found["items"] == 6 and found["calibration_error"] == pytest.approx((4 * 0.05 + 2 * 0.1) / 6)
    assert found["brier"] == pytest.approx(2 * (3 * 0.04 + 0.64 + 0.16 + 0.36) / 6)
    drawn = random.Random(0)
    true = [drawn.uniform(0.5, 1) for _ in range(4000)]
    rows = [([4 * math.log(p / (1 - p)), 0.0], [hit, not hit]) for p in true for hit in [drawn.random() < p]]
    found = metrics.calibration(rows)
    assert found["temperature"] == pytest.approx(4, rel=0.1)
    assert found["calibration_error_fitted"] < 0.03 < 0.1 < found["calibration_error"]
    assert found["brier_fitted"] < found["brier"]
