"""The suite of specifications: answers, inputs, descriptions, splits, and the packaged manifest."""

import collections
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_rows
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.examples import normalise, shared_inputs
from t2l_engine.research.tasks.folder import Task, load_tasks, write_tasks
from t2l_specs import english, fixed, suite, wordings
from t2l_specs.family import FURTHER, Specification, sections
from t2l_specs.suite import FAMILIES, HELD_OUT, digest, leaks, task

#: What each family should answer, written by hand.
CASES = {row["family"]: row for _, row in read_rows(Path(__file__).parent / "spec_cases.jsonl")}
#: The first quarter of the suite: some of every family and every task split.  Made when first asked for, once a process.
placed_ones = functools.cache(lambda: suite.suite(600))
all_tasks = functools.cache(lambda: {placed.spec.name: task(placed.spec, suite.EXAMPLES, 0) for placed in placed_ones()})
#: Families with fewer than 200 inputs.
SMALL = {"convert", "label_kind", "mention_template", "opposite", "times", "which_kind"}


def of_split(split):
    return [placed for placed in placed_ones() if placed.task_split == split]


def agrees(placed, pairs):
    """Whether a specification gives all the answers of ``pairs``."""
    return all(placed.spec.answer(text) == answer for text, answer in pairs)


def in_tuples(value):
    return tuple(map(in_tuples, value)) if isinstance(value, list) else value


def said(value):
    """The strings that a description has to contain for a parameter's value."""
    return [text for part in value for text in said(part)] if isinstance(value, tuple) else [value]


# --- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_answers(name):
    """Those written by hand."""
    spec = Specification(FAMILIES[name], in_tuples(CASES[name]["parameters"]))
    expected = CASES[name]["answers"]
    assert len(expected) >= 2 and {text: spec.answer(text) for text in expected} == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_two_hundred_inputs(family):
    spec = next(p.spec for p in placed_ones() if p.spec.family is family)
    count = suite.EXAMPLES if family.name in SMALL else 200
    examples = spec.examples(count, 0)
    assert len({normalise(e.input) for e in examples}) == count
    assert examples[:30] == spec.examples(30, 0), "the first examples depend on how many are read"
    if family.name in SMALL:
        with pytest.raises(ConfigError, match=rf"examples: {spec.name} has \d+ different inputs, expected 2000"):
            spec.examples(2000, 0)


# --- tasks -------------------------------------------------------------------------------------------------------------

#: What a family reads -> the layouts that inputs of split "test" have, and no others.
UNSEEN = {
    "list": r" / |\n", "numbers": r" / |\n", "record": r" \| |\n", "word": '^"|^the word ',
    "number": r"^the number |^no\. ", "person": r"^(Dr|Prof\.) ", "file": "/.*/", "time": r"^at |\.m\.",
    "quantity": "^exactly|^a total",
}  # fmt: skip


def test_inputs_and_answers():
    """They are short; each input is in one split, test inputs in layouts of their own; no constant solves a task."""
    assert UNSEEN.keys() <= {placed.spec.family.reads for placed in placed_ones()}
    for spec in (placed.spec for placed in placed_ones()):
        examples = all_tasks()[spec.name].examples
        splits = collections.Counter(e.split for e in examples)
        assert splits == {"train": 39, "val": 6, "test": 15} and shared_inputs(examples) == 0, spec.name
        for example in examples:
            assert len(example.input.split()) <= 25 and len(example.outputs[0].split()) <= 20, example
            assert example.input.strip() == example.input and example.outputs[0].strip(), example
            if pattern := UNSEEN.get(spec.family.reads):
                assert bool(re.search(pattern, example.input)) is (example.split == "test"), (spec.name, example)
        answers = collections.Counter(e.outputs[0] for e in examples)
        most = max(answers.values())
        assert (len(answers) == 1) if spec.family.constant else (most <= 0.6 * len(examples)), (spec.name, most)


def check_states_every_parameter(spec, text):
    stated, slots = text.casefold(), "|".join(spec.family.params)
    for value in said(spec.values):
        if isinstance(value, int):
            forms = {str(value), english.number_word(value) if value < 1000 else str(value)}
        else:
            forms = {value, english.plural(value)}
        assert any(form.casefold() in stated for form in forms), (spec.name, value, text)
    plain = functools.reduce(lambda left, value: left.replace(str(value), "x"), said(spec.values), text)
    assert not re.search(rf"\{{({slots})\b|  | [,.](?![.\w])|\[\w*\|", plain), text


def test_descriptions_are_distinct_state_every_parameter_and_come_in_several_forms():
    for placed in placed_ones():
        texts = all_tasks()[placed.spec.name].descriptions
        assert len(set(map(normalise, texts))) == len(texts) == suite.DESCRIPTIONS and len(texts) - HELD_OUT >= 12
        assert sum("?" in text for text in texts[:-HELD_OUT]) >= 2 and not any(map(held_frame, texts[:-HELD_OUT]))
        for text in texts:
            check_states_every_parameter(placed.spec, text)


