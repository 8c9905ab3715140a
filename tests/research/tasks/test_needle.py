"""Needle-in-a-haystack tasks."""

import pytest
from typer.testing import CliRunner

from t2l_engine.cli import app
from t2l_engine.research.tasks import needle
from t2l_engine.research.tasks.folder import load_tasks


def test_every_answer_is_in_the_text_alone():
    made = needle.texts(50, 30, 200, (1, 3), 0, "train")
    assert {len(task.examples) for task in made} == {1, 2, 3}
    for task in made:
        (text,) = task.descriptions
        for example in task.examples:
            kind = example.input.removeprefix("What is the ").removesuffix("?")
            assert text.count(f"The {kind} is {example.outputs[0]}.") == 1 == text.count(f"The {kind} is ")
            assert example.outputs[0] not in example.input
    lengths = sorted(needle.length(task.descriptions[0]) for task in made)
    assert 25 <= lengths[0] < 50 and 150 < lengths[-1] <= 205
    assert made == needle.texts(50, 30, 200, (1, 3), 0, "train") != needle.texts(50, 30, 200, (1, 3), 1, "train")


def test_the_command_writes_a_task_folder(tmp_path):
    arguments = ["tasks", "needle", "-o", str(tmp_path / "needle"), "--texts", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "3 tasks, 9 examples" in result.stdout
    assert [len(task.examples) for task in load_tasks(tmp_path / "needle", "test")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("shortest", "longest", "facts", "expected"),
    [(30, 20, (1, 3), "shortest, longest: "), (1, 9, (3, 1), "facts: "), (1, 9, (0, 3), "facts: ")],
)
def test_faults(shortest, longest, facts, expected):
    with pytest.raises(ValueError, match=f"^{expected}expected .*, got "):
        needle.texts(1, shortest, longest, facts, 0, "test")
