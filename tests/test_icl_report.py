"""Tables of the suite ``icl``: what they say follows from the numbers, losses are said, accuracy stands beside speed."""

import json
import re
import shlex

import icl_result
import pytest

from bench import icl, report, rows
from bench.icl import measured, summary, tables, words
from bench.icl.words import Linear
from t2l_engine.cli import cost_tables
from t2l_engine.research import costs
from t2l_engine.research.costs.known import PAPER


@pytest.fixture
def load(tmp_path):
    """Factory: the result, with ``change`` made to its lists, as the report reads it."""

    def make(change=lambda made: None):
        made = icl_result.lists()
        change(made)
        about = {"date": "2026-01-02", "commit": "0123abc", "dirty": False, "command": "python -m bench icl --tasks TASKS"}
        machine = {"cpu": "Some CPU", "cores": 2, "memory_gib": 8.0, "isa": "avx512"}
        whole = {"suite": "icl", "size": "full", "machine": machine, "versions": {"torch": "2.11"}, **about, **made}
        (tmp_path / "icl.json").write_text(json.dumps(whole))
        return rows.load(tmp_path / "icl.json")

    return make


def cells(text, first):
    """Cells of the only line whose first cell is ``first``."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "won, cell, sentence",
    [
        (None, "never", "at no number of questions"),
        ([1, None], "always", "at every number of questions"),
        ([5, None], "from 5 on", "from 5 questions on"),
        ([1, 1410], "up to 1,410", "up to 1,410 questions"),
        ([2, 9], "2 to 9", "from 2 to 9 questions"),
    ],
)
def test_when(won, cell, sentence):
    assert words.when(won) == cell and words.when_said(won) == sentence


def test_won_is_of_sums():
    assert words.won(Linear(30.0, 10.0), Linear(15.0, 15.0)) == (5, None)  # 70 against 75
    assert words.won(Linear(10.0, 10.0), Linear(40.0, 5.0)) == (1, 6)  # 70 against 70 at 7
    assert words.won(Linear(10.0, 10.0), Linear(10.0, 10.0)) is None


def test_amounts():
    assert [words.amount(x, "B") for x in (0, 921_600, 6_815_744, 1e12)] == ["0 B", "922 kB", "6.82 MB", "1.00 TB"]
    assert words.listed(["a", "b", "c"]) == "a, b and c" and words.listed(["a"]) == "a" and words.listed([]) == "none"


def test_names_are_those_of_the_suite():
    assert (words.PAPER, words.MEAN) == ("paper", icl.costs.MEAN)
    assert list(costs.LABELS) == list(costs.WAYS)


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_says_what_was_counted_and_measured(load):
    text = summary.readme(load())
    line = cells(text, "Mistral-7B | the paper's: 59, examples 3 x 80")
    assert line[2:9] == ["4.20 TFLOP", "0.857 TFLOP", "4.90 x", "0.832 TFLOP", "0.825 TFLOP", "1.01 x", "from 5 on"]
    line = cells(text, "SmolLM2-135M, measured, float32")
    assert line[2:5] == ["175 ms", "50.0 ms", "3.50 x (3.15–3.85)"]
    assert line[5:9] == ["42.0 ms", "40.0 ms", "1.05 x", "from 6 on"]  # 50 + 5 x 40 is less than 6 x 42; 5 x 42 is not more
    assert "up to 1.14 times (Mistral-7B and Gemma-2-2B at the paper's lengths" in text
    assert "first question's ratio is 3.50 (float32) and 3.50 (bfloat16), by operations 4.87." in text
    assert "Bar: at least 3.00; 0 of 2 missed." in text


def test_readme_shows_accuracy_beside_speed(load):
    text = summary.readme(load())
    head = cells(text, "tasks")
    for group, accuracy in (
        ("mean of 1 tasks never trained on", ["40.0", "2.0", "90.0", "20.0"]),
        ("mean of 2 trained tasks", ["60.0", "0.0", "70.0", "20.0"]),
        ("mean of 1 of the paper's benchmarks, never trained on", ["30.0", "10.0", "4.0", "20.0"]),
    ):
        line = cells(text, group)
        assert line[head.index("accuracy, ICL") : head.index("ms a question, ICL")] == accuracy
    assert "T2L is less accurate than three examples on 2 (26.0 points at most: gsm8k)" in text
    assert "slower than no cache on 1 (1.10 times the time at most: choose)" in text
    assert "than a warm cache on none" in text


def test_commands_of_the_readme_say_the_same(load):
    text = summary.readme(load())
    commands = re.findall(r"`t2l cost --model mistral-7b --answer 1 ([^`]+)`", text)
    assert len(commands) == 3
    for options in map(shlex.split, commands):
        given = dict(zip(options[::2], map(int, options[1::2]), strict=True))
        questions, users, tasks = (given.get(f"--{name}", 1) for name in ("questions", "users", "tasks"))
        said = cost_tables.document(costs.known_setup("mistral-7b"), PAPER, questions, users, tasks, None)
        if users > 1:
            held = [words.amount(said["ways"][way]["memory_bytes"], "B") for way in ("icl-cold", "t2l-task")]
            assert f"hold {held[0]} beside the weights, with T2L {held[1]}." in text
        if questions > 1:
            assert f"{said['ways']['icl-cold']['ratio']:.2f} times with {questions} " in text
        won = {(e["way"], e["rival"]): words.when_said(e["questions"]) for e in said["questions_won"]}
        assert f"less than a warm cache {won['t2l-task', 'icl-warm']}, and than a cold one" in text


# --- docs/results.md -------------------------------------------------------------------------------------------------


def test_costs(load):
    text = tables.costs(load())
    assert text.count("| lengths implied by the paper |") == text.count("| humaneval |") == len(icl_result.MODELS)
    mistral = text.partition("**Gemma-2-2B**")[0]
    line = cells(mistral, "lengths implied by the paper")
    assert line[1:5] == ["59", "3 x 80", "1", "35"] and line[7:] == [
        *("4.90 x", "4.90 x", "1.01 x", "always", "from 5 on", "up to 135", "never", "14")
    ]
    assert cells(mistral, "humaneval")[7:] == [
        *("**0.986 x**", "**0.990 x**", "**1.000 x**", "never", "never", "never", "never", "–")
    ]


def test_paper(load):
    text = tables.paper(load())
    assert cells(text, "hypernetwork (variant M)")[-1] == "**no**, 726 times"
    assert "the printed figure within its rounding: our reading, not a statement of the authors." in text
    assert "Ratio of three-shot in-context learning to T2L: 4.88 printed, 4.86 with" in text

    def fits(made):
        made["paper"][0] |= {"off_percent": 0.01}
        made["paper"][4] |= {"implied_tokens": 298.01}
        made["hypernetwork"][0] |= {"trunk_of_one_layer_tflop": 6e-6}

    text = tables.paper(load(fits))
    assert cells(text, "language model, question alone")[-1] == "yes"
    assert cells(text, "3-shot in-context learning")[-1] == "**no**; 298 tokens would be"
    assert "6.00 MFLOP, which is not the printed figure" in text


def test_first_question(load):
    text = measured.first(load())
    assert text.count("| sum of the parts | 49.5 | 99.0 % |") == 1  # 8 + 1 + 0.5 + 40 of 50 ms
    assert text.count("Bar: at least 3.00 times; met: yes.") == 2
    missing = load(lambda made: made["first_question"][1]["parts"].pop("T2L per task, later question"))
    with pytest.raises(
        rows.ResultError, match=f"icl.json: first_question: first question, bfloat16: '{words.KEPT}' was not"
    ):
        summary.readme(missing)


def test_examples(load):
    text = measured.examples(load())
    plain, warm = "from 1 on (by operations from 1 on)", "from 8 on (by operations from 3 on)"
    assert f"is the faster one without a cache {plain} and beside a warm cache {warm}." in text

    def slow(made):
        for entry in made["by_examples"]:
            entry["ratio"]["icl-warm"]["median"] = 0.9

    assert "beside a warm cache at none of these counts (" in measured.examples(load(slow))


def test_questions(load):
    text = measured.questions(load())
    # ICL 60 ms, cold 30 once and 45, warm 45; T2L 10 once and 44
    kept = ["1.36 x", "1.03 x", "1.02 x", "always", "always", "from 11 on"]
    assert cells(text, "copy_last")[-7:] == ["**0.938 x**", *kept]
    assert cells(text, "choose")[-6:-2] == ["**0.905 x**", "1.03 x", "1.02 x", "never"]
    assert "Of 200 answers 196 are alike with a warm cache and without, 192 merged and beside the weights." in text
    assert "a standard error is up to 7.07 points" in text


def test_lengths_and_terms(load):
    known = json.loads((report.ROOT / "bench" / "results" / "lengths.json").read_text())
    text = tables.token_counts(known)
    assert all(f"**{words.title(model)}**" in text for model in words.MODELS)
    assert cells(text.partition("**Mistral-7B**")[2].partition("**")[0], "humaneval")[3:5] == ["–", "–"]
    text = tables.terms(load())
    assert "| merge | merge | T2L merged | 10.7 GFLOP |" in text


@pytest.mark.parametrize(
    "make, name",
    [
        *((summary.readme, name) for name in ("costs", "first_question", "questions")),
        *((make, "costs") for make in (tables.costs, tables.phases, tables.memory)),
        *((tables.paper, name) for name in ("paper", "hypernetwork", "ratio")),
        *((measured.first, "first_question"), (measured.examples, "by_examples"), (measured.questions, "questions")),
        (tables.terms, "terms"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_missing_list_is_named(load, make, name):
    for change in (lambda made: made.pop(name), lambda made: made[name].clear()):
        with pytest.raises(rows.ResultError, match=f"icl.json: nothing under '{name}'"):
            make(load(change))


def test_missing_lengths_are_named(load):
    with pytest.raises(rows.ResultError, match="icl.json: costs: none with model 'mistral-7b', workload 'paper'"):
        tables.phases(load(lambda made: made["costs"].pop(0)))
