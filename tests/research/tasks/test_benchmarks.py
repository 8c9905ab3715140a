"""Import of T2L's benchmarks: the forms of their rows, how answers are judged, what is left out, and broken rows."""

import json

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import MAX_LINE_BYTES
from t2l_engine.research.tasks.benchmarks import NAMES, import_benchmarks
from t2l_engine.research.tasks.folder import Example, load_tasks, write_tasks

COLUMNS = {"label": ["1", "2", "3"], "text": ["a stone ", "a fish", "a tree"]}
OBJECTS = [{"label": label, "text": text} for label, text in zip(COLUMNS["label"], COLUMNS["text"], strict=True)]
ARC = {"id": "x", "question": "What swims?", "choices": COLUMNS, "answerKey": "2"}
BOOLQ = {"question": "can fish swim", "passage": "Fish -- They swim.", "answer": True}
HELLASWAG = {"ind": 1, "ctx": "He sits", "endings": ["up.", "down."], "label": "1", "split": "val", "split_type": "x"}
PIQA = {"goal": "Open the door.", "sol1": "Turn the knob.", "sol2": "Wait for it.", "label": 0}
WINOGRANDE = {"sentence": "The cup was on the table, so the _ was wet.", "option1": "cup", "option2": "table", "answer": "2"}
GSM8K = {"question": "What is 500 times 2?", "answer": "500*2=<<500*2=1000>>1,000\n#### 1,000"}
CHECKS = "def check(candidate):\n    assert candidate() == 1"
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": '\ndef one():\n    """Return 1."""\n', "entry_point": "one",
             "canonical_solution": "    return 1\n", "test": CHECKS}  # fmt: skip
MBPP = {"text": "Write one.", "code": "def one(): return 1", "test_list": ["assert one()", "assert one() < 2"]}
SETUP = MBPP | {"test_setup_code": "import math"}
SANITIZED = {"prompt" if key == "text" else key: value for key, value in MBPP.items()} | {"test_imports": ["import math"]}

FISH = Example("What swims?", ("a fish",), "test", "options", ("a stone", "a fish", "a tree"))
PROGRAM = "Write one.\n\nThe program must fulfil:\nassert one()\nassert one() < 2"
TESTS = "import math\nassert one()\nassert one() < 2"
CODE = Example(PROGRAM, ("def one(): return 1",), "test", "pass", tests=TESTS)
OPTIONS = ("test", "options")
CUP = "The cup was on the table, so the _ was wet.\n\nQuestion: does the blank _ stand for cup or for table?"
SWIM, KNOB = "Fish -- They swim.\n\nQuestion: can fish swim?", ("Turn the knob.", "Wait for it.")
STEM = {"question": {"stem": "What swims?", "choices": OBJECTS}, "answerKey": "2"}
#: name -> rows in every spelling, and what they become.
FORMS = {
    "arc_easy": [(ARC, FISH), (STEM, FISH)],
    "arc_challenge": [(ARC, FISH)],
    "openbookqa": [({"question_stem": "What swims?", "choices": COLUMNS, "answerKey": "2"}, FISH), (STEM, FISH)],
    "boolq": [
        (BOOLQ | {"answer": right}, Example(SWIM, (text,), *OPTIONS, ("yes", "no")))
        for right, text in ((True, "yes"), (False, "no"))
    ],
    "hellaswag": [(HELLASWAG, Example("He sits", ("down.",), "val", "options", ("up.", "down.")))],
    "piqa": [(PIQA, Example("Open the door.", KNOB[:1], *OPTIONS, KNOB))],
    "winogrande": [
        (WINOGRANDE | {"answer": number}, Example(CUP, (text,), *OPTIONS, ("cup", "table")))
        for number, text in ((1, "cup"), ("2", "table"))
    ],
    "gsm8k": [(GSM8K, Example("What is 500 times 2?", ("1,000",), "test", "number"))],
    "humaneval": [
        (HUMANEVAL, Example(HUMANEVAL["prompt"], ("    return 1\n",), "test", "pass", tests=f"{CHECKS}\ncheck(one)"))
    ],
    "mbpp": [(SETUP, CODE), (SANITIZED, CODE)],
}
NO_ANSWER, CHOICES = "no answer is stated", "the choices are not distinct texts"


@pytest.fixture
def source(tmp_path):
    """Factory of the folder of benchmarks: rows, or lines as they are, of each."""
    folder = tmp_path / "source"
    folder.mkdir()

    def make(**files):
        for name, rows in files.items():
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder

    return make


def test_rows_of_every_benchmark(source, tmp_path):
    folder = source(**{name: [row for row, _ in forms] for name, forms in FORMS.items()})
    imported = import_benchmarks(folder)
    assert imported.left_out == {} and [task.name for task in imported.tasks] == list(NAMES)
    assert {task.name: list(task.examples) for task in imported.tasks} == {
        name: [example for _, example in forms] for name, forms in FORMS.items()
    }
    texts = [text for task in imported.tasks for text in task.descriptions]
    assert len(set(texts)) == len(texts) == 30
    write_tasks(tmp_path / "tasks", imported.tasks)
    assert load_tasks(tmp_path / "tasks", None) == sorted(imported.tasks, key=lambda task: task.name)


def test_splits_order_and_how_many(source):
    rows = [{"raw": PIQA | {"goal": str(i)}, "split": "train" if i % 3 else "test", "prompt": "?"} for i in range(9)]
    folder = source(piqa=[*rows, "", PIQA])
    (task,) = import_benchmarks(folder).tasks
    assert [(e.input, e.split) for e in task.examples[:4]] == [("0", "test"), ("1", "train"), ("2", "train"), ("3", "test")]
    assert len(task.examples) == 10 and task.examples[-1].split == "test"
    (task,) = import_benchmarks(folder, limit=2).tasks
    assert [e.input for e in task.examples] == ["0", "1", "2", "3"]
    for limit in (0, -1):
        with pytest.raises(ConfigError, match="limit: expected a positive number"):
            import_benchmarks(folder, limit=limit)


@pytest.mark.parametrize("name, row, reason", [
    *((name, row, NO_ANSWER) for name, row in (
        ("arc_easy", ARC | {"answerKey": ""}), ("hellaswag", HELLASWAG | {"label": ""}), ("piqa", PIQA | {"label": -1}),
        ("winogrande", WINOGRANDE | {"answer": ""}))),
    *((name, row, CHOICES) for name, row in (
        ("arc_easy", ARC | {"choices": {"label": ["1", "2"], "text": ["a", " a"]}}),
        ("openbookqa", ARC | {"choices": {"label": ["2"], "text": ["a"]}}),
        ("hellaswag", HELLASWAG | {"endings": ["", "down."]}), ("piqa", PIQA | {"sol2": PIQA["sol1"]}))),
    *(("gsm8k", GSM8K | {"answer": text}, "the answer does not end in a number after ####") for text in ("1.", "#### many")),
    ("mbpp", SETUP | {"test_list": []}, "there are no tests"),
])  # fmt: skip
def test_rows_of_no_use_are_counted(source, name, row, reason):
    good, example = FORMS[name][0]
    imported = import_benchmarks(source(**{name: [row, good, row]}))
    assert imported.left_out == {name: {reason: 2}} and imported.tasks[0].examples == (example,)
    assert import_benchmarks(source(**{name: [row]})).tasks == []


QUESTION = {"question": {"stem": "x", "choices": [{"label": "2"}]}}


@pytest.mark.parametrize("name, row, field", [
    ("arc_easy", ARC | {"answerKey": "D"}, r"answerKey: .*\['1', '2', '3'\].*'D'"),
    ("arc_easy", ARC | {"choices": COLUMNS | {"text": ["a", "b"]}}, "answerKey: "),
    ("arc_easy", ARC | {"choices": OBJECTS}, "choices: "),
    ("arc_easy", ARC | {"choices": COLUMNS | {"text": ["a", 3, "b"]}}, "choices: text: "),
    ("arc_easy", ARC | QUESTION, r"question: choices\[0\]: text: .*none"),
    *(("boolq", BOOLQ | {"answer": 1}, "answer: .*1"), ("boolq", BOOLQ | {"passage": "\ud800"}, "passage: ")),
    ("hellaswag", HELLASWAG | {"label": "2"}, r"label: .*\[0, 2\).*'2'"),
    ("hellaswag", HELLASWAG | {"label": None}, "label: "),
    ("hellaswag", {"raw": {"ctx": "x"}, "split": "val"}, "raw: endings: .*none"),
    ("hellaswag", {"raw": "x", "split": "val"}, "raw: "),
    *(("piqa", PIQA | {"label": True}, r"label: .*True"), ("piqa", PIQA | {"split": 3}, "split: .*3")),
    ("winogrande", WINOGRANDE | {"answer": 0}, r"answer: .*\[1, 3\).*0"),
    ("humaneval", HUMANEVAL | {"entry_point": "f(); g"}, r"entry_point: .*'f\(\); g'"),
    *(("mbpp", MBPP, "test_setup_code: .*none"), ("mbpp", "[]", r"expected .*\[\]")),
    ("mbpp", " " * (MAX_LINE_BYTES + 1), "expected .*bytes"),
])  # fmt: skip
def test_a_broken_row_is_named(source, name, row, field):
    with pytest.raises(ConfigError, match=rf"{name}\.jsonl:2: {field}"):
        import_benchmarks(source(**{name: [FORMS[name][0][0], row]}))


def test_broken_json(source, broken_json):
    with pytest.raises(ConfigError, match=r"gsm8k\.jsonl:1: "):
        import_benchmarks(source(gsm8k=[broken_json or "x"]))
