import json

import pytest

from t2l_engine import ConfigError
from t2l_engine.tasks import Example, load_tasks

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
    assert tasks[1].examples == (
        Example("France", ("Paris", "paris"), "train"),
        Example("Перу", ("Лима",), "train"),
    )
    assert [e.input for e in load_tasks(folder, "test")[0].examples] == ["Japan"]


@pytest.mark.parametrize(
    "descriptions",
    [
        [],
        {},
        "a",
        None,
        {"a": []},
        {"a": "Name it."},
        {"a": ["Name it.", " "]},
        {"a": ["Name it.", 3]},
        {"a": None},
        {"a": ["\ud800"]},
    ],
    ids=str,
)
def test_descriptions(write, descriptions):
    with pytest.raises(ConfigError, match=r"descriptions\.json"):
        load_tasks(write(descriptions, a=ROWS), "train")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '"text"',
        {"output": ["Rome"], "split": "train"},
        {"input": "Italy", "split": "train"},
        {"input": "Italy", "output": ["Rome"]},
        {"input": 3, "output": ["Rome"], "split": "train"},
        '{"input": "\\ud800", "output": ["Rome"], "split": "train"}',
        {"input": "Italy", "output": "Rome", "split": "train"},
        {"input": "Italy", "output": [], "split": "train"},
        {"input": "Italy", "output": [3], "split": "train"},
        {"input": "Italy", "output": None, "split": "train"},
        {"input": "Italy", "output": {"Rome": 1}, "split": "train"},
        {"input": "Italy", "output": ["Rome"], "split": None},
    ],
    ids=str,
)
def test_a_bad_line_is_named(write, line):
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: "):
        load_tasks(write({"a": ["Name it."]}, a=[ROWS[0], "", line, ROWS[1]]), "train")


def test_bytes_that_are_no_text_are_named(write):
    folder = write({"a": ["Name it."]}, a=ROWS)
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'\n{"input": "\xff"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl"):
        load_tasks(folder, "train")
    (folder / "descriptions.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"descriptions\.json"):
        load_tasks(folder, "train")


def test_missing_files_and_splits(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.descriptions\.json"):
        load_tasks(tmp_path / "nowhere", "train")
    folder = write({"a": ["Name it."], "b": ["Name it."]}, a=ROWS)
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        load_tasks(folder, "train")
    with pytest.raises(ConfigError, match=r"a\.jsonl: no examples of split 'validation'"):
        load_tasks(folder, "validation")
