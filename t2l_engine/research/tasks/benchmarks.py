"""Import of the ten benchmarks of Text-to-LoRA (arXiv 2506.06105), each from a ``<name>.jsonl`` file with a row per line.

A row has the fields of the data set on the Hugging Face Hub or of its first publication.  It may also be the value of "raw"
in an object that has a "split" too.  Files are untrusted.  Licences, as stated by the authors:

==============  ============  =====================  ==============
name            metric        data set               licence
==============  ============  =====================  ==============
arc_challenge   options       ARC, Challenge Set     CC BY-SA 4.0
arc_easy        options       ARC, Easy Set          CC BY-SA 4.0
boolq           options       BoolQ                  CC BY-SA 3.0
gsm8k           number        GSM8K                  MIT
hellaswag       options       HellaSwag              MIT
humaneval       pass          HumanEval              MIT
mbpp            pass          MBPP                   CC BY 4.0
openbookqa      options       OpenBookQA             Apache-2.0
piqa            options       PIQA                   AFL-3.0
winogrande      options       WinoGrande             CC BY
==============  ============  =====================  ==============
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import is_unicode, read_rows
from t2l_engine.research.tasks.folder import Example, Task, parse_number

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


class _Row:
    """Checked access to a row's fields; ConfigError names line and field if it is missing or of another type."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where, self.values = where, values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def fault(self, name: str, expected: str) -> ConfigError:
        found = f"got {short_repr(self.values[name])}" if name in self.values else "found none"
        return ConfigError(f"{self.where}: {name}: expected {expected}, {found}")

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not is_unicode(value):
            raise self.fault(name, "a string of Unicode text")
        return value

    def texts(self, name: str) -> list[str]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) and is_unicode(value) for value in values):
            raise self.fault(name, "a list of strings of Unicode text")
        return values

    def part(self, name: str) -> _Row:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return _Row(f"{self.where}: {name}", value)

    def parts(self, name: str) -> list[_Row]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.fault(name, "a list of objects")
        return [_Row(f"{self.where}: {name}[{i}]", value) for i, value in enumerate(values)]

    def index(self, name: str, count: int, first: int = 0) -> int:
        """Index of the correct one of ``count`` choices; the field holds index + ``first``, as a number or as digits.

        _LeftOut for "" and -1, which mean that no answer is stated.
        """
        value = self.values.get(name)
        if value in ("", "-1") or (value == -1 and isinstance(value, int)):
            raise _LeftOut(_NO_ANSWER)
        numbers = {key: i for i in range(count) for key in (i + first, str(i + first))}
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in numbers:
            raise self.fault(name, f"a number in [{first}, {first + count})")
        return numbers[value]


def _choose(row: _Row, text: str, options: Sequence[str], correct: int) -> Example:
    options = tuple(option.strip() for option in options)
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise _LeftOut(_CHOICES)
    return Example(text.strip(), (options[correct],), SPLIT, "options", options)


def _labelled(row: _Row) -> Example:
    """ARC and OpenBookQA: choices are columns on the Hub, and objects in the authors' files."""
    if isinstance(row.values.get("question"), dict):
        question = row.part("question")
        text, choices = question.text("stem"), question.parts("choices")
        labels, options = [c.text("label") for c in choices], [c.text("text") for c in choices]
    else:
        text = row.text("question_stem" if "question_stem" in row else "question")
        columns = row.part("choices")
        labels, options = columns.texts("label"), columns.texts("text")
    answer = row.text("answerKey")
    if not answer:
        raise _LeftOut(_NO_ANSWER)
    if len(labels) != len(options) or labels.count(answer) != 1:
        raise row.fault("answerKey", f"one of the labels {short_repr(labels)} of {len(options)} choices")
    return _choose(row, text, options, labels.index(answer))


def _boolq(row: _Row) -> Example:
    answer = row.values.get("answer")
    if not isinstance(answer, bool):
        raise row.fault("answer", "true or false")
    text = f"{row.text('passage').strip()}\n\nQuestion: {row.text('question').strip().rstrip('?')}?"
    return _choose(row, text, ("yes", "no"), 0 if answer else 1)


def _hellaswag(row: _Row) -> Example:
    endings = row.texts("endings")
    return _choose(row, row.text("ctx"), endings, row.index("label", len(endings)))


def _piqa(row: _Row) -> Example:
    return _choose(row, row.text("goal"), (row.text("sol1"), row.text("sol2")), row.index("label", 2))


def _winogrande(row: _Row) -> Example:
    options = row.text("option1").strip(), row.text("option2").strip()
    text = f"{row.text('sentence').strip()}\n\nQuestion: does the blank _ stand for {options[0]} or for {options[1]}?"
    return _choose(row, text, options, row.index("answer", 2, first=1))


def _gsm8k(row: _Row) -> Example:
    question, (_, found, number) = row.text("question").strip(), row.text("answer").rpartition("####")
    if not found or parse_number(number) is None:
        raise _LeftOut("the answer does not end in a number after ####")
    return Example(question, (number.strip(),), SPLIT, "number")


