"""Examples that repeat a benchmark are found and dropped."""

import pytest

from t2l_engine.research.tasks.decontaminate import Overlap, decontaminate, overlaps
from t2l_engine.research.tasks.folder import Example, Task

WORDS = "the quick brown fox jumps over the lazy dog while seven cats look on from afar".split()


def task(name, *texts, output="yes"):
    return Task(name, ("Do it.",), tuple(Example(text, (output,), "train") for text in texts))


def test_thirteen_words_in_a_row():
    question = " ".join(WORDS)
    twelve, thirteen = " ".join(WORDS[2:14]), " ".join(WORDS[2:15])
    tasks = [task("a", f"so {thirteen} indeed", f"so {twelve} indeed"), task("b", "nothing in common with it")]
    assert overlaps(tasks, [task("bench", question)]) == [Overlap("a", "train", 0, "bench")]
    assert [o.index for o in overlaps(tasks, [task("bench", question)], n=12)] == [0, 1]
    assert overlaps(tasks, [task("bench", *(" ".join(WORDS[i:]) for i in range(8, 16)))]) == []


def test_case_and_punctuation_do_not_matter():
    text = '"The QUICK, brown fox" jumps_over the lazy dog; while seven cats: look on -- from afar!'
    assert overlaps([task("a", text)], [task("bench", " ".join(WORDS))]) == [Overlap("a", "train", 0, "bench")]


def test_short_texts_overlap_where_they_are_the_same():
    bench = [task("one", "Which animal is the largest?"), task("two", "Name an animal.", "What is that")]
    asked = task(
        "a", "which animal is the LARGEST", "Tell me: which animal is the largest?", "Name an animal.", "what is that"
    )
    assert overlaps([asked], bench) == [Overlap("a", "train", 0, "one")]  # four words are too few to tell


def test_answers_count():
    long = " ".join(WORDS)
    assert overlaps([task("a", "Say it.", output=long)], [task("bench", f"Read: {long}")])
    assert overlaps([task("a", long)], [task("bench", "Say it.", output=long)])


def test_decontaminate_drops_examples_and_empty_tasks():
    tasks = [task("a", " ".join(WORDS), "something else altogether"), task("b", " ".join(WORDS))]
    kept, found = decontaminate(tasks, [task("bench", " ".join(WORDS))])
    assert kept == [task("a", "something else altogether")]
    assert [(o.task, o.index) for o in found] == [("a", 0), ("b", 0)]
    assert decontaminate(kept, [task("bench", " ".join(WORDS))]) == (kept, [])


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="n: expected at least 5 words, got 4"):
        overlaps([], [], n=4)
