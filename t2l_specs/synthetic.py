"""Twelve small generated tasks, so that training and its tests need no external data.

``synthetic.json`` has their words and descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t2l_engine.files.errors import expect
from t2l_engine.research.tasks.examples import split
from t2l_engine.research.tasks.folder import Example, Task
from t2l_specs.draw import Draw
from t2l_specs.english import plural, verb_forms

MIN_EXAMPLES, MAX_EXAMPLES = 20, 120

_DATA = json.loads((Path(__file__).parent / "synthetic.json").read_text(encoding="utf-8"))
ANIMALS, COLOURS, FOODS, OBJECTS, VERBS = (words.split() for words in _DATA["words"].values())
NOUNS = ANIMALS + FOODS + OBJECTS


def suite(examples: int = MAX_EXAMPLES, seed: int = 0) -> list[Task]:
    """Twelve tasks of ``examples`` examples each, in splits train, val and test; deterministic in ``seed``.

    Raises ConfigError unless ``examples`` is in [20, 120].
    """
    valid = type(examples) is int and MIN_EXAMPLES <= examples <= MAX_EXAMPLES
    expect(valid, "examples", f"a number from {MIN_EXAMPLES} to {MAX_EXAMPLES}", examples)
    tasks = []
    for name, descriptions in _DATA["descriptions"].items():
        made: dict[str, str] = {}
        pairs = _MAKERS[name](Draw(f"{seed}/{name}"))
        while len(made) < examples:
            made.setdefault(*next(pairs))
        found = (Example(text, (answer,), "train") for text, answer in made.items())
        tasks.append(Task(name, tuple(descriptions), tuple(split(found))))
    return tasks


def _each(words: Sequence[str], answer: Callable[[str], str]) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """(word, answer) of every word once."""
    return lambda draw: ((word, answer(word)) for word in draw.shuffled(words))


def _position(index: int) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """Lists of three nouns and colours; the answer is the word at ``index``."""

    def make(draw: Draw) -> Iterator[tuple[str, str]]:
        while True:
            words = draw.shuffled(NOUNS + COLOURS)[:3]
            yield ", ".join(words), words[index]

    return make


def _kind(words: Sequence[str], *others: Sequence[str]) -> Callable[[Draw], Iterator[tuple[str, str]]]:
    """Lists of one of ``words`` and one of each of ``others``; the answer is the former."""

    def make(draw: Draw) -> Iterator[tuple[str, str]]:
        while True:
            wanted = draw.pick(words)
            yield ", ".join(draw.shuffled([wanted, *map(draw.pick, others)])), wanted

    return make


def _longer(draw: Draw) -> Iterator[tuple[str, str]]:
    while True:
        words = draw.shuffled(NOUNS)[:2]
        if len(words[0]) != len(words[1]):
            yield ", ".join(words), max(words, key=len)


def _is_animal(draw: Draw) -> Iterator[tuple[str, str]]:
    others = draw.shuffled(FOODS + OBJECTS)
    for animal, other in zip(draw.shuffled(ANIMALS), others, strict=False):
        yield animal, "yes"
        yield other, "no"


_MAKERS: dict[str, Callable[[Draw], Iterator[tuple[str, str]]]] = {
    "syn_first_of_3": _position(0),
    "syn_last_of_3": _position(2),
    "syn_animal_in_list": _kind(ANIMALS, OBJECTS, FOODS),
    "syn_colour_in_list": _kind(COLOURS, ANIMALS, OBJECTS),
    "syn_food_in_list": _kind(FOODS, COLOURS, OBJECTS),
    "syn_upper_case": _each(NOUNS, str.upper),
    "syn_first_letter": _each(NOUNS + COLOURS, lambda word: word[0]),
    "syn_past_tense": _each(VERBS, lambda verb: verb_forms(verb)[1]),
    "syn_plural": _each(NOUNS, plural),
    "syn_longer_word": _longer,
    "syn_twice": _each(NOUNS, lambda word: f"{word} {word}"),
    "syn_is_animal": _is_animal,
}
