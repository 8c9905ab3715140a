"""Manifests: the assignment of tasks' examples to splits as digests, without any text of the tasks.

A manifest is JSON: ``{"format", "about", "tasks": {name: {"skill", "task_split", "source", "licence": [...], "permissive",
"splits": {split: base64}}}}``.  The base64 of a split holds the first 5 bytes of the SHA-256 of each example, sorted and
concatenated.  Applied to tasks from the same sources, it reproduces examples and splits.  The manifest of the suite of
specifications is smaller: its examples are made again from a seed, see :mod:`t2l_specs.fixed`.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import MAX_NAME, ConfigError, boolean, expect, one_of, short_repr
from t2l_engine.files.text import from_json, read_json
from t2l_engine.research.tasks.examples import example_digest, input_digest, pool
from t2l_engine.research.tasks.folder import Task, check_name, load_tasks
from t2l_engine.research.tasks.rows import check_text

FORMAT, SPECS_FORMAT = "t2l_engine.tasks.v1", "t2l_engine.specs.v1"
PACKAGED = Path(__file__).parent / "manifests"
#: train: training tasks.  in-family: held out, of skills in train.  out-of-family: held out, of other skills.
TASK_SPLITS = ("train", "in-family", "out-of-family")
PREFIX_BYTES = 5
#: A task of 200 examples takes about 1,500 bytes of the file and 20,000 bytes of memory.
MAX_MANIFEST_BYTES = 1 << 23


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task in a manifest; ``splits`` maps a split to the prefixes (5 bytes each) of its examples' digests.

    ``permissive``: whether the licences allow derived works under other terms.  ``descriptions``: their digest;
    empty if a manifest does not fix descriptions.

    Raises ConfigError naming an invalid field.
    """

    skill: str
    task_split: str
    source: str
    licence: tuple[str, ...]
    permissive: bool
    splits: dict[str, frozenset[bytes]]
    descriptions: str = ""

    def __post_init__(self) -> None:
        check_text("skill", self.skill)
        check_text("source", self.source)
        one_of("task_split", self.task_split, TASK_SPLITS)
        boolean("permissive", self.permissive)
        expect(isinstance(self.descriptions, str), "descriptions", "hex digits", self.descriptions)
        listed = isinstance(self.licence, (list, tuple)) and self.licence
        expect(listed, "licence", "a non-empty list of strings", self.licence)
        for text in self.licence:
            check_text("licence", text)
        object.__setattr__(self, "licence", tuple(self.licence))
        expect(isinstance(self.splits, dict) and self.splits, "splits", "an object of splits", self.splits)
        if len(frozenset().union(*self.splits.values())) != sum(map(len, self.splits.values())):
            raise ConfigError("splits: expected every example in one split only")

    def split_of(self, prefix: bytes) -> str | None:
        """The split of the example whose digest starts with ``prefix``; None if there is none."""
        return next((name for name, prefixes in self.splits.items() if prefix in prefixes), None)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """``tasks``: by name; ``about``: the purpose of the manifest, in a sentence."""

    about: str
    tasks: dict[str, Entry]

    def names(self, task_split: str | None = None) -> list[str]:
        """The tasks of a task split (None: of all), sorted; ConfigError for an unknown one."""
        if task_split is not None:
            one_of("task_split", task_split, TASK_SPLITS)
        return sorted(name for name, entry in self.tasks.items() if task_split in (None, entry.task_split))


@dataclasses.dataclass(frozen=True)
class Difference:
    """``count`` examples of a task that are ``"missing"``, ``"extra"`` or ``"moved"`` to another split.

    ``split``: of the examples in the manifest; for extra ones, in the folder; None if the whole task is missing or extra.
    Of kind ``"reworded"``: the task's ``count`` descriptions, or their order, are others.
    """

    task: str
    kind: str
    split: str | None
    count: int

    def __str__(self) -> str:
        if self.kind == "reworded":
            return f"{self.task}: {self.count} descriptions reworded"
        where = "in all" if self.split is None else f"of split {short_repr(self.split)}"
        return f"{self.task}: {self.count} examples {where} {self.kind}"