def _humaneval(row: _Row) -> Example:
    name = row.text("entry_point")
    if not name.isidentifier():
        raise row.fault("entry_point", "a name of Python")
    tests = f"{row.text('test')}\ncheck({name})"
    return Example(row.text("prompt"), (row.text("canonical_solution"),), SPLIT, "pass", tests=tests)


def _mbpp(row: _Row) -> Example:
    """The full data set, or the sanitized one, in which some fields have other names."""
    tests = "\n".join(row.texts("test_list"))
    if not tests.strip():
        raise _LeftOut("there are no tests")
    before = "\n".join(row.texts("test_imports")) if "test_imports" in row else row.text("test_setup_code")
    text = f"{row.text('text' if 'text' in row else 'prompt').strip()}\n\nThe program must fulfil:\n{tests}"
    return Example(text, (row.text("code"),), SPLIT, "pass", tests=f"{before}\n{tests}" if before.strip() else tests)


_READERS: dict[str, Callable[[_Row], Example]] = {
    "arc_easy": _labelled,
    "arc_challenge": _labelled,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "openbookqa": _labelled,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}
NAMES = tuple(_READERS)
_DESCRIPTIONS = {
    "arc_easy": (
        "Answer the school science question with the one choice that is true.",
        "These are simple questions about nature and matter, as pupils get them in tests. Pick the right answer.",
        "Use basic knowledge of biology, physics, chemistry and the earth to tell which of the offered answers is correct.",
    ),
    "arc_challenge": (
        "Work out which answer to a hard science question from a school exam is the right one.",
        "Each question needs several facts of science put together. Think, then choose the answer that follows from them.",
        "Select the correct answer to an exam question about science that looking up a single sentence does not settle.",
    ),
    "boolq": (
        "Read the paragraph, then say yes or no to the question about it.",
        "Decide from the text given whether what is asked is the case. Reply with yes or with no.",
        "You see an excerpt of an encyclopedia and a question that somebody typed. Answer it with one word, yes or no.",
    ),
    "hellaswag": (
        "Continue the scene with the sentence that makes the most sense.",
        "Given how a description of an activity starts, find what plausibly comes next.",
        "Finish the passage: of several endings only one fits what people do in everyday life.",
    ),
    "openbookqa": (
        "Combine an elementary fact of science with common knowledge to complete the sentence or answer the question.",
        "Choose the ending or answer that agrees with how the world works, by the science of a primary school.",
        "Apply a simple law of nature to an everyday situation and tell which of the alternatives holds.",
    ),
    "piqa": (
        "Say how to reach the goal with things at hand: take the way that would really work.",
        "Two procedures are proposed for a practical purpose. Prefer the one that physical common sense approves.",
        "Judge by the properties of everyday objects which instruction achieves what is wanted.",
    ),
    "winogrande": (
        "A sentence has a blank. Tell which of the two names or things belongs there.",
        "Find out whom or what the gap in the sentence refers to, from what the sentence says about both candidates.",
        "Resolve the reference: fill _ with the candidate that makes the statement sensible.",
    ),
    "gsm8k": (
        "Solve the word problem step by step and end with the number asked for.",
        "Do the arithmetic that the little story calls for; the last thing you write is the result.",
        "Reason through a mathematics exercise of primary school with simple calculations, then state the final figure.",
    ),
    "humaneval": (
        "Complete the Python function so that it does what its docstring promises.",
        "Given the head and the documentation of a function in Python, write its body.",
        "Implement the function that is begun. Hidden tests will call it, so mind the examples and the corner cases.",
    ),
    "mbpp": (
        "Write a short Python program for the task so that all its assertions hold.",
        "Turn the description in one sentence into a working Python function; the checks show its name and arguments.",
        "Program a solution in Python to a beginner's exercise. Reply with code that passes the listed tests.",
    ),
}


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
    if unknown:
        raise ConfigError(f"names: expected some of {NAMES}, got {short_repr(unknown)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected a positive number, got {short_repr(limit)}")
    found = [name for name in NAMES if (source / f"{name}.jsonl").is_file()]
    absent = [name for name in names or () if name not in found]
    if absent or not found:
        raise FileNotFoundError(
            f"{source}: no {(absent or ['<name>'])[0]}.jsonl found; the benchmarks are {', '.join(NAMES)}"
        )
    imported = Imported([], {})
    for name in found:
        if names is None or name in names:
            examples, left_out = _read(name, source / f"{name}.jsonl", limit)
            if left_out:
                imported.left_out[name] = left_out
            if examples:
                imported.tasks.append(Task(name, _DESCRIPTIONS[name], tuple(examples)))
    return imported


def _read(name: str, path: Path, limit: int | None) -> tuple[list[Example], dict[str, int]]:
    examples: list[Example] = []
    counts: collections.Counter[str] = collections.Counter()
    left_out: collections.Counter[str] = collections.Counter()
    for where, values in read_rows(path):
        row = _Row(where, values)
        split = row.text("split") if "split" in row else SPLIT
        if limit is not None and counts[split] >= limit:
            continue
        try:
            example = _READERS[name](row.part("raw") if "raw" in row else row)
        except _LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        counts[split] += 1
        examples.append(dataclasses.replace(example, split=split))
    return examples, dict(left_out)
