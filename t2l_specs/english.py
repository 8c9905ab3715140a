"""The word lists of the suite (``words.json``, written for this project) and English forms of words and numbers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2l_specs.draw import Draw

_DATA: dict[str, Any] = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))

#: Kind of thing -> its words.  No word is in two kinds, and no kind is part of another.
KINDS: dict[str, list[str]] = {kind: entry["words"] for kind, entry in _DATA["kinds"].items()}
#: Word -> its kind.
KIND_OF: dict[str, str] = {word: kind for kind, words in KINDS.items() for word in words}
KIND_NAMES = list(KINDS)
#: Words of plain things, in lower case and countable: what can be listed, spelled or put into the plural.
NOUNS: list[str] = list(_DATA["objects"])
NOUNS += (w for of in _DATA["kinds"].values() if of["group"] in ("creature", "thing", "person") for w in of["words"])
NAMES, SURNAMES, DAYS, MONTHS = (_DATA[key] for key in ("names", "surnames", "days", "months"))
TOPICS: dict[str, list[str]] = _DATA["topics"]
#: What it is for -> sentences with slots: those that are seen in training, and unseen ones.
FRAMES: dict[str, list[list[str]]] = _DATA["frames"]
#: As FRAMES: kind of thing -> sentences with a slot for its word, ``{w}`` or (with its article) ``{a}``.
SENTENCES: dict[str, list[list[str]]] = {kind: _DATA["sentences"][of["group"]] for kind, of in _DATA["kinds"].items()}
#: Adjective -> [comparative, superlative]; verb -> [third person, past, -ing form].
ADJECTIVES: dict[str, list[str]] = _DATA["adjectives"]
OPPOSITES: dict[str, str] = _DATA["opposites"]
VERBS: dict[str, list[str]] = _DATA["verbs"]
VERB_WORDS, ADJECTIVE_WORDS = list(VERBS), list(ADJECTIVES)
GOOD, BAD, REVIEWED = _DATA["good_words"], _DATA["bad_words"], _DATA["reviewed"]
#: Words and short phrases that a specification may ask to write.
STRINGS, REPLIES = _DATA["strings"], _DATA["replies"]


def _made_up(count: int) -> list[str]:
    """Different strings of two or three syllables that are no words; to copy one, no list of words helps."""
    draw, found = Draw("made-up words"), {}
    starts = "b br c d dr f fl g gr h j k l m n p pl r s sk st t tr v w z".split()
    while len(found) < count:
        syllables = (draw.pick(starts) + draw.pick("aeiou") for _ in range(draw.number(2, 3)))
        word = "".join(syllables) + draw.pick(["", "", "l", "m", "n", "r", "s"])
        if word not in KIND_OF and word not in NOUNS:
            found[word] = None
    return list(found)


_MADE = _made_up(1000)
MADE_WORDS, MADE_NAMES = _MADE[:600], [word.capitalize() for word in _MADE[600:]]
#: What a description says -> what it means: a place its index, letters their regular expression, a time its hours.
MAPS: dict[str, dict[str, Any]] = _DATA["maps"]
#: (unit, smaller unit) -> how many of the latter one of the former is.
UNITS: dict[tuple[str, str], int] = {tuple(units): factor for units, factor in _DATA["conversions"]}


def values_of(listed: list[Any]) -> tuple[Any, ...]:
    """Values of a parameter: strings, numbers, and tuples of strings, which JSON has as lists."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in listed)


#: Further values of parameters, by name.
POOLS: dict[str, tuple[Any, ...]] = {name: values_of(listed) for name, listed in _DATA["pools"].items()}
_ONES, _TENS = _DATA["ones"].split(), _DATA["tens"].split()


@functools.cache
def nouns_of(low: int, high: int = 99) -> list[str]:
    """The nouns of ``low`` to ``high`` letters."""
    return [word for word in NOUNS if low <= len(word) <= high]


@functools.cache
def nouns_like(pattern: str, inside: bool = True) -> list[str]:
    """The nouns in which the regular expression ``pattern`` is found, or those in which it is not."""
    return [word for word in NOUNS if bool(re.search(pattern, word)) is inside]


def with_article(word: str) -> str:
    """``word`` after its indefinite article.

    >>> with_article("owl"), with_article("unicycle"), with_article("hour")
    ('an owl', 'a unicycle', 'an hour')
    """
    low = word.lower()
    like_you = low.startswith(("uni", "use", "uku", "ewe", "one", "eu")) and not low.startswith("unin")
    vowel = (low[:1] in tuple("aeiou") and not like_you) or low.startswith(("hour", "honest", "heir"))
    return f"{'an' if vowel else 'a'} {word}"


@functools.cache
def plural(noun: str) -> str:
    """The plural of a noun, or of the last word of a phrase; for kinds of things, of their name.

    >>> plural("fox"), plural("wolf"), plural("piece of furniture"), plural("toy")
    ('foxes', 'wolves', 'pieces of furniture', 'toys')
    """
    if noun in _DATA["kinds"]:
        return _DATA["kinds"][noun]["plural"]
    if noun.lower() in _DATA["plurals"]:
        return _DATA["plurals"][noun.lower()]
    return _with_s(noun, "s", "x", "ch", "sh", "z")


def verb_forms(verb: str) -> Sequence[str]:
    """The third person, past and -ing form of ``verb``; by rule where it is not in the word list."""
    if verb in VERBS:
        return VERBS[verb]
    past = verb + "d" if verb.endswith("e") else verb[:-1] + "ied" if _consonant_y(verb) else verb + "ed"
    stem = verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb
    return _with_s(verb, "s", "x", "ch", "sh", "z", "o"), past, stem + "ing"


def degrees(adjective: str) -> Sequence[str]:
    """The comparative and superlative of ``adjective``; with "more" and "most" where it is not in the word list."""
    return ADJECTIVES.get(adjective) or (f"more {adjective}", f"most {adjective}")


def number_word(number: int) -> str:
    """``number`` from 0 to 999 in words.

    >>> number_word(40), number_word(58), number_word(207)
    ('forty', 'fifty-eight', 'two hundred and seven')
    """
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = f" and {number_word(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"


def ordinal(number: int) -> str:
    """``number`` with its ordinal ending.

    >>> [ordinal(n) for n in (1, 2, 3, 11, 12, 13, 21, 112)]
    ['1st', '2nd', '3rd', '11th', '12th', '13th', '21st', '112th']
    """
    teen = 10 < number % 100 < 14
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def listed(words: list[str], conjunction: str = "and") -> str:
    """``words`` as an English list: commas, and ``conjunction`` before the last.

    >>> listed(["salt", "oil", "tea"], "or")
    'salt, oil or tea'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def _with_s(word: str, *endings: str) -> str:
    """``word`` with -s, or -es after one of ``endings``."""
    if word.endswith(endings):
        return word + "es"
    return word[:-1] + "ies" if _consonant_y(word) else word + "s"


def _consonant_y(word: str) -> bool:
    return len(word) > 1 and word.endswith("y") and word[-2] not in "aeiou"
