"""Task folders: what training and evaluation read.

A folder holds ``<name>.jsonl`` files, one example a line: ``{"input": str, "output": [accepted answers], "split": str}``,
and ``descriptions.json``: ``{name: [description, ...]}``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

from t2l_engine.config import ConfigError, distinct, read_json, shown
from t2l_engine.prompts import is_unicode

DESCRIPTIONS_NAME = "descriptions.json"
MAX_LINE_BYTES = 1 << 20
MAX_NAME_BYTES = 128
_NAME = re.compile(r"\w[\w.+-]*")  # a plain file name, whatever the system


@dataclasses.dataclass(frozen=True)
class Example:
    """One input with its accepted answers."""

    input: str
    outputs: tuple[str, ...]
    split: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A named task: descriptions and examples."""

    name: str
    descriptions: tuple[str, ...]
    examples: tuple[Example, ...]


def load_tasks(folder: str | Path, split: str) -> list[Task]:
    """All tasks of ``folder`` with their examples of ``split``, sorted by name.

    Raises FileNotFoundError when the folder or its descriptions are absent, ConfigError naming file and line otherwise.
    """
    folder = Path(folder)
    path = folder / DESCRIPTIONS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a task folder holds {DESCRIPTIONS_NAME} and <name>.jsonl files")
    descriptions = read_json(path)
    if not isinstance(descriptions, dict) or not descriptions:
        raise ConfigError(f"{path}: expected an object of task names, got {type(descriptions).__name__}")
    tasks = []
    for name, texts in sorted(descriptions.items()):
        if not _NAME.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(
                f"{path}: expected task names of letters, digits and '._+-', not led by one of those, of at most "
                f"{MAX_NAME_BYTES} bytes, got {shown(name)}"
            )
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ConfigError(f"{path}: {name}: expected a non-empty list of non-empty strings")
        if not all(map(is_unicode, texts)):
            raise ConfigError(f"{path}: {name}: expected Unicode text, got lone surrogates")
        for _ in _read_examples(folder / f"{name}.jsonl"):  # to its end before anything is kept
            pass
        examples = tuple(e for e in _read_examples(folder / f"{name}.jsonl") if e.split == split)
        if not examples:
            raise ConfigError(f"{folder / (name + '.jsonl')}: no examples of split {split!r}")
        tasks.append(Task(name, tuple(texts), examples))
    return tasks


def _read_examples(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, but {DESCRIPTIONS_NAME} names it")
    with path.open("rb") as lines:
        for number in itertools.count(1):
            line = lines.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{path}:{number}: expected lines of at most {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=distinct)
                outputs = row["output"]
                example = Example(row["input"], tuple(outputs), row["split"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {shown(str(error))}"
                raise ConfigError(f"{path}:{number}: expected input, output and split: {reason}") from None
            strings = (example.input, example.split, *example.outputs)
            if not isinstance(outputs, list) or not outputs or not all(isinstance(s, str) for s in strings):
                raise ConfigError(f"{path}:{number}: expected strings, output a non-empty list of them")
            if not all(map(is_unicode, strings)):
                raise ConfigError(f"{path}:{number}: expected Unicode text, got lone surrogates")
            yield example
