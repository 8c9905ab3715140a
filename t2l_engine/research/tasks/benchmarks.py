"""Import of the ten benchmarks of Text-to-LoRA (arXiv 2506.06105), each from a ``<name>.jsonl`` file with a row per line.

A row has the fields of the data set on the Hugging Face Hub or of its first publication.  It may also be the value of "raw"
in an object that has a "split" too.  Files are untrusted.  ``docs/tasks.md`` lists the metrics and the licences.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t2l_engine.files.errors import expect, short_repr
from t2l_engine.files.text import read_rows
from t2l_engine.research.tasks.folder import Example, Task, parse_number
from t2l_engine.research.tasks.rows import Row

#: Split of rows that state none.
SPLIT = "test"
_NO_ANSWER, _CHOICES = "no answer is stated", "the choices are not distinct texts"


@dataclasses.dataclass(frozen=True)
class Imported:
    """``tasks``; ``left_out``: benchmark -> reason -> number of rows left out."""

    tasks: list[Task]
    left_out: dict[str, dict[str, int]]


class _LeftOut(Exception):
    """A well-formed row that cannot be used; the message is the reason."""


def _index(row: Row, name: str, count: int, first: int = 0) -> int:
    """Index of the correct one of ``count`` choices; the field holds index + ``first``, as a number or as digits.

    _LeftOut for "" and -1, which mean that no answer is stated.
    """
    value = row.values.get(name)
    if value in ("", "-1") or (value == -1 and isinstance(value, int)):
        raise _LeftOut(_NO_ANSWER)
    numbers = {key: i for i in range(count) for key in (i + first, str(i + first))}
    valid = type(value) in (int, str) and value in numbers
    row.expect(valid, name, f"a number in [{first}, {first + count})")
    return numbers[value]


def _choose(text: str, options: Sequence[str], correct: int) -> Example:
    options = tuple(option.strip() for option in options)
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise _LeftOut(_CHOICES)
    return Example(text.strip(), (options[correct],), SPLIT, "options", options)


def _labelled(row: Row) -> Example:
    """ARC and OpenBookQA: choices are columns on the Hub, and objects in the authors' files."""
    if isinstance(row.values.get("question"), dict):
        question = row.object("question")
        text, choices = question.text("stem"), question.objects("choices")
        labels, options = (tuple(choice.text(key) for choice in choices) for key in ("label", "text"))
    else:
        text = row.text("question_stem" if "question_stem" in row else "question")
        columns = row.object("choices")
        labels, options = columns.texts("label"), columns.texts("text")
    answer = row.text("answerKey")
    if not answer:
        raise _LeftOut(_NO_ANSWER)
    found = len(labels) == len(options) and labels.count(answer) == 1
    row.expect(found, "answerKey", f"one of the labels {short_repr(list(labels))} of {len(options)} choices")
    return _choose(text, options, labels.index(answer))


def _boolq(row: Row) -> Example:
    answer = row.values.get("answer")
    row.expect(isinstance(answer, bool), "answer", "true or false")
    text = f"{row.text('passage').strip()}\n\nQuestion: {row.text('question').strip().rstrip('?')}?"
    return _choose(text, ("yes", "no"), 0 if answer else 1)


def _hellaswag(row: Row) -> Example:
    endings = row.texts("endings")
    return _choose(row.text("ctx"), endings, _index(row, "label", len(endings)))


def _piqa(row: Row) -> Example:
    return _choose(row.text("goal"), (row.text("sol1"), row.text("sol2")), _index(row, "label", 2))


def _winogrande(row: Row) -> Example:
    options = row.text("option1").strip(), row.text("option2").strip()
    text = f"{row.text('sentence').strip()}\n\nQuestion: does the blank _ stand for {options[0]} or for {options[1]}?"
    return _choose(text, options, _index(row, "answer", 2, first=1))


