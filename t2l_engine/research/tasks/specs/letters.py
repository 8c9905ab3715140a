"""Families on the letters of a word."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import PLACES, at, one_word, word
from t2l_engine.research.tasks.specs.words import POOLS, STRINGS, nouns_like, nouns_of

PARTS = {
    f"{side} {count}": (side, number)
    for side in ("first", "last")
    for number, count in ((1, "letter"), (2, "two letters"), (3, "three letters"))
}

FAMILIES = (
    Family(
        "letter_at",
        "word",
        {"place": tuple(PLACES)},
        make=lambda p, draw: one_word(draw, nouns_of(4)),
        answer=lambda p, text: at(word(text), PLACES[p.place]),
    ),
    Family(
        "prefix",
        "word",
        {"text": POOLS["prefixes"]},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: p.text + word(text),
    ),
    Family(
        "suffix",
        "word",
        {"text": POOLS["suffixes"]},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: word(text) + p.text,
    ),
    Family(
        "replace_letter",
        "word",
        {"old": tuple("aeiourstnl"), "new": tuple("aeiouxyzqk*#-_0")},
        make=lambda p, draw: one_word(draw, nouns_like(p.old)),
        answer=lambda p, text: word(text).replace(p.old, p.new),
        valid=lambda p: p.old != p.new,
    ),
    Family(
        "remove_letter",
        "word",
        {"letter": tuple("aeiourstnlcmpdbhgk")},
        make=lambda p, draw: one_word(draw, nouns_like(p.letter)),
        answer=lambda p, text: word(text).replace(p.letter, "") or "none",
    ),
    Family(
        "word_case",
        "word",
        {
            "style": (
                "all letters",
                "only the first letter",
                "only the last letter",
                "only the second letter",
                "all letters but the first",
                "only the vowels",
            )
        },
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: _capitals(word(text), p.style),
    ),
    Family(
        "spell",
        "word",
        {"sep": POOLS["letter_joiners"]},
        make=lambda p, draw: one_word(draw, nouns_of(1, 7)),
        answer=lambda p, text: p.sep.join(word(text)[:20]),
    ),
    Family(
        "cut",
        "word",
        {"side": ("first", "last"), "n": (2, 3, 4)},
        make=lambda p, draw: one_word(draw, nouns_of(p.n + 1)),
        answer=lambda p, text: word(text)[: p.n] if p.side == "first" else word(text)[-p.n :],
    ),
    Family(
        "drop_letters",
        "word",
        {"what": tuple(PARTS)},
        make=lambda p, draw: one_word(draw, nouns_of(5)),
        answer=lambda p, text: _cut_at(word(text), p.what)[1] or "none",
    ),
    Family(
        "repeat_word",
        "word",
        {"n": (2, 3, 4), "sep": (*POOLS["letter_joiners"], " and ", " oh ", "!")},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: p.sep.join([word(text)] * p.n),
    ),
    Family(
        "add_word",
        "word",
        {"new": STRINGS, "where": ("before", "after")},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: f"{p.new} {word(text)}" if p.where == "before" else f"{word(text)} {p.new}",
    ),
    Family(
        "letter_marks",
        "word",
        {"what": tuple(PARTS), "marks": ("()", "<>", "[]", "{}", "**", "__", "''", "//", "||", "~~")},
        make=lambda p, draw: one_word(draw, nouns_of(5)),
        answer=lambda p, text: _mark(word(text), p.what, p.marks),
    ),
)


def _capitals(text, style):
    text = text.lower()
    if style == "only the vowels":
        return "".join(c.upper() if c in "aeiou" else c for c in text)
    if style == "only the last letter":
        return text[:-1] + text[-1:].upper()
    start, end = {"all letters": (0, 99), "only the first letter": (0, 1), "only the second letter": (1, 2)}.get(
        style, (1, 99)
    )
    return text[:start] + text[start:end].upper() + text[end:]


def _cut_at(text, what):
    """(the letters that ``what`` names, the others)."""
    side, count = PARTS[what]
    return (text[:count], text[count:]) if side == "first" else (text[-count:], text[:-count])


def _mark(text, what, marks):
    part, rest = _cut_at(text, what)
    part = marks[0] + part + marks[1]
    return part + rest if PARTS[what][0] == "first" else rest + part
