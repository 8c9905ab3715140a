"""Task folders, the input of training and evaluation.

A folder holds ``<name>.jsonl`` files, one example per line: ``{"input": str, "output": [accepted answers], "split": str}``,
and ``descriptions.json``: ``{name: [description, ...]}``.  A line may also state its metric: ``"metric": str`` (one of
METRICS), with ``"options": [str, ...]`` or ``"tests": str``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, expect, short_repr
from t2l_engine.files.text import (
    MAX_DESCRIPTIONS_BYTES,
    MAX_LINE_BYTES,
    MAX_VALUES,
    count_values,
    is_unicode,
    read_json,
    read_rows,
)
from t2l_engine.files.weights import replacing
from t2l_engine.research.tasks.rows import Row

DESCRIPTIONS_NAME = "descriptions.json"
MAX_NAME_BYTES = 128
#: An answer is correct if, respectively: it equals an accepted one after stripping; its last number equals an accepted one;
#: the option of highest log-likelihood is an accepted one; it is Python code after which ``tests`` run without an exception.
METRICS = ("exact_match", "number", "options", "pass")
_NAME = re.compile(r"\w[\w.+-]*")  # a plain file name on every system


@dataclasses.dataclass(frozen=True)
class Example:
    """One input with its accepted answers and metric.

    ``metric``: one of METRICS.  ``options``: for metric "options", the choices, which include the outputs.
    ``tests``: for metric "pass", Python source that runs after the answer.
    """

    input: str
    outputs: tuple[str, ...]
    split: str
    metric: str = "exact_match"
    options: tuple[str, ...] = ()
    tests: str = ""


#: Keys of a line that are written only if the value is not the default.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Example) if field.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True)
class Task:
    """A named task: descriptions and examples."""

    name: str
    descriptions: tuple[str, ...]
    examples: tuple[Example, ...]


def family_of(name: str) -> str:
    """The family of the task ``name``: of ``"keep_kind-007"`` what is before the number, else the name itself."""
    return re.sub(r"-[0-9]+$", "", name)


def load_tasks(
    folder: str | Path, split: str | None, *, names: Sequence[str] | None = None, required: bool = True
) -> list[Task]:
    """All tasks of ``folder`` with their examples of ``split`` (None: of every split), sorted by name.

    Args:
        names: of the tasks to read; None: all.
        required: whether a task without such an example is an error; otherwise its examples are an empty tuple.

    Raises FileNotFoundError for a missing folder or file, ConfigError naming file and line for invalid content.
    """
    folder = Path(folder)
    tasks = []
    for name, texts in read_descriptions(folder, names).items():
        for _ in _read_examples(folder / f"{name}.jsonl"):  # checks the whole file before examples are kept in memory
            pass
        examples = tuple(e for e in _read_examples(folder / f"{name}.jsonl") if split in (None, e.split))
        if required and not examples:
            raise ConfigError(f"{folder / (name + '.jsonl')}: no examples{'' if split is None else f' of split {split!r}'}")
        tasks.append(Task(name, tuple(texts), examples))
    return tasks


def read_descriptions(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The descriptions of ``names`` (None: of all tasks) in ``descriptions.json`` of ``folder``, sorted by name.

    Raises FileNotFoundError for a missing file, ConfigError if it lacks one of ``names`` or is invalid.
    """
    path = Path(folder) / DESCRIPTIONS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a task folder holds {DESCRIPTIONS_NAME} and <name>.jsonl files")
    descriptions = read_json(path, MAX_DESCRIPTIONS_BYTES)
    expect(isinstance(descriptions, dict) and descriptions, str(path), "an object of task names", descriptions)
    for name in names or ():
        if name not in descriptions:
            raise ConfigError(f"{path}: expected a task named {short_repr(name)}, found none of that name")
    asked = descriptions if names is None else set(names)
    wanted = {name: texts for name, texts in sorted(descriptions.items()) if name in asked}
    for name, texts in wanted.items():
        check_name(name, str(path))
        _check_descriptions(texts, f"{path}: {name}")
    return wanted


