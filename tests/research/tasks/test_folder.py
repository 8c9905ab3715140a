import json

import pytest

from t2l_engine import ConfigError
from t2l_engine.files.text import MAX_LINE_BYTES, read_rows
from t2l_engine.research.tasks import folder as tasks_module
from t2l_engine.research.tasks.folder import METRICS, Example, Task, load_tasks, parse_number, write_tasks

ROWS = (
    {"input": "France", "output": ["Paris", "paris"], "split": "train"},
    {"input": "Japan", "output": ["Tokyo"], "split": "test"},
    {"input": "Перу", "output": ["Лима"], "split": "train"},
)


@pytest.fixture
def write(tmp_path):
    """Factory of task folders: descriptions (any JSON) and the lines of each task's file."""

    def make(descriptions, **lines):
        (tmp_path / "descriptions.json").write_text(json.dumps(descriptions), encoding="utf-8")
        for name, content in lines.items():
            rows = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content)
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return tmp_path

    return make


def test_tasks_are_sorted_and_of_one_split(write):
    descriptions = {"b": ["Name the capital."], "a": ["One.", "Two."]}
    folder = write(descriptions, b=[*ROWS, "", "  "], a=ROWS, unlisted=["no JSON"])
    tasks = load_tasks(str(folder), "train")
    assert [task.name for task in tasks] == ["a", "b"]
    assert tasks[0].descriptions == ("One.", "Two.")
    assert tasks[1].examples == (Example("France", ("Paris", "paris"), "train"), Example("Перу", ("Лима",), "train"))
    assert [e.input for e in load_tasks(folder, "test")[0].examples] == ["Japan"]


@pytest.mark.parametrize("descriptions", [
    [], {}, "a", None,
    *({"a": texts} for texts in ([], "Name it.", ["Name it.", " "], ["Name it.", 3], None, ["\ud800"])),
], ids=str)  # fmt: skip
def test_descriptions(write, descriptions):
    with pytest.raises(ConfigError, match=r"descriptions\.json"):
        load_tasks(write(descriptions, a=ROWS), "train")


ITALY = {"input": "Italy", "output": ["Rome"], "split": "train"}


@pytest.mark.parametrize("line", [
    "{", "[1]", "null", '"text"', '{"input": "\\ud800", "output": ["Rome"], "split": "train"}',
    *({key: value for key, value in ITALY.items() if key != missing} for missing in ITALY),
    *(ITALY | {"output": value} for value in ("Rome", [], [3], None, {"Rome": 1})),
    *(ITALY | {"metric": "pass", "tests": "pass"} | {key: value} for key in ("metric", "options", "tests")
      for value in (None, 3, [3], {"a": 1}, [["a"]])),
    ITALY | {"input": 3}, ITALY | {"split": None},
], ids=str)  # fmt: skip
def test_a_bad_line_is_named(write, line):
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: "):
        load_tasks(write({"a": ["Name it."]}, a=[ROWS[0], "", line, ROWS[1]]), "train")


def test_files_that_are_not_there_or_no_text(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.descriptions\.json"):
        load_tasks(tmp_path / "nowhere", "train")
    folder = write({"a": ["Name it."], "b": ["Name it."]}, a=ROWS)
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        load_tasks(folder, "train")
    for name, content in (("b.jsonl", b'\n{"input": "\xff"}'), ("descriptions.json", b"\xff")):
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load_tasks(folder, "train")


def test_every_split_and_chosen_tasks(write):
    folder = write({"b": ["Name it."], "a": ["Name it."], "broken": ["Name it."]}, a=ROWS, b=ROWS[:1], broken=["no JSON"])
    assert [len(task.examples) for task in load_tasks(folder, None, names=["b", "a"])] == [3, 1]
    assert [task.name for task in load_tasks(folder, "train", names=("b",))] == ["b"]
    assert load_tasks(folder, "train", names=[]) == []
    for name in ("c", "../a", "\ud800"):
        with pytest.raises(ConfigError, match=r"descriptions\.json: expected a task named .*, found none"):
            load_tasks(folder, "train", names=["a", name])


def test_splits_that_may_be_absent(write):
    folder = write({"a": ["Name it."], "empty": ["Name it."]}, a=ROWS, empty=[])
    assert [len(task.examples) for task in load_tasks(folder, "test", required=False)] == [1, 0]
    assert [len(task.examples) for task in load_tasks(folder, None, required=False)] == [3, 0]
    for split, message in ((None, r"empty\.jsonl: no examples$"), ("validation", r"a\.jsonl: no .* split 'validation'")):
        with pytest.raises(ConfigError, match=message):
            load_tasks(folder, split)


TASKS = [
    Task("b", ("Name the capital.", "Où ?"), (Example("Перу\n", ("Лима", "Lima"), "train"),)),
    Task("a-1.2", ("One.",), (Example("x", ("y",), "test"), Example("", ("",), "train"))),
]


def test_what_is_written_is_read(tmp_path):
    write_tasks(tmp_path / "new" / "folder", TASKS)
    assert load_tasks(tmp_path / "new" / "folder", None) == TASKS[::-1]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["a-1.2.jsonl", "b.jsonl", "descriptions.json"]
    assert (tmp_path / "new" / "folder" / "b.jsonl").read_bytes() == (
        '{"input": "Перу\\n", "output": ["Лима", "Lima"], "split": "train"}\n'.encode()
    )


def one(*examples, name="x", texts=("One.",)):
    return Task(name, texts, tuple(Example(*example, "train") for example in examples))


@pytest.mark.parametrize("task, message", [
    (one(name="../x"), "expected task names"), (one(texts=()), "x: "), (one(texts=(" ",)), "x: "),
    (one(texts=("\ud800",)), "Unicode"), (one(("a", ())), r"x\.jsonl:1: .*output"),
    (one(("a", ("b",)), ("\ud800", ("b",))), r"x\.jsonl:2: .*Unicode"),
    (one(("a" * MAX_LINE_BYTES, ("b",))), r"x\.jsonl:1: .*bytes"), (one(name="a-1.2"), "distinct names"),
], ids=["path", "none", "blank", "surrogate", "no-output", "surrogate-input", "long-line", "twice"])  # fmt: skip
def test_what_could_not_be_read_is_not_written(tmp_path, task, message):
    with pytest.raises(ConfigError, match=message):
        write_tasks(tmp_path / "out", [TASKS[1], task])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="at least one task"):
        write_tasks(tmp_path / "out", [])


