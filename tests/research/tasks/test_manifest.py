"""Manifests: what they hold, how they are read, and how folders are compared with them; and the packaged one."""

import base64
import dataclasses
import json
import random
import re

import pytest

from t2l_engine.files.errors import MAX_CONFIG_BYTES, ConfigError
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.examples import example_digest, normalise
from t2l_engine.research.tasks.folder import Example, Task, write_tasks
from t2l_engine.research.tasks.manifest import apply, build, check, read, select, summary

FACTS = {"skill": "letters", "task_split": "train", "source": "made here", "licence": ["Apache-2.0"], "permissive": True}
EMPTY = base64.b64encode(b"12345").decode()


@pytest.fixture
def values(suite):
    splits = dict(zip((t.name for t in suite), ("train", "in-family", "out-of-family", "train"), strict=True))
    return build(suite, {name: FACTS | {"task_split": split} for name, split in splits.items()}, "For tests.")


@pytest.fixture
def manifest(values, save):
    return read(save(values))


@pytest.fixture
def save(tmp_path):
    def write(values):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
        return tmp_path / "manifest.json"

    return write


def edited(task, change):
    """``task`` with each example as ``change`` gives it; None leaves it out."""
    return dataclasses.replace(task, examples=tuple(e for e in map(change, task.examples) if e is not None))


def test_a_manifest_holds_digests_and_no_text(suite, values):
    entry = values["tasks"][suite[0].name]
    assert entry["splits"].keys() == {"train", "val", "test"} and entry["skill"] == "letters"
    train = base64.b64decode(entry["splits"]["train"])
    expected = sorted(example_digest(e.input, e.outputs[0])[:5] for e in suite[0].examples if e.split == "train")
    assert train == b"".join(expected)
    text = json.dumps(values)
    assert not any(e.input in text for task in suite for e in task.examples if len(e.input) > 4)
    facts = {t.name: FACTS | {"task_split": values["tasks"][t.name]["task_split"]} for t in suite}
    assert build(suite[::-1], facts, "For tests.") == values


def test_build_names_what_is_wrong(suite):
    for facts, message in (
        ({}, "missing field 'skill'"),
        ({suite[0].name: FACTS | {"task_split": "seen"}}, "task_split: expected one of"),
        ({suite[0].name: FACTS | {"kind": 1}}, "unknown field 'kind'"),
    ):
        with pytest.raises(ConfigError, match=rf"manifest: {suite[0].name}: {message}"):
            build(suite[:1], facts, "For tests.")
    twice = edited(suite[0], lambda e: dataclasses.replace(e, input="the same", outputs=("x",)))
    with pytest.raises(ConfigError, match="splits: .*each once"):
        build([twice], {twice.name: FACTS}, "For tests.")


def test_differences(suite, manifest, tmp_path):
    first, second, third, _ = suite
    lost = [e.input for e in first.examples if e.split == "train"][:3]
    test = [e.input for e in second.examples if e.split == "test"][:2]
    changed = [
        edited(first, lambda e: None if e.input in lost else e),
        edited(second, lambda e: dataclasses.replace(e, split="train") if e.input in test else e),
        dataclasses.replace(third, examples=(*third.examples, Example("new", ("x",), "val"), third.examples[0])),
        dataclasses.replace(first, name="another"),
    ]
    write_tasks(tmp_path / "other", changed)
    found = check(tmp_path / "other", manifest)
    assert [d.task for d in found] == sorted(d.task for d in found) and str(found[0]) == "another: 20 examples in all extra"
    assert set(map(dataclasses.astuple, found)) == {
        ("another", "extra", None, 20),
        (first.name, "missing", "train", 3),
        (second.name, "moved", "test", 2),
        (third.name, "extra", third.examples[0].split, 1),
        (third.name, "extra", "val", 1),
        (suite[3].name, "missing", None, 20),
    }
    assert {d.task for d in check(tmp_path / "other", manifest, "in-family")} == {second.name, "another"}


def test_select(suite, manifest):
    names = [task.name for task in suite]
    assert select(names, manifest, "in-family") == [names[1]]
    assert select([names[3], "another", names[0]], manifest, "train") == sorted([names[0], names[3]])
    manifest.tasks[names[0]] = dataclasses.replace(manifest.tasks[names[0]], permissive=False)
    assert select(names, manifest, "train", permissive=True) == [names[3]]
    assert manifest.names() == sorted(names) and manifest.names("out-of-family") == [names[2]]
    for call in (lambda: select(names, manifest, "seen"), lambda: check("nowhere", manifest, "seen")):
        with pytest.raises(ConfigError, match="task_split: expected one of .*, got 'seen'"):
            call()


def test_apply_gives_the_splits_of_the_manifest_whatever_the_order(suite, manifest):
    other = []
    for task in suite:
        examples = [Example(f"  {e.input.upper()} ", ("another", *e.outputs), "test") for e in task.examples]
        random.Random(0).shuffle(examples)
        other.append(dataclasses.replace(task, examples=(*examples, Example("not in the manifest", ("x",), "train"))))
    applied = apply([*other, Task("unknown", ("x",), suite[0].examples)], manifest)
    assert applied.missing == {} and [t.name for t in applied.tasks] == [t.name for t in suite]
    for task, expected in zip(applied.tasks, suite, strict=True):
        of_both = ([(normalise(e.input), e.split) for e in of.examples] for of in (task, expected))
        assert next(of_both) == next(of_both)
        assert [e.outputs for e in task.examples] == [(*e.outputs, "another") for e in expected.examples]
    assert apply([suite[0]], manifest).tasks == [suite[0]]


