"""What a repeat draws for a method, and when adapters count as the same."""

import re
import string

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.research.evaluation.methods import SHOTS, Generated, Routed, Stored, junk, partners, shots_of
from t2l_engine.research.tasks.folder import Example, family_of
from t2l_specs import synthetic
from tests.research.evaluation.conftest import random_stack, task

TASKS = [task(f"task{i}", descriptions=[f"Do {i}.", f"Do {i}, please."][: 1 + i % 2]) for i in range(5)]


@pytest.mark.parametrize("count", [2, 3, 40])
def test_partners_are_a_derangement(count):
    names = [f"task{i}" for i in range(count)]
    drawn = [partners(names, repeat) for repeat in range(6)]
    for found in drawn:
        assert list(sorted(found)) == sorted(found.values()) == sorted(names)
        assert all(name != other for name, other in found.items())
    assert drawn[0] == partners(list(names), 0)
    if count > 3:
        assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_partners_of_the_same_family():
    """A derangement of each family; a task that is alone in its family has none."""
    families = {"cut": 2, "keep_kind": 6, "wrap": 6, "alone": 1}
    names = [f"{family}-{i:03}" for i in range(6) for family, count in families.items() if i < count] + ["other"]
    drawn = [partners(names, repeat, family_of) for repeat in range(4)]
    for found in drawn:
        assert set(found) == set(found.values()) == {*names} - {"alone-000", "other"}
        assert all(name != other and family_of(name) == family_of(other) for name, other in found.items())
    keep, wrap = ([other[-3:] for name, other in sorted(drawn[0].items()) if name.startswith(f)] for f in ("keep", "wrap"))
    assert keep != wrap and drawn[0] != drawn[1] and drawn[0] == partners(names, 0, family_of)
    assert partners(["a-1", "b-1"], 0, family_of) == {}


def test_junk_says_nothing():
    made = {(t.name, repeat): junk(t, repeat) for t in TASKS for repeat in range(20)}
    assert len(set(made.values())) == len(made) == 100
    assert all(junk(t, 3) == made[t.name, 3] for t in TASKS)
    assert junk(task("task0", descriptions=["Other."]), 3) == made["task0", 3]  # by name, not by what is said of it
    assert all(re.fullmatch(r"[A-Z][a-z]{1,8}( [a-z]{2,9}){7}\.", text) for text in made.values())
    english = {w for t in synthetic.suite(20) for d in t.descriptions for w in re.findall("[a-z]{4,}", d.lower())}
    words = [w for text in made.values() for w in re.findall("[a-z]{4,}", text.lower())]
    assert len(english) > 100 and len(words) > 400 and english.isdisjoint(words)
    assert set("".join(words)) == set(string.ascii_lowercase)


def test_worked_examples_are_drawn_by_task_and_repeat():
    pool = [Example(f"in {i}", (f"out {i}", "other"), "train") for i in range(30)]
    drawn = [tuple(shots_of(t, pool, repeat)) for t in TASKS for repeat in range(3)]
    assert len(set(drawn)) == 15 and drawn[0] == tuple(shots_of(TASKS[0], pool, 0))
    for shots in drawn:
        assert len(set(shots)) == SHOTS and all(x.replace("in", "out") == y for x, y in shots)
    assert shots_of(TASKS[0], pool, 0, 1) == list(drawn[0][:1])
    assert len(shots_of(TASKS[0], pool[:2], 0)) == 2


def test_what_is_asked_is_no_worked_example():
    pool = [Example(f"in {i}", ("out",), "train") for i in range(5)]
    first = shots_of(TASKS[0], pool, 0)
    assert shots_of(TASKS[0], pool, 0, asked="elsewhere") == first
    for example in pool:
        found = shots_of(TASKS[0], pool, 0, asked=example.input)
        assert len(found) == SHOTS and example.input not in dict(found)
        assert [s for s in found if s in first] == [s for s in first if s[0] != example.input]
        assert shots_of(TASKS[0], pool, 0, asked=f" {example.input.upper()}") == found
    assert shots_of(TASKS[0], pool[:1], 0, asked="in 0") == []


def test_equal_identities_are_equal_adapters(engine, checkpoint, one_hot, by_input, reading):
    before = Generated(reading).identity
    with torch.no_grad():
        reading.encoder.norm.weight += 1
    assert Generated(reading).identity != before
    stack, names = random_stack(3), ["a", "b", "c"]
    alike = [Stored(stack, names), Stored(random_stack(3), list(names))]
    others = [
        Stored(random_stack(3, seed=1), names), Stored(stack, ["a", "c", "b"]), Stored(stack[[0, 1]], names[:2]),
        Stored(stack.to(dtype=torch.bfloat16), names), Routed(stack), Routed(random_stack(3, seed=1)),
        Stored(t2l.AdapterStack(stack.lora_A, stack.lora_B, stack.scaling * 2), names),
    ]  # fmt: skip
    load = t2l.TextToLoRA.from_pretrained
    generated = [Generated(e) for e in (engine, load(checkpoint, scaling=3.0), load(one_hot), load(by_input))]
    assert len({a.identity for a in alike}) == 1 and Generated(load(checkpoint)).identity == generated[0].identity
    found = [a.identity for a in (alike[0], *others, *generated[:3])]
    assert len(set(found)) == len(found)
    assert generated[3].identity == generated[0].identity  # the same weights: what they are asked is no part of them
