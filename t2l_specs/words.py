"""Rules of the families that read a word, a number or a quantity."""

import re

from t2l_specs.english import (
    ADJECTIVE_WORDS,
    KIND_NAMES,
    KIND_OF,
    KINDS,
    MAPS,
    OPPOSITES,
    UNITS,
    VERB_WORDS,
    comparative,
    ing,
    nouns_like,
    nouns_of,
    number_word,
    ordinal,
    past,
    plural,
    superlative,
    third_person,
    with_article,
)
from t2l_specs.family import Rule
from t2l_specs.inputs import NONE, at, capital, first_or_last, number, one_number, one_word, word
from t2l_specs.lists import PLACES, beside

_BOTH_WAYS = OPPOSITES | {b: a for a, b in OPPOSITES.items()}
_OF_OPPOSITES = list(_BOTH_WAYS)

RULES = {
    # The letters of a word.
    "letter_at": Rule(lambda p, draw: one_word(draw, nouns_of(4)), lambda p, text: at(word(text), PLACES[p.place])),
    "prefix": Rule(lambda p, draw: one_word(draw), lambda p, text: p.text + word(text)),
    "suffix": Rule(lambda p, draw: one_word(draw), lambda p, text: word(text) + p.text),
    "replace_letter": Rule(
        lambda p, draw: one_word(draw, nouns_like(p.old)),
        lambda p, text: word(text).replace(p.old, p.new),
        valid=lambda p: p.old != p.new,
    ),
    "remove_letter": Rule(
        lambda p, draw: one_word(draw, nouns_like(p.letter)), lambda p, text: word(text).replace(p.letter, "") or NONE
    ),
    "mask_vowels": Rule(lambda p, draw: one_word(draw), lambda p, text: re.sub("[aeiou]", p.mark, word(text).lower())),
    "word_case": Rule(lambda p, draw: one_word(draw), lambda p, text: _capitals(word(text).lower(), p.style)),
    "spell": Rule(lambda p, draw: one_word(draw, nouns_of(1, 7)), lambda p, text: p.sep.join(word(text)[:20])),
    "cut": Rule(lambda p, draw: one_word(draw, nouns_of(p.n + 1)), lambda p, text: first_or_last(word(text), p.side, p.n)),
    "drop_letters": Rule(
        lambda p, draw: one_word(draw, nouns_of(5)), lambda p, text: _cut_at(word(text), p.what)[1] or NONE
    ),
    "letter_marks": Rule(lambda p, draw: one_word(draw, nouns_of(5)), lambda p, text: _mark(word(text), p.what, p.marks)),
    "double_letter": Rule(lambda p, draw: one_word(draw, nouns_of(4)), lambda p, text: _double(word(text), PLACES[p.place])),
    "reverse_word": Rule(lambda p, draw: one_word(draw, nouns_of(1, 6)), lambda p, text: word(text)[::-1] + p.end),
    "move_letter": Rule(lambda p, draw: one_word(draw), lambda p, text: word(text)[1:] + word(text)[0] + p.end),
    # The word beside others, and in a form.
    "repeat_word": Rule(lambda p, draw: one_word(draw), lambda p, text: p.sep.join([word(text)] * p.n)),
    "add_word": Rule(lambda p, draw: one_word(draw), lambda p, text: " ".join(beside(word(text), p.new, p.where))),
    "template": Rule(lambda p, draw: one_word(draw), lambda p, text: p.template.replace("___", word(text))),
    "article": Rule(
        lambda p, draw: one_word(draw), lambda p, text: capital(p.template.replace("___", with_article(word(text))))
    ),
    "amount": Rule(lambda p, draw: one_word(draw), lambda p, text: f"{p.amount} {plural(word(text))}"),
    "habit": Rule(
        lambda p, draw: one_word(draw, VERB_WORDS), lambda p, text: f"{p.who} {third_person(word(text))} {p.when}"
    ),
    "past": Rule(lambda p, draw: one_word(draw, VERB_WORDS), lambda p, text: f"{p.who} {past(word(text))} {p.when}"),
    "verb_form": Rule(
        lambda p, draw: one_word(draw, VERB_WORDS),
        lambda p, text: f"{p.start} {ing(word(text)) if p.start.endswith(('is', 'are', 'were', 'am')) else word(text)}",
    ),
    "compare": Rule(
        lambda p, draw: one_word(draw, ADJECTIVE_WORDS), lambda p, text: f"{p.start} {comparative(word(text))} {p.end}"
    ),
    "superlative": Rule(
        lambda p, draw: one_word(draw, ADJECTIVE_WORDS),
        lambda p, text: f"the {superlative(word(text))} {p.thing} of all",
    ),
    "opposite": Rule(
        lambda p, draw: one_word(draw, _OF_OPPOSITES),
        lambda p, text: f"{p.template.replace('___', word(text))} {_BOTH_WAYS.get(word(text), NONE)}",
    ),
    "word_length": Rule(lambda p, draw: one_word(draw), lambda p, text: f"{len(word(text))} {plural(p.unit)}"),
    # Labels of words.
    "label_kind": Rule(
        lambda p, draw: one_word(draw, KINDS[p.kind] if draw.chance() else KINDS[draw.pick(KIND_NAMES)]),
        lambda p, text: p.labels[KIND_OF.get(word(text)) != p.kind],
    ),
    "which_kind": Rule(
        lambda p, draw: one_word(draw, KINDS[draw.pick(p.kinds)]),
        lambda p, text: next((kind for kind in p.kinds if KIND_OF.get(word(text)) == kind), p.kinds[-1]),
    ),
    "label_letter": Rule(
        lambda p, draw: one_word(draw, nouns_like(p.letter, draw.chance())),
        lambda p, text: p.labels[p.letter not in word(text).lower()],
    ),
    "label_vowel": Rule(
        lambda p, draw: one_word(draw, nouns_like("^[aeiou]", draw.chance())),
        lambda p, text: p.labels[word(text)[0].lower() not in "aeiou"],
    ),
    "label_length": Rule(
        lambda p, draw: one_word(draw, nouns_of(p.limit + 1) if draw.chance() else nouns_of(1, p.limit)),
        lambda p, text: p.labels[len(word(text)) <= p.limit],
    ),
    # Numbers and quantities.
    "add": Rule(
        lambda p, draw: one_number(draw, 100, 899),
        lambda p, text: str(number(text) + (p.n if p.what == "plus" else -p.n)),
    ),
    "times": Rule(lambda p, draw: one_number(draw, 2, 99), lambda p, text: str(number(text) * p.n)),
    "sequence": Rule(
        lambda p, draw: one_number(draw, 10, 800),
        lambda p, text: ", ".join(str(number(text) + p.step * i) for i in range(1, p.count + 1)),
    ),
    "round": Rule(
        lambda p, draw: one_number(draw, 1001, 9999),
        lambda p, text: str((number(text) + p.to // 2) // p.to * p.to),
    ),
    "unit": Rule(lambda p, draw: one_number(draw, 2, 999), lambda p, text: f"{number(text)}{p.unit}"),
    "sign": Rule(lambda p, draw: one_number(draw, 2, 999), lambda p, text: f"{p.sign}{number(text)}"),
    "pad": Rule(lambda p, draw: one_number(draw, 1, 999), lambda p, text: str(number(text)).rjust(p.width, p.fill)),
    "thousands": Rule(
        lambda p, draw: one_number(draw, 1000, 9_999_999),
        lambda p, text: f"{number(text):,}".replace(",", MAPS["thousands_marks"][p.mark]),
    ),
    "ordinal": Rule(lambda p, draw: one_number(draw, 1, 400), lambda p, text: f"the {ordinal(number(text))} {p.thing}"),
    "number_words": Rule(
        lambda p, draw: one_number(draw, 2, 999),
        lambda p, text: f"{number_word(number(text) % 1000)} {plural(p.unit)}",
    ),
    "convert": Rule(
        lambda p, draw: draw.layout(("{} {}", "{} {} in all"), ("exactly {} {}", "a total of {} {}")).format(
            draw.number(2, 99), p.units[0]
        ),
        lambda p, text: f"{number(text) * UNITS[p.units]} {p.units[1]}",
    ),
    "label_limit": Rule(
        lambda p, draw: one_number(draw, 0, p.limit - 1) if draw.chance() else one_number(draw, p.limit, 2 * p.limit),
        lambda p, text: p.labels[number(text) >= p.limit],
    ),
    "label_parity": Rule(lambda p, draw: one_number(draw, 0, 999), lambda p, text: p.labels[number(text) % 2]),
}


def _capitals(text, style):
    """``text``, in small letters, with the letters of ``style`` in capitals."""
    if style == "only the vowels":
        return re.sub("[aeiou]", lambda vowel: vowel[0].upper(), text)
    start, end = {
        "all letters": (0, None),
        "only the first letter": (0, 1),
        "only the second letter": (1, 2),
        "only the last letter": (max(len(text) - 1, 0), None),
        "all letters but the first": (1, None),
    }[style]
    return text[:start] + text[start:end].upper() + ("" if end is None else text[end:])


def _cut_at(text, what):
    """(the letters that ``what`` names, the others)."""
    count = MAPS["letter_parts"][what]
    return (text[:count], text[count:]) if count > 0 else (text[count:], text[:count])


def _mark(text, what, marks):
    part, rest = _cut_at(text, what)
    part = marks[0] + part + marks[1]
    return part + rest if MAPS["letter_parts"][what] > 0 else rest + part


def _double(text, index):
    letter = at(text, index)
    return text if letter == NONE else text[: index % len(text)] + letter + text[index % len(text) :]