def write_tasks(folder: str | Path, tasks: Sequence[Task], *, overwrite: bool = False) -> None:
    """Write a task folder; each file is written atomically, ``descriptions.json`` last.

    Args:
        folder: created if missing.
        overwrite: allow a folder that holds tasks, or files named as those that are written.  Other tasks are then no longer
            in ``descriptions.json``; their files are kept.

    Raises FileExistsError for such a folder otherwise, ConfigError naming content that ``load_tasks`` would reject; nothing
    is written then.
    """
    folder = Path(folder)
    path = folder / DESCRIPTIONS_NAME
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists; expected a folder without tasks, or overwrite=True (--force)")
    names = [task.name for task in tasks]
    distinct = names and len(set(names)) == len(names)
    expect(distinct, str(folder), "at least one task and distinct names to write", names)
    contents = {f"{task.name}.jsonl": _lines(folder, task) for task in tasks}
    descriptions = {task.name: list(task.descriptions) for task in sorted(tasks, key=lambda task: task.name)}
    contents[DESCRIPTIONS_NAME] = (json.dumps(descriptions, indent=1, ensure_ascii=False) + "\n").encode()
    for file in () if overwrite else map(folder.joinpath, contents):
        # One with the same content is of a call that was killed.
        if file.exists() and not (file.is_file() and file.read_bytes() == contents[file.name]):
            raise FileExistsError(f"{file}: exists; expected no file of a task's name, or overwrite=True (--force)")
    content, count = contents[DESCRIPTIONS_NAME], sum(map(len, descriptions.values()))
    sizes = {"bytes": (len(content), MAX_DESCRIPTIONS_BYTES), "values": (count_values(content), MAX_VALUES)}
    for unit, (size, limit) in sizes.items():
        if size > limit:
            raise ConfigError(
                f"{path}: expected at most {limit} {unit} to write, got {size}: {count} descriptions of {len(tasks)} tasks "
                "are too many for one folder"
            )
    with replacing(folder, *contents) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)


def _lines(folder: Path, task: Task) -> bytes:
    check_name(task.name, str(folder))
    path = folder / f"{task.name}.jsonl"
    _check_descriptions(list(task.descriptions), f"{folder / DESCRIPTIONS_NAME}: {task.name}")
    lines = []
    for number, example in enumerate(task.examples, start=1):
        where = f"{path}:{number}"
        row: dict[str, Any] = {"input": example.input, "output": list(example.outputs), "split": example.split}
        row |= {key: getattr(example, key) for key, value in _DEFAULTS.items() if getattr(example, key) != value}
        if "options" in row:
            row["options"] = list(example.options)
        _example(where, row)
        lines.append((json.dumps(row, ensure_ascii=False) + "\n").encode())
        if len(lines[-1]) > MAX_LINE_BYTES:
            raise ConfigError(f"{where}: expected lines of at most {MAX_LINE_BYTES} bytes to write")
    return b"".join(lines)


def check_name(name: str, where: str) -> None:
    """ConfigError unless ``name`` is a valid name of a task and its file; ``where`` begins the message."""
    expected = f"task names of letters, digits and '._+-', not led by one of those, of at most {MAX_NAME_BYTES} bytes"
    expect(_NAME.fullmatch(name) and len(name.encode()) <= MAX_NAME_BYTES, where, expected, name)


def _check_descriptions(texts: object, where: str) -> None:
    valid = isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() and is_unicode(t) for t in texts)
    expect(valid, where, "a non-empty list of non-empty strings of Unicode text", texts)


def _example(where: str, values: dict[str, Any]) -> Example:
    """The example of a line; ConfigError unless metric, options, tests and outputs are consistent."""
    row = Row(where, values)
    example = Example(
        row.text("input"),
        row.texts("output"),
        row.text("split"),
        row.text("metric", _DEFAULTS["metric"]),
        row.texts("options") if "options" in row else (),
        row.text("tests", _DEFAULTS["tests"]),
    )
    outputs, metric, options, tests = example.outputs, example.metric, example.options, example.tests
    row.expect(outputs, "output", "at least one string")
    row.expect(metric in METRICS, "metric", f"one of {METRICS}")
    if metric == "options":
        distinct = len(options) > 1 and len(set(options)) == len(options) and all(option.strip() for option in options)
        row.expect(distinct, "options", "at least two distinct non-empty strings")
        row.expect(set(options).issuperset(outputs), "output", f"some of {short_repr(options)}")
    else:
        row.expect(not options, "options", f"none with metric {metric!r}")
    if metric == "pass":
        row.expect(tests.strip(), "tests", "Python source with metric 'pass'")
    else:
        row.expect(not tests, "tests", f"none with metric {metric!r}")
    numbers = metric != "number" or all(parse_number(output) is not None for output in outputs)
    row.expect(numbers, "output", "numbers with metric 'number'")
    return example


def parse_number(text: str) -> float | None:
    """``text`` as a number, ignoring commas; None if it is not a finite number.

    >>> parse_number(" 1,250.50 ")
    1250.5
    """
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_examples(path: Path) -> Iterator[Example]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, but {DESCRIPTIONS_NAME} names it")
    return (_example(where, values) for where, values in read_rows(path))
