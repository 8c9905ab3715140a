"""Operators that some families take as parameters, by what a description says of them.

An item is chosen, then changed, then written in a form: "the longest word in capital letters, in round brackets".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from t2l_specs import inputs
from t2l_specs.english import MADE_WORDS, MAPS, plural, with_article

_Change = Callable[[str], str]


def alternating(word: str) -> str:
    """``word`` with every other letter as a capital, beginning with the first."""
    return re.sub("(.)(.?)", lambda pair: pair[1].upper() + pair[2], word)


def _replaced(pattern: str, new: str | Callable[[re.Match[str]], str]) -> _Change:
    return lambda word: re.sub(pattern, new, word)


def _cut(pattern: str) -> _Change:
    return lambda word: "".join(re.findall(pattern, word))


def _joined(sign: str) -> _Change:
    return lambda word: sign.join(word[:20])


def _calculated(what: str, by: int) -> _Change:
    factor, added = (by, 0) if what == "times" else (1, by if what == "plus" else -by)
    return lambda digits: str(inputs.number(digits) * factor + added)


_PARTS = MAPS["letter_parts"].items()
#: Changes of a word.
WORD_CHANGES: dict[str, _Change] = {
    "in capital letters": str.upper,
    "in alternating case": lambda word: alternating(word.lower()),
    # Words have three letters or more.
    **{f"without its {part}": _replaced(regex, "") for part, regex in _PARTS if "three" not in part},
    **{f"cut to its {part}": _cut(pattern) for part, pattern in _PARTS},
    **{
        f"with its {part} in capital letters": _replaced(pattern, lambda found: found[0].upper()) for part, pattern in _PARTS
    },
    **{
        f"with its {part} in {name}": _replaced(pattern, rf"{marks[0]}\g<0>{marks[1]}")
        for part, pattern in _PARTS
        for name, marks in MAPS["letter_brackets"].items()
    },
    **{f"with {name} between its letters": _joined(sign) for name, sign in MAPS["letter_signs"].items()},
    **{f"with every {letter} removed": _replaced(letter, "") for letter in "aeor"},
    **{f"with every {letter} changed to {new}": _replaced(letter, new) for letter in "aeor" for new in "u#"},
}
#: Changes of a word for something that can be counted.
NOUN_CHANGES: dict[str, _Change] = {"in the plural": plural, "with its indefinite article": with_article}
#: Changes of a number.
NUMBER_CHANGES: dict[str, _Change] = {
    f"{what} {by}": _calculated(what, by)
    for what, numbers in (
        ("plus", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 50, 100, 200)),
        ("minus", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25)),
        ("times", (2, 3, 4, 5, 6, 10, 20, 100)),
    )
    for by in numbers
}
CHANGES = WORD_CHANGES | NOUN_CHANGES | NUMBER_CHANGES

_BESIDE = {
    "after the word {}": "{} ~",
    "followed by the word {}": "~ {}",
    "after the word {} and a colon": "{}: ~",
    "followed by a hyphen and the word {}": "~-{}",
}
#: Forms with a made-up word -> what is written, with ~ for the answer so far; as MAPS["forms"].
MADE_FORMS: dict[str, str] = {
    said.format(word): form.format(word)
    for i, word in enumerate(MADE_WORDS[-40:])
    for said, form in [list(_BESIDE.items())[i % len(_BESIDE)]]
}
FORMS: dict[str, str] = MAPS["forms"] | MAPS["number_forms"] | MADE_FORMS


def chosen(values: Sequence[Any], which: str, rank: Callable[[Sequence[Any], str], Any]) -> Any:
    """The one of ``values`` at a place or, where ``which`` is none, the one that ``rank`` gives."""
    places = MAPS["places"]
    return inputs.at(values, places[which]) if which in places else rank(values, which)


def applied(chosen: str, change: str, form: str) -> str:
    """``chosen`` after the operators ``change`` and ``form``.

    >>> applied("owl", "with its first letter in capital letters", "twice with a hyphen in between")
    'Owl-Owl'
    """
    return FORMS[form].replace("~", CHANGES[change](chosen) or inputs.NONE)