def held_frame(text):
    return text.startswith(("Can you", "Could you", "Would you", "I would like you to "))


def alternatives(phrase):
    """``phrase`` with each choice of its ``[a|b]``."""
    found = re.search(r"\[([^\[\]]*\|[^\[\]]*)\]", phrase)
    if found is None:
        return [phrase]
    made = (phrase[: found.start()] + choice + phrase[found.end() :] for choice in found[1].split("|"))
    return [text for one in made for text in alternatives(one)]


def test_no_frame_of_training_opens_like_one_that_is_held_out():
    further = sections(FURTHER)["frames"]["frame"]
    openings = tuple(text for f in wordings.HELD_FRAMES for text in alternatives(f.split("{")[0]) if text)
    assert len(openings) == 5
    assert not [text for f in (*wordings.FRAMES, *further) for text in alternatives(f) if text.startswith(openings)]


def test_further_descriptions_are_distinct_and_use_nothing_that_is_held_out():
    """One trained specification of each family, and the phrases themselves, with each of their alternatives."""
    held = set()
    for family in FAMILIES.values():
        for use in ("do", "noun", "ask", "held") if family.held_out else ("held",):
            held |= {normalise(text) for phrase in family.phrases(use) for text in alternatives(phrase)}
    trained = {placed.spec.family.name: placed.spec for placed in of_split("train")}
    assert trained.keys() == {name for name, family in FAMILIES.items() if not family.held_out}
    for name, spec in trained.items():
        phrases = [phrase for use in ("do", "noun", "ask") for phrase in FAMILIES[name].phrases(use, further=True)]
        assert len(phrases) == len(set(map(normalise, phrases))) >= 20, name
        assert not held & {normalise(text) for phrase in phrases for text in alternatives(phrase)}, name
        texts, plain = task(spec, 1, 0, 18).descriptions, task(spec, 1, 0).descriptions
        assert (*texts[: -18 - HELD_OUT], *texts[-HELD_OUT:]) == plain and len(set(map(normalise, texts))) == 36
        for text in texts[-18 - HELD_OUT : -HELD_OUT]:
            check_states_every_parameter(spec, text)
            assert not held_frame(text) and not text.startswith("Whatever "), text
    out = of_split("out-of-family")[0].spec
    with pytest.raises(ConfigError, match=f"{out.name}: expected more phrases"):
        task(out, 1, 0, 1)


# --- task splits --------------------------------------------------------------------------------------------------------


def test_no_held_out_description_is_trained():
    splits = [(placed.task_split, all_tasks()[placed.spec.name]) for placed in placed_ones()]
    assert leaks(splits) == []
    copied = Task("copied", (*all_tasks()[of_split("train")[0].spec.name].descriptions[:1], *"abcd"), ())
    assert leaks([*splits, ("out-of-family", copied)]) == [f"copied: {copied.descriptions[0]}"]


def test_no_two_specifications_do_the_same_and_none_that_is_held_out_is_trained_under_another_name():
    kinds = collections.defaultdict(list)
    for placed in placed_ones():
        pairs = [(e.input, e.outputs[0]) for e in all_tasks()[placed.spec.name].examples[::2]]
        kinds[placed.spec.family.reads].append((placed, placed.task_split == "train", pairs))
    for group in kinds.values():
        for i, (one, trained, pairs) in enumerate(group):
            for j, (other, other_trained, other_pairs) in enumerate(group[:i]):
                if trained and other_trained and (i + j) % 10:
                    continue  # of the pairs of trained ones, a sample
                own = trained > other_trained or agrees(other, pairs)
                assert not own or not (trained < other_trained or agrees(one, other_pairs)), (one.spec.name, other.spec.name)


@pytest.mark.slow
def test_the_whole_suite():
    """As the packaged manifest lists it; in-family has values that are not trained, or trained ones combined anew."""

    def values(placed):
        return [(placed.spec.family.name, i, value) for i, value in enumerate(placed.spec.values)]

    every, wanted = suite.suite(), packaged()
    assert len(every) == suite.SPECIFICATIONS and every[: len(placed_ones())] == placed_ones()
    trained = {value for placed in every if placed.task_split == "train" for value in values(placed)}
    for placed in every:
        if placed.task_split == "in-family":
            known = [value in trained for value in values(placed)]
            assert all(known) is (placed.new == "combination"), placed.spec.name
            assert len(known) > 1 or placed.new == "value", placed.spec.name
    assert wanted == {placed.spec.name: stored(placed) for placed in every}


def test_some_pairs_of_operators_are_never_trained_together(monkeypatch):
    """A new combination of operators has such a pair, of operators that are trained."""
    composed = {name: family for name, family in FAMILIES.items() if family.rule.operators}
    monkeypatch.setattr(suite, "FAMILIES", composed)
    made = list(itertools.islice(suite.stream(0), 24 * len(composed)))
    trained = {(p.spec.family.name, value) for p in made if p.task_split == "train" for value in p.spec.values}
    kinds = collections.Counter((p.spec.family.name, p.task_split, p.new) for p in made)
    for name in composed:
        assert (
            kinds[name, "train", ""] > 12 and kinds[name, "in-family", "value"] and kinds[name, "in-family", "combination"]
        )
    for placed in made:
        family, values = placed.spec.family, placed.spec.values
        if placed.new != "value":
            assert suite._has_kept_pair(family, values, 0) is (placed.new == "combination"), placed.spec.name
            assert all((family.name, value) in trained for value in values), placed.spec.name


