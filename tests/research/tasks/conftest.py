"""What the tests of the task data share."""

import json

import pytest
from typer.testing import CliRunner

from t2l_engine.cli import tasks as command
from t2l_engine.research.tasks.folder import write_tasks
from t2l_specs import synthetic

#: JSON text that no reader may take, whatever it expects.
BROKEN_JSON = {
    "empty": "", "text": "no json", "list": "[]", "null": "null", "number": "1e999",
    "digits": '{"a": ' + "9" * 100_000 + "}", "cut": '{"a": ["x"',
    "deep": "[" * 100_000 + "]" * 100_000, "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "doubled key": '{"a": ["x"], "a": ["x"]}', "bom": '\ufeff{"a": ["x"]}',
}  # fmt: skip


@pytest.fixture(params=BROKEN_JSON.values(), ids=BROKEN_JSON)
def broken_json(request):
    """Text of a broken or hostile JSON file."""
    return request.param


@pytest.fixture
def t2l_tasks():
    """Run ``t2l tasks`` with arguments; (what it printed on stdout, what on stderr, the exception or None)."""

    def call(*arguments):
        result = CliRunner().invoke(command.app, list(map(str, arguments)))
        assert result.exit_code != 2, result.stderr  # wrong usage
        failed = result.exit_code != 0
        assert not failed or isinstance(result.exception, (ValueError, OSError)), result.exception
        return result.stdout, result.stderr, result.exception if failed else None

    return call


@pytest.fixture
def suite():
    """Four synthetic tasks of 20 examples."""
    return [
        task for task in synthetic.suite(20) if task.name.endswith("_3") or "letter" in task.name or "twice" in task.name
    ]


@pytest.fixture
def folder(tmp_path, suite):
    """The suite as a task folder."""
    write_tasks(tmp_path / "tasks", suite)
    return tmp_path / "tasks"


@pytest.fixture
def sni(tmp_path):
    """Factory of Super-NaturalInstructions files: ``sni(task001_colours={"Definition": ...})``; returns their folder."""
    source = tmp_path / "sni"
    source.mkdir()

    def make(**files):
        for name, values in files.items():
            text = values if isinstance(values, str) else json.dumps(values)
            (source / f"{name}.json").write_text(text, encoding="utf-8")
        return source

    return make