@dataclasses.dataclass(frozen=True)
class Applied:
    """``tasks`` with a manifest's examples and splits; ``missing``: task -> number of examples that were not found."""

    tasks: list[Task]
    missing: dict[str, int]


def build(tasks: Iterable[Task], facts: Mapping[str, Mapping[str, Any]], about: str) -> dict[str, Any]:
    """The JSON of a manifest of ``tasks`` with all their splits.

    Args:
        facts: task name -> ``skill``, ``task_split``, ``source``, ``licence`` and ``permissive``.

    Raises ConfigError naming task and field.
    """
    values: dict[str, Any] = {"format": FORMAT, "about": about, "tasks": {}}
    for task in sorted(tasks, key=lambda task: task.name):
        encoded = {name: base64.b64encode(b"".join(found)).decode() for name, found in prefixes(task).items()}
        values["tasks"][task.name] = {**facts.get(task.name, {}), "splits": encoded}
    _parse(values, "manifest")
    return values


def read(path_or_name: str | Path, examples: int | None = None) -> Manifest:
    """The manifest in a file, or a packaged one by name (``"skills"``, ``"specs"``).

    ``examples``: how many a task of the suite of specifications has; None: its default.

    Raises FileNotFoundError listing the packaged ones, ConfigError naming file, task and field.
    """
    packaged = {path.stem: path for path in PACKAGED.glob("*.json")}
    path = packaged.get(str(path_or_name), Path(path_or_name))
    if not path.is_file():
        raise FileNotFoundError(f"manifest {str(path_or_name)!r}: no such file; packaged manifests: {sorted(packaged)}")
    values = read_json(path, MAX_MANIFEST_BYTES)
    if isinstance(values, dict) and values.get("format") == SPECS_FORMAT:
        from t2l_specs import fixed  # the generator, which imports this module

        return fixed.read(values, examples, str(path))
    expect(examples is None, "examples", f"none with manifest {path}, which fixes them", examples)
    return _parse(values, str(path))


def check(folder: str | Path, manifest: Manifest, task_split: str | None = None) -> list[Difference]:
    """The differences between a task folder and ``manifest`` (with ``task_split``: its tasks of that one), sorted by task.

    Raises ConfigError for an unknown task split, and the errors of ``load_tasks``.
    """
    wanted = {name: manifest.tasks[name] for name in manifest.names(task_split)}
    tasks = {task.name: task for task in load_tasks(folder, None, required=False)}
    differences: list[Difference] = []
    for name in sorted(tasks.keys() | wanted.keys()):
        if name not in tasks:
            differences.append(Difference(name, "missing", None, sum(map(len, wanted[name].splits.values()))))
        elif name not in manifest.tasks:
            differences.append(Difference(name, "extra", None, len(tasks[name].examples)))
        elif name in wanted:
            differences += _compare(tasks[name], wanted[name])
    return differences


def select(names: Iterable[str], manifest: Manifest, task_split: str, *, permissive: bool = False) -> list[str]:
    """The tasks among ``names`` in ``task_split`` of ``manifest``, sorted; with ``permissive`` only permissive ones.

    Raises ConfigError for an unknown task split.
    """
    chosen = set(names).intersection(manifest.names(task_split))
    return sorted(name for name in chosen if manifest.tasks[name].permissive or not permissive)


def apply(tasks: Iterable[Task], manifest: Manifest) -> Applied:
    """``tasks`` with the examples and splits of ``manifest`` instead of their own, in order of hash.

    An example is identified by its input and any of its accepted outputs, which becomes the first one.  Tasks that are not
    in the manifest or without any of its examples are left out.
    """
    applied, missing = [], {}
    for task in tasks:
        entry = manifest.tasks.get(task.name)
        if entry is None:
            continue
        found = {}
        for example in pool(task.examples):
            for output in example.outputs:
                prefix = _prefix(example.input, output)
                name = entry.split_of(prefix)
                if name is not None and prefix not in found:
                    outputs = tuple(dict.fromkeys((output, *example.outputs)))
                    found[prefix] = dataclasses.replace(example, outputs=outputs, split=name)
                    break
        lacking = sum(map(len, entry.splits.values())) - len(found)
        if lacking:
            missing[task.name] = lacking
        if found:
            applied.append(dataclasses.replace(task, examples=tuple(sorted(found.values(), key=input_digest))))
    return Applied(applied, missing)