def test_a_larger_suite_begins_with_the_smaller_and_other_seeds_make_others():
    assert suite.suite(200) == placed_ones()[:200] != suite.suite(200, seed=1)
    for count in (20, True, "many"):
        with pytest.raises(ConfigError, match="specifications: expected a number of at least"):
            suite.suite(count)


def test_the_same_in_every_version_of_python():
    rows = [[t.name, t.descriptions, [(e.input, e.outputs, e.split) for e in t.examples]] for t in all_tasks().values()]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "81d45a29730a2122"


# --- the manifest ------------------------------------------------------------------------------------------------------


def packaged():
    """Name -> (the split that the packaged manifest lists it in, its digest)."""
    values = json.loads((manifests.PACKAGED / "specs.json").read_text(encoding="utf-8"))
    assert values["seed"] == 0 and values["version"] == suite.VERSION
    return {name: (split, found) for split, names in values["tiers"].items() for name, found in names.items()}


def stored(placed):
    """What the packaged manifest should say of a specification."""
    tier = {"train": "train", "in-family": "sibling", "out-of-family": "novel"}[placed.task_split]
    return tier + (f", new {placed.new}" if placed.new else ""), digest(placed.spec, 0)


def test_the_packaged_manifest_is_this_suite():
    wanted = packaged()
    assert all(wanted[placed.spec.name] == stored(placed) for placed in placed_ones()[::4])


small_values = functools.cache(lambda: fixed.build(140))


@pytest.fixture
def small(tmp_path):
    """A manifest file of 140 specifications."""
    (tmp_path / "small.json").write_text(json.dumps(small_values()))
    return tmp_path / "small.json"


def test_commands(t2l_tasks, small, tmp_path):
    def run(command):
        return t2l_tasks(*command.format(small=small, here=tmp_path).split())

    made = "synthetic --suite specs --specifications 140"
    assert run(f"{made} --examples 20 -o {{here}}/all")[0] == f"{tmp_path}/all: 140 tasks, 2800 examples\n"
    tasks = [task(p.spec, 20, 0) for p in placed_ones()[:140]]
    assert load_tasks(tmp_path / "all", None) == sorted(tasks, key=lambda t: t.name)
    check = "check {here}/all --manifest {small}"
    assert run(f"{check} --examples 20")[0] == f"{tmp_path}/all: 140 tasks as in manifest {small}\n"
    assert run("select {here}/all --manifest {small} --task-split out-of-family --permissive -o {here}/out")[2] is None
    chosen = {t.name for t in load_tasks(tmp_path / "out", None)}
    assert chosen == {p.spec.name for p in placed_ones()[:140] if p.task_split == "out-of-family"}
    further = f"{made} --examples 5 --further-descriptions 3 -o {{here}}/further"
    assert run(f"{further} --task-split train")[2] is None
    assert {len(t.descriptions) for t in load_tasks(tmp_path / "further", None)} == {suite.DESCRIPTIONS + 3}
    for command, message in (
        (check, "differs"),
        ("synthetic --task-split out-of-family -o {here}/x", "expected none without"),
        (further, "expected --task-split train alone"),
        ("check {here}/all --manifest skills --examples 20", "expected none with manifest"),
    ):
        assert message in str(run(command)[2]), command
    changed = Task(tasks[0].name, tasks[0].descriptions[::-1], tasks[0].examples[1:])
    write_tasks(tmp_path / "all", [changed, *tasks[1:]], overwrite=True)
    assert sorted(map(str, manifests.check(tmp_path / "all", manifests.read(small, 20)))) == [
        f"{changed.name}: 1 examples of split 'train' missing",
        f"{changed.name}: {suite.DESCRIPTIONS} descriptions reworded",
    ]


@pytest.mark.parametrize("change, message", [
    ({"version": 0}, "expected format, about, version"), ({"seed": None}, "expected a number as seed"),
    ({"tiers": []}, "objects as tiers"), ({"tiers": {"train": []}}, "objects as tiers"), ({"about": ""}, "about"),
    ({"surprise": 1}, "expected format, about, version"), ({"seed": 1}, "this package makes"),
    ({"tiers": {}}, "each in one tier"),
    ({"tiers": {"train": {"a": ""}, "novel": {"a": ""}}}, "each in one tier"),
    ({"tiers": {"train": dict.fromkeys(map(str, range(10**5)), "")}}, "this package makes"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_manifest_that_this_package_does_not_make(small, change, message):
    small.write_text(json.dumps(json.loads(small.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        manifests.read(small)
