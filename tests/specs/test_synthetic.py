"""The suite made by code: the same everywhere, right, short, without leaks."""

import hashlib
import json

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.examples import normalise
from t2l_specs import synthetic

SUITE = {task.name: task for task in synthetic.suite()}


def pairs(name):
    return [(e.input, e.outputs[0]) for e in SUITE[name].examples]


def test_twelve_tasks_with_splits_and_descriptions():
    assert len(SUITE) == 12
    for task in SUITE.values():
        splits = [e.split for e in task.examples]
        assert [splits.count(name) for name in ("train", "val", "test")] == [78, 12, 30], task.name
        assert len({normalise(e.input) for e in task.examples}) == 120 and len(task.descriptions) >= 8, task.name
        assert max(len(e.input) for e in task.examples) <= 40, task.name
    texts = [text for task in SUITE.values() for text in task.descriptions]
    assert len(set(texts)) == len(texts)


def test_the_same_for_a_seed_in_every_version_of_python():
    def digest(tasks):
        rows = [[t.name, t.descriptions, [(e.input, e.outputs, e.split) for e in t.examples]] for t in tasks]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    assert digest(synthetic.suite(30)) == "c97cadaa28ca9743" != digest(synthetic.suite(30, seed=1))


def test_answers():
    kinds = {"animal": synthetic.ANIMALS, "colour": synthetic.COLOURS, "food": synthetic.FOODS}
    for name, words in kinds.items():
        assert all([w for w in x.split(", ") if w in words] == [y] for x, y in pairs(f"syn_{name}_in_list"))
    assert {x.split(", ").index(y) for x, y in pairs("syn_food_in_list")} == {0, 1, 2}
    assert {"cry": "cried", "play": "played", "agree": "agreed", "whisper": "whispered"}.items() <= {
        *pairs("syn_past_tense")
    }
    assert [synthetic.plural(word) for word in ("box", "peach", "key", "puppy")] == ["boxes", "peaches", "keys", "puppies"]
    for name, right in {
        "first_of_3": lambda x, y: x.split(", ")[0] == y and x.count(", ") == 2,
        "last_of_3": lambda x, y: x.split(", ")[2] == y and x.count(", ") == 2,
        "longer_word": lambda x, y: len(y) > min(map(len, x.split(", "))) and y in x.split(", "),
        "plural": lambda x, y: y.endswith("s"),
        "past_tense": lambda x, y: y.endswith("ed"),
        "upper_case": lambda x, y: y == x.upper(),
        "first_letter": lambda x, y: y == x[0],
        "twice": lambda x, y: y == f"{x} {x}",
        "is_animal": lambda x, y: (x in synthetic.ANIMALS) == (y == "yes"),
    }.items():
        assert all(right(x, y) for x, y in pairs(f"syn_{name}")), name
    assert sum(y == "yes" for _, y in pairs("syn_is_animal")) == 60


@pytest.mark.parametrize("examples", [19, 121, 0, -1, True, 20.0, "20", 10**5000], ids=lambda e: str(type(e)))
def test_numbers_out_of_range(examples):
    with pytest.raises(ConfigError, match="examples: expected a number from 20 to 120, got"):
        synthetic.suite(examples)