def summary(tasks: Iterable[Task]) -> dict[str, dict[str, list]]:
    """``{task: {"descriptions": [count, hex], split: [count, hex], ...}}``, 16 hex digits of SHA-256 each.

    Of all that training may see, in its order: the last descriptions may be held out, and examples are drawn by their
    places.  About 200 bytes per task, small enough for a checkpoint's configuration.
    """
    result = {}
    for task in tasks:
        parts: dict[str, list] = {"descriptions": list(task.descriptions)}
        for split in sorted({example.split for example in task.examples}):
            own = (example for example in task.examples if example.split == split)
            parts[split] = [(e.input, e.outputs, e.metric, e.options, e.tests) for e in own]
        result[task.name] = {name: [len(of), short_digest(of)] for name, of in parts.items()}
    return result


def short_digest(values: Iterable[Any]) -> str:
    """16 hex digits of SHA-256 over the JSON of ``values``, in their order."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:16]


def prefixes(task: Task) -> dict[str, list[bytes]]:
    """The digest prefixes of the task's examples by split, both sorted."""
    splits: dict[str, list[bytes]] = {}
    for example in task.examples:
        splits.setdefault(example.split, []).append(_prefix(example.input, example.outputs[0]))
    return {name: sorted(found) for name, found in sorted(splits.items())}


def _parse(values: Any, where: str) -> Manifest:
    found = values.get("format") if isinstance(values, dict) else None
    expect(found == FORMAT, f"{where}: format", f"a manifest {FORMAT!r}", found or values)
    expect(values.keys() == {"format", "about", "tasks"}, where, "format, about and tasks", sorted(values))
    about, tasks = values["about"], values["tasks"]
    check_text(f"{where}: about", about)
    expect(isinstance(tasks, dict) and tasks, f"{where}: tasks", "an object of tasks", tasks)
    for name in tasks:
        check_name(name, f"{where}: tasks")
    return Manifest(about, {name: _entry(entry, f"{where}: {name}") for name, entry in tasks.items()})


def _entry(values: Any, where: str) -> Entry:
    if isinstance(values, dict) and isinstance(splits := values.get("splits"), dict):
        values = values | {"splits": {name: _decoded(f"{where}: splits", name, text) for name, text in splits.items()}}
    return from_json(Entry, values, where)


def _decoded(where: str, name: str, text: Any) -> frozenset[bytes]:
    """The digest prefixes in base64 ``text`` of split ``name``."""
    expect(name.isidentifier() and len(name) <= MAX_NAME, where, "plain names such as 'train'", name)
    expected = f"{where}: {name}: expected base64 of {PREFIX_BYTES} bytes an example, each once"
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise ConfigError(f"{expected}, got {short_repr(text)}") from None
    found = frozenset(content[i : i + PREFIX_BYTES] for i in range(0, len(content), PREFIX_BYTES))
    if not content or len(found) * PREFIX_BYTES != len(content):
        raise ConfigError(f"{expected}, got {len(content)} bytes, {len(found)} of them different")
    return found


def _prefix(text: str, output: str) -> bytes:
    return example_digest(text, output)[:PREFIX_BYTES]


def _compare(task: Task, entry: Entry) -> list[Difference]:
    """Missing, extra and moved examples, by split."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    seen = set()
    for example in task.examples:
        prefix = _prefix(example.input, example.outputs[0])
        name = entry.split_of(prefix)
        if name is None or prefix in seen:
            counts["extra", example.split] += 1
        elif name != example.split:
            counts["moved", name] += 1
        seen.add(prefix)
    for name, prefixes in entry.splits.items():
        counts["missing", name] += len(prefixes - seen)
    found = [Difference(task.name, kind, name, count) for (kind, name), count in sorted(counts.items()) if count]
    if entry.descriptions and short_digest(task.descriptions) != entry.descriptions:
        found.append(Difference(task.name, "reworded", None, len(task.descriptions)))
    return found
