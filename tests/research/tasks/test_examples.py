"""Which examples are the same, which are chosen, and where each falls."""

import dataclasses
import random

import pytest

from t2l_engine.research.tasks.examples import choose, example_digest, normalise, pool, split
from t2l_engine.research.tasks.folder import Example


def example(text, *outputs):
    return Example(text, outputs or (f"answer to {text}",), "train")


def numbered(count):
    return [example(f"question {i}") for i in range(count)]


def shuffled(values, seed):
    return random.Random(seed).sample(values, len(values))


def test_the_same_input_is_pooled_and_its_outputs_follow_in_order():
    pooled = pool(
        [example(" An  Ant ", "x", "y"), example("bee", "z"), example("an\tant", "y", "w"), example("AN ANT", "x")]
    )
    assert pooled == [example(" An  Ant ", "x", "y", "w"), example("bee", "z")]


def test_outputs_are_pooled_where_they_are_judged_alike():
    first, other = (Example("Which?", (c,), "test", "options", ("a", c)) for c in "bc")
    again = dataclasses.replace(first, outputs=("a",), split="train")
    assert pool([first, other, again, example("which?", "z")]) == [dataclasses.replace(first, outputs=("b", "a"))]
    assert split([first])[0].options == ("a", "b")


def test_digests_ignore_space_and_case_of_the_input_alone():
    assert normalise(" Straße\n\nX ") == "strasse x"
    assert example_digest("An  ant", "x") == example_digest("an ant ", "x")
    assert len({example_digest("an ant", "x"), example_digest("an ant", "X"), example_digest("an", "ant x")}) == 3


def test_choice_and_split_do_not_depend_on_the_order_of_a_file():
    values = numbered(300)
    expected = split(choose(values, 200))
    for seed in range(5):
        assert split(choose(shuffled(values, seed), 200)) == expected
    assert split(choose(values, 100)) != expected[:100]  # another 100 examples, in their own splits
    assert {e.input for e in choose(values, 100)} < {e.input for e in choose(values, 200)}


def test_short_examples_are_preferred():
    values = [example(f"{i} " + "long " * 200) for i in range(50)] + numbered(40)
    chosen = choose(values, 60)
    assert sum(len(e.input) < 900 for e in chosen) == 40 and len(chosen) == 60
    assert choose(values, 40) == choose(numbered(40))
    assert len(choose([example("x", "y" * 900)], 1)) == 1  # long ones rather than none


@pytest.mark.parametrize("count, expected", [
    (200, (130, 20, 50)), (120, (78, 12, 30)), (60, (39, 6, 15)), (7, (5, 1, 1)), *((n, (n, 0, 0)) for n in range(3)),
])  # fmt: skip
def test_shares_of_the_splits(count, expected):
    names = [e.split for e in split(numbered(count))]
    assert tuple(names.count(name) for name in ("train", "val", "test")) == expected


def test_no_input_is_in_two_splits():
    values = [example(text, str(i)) for i in range(4) for text in (f"  Word {n % 50}" for n in range(200))]
    found = split(values)
    assert len(found) == 50 and len({normalise(e.input) for e in found}) == 50
    assert all(e.outputs == ("0", "1", "2", "3") for e in found)