def _gsm8k(row: Row) -> Example:
    question, (_, found, number) = row.text("question").strip(), row.text("answer").rpartition("####")
    if not found or parse_number(number) is None:
        raise _LeftOut("the answer does not end in a number after ####")
    return Example(question, (number.strip(),), SPLIT, "number")


def _humaneval(row: Row) -> Example:
    name = row.text("entry_point")
    row.expect(name.isidentifier(), "entry_point", "a name of Python")
    tests = f"{row.text('test')}\ncheck({name})"
    return Example(row.text("prompt"), (row.text("canonical_solution"),), SPLIT, "pass", tests=tests)


def _mbpp(row: Row) -> Example:
    """The full data set, or the sanitized one, in which some fields have other names."""
    tests = "\n".join(row.texts("test_list"))
    if not tests.strip():
        raise _LeftOut("there are no tests")
    before = "\n".join(row.texts("test_imports")) if "test_imports" in row else row.text("test_setup_code")
    text = f"{row.text('text' if 'text' in row else 'prompt').strip()}\n\nThe program must fulfil:\n{tests}"
    return Example(text, (row.text("code"),), SPLIT, "pass", tests=f"{before}\n{tests}" if before.strip() else tests)


_READERS: dict[str, Callable[[Row], Example]] = {
    "arc_easy": _labelled, "arc_challenge": _labelled, "boolq": _boolq, "hellaswag": _hellaswag, "openbookqa": _labelled,
    "piqa": _piqa, "winogrande": _winogrande, "gsm8k": _gsm8k, "humaneval": _humaneval, "mbpp": _mbpp,
}  # fmt: skip
NAMES = tuple(_READERS)
_DESCRIPTIONS = json.loads((Path(__file__).parent / "benchmarks.json").read_text(encoding="utf-8"))


def import_benchmarks(source: str | Path, names: Sequence[str] | None = None, limit: int | None = None) -> Imported:
    """The benchmarks that have a file in folder ``source``, as tasks in the order of NAMES, with rows in their order.

    Rows have the split that they state (HellaSwag's do), or "test".  Rows without a stated answer or with equal choices are
    left out, and so is a benchmark without remaining rows.

    Args:
        names: of the benchmarks to import, each of which must have a file; None: all that have one.
        limit: of examples per split; further rows are only parsed as JSON.  None: all.

    Raises FileNotFoundError for missing files, ConfigError naming an unknown benchmark, or file, line and field.
    """
    source = Path(source)
    unknown = sorted(set(names or ()).difference(NAMES))
    expect(not unknown, "names", f"some of {NAMES}", unknown)
    expect(limit is None or limit > 0, "limit", "a positive number", limit)
    found = [name for name in NAMES if (source / f"{name}.jsonl").is_file()]
    absent = [name for name in names or () if name not in found]
    if absent or not found:
        raise FileNotFoundError(
            f"{source}: no {(absent or ['<name>'])[0]}.jsonl found; the benchmarks are {', '.join(NAMES)}"
        )
    imported = Imported([], {})
    for name in found if names is None else (name for name in found if name in names):
        left_out: collections.Counter[str] = collections.Counter()
        examples = tuple(_read(name, source / f"{name}.jsonl", limit, left_out))
        if left_out:
            imported.left_out[name] = dict(left_out)
        if examples:
            imported.tasks.append(Task(name, tuple(_DESCRIPTIONS[name]), examples))
    return imported


def _read(name: str, path: Path, limit: int | None, left_out: collections.Counter[str]) -> Iterator[Example]:
    counts: collections.Counter[str] = collections.Counter()
    for where, values in read_rows(path):
        row = Row(where, values)
        split = row.text("split", SPLIT)
        if limit is not None and counts[split] >= limit:
            continue
        try:
            example = _READERS[name](row.object("raw") if "raw" in row else row)
        except _LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        counts[split] += 1
        yield dataclasses.replace(example, split=split)