def test_as_many_descriptions_as_can_be_read_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_module, "MAX_DESCRIPTIONS_BYTES", 40)
    write_tasks(tmp_path, TASKS[1:])
    with pytest.raises(ConfigError, match=r"expected at most 40 bytes to write, got \d+: 3 descriptions of 2"):
        write_tasks(tmp_path, TASKS, overwrite=True)


JUDGED = Task("judged", ("Answer.",), (
    Example("1 + 1", ("2", "2.0", "1,002"), "test", "number"),
    Example("Où ?", ("là",), "test", "options", ("ici", "là")),
    Example("def f():", ("    return 1",), "test", "pass", tests="assert f() == 1\n"),
    Example("x", ("y",), "test"),
))  # fmt: skip


def test_how_answers_are_judged_is_kept(tmp_path, write):
    write_tasks(tmp_path / "out", [JUDGED])
    assert load_tasks(tmp_path / "out", None) == [JUDGED]
    keys = [row.keys() - {"input", "output", "split"} for _, row in read_rows(tmp_path / "out" / "judged.jsonl")]
    assert keys == [{"metric"}, {"metric", "options"}, {"metric", "tests"}, set()]
    assert {example.metric for example in JUDGED.examples} == set(METRICS)
    stated = write({"a": ["Name it."]}, a=[ROWS[0] | {"metric": "exact_match", "options": [], "tests": ""}])
    assert load_tasks(stated, None)[0].examples == (Example("France", ("Paris", "paris"), "train"),)  # the defaults


BC = {"options": ("b", "c")}


@pytest.mark.parametrize("keys, field", [
    ({"metric": "rouge"}, "metric: .*'rouge'"), ({"metric": "number"}, "output: .*'b'"),
    *(({"metric": "options"} | more, "options: ") for more in (
        {}, {"options": ("b",)}, {"options": ("b", "c", "c")}, {"options": ("b", " ")})),
    ({"metric": "options", "options": ("B", "c")}, r"output: .*\('B', 'c'\)"),
    *((BC | more, "options: expected none") for more in ({}, {"metric": "number"})),
    *(({"metric": "pass"} | more, "tests: expected Python") for more in ({}, {"tests": " \n"})),
    *((more | {"tests": "pass"}, "tests: expected none") for more in ({}, BC | {"metric": "options"})),
    ({"metric": "options", "options": ("b", "\ud800")}, "Unicode"), ({"metric": "pass", "tests": "\ud800"}, "Unicode"),
], ids=str)  # fmt: skip
def test_contradictions_are_neither_read_nor_written(write, tmp_path, keys, field):
    line = json.dumps({"input": "a", "output": ["b"], "split": "train", **keys})
    with pytest.raises(ConfigError, match=rf"a\.jsonl:2: .*{field}"):
        load_tasks(write({"a": ["Name it."]}, a=[ROWS[0], line]), "train")
    with pytest.raises(ConfigError, match=rf"x\.jsonl:1: .*{field}"):
        write_tasks(tmp_path / "out", [Task("x", ("One.",), (Example("a", ("b",), "train", **keys),))])
    assert not (tmp_path / "out").exists()


def test_numbers():
    numbers = {"3": 3, " -1,234.5\n": -1234.5, "1e3": 1000, "0": 0}
    assert {text: parse_number(text) for text in numbers} == numbers
    assert [parse_number(text) for text in ("", ",", "3 apples", "nan", "inf", "1e999", "1/2", "$3")] == [None] * 8