def test_a_summary_is_of_all_that_training_may_see(suite):
    task, edit = suite[0], dataclasses.replace
    counts = summary([task])[task.name]
    assert {name: of[0] for name, of in counts.items()} == {"descriptions": 8, "train": 13, "val": 2, "test": 5}
    assert all(re.fullmatch("[0-9a-f]{16}", of) for _, of in counts.values())
    first, *others = task.examples
    changed = [
        {"outputs": ("?",)}, {"input": first.input.upper()}, {"outputs": (*first.outputs, "?")}, {"metric": "number"},
    ]  # fmt: skip
    for part, other in (
        ("descriptions", edit(task, descriptions=task.descriptions[::-1])),  # the last ones may be held out
        *((first.split, edit(task, examples=(edit(first, **of), *others))) for of in changed),
    ):
        assert [name for name, of in summary([other])[task.name].items() if of != counts[name]] == [part]
    assert summary([edit(task, examples=task.examples[::-1])])[task.name]["train"] != counts["train"]
    many = summary([edit(task, name=f"task{i:04}_" + "n" * 60) for i in range(500)])
    assert len(json.dumps(many, indent=2)) < MAX_CONFIG_BYTES // 2


# --- broken and hostile ------------------------------------------------------------------------------------------------


def test_broken_json_is_named(save, broken_json):
    with pytest.raises(ConfigError, match=r"manifest\.json: ") as refused:
        read(save(broken_json))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("field, value, message", [
    *(("format", value, "format") for value in ("t2l_engine.tasks.v2", None)),
    *(("about", value, "about") for value in (None, "\ud800")),
    *(("tasks", value, "tasks") for value in ({}, [])),
    *(("tasks", {name: {}}, "expected task names") for name in ("../x", "a/b", "\ud800", "n" * 200)),
    ("tasks", {"a": None}, "a: expected a JSON object"), ("tasks", {"a": {}}, "a: missing field"),
    ("surprise", 1, "expected format, about and tasks"),
], ids=str)  # fmt: skip
def test_a_manifest_of_other_kinds_is_refused(values, save, field, value, message):
    with pytest.raises(ConfigError, match=rf"manifest\.json: .*{message}") as refused:
        read(save(values | {field: value}))
    assert len(str(refused.value)) < 1000


WRONG = {
    "skill": ["", 3, "\ud800"], "task_split": ["seen", []], "source": [None], "licence": ["MIT", [], [3], ["\ud800"]],
    "permissive": [1, "yes", 10**400], "surprise": [1],
    "splits": [
        None, {}, {"train": ""}, {"train": 5}, {"train": [EMPTY]}, {"train": "not base64"}, {"train": "\ud800aaa"},
        {"train": EMPTY[:4]}, {"train": base64.b64encode(b"1234512345").decode()}, {"train": EMPTY, "test": EMPTY},
        {"../train": EMPTY}, {"t" * 100: EMPTY},
    ],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, v) for field, found in WRONG.items() for v in found], ids=str)
def test_fields_of_a_task_are_checked(values, suite, save, field, value):
    values["tasks"][suite[0].name][field] = value
    with pytest.raises(ConfigError, match=rf"manifest\.json: {suite[0].name}: .*{field}") as refused:
        read(save(values))
    assert len(str(refused.value)) < 1000


# --- the packaged one --------------------------------------------------------------------------------------------------

SKILLS = read("skills")


def test_nothing_held_out_is_trained_on():
    trained = {entry.skill for entry in SKILLS.tasks.values() if entry.task_split == "train"}
    free = {entry.skill for entry in SKILLS.tasks.values() if entry.task_split == "train" and entry.permissive}
    for entry in SKILLS.tasks.values():
        known = free if entry.permissive else trained
        assert entry.task_split == "train" or (entry.skill in known) is (entry.task_split == "in-family")
        assert entry.task_split != "out-of-family" or entry.skill not in trained
    assert [len(SKILLS.names(split)) for split in manifests.TASK_SPLITS] == [207, 15, 10]
    train = frozenset().union(*(e.splits["train"] for e in SKILLS.tasks.values() if e.task_split == "train"))
    assert not any(train & entry.splits[name] for entry in SKILLS.tasks.values() for name in ("val", "test"))


def test_sizes_and_licences():
    free = re.compile(r"MIT|Apache[ -]2\.0|CC BY \d\.0|.*Public Domain.*|WordNet 3\.0 .*")
    for name, entry in SKILLS.tasks.items():
        sizes = {split: len(found) for split, found in entry.splits.items()}
        assert sizes.keys() == {"train", "val", "test"}, name
        assert 60 <= sum(sizes.values()) <= 200 and sizes["train"] >= 50 and sizes["test"] >= 15, name
        assert all(map(free.fullmatch, entry.licence)) is entry.permissive, name


def test_no_task_is_made_of_the_benchmarks():
    from t2l_engine.research.tasks import sni

    for name, entry in SKILLS.tasks.items():
        assert not any(sni.names_data_set(text, benchmark) for text in (name, entry.source) for benchmark in sni.BENCHMARKS)
