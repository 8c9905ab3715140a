"""Import of Super-NaturalInstructions: one JSON file per task, as in ``tasks/`` of allenai/natural-instructions.

Reads "Definition", "Source", "Instance License" and "Instances" (a list of ``{"id", "input", "output"}``, with a string or a
list of accepted ones as output).  Early versions lack some fields or have a string instead of a list.  Files are untrusted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, expect, short_repr
from t2l_engine.files.text import MAX_LINE_BYTES, is_unicode, read_json
from t2l_engine.research.tasks import examples
from t2l_engine.research.tasks.folder import Example, Task, check_name
from t2l_engine.research.tasks.manifest import Manifest, apply
from t2l_engine.research.tasks.rows import Row

#: The largest tasks have about ten MB.
MAX_FILE_BYTES = 64 << 20
#: Limits in characters of fields that are compared word by word, and of other text (a line of a task folder).
MAX_LABEL, MAX_TEXT = 1 << 14, MAX_LINE_BYTES
#: The ten benchmarks of Text-to-LoRA (two are ARC), whose data must not be trained on.
BENCHMARKS = ("arc", "boolq", "gsm8k", "hellaswag", "humaneval", "mbpp", "openbookqa", "obqa", "piqa", "winogrande")
_NUMBER = re.compile(r"(?:task)?0*(\d{1,9})")


@dataclasses.dataclass(frozen=True)
class Imported:
    """``tasks``; ``left_out``: task -> reason; ``missing``: task -> number of the manifest's examples not found."""

    tasks: list[Task]
    left_out: dict[str, str]
    missing: dict[str, int]


def import_sni(
    source: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    max_instances: int = examples.MAX_EXAMPLES,
    manifest: Manifest | None = None,
    licences: Sequence[str] = (),
) -> Imported:
    """The tasks of a folder of Super-NaturalInstructions files, or of one file, sorted by name.

    Args:
        tasks: names or numbers (``"task1453_person..."``, ``"task1453"``, ``"1453"``) of the tasks to read; None: all.
        descriptions: task name or number -> descriptions to add to the task's definition (:func:`further_descriptions`).
        max_instances: limit of examples per task, chosen by hash.
        manifest: import its tasks with its examples and splits; ``max_instances`` is ignored then.
        licences: allowed licences; each licence of a task must contain one of them as whole words, ignoring case: "CC BY"
            allows "CC BY 4.0" but not "CC BY-NC 4.0".  Tasks that state none are left out.  Empty: any.

    Tasks made from BENCHMARKS, by "Source" or by name, are left out.
    Raises FileNotFoundError if there are no task files, ConfigError naming the file and the invalid field.
    """
    paths = [p for p in _files(Path(source), tasks) if manifest is None or p.stem in manifest.tasks]
    texts: dict[str, list[str]] = {}
    for name, found in (descriptions or {}).items():
        texts.setdefault(_key(name), []).extend(found)
    used = not texts or any(key in texts for path in paths for key in _keys(path.stem))
    expect(used, "descriptions", f"names or numbers of tasks in {source}", sorted(texts))
    imported = Imported([], {}, {})
    for path in paths:
        row = Row(str(path), _read_object(path))
        reason = _reason(row, path.stem, licences)
        found = [] if reason else list(_instances(row))
        if not found:
            imported.left_out[path.stem] = reason or "no instance with text"
            continue
        further = (text for key in _keys(path.stem) for text in texts.get(key, ()))
        about = (text.strip() for text in (*row.one_or_more("Definition", MAX_TEXT), *further))
        about = tuple(dict.fromkeys(filter(None, about)))
        if not about:
            raise ConfigError(f"{path}: Definition: expected one, or descriptions for {path.stem}, got none")
        task = Task(path.stem, about, tuple(found))
        if manifest is None:
            chosen = examples.split(examples.choose(found, max_instances))
            imported.tasks.append(dataclasses.replace(task, examples=tuple(chosen)))
        else:
            applied = apply([task], manifest)
            imported.tasks.extend(applied.tasks)
            imported.missing.update(applied.missing)
    return imported


def further_descriptions(path: str | Path) -> dict[str, list[str]]:
    """``{task name or number: [description, ...]}`` from a JSON file; ConfigError names the file and the task."""
    values = _read_object(Path(path))
    for name, texts in values.items():
        valid = isinstance(texts, list) and all(isinstance(text, str) and is_unicode(text) for text in texts)
        expect(valid, f"{path}: {short_repr(name)}", "a list of strings of Unicode text", texts)
    return values


def _files(source: Path, tasks: Sequence[str] | None) -> list[Path]:
    paths = [source] if source.is_file() else sorted(source.glob("task*.json"))
    if not paths:
        raise FileNotFoundError(f"{source}: no task*.json files found, expected tasks of Super-NaturalInstructions")
    for path in paths:
        check_name(path.stem, f"{source}: {short_repr(path.name)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file")
    if tasks is None:
        return paths
    wanted = set(map(_key, tasks))
    unknown = wanted.difference(key for path in paths for key in _keys(path.stem))
    expect(not unknown, "tasks", f"names or numbers of tasks in {source}", sorted(unknown))
    return [path for path in paths if wanted.intersection(_keys(path.stem))]


def _key(name: str) -> str:
    """The number in "task0042" or "42" without leading zeros; any other name unchanged."""
    number = _NUMBER.fullmatch(name)
    return number[1] if number else name


def _keys(name: str) -> tuple[str, str]:
    """The keys that identify a task: its name and its number."""
    return name, _key(name.partition("_")[0])


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, MAX_FILE_BYTES)
    expect(isinstance(values, dict), str(path), "a JSON object", values)
    return values


def _instances(row: Row) -> Iterator[Example]:
    """The instances with non-blank input and output."""
    for instance in row.objects("Instances"):
        text = instance.text("input")
        instance.expect("output" in instance, "output", "a string or a list of strings")
        instance.expect(len(text) < MAX_TEXT, "input", f"at most {MAX_TEXT} characters")
        outputs = tuple(output for output in instance.one_or_more("output", MAX_TEXT) if output.strip())
        if outputs and text.strip():
            yield Example(text, outputs, "train")


def _reason(row: Row, name: str, licences: Sequence[str]) -> str | None:
    """Why the task ``name`` is left out; None if it is not."""
    sources, stated = (row.one_or_more(field, MAX_LABEL) for field in ("Source", "Instance License"))
    benchmarks = (source for text in (*sources, name) for source in BENCHMARKS if names_data_set(text, source))
    if benchmark := next(benchmarks, None):
        return f"made of {benchmark}"
    # "-" is part of a word: "CC BY" does not match "CC BY-NC 4.0".
    allowed = [re.compile(rf"(?<![\w-]){re.escape(licence)}(?![\w-])", re.IGNORECASE) for licence in licences]
    refused = [text for text in stated if not any(pattern.search(text) for pattern in allowed)]
    if licences and (refused or not stated):
        return f"licence {short_repr(refused[0])}" if refused else "no licence stated"
    return None


def names_data_set(text: str, source: str) -> bool:
    """Whether ``text`` names the data set ``source``, with any separators; a name of up to four letters must be a word."""
    found, wanted = examples.words(text), "".join(examples.words(source))
    return wanted in found or (len(wanted) > 4 and wanted in "".join(found))
