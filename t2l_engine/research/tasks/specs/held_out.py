"""Families that are held out whole, from near to far; ``held_out`` says why each is another skill than those trained."""

import datetime
import re

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import (
    PLACES,
    at,
    date,
    items,
    listing,
    mixed,
    nouns,
    number,
    numbers,
    numbers_list,
    one_date,
    one_number,
    one_record,
    one_time,
    one_word,
    put,
    record,
    time,
    tokens,
    word,
)
from t2l_engine.research.tasks.specs.labels import PAIRS
from t2l_engine.research.tasks.specs.rewriting import CONTAINERS
from t2l_engine.research.tasks.specs.texts import my_habit, phrase
from t2l_engine.research.tasks.specs.words import (
    KIND_NAMES,
    KIND_OF,
    KINDS,
    MONTHS,
    OPPOSITES,
    POOLS,
    nouns_like,
    nouns_of,
    number_word,
    plural,
)

_HOURS = {"one hour": 1, "two hours": 2, "three hours": 3, "four hours": 4, "six hours": 6, "twelve hours": 12}
_DAYS = {"one day": 1, "two days": 2, "three days": 3, "a week": 7, "ten days": 10, "two weeks": 14}
_BOTH_WAYS = OPPOSITES | {b: a for a, b in OPPOSITES.items()}
_OF_OPPOSITES = list(_BOTH_WAYS)

NEAR = (
    Family(
        "template_place",
        "list",
        {"place": tuple(PLACES), "template": POOLS["templates"]},
        make=lambda p, draw: nouns(draw, 4, 5),
        answer=lambda p, text: p.template.replace("___", at(items(text), PLACES[p.place])),
        held_out="choosing by place and filling a template are trained, but never one after the other",
    ),
    Family(
        "reverse_list",
        "list",
        {"sep": POOLS["joiners"]},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: p.sep.join(items(text)[::-1]),
        held_out="no trained family turns the order around; swaps move two items, and sorting reads the letters",
    ),
    Family(
        "kind_place",
        "list",
        {"kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, 1, 4)),
        answer=lambda p, text: str(next((i for i, w in enumerate(items(text), 1) if w in KINDS[p.kind]), 0)),
        held_out="trained families find a kind and give a word; here the answer is where it stands",
    ),
    Family(
        "alphabet_end",
        "list",
        {"which": ("first", "last")},
        make=lambda p, draw: nouns(draw, 4, 4),
        answer=lambda p, text: sorted(items(text), key=str.lower)[0 if p.which == "first" else -1],
        held_out="sorting whole lists is trained; choosing one word by the alphabet is not",
    ),
    Family(
        "every_other",
        "list",
        {"start": ("first", "second")},
        make=lambda p, draw: nouns(draw, 5, 6),
        answer=lambda p, text: put(items(text)[p.start == "second" :: 2]),
        held_out="trained families take one place or a run of places, never a pattern of them",
    ),
    Family(
        "mask_vowels",
        "word",
        {"mark": tuple("*#-_.?+x0~")},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: re.sub("[aeiou]", p.mark, word(text).lower()),
        held_out="trained families replace one letter that the description names; here a class of letters",
    ),
    Family(
        "double_letter",
        "word",
        {"place": ("first", "second", "third", "last")},
        make=lambda p, draw: one_word(draw, nouns_of(4)),
        answer=lambda p, text: _double(word(text), PLACES[p.place]),
        held_out="trained families cut, mark or capitalise letters at a place; none adds a copy of one",
    ),
    Family(
        "label_vowel",
        "word",
        {"labels": PAIRS},
        make=lambda p, draw: one_word(draw, nouns_like("^[aeiou]", draw.chance())),
        answer=lambda p, text: p.labels[word(text)[0].lower() not in "aeiou"],
        held_out="labels are trained on kinds, letters, limits and moods; the class of the first letter is a new criterion",
    ),
    Family(
        "label_length",
        "word",
        {"limit": (4, 5, 6, 7), "labels": PAIRS},
        make=lambda p, draw: one_word(draw, nouns_of(p.limit + 1) if draw.chance() else nouns_of(1, p.limit)),
        answer=lambda p, text: p.labels[len(word(text)) <= p.limit],
        held_out="labels are trained with limits on numbers and ages; counting letters for a label is a new criterion",
    ),
)

MIDDLE = (
    Family(
        "odd_one_out",
        "list",
        {"size": (3, 4, 5)},
        make=lambda p, draw: listing(draw, _odd(draw, p.size)),
        answer=lambda p, text: _odd_one(items(text), p.size),
        held_out="the kind is not named: it has to be found from the other words",
    ),
    Family(
        "acronym",
        "list",
        {"sep": ("", ".", "-", " ", "/", "+", "_", "&")},
        make=lambda p, draw: nouns(draw, 3, 5),
        answer=lambda p, text: p.sep.join(w[0].upper() for w in items(text)),
        held_out="letters are trained on single words; here one letter of each word makes the answer",
    ),
    Family(
        "word_length",
        "word",
        {"unit": CONTAINERS},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: f"{len(word(text))} {plural(p.unit)}",
        held_out="counting is trained on the items of lists, not on letters",
    ),
    Family(
        "sort_numbers",
        "numbers",
        {"order": ("smallest first", "largest first"), "sep": POOLS["joiners"]},
        make=lambda p, draw: numbers_list(draw, 1, 99, 4),
        answer=lambda p, text: p.sep.join(map(str, sorted(numbers(text), reverse=p.order.startswith("l")))),
        held_out="sorting is trained by alphabet and length, numbers only one at a time",
    ),
    Family(
        "round",
        "number",
        {"to": (10, 100, 1000)},
        make=lambda p, draw: one_number(draw, 1001, 9999),
        answer=lambda p, text: str((number(text) + p.to // 2) // p.to * p.to),
        held_out="no trained family gives up digits of a number",
    ),
    Family(
        "later_time",
        "time",
        {"by": tuple(_HOURS), "what": ("later", "earlier")},
        make=lambda p, draw: one_time(draw),
        answer=lambda p, text: _shifted(time(text), _HOURS[p.by] if p.what == "later" else -_HOURS[p.by]),
        held_out="times are trained as formats and halves of the day, never calculated with",
    ),
    Family(
        "field_names",
        "record",
        {"sep": POOLS["joiners"]},
        make=lambda p, draw: one_record(draw, others=3),
        answer=lambda p, text: p.sep.join(record(text)) or "none",
        held_out="trained families ask for values; here the names of the fields are the answer",
    ),
    Family(
        "hashtag",
        "text",
        {"sign": ("#", "@", "$", "~", "!", "%", "&", "*")},
        make=lambda p, draw: phrase(draw),
        answer=lambda p, text: p.sign + "".join(w[0].upper() + w[1:] for w in tokens(text)),
        held_out="phrases are trained with a separator; here capitals mark the words, and there is none",
    ),
)

FAR = (
    Family(
        "reverse_word",
        "word",
        {"end": ("!", "?", ".", "...", "-", ";", ":", "#")},
        make=lambda p, draw: one_word(draw, nouns_of(1, 6)),
        answer=lambda p, text: word(text)[::-1] + p.end,
        held_out="no trained family changes the order of letters",
    ),
    Family(
        "move_letter",
        "word",
        {"end": ("ay", "o", "ish", "oo", "en", "um", "ka", "zee")},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: word(text)[1:] + word(text)[0] + p.end,
        held_out="no trained family moves a letter to another place",
    ),
    Family(
        "number_words",
        "number",
        {"unit": CONTAINERS},
        make=lambda p, draw: one_number(draw, 2, 999),
        answer=lambda p, text: f"{number_word(number(text) % 1000)} {plural(p.unit)}",
        held_out="no trained family writes numbers in words",
    ),
    Family(
        "sum",
        "numbers",
        {"what": ("sum", "difference"), "n": (2, 3)},
        make=lambda p, draw: numbers_list(draw, 1, 60, p.n),
        answer=lambda p, text: str(_sum(numbers(text), p.what)),
        valid=lambda p: p.what == "sum" or p.n == 2,
        held_out="trained sums add a number that the description states; here both are in the input",
    ),
    Family(
        "later_date",
        "date",
        {"by": tuple(_DAYS), "what": ("later", "earlier")},
        make=lambda p, draw: one_date(draw),
        answer=lambda p, text: _other_day(date(text), _DAYS[p.by] if p.what == "later" else -_DAYS[p.by]),
        held_out="dates are trained as formats, parts and ages, never calculated with",
    ),
    Family(
        "quarter",
        "date",
        {"name": ("Q", "quarter ", "T", "part ", "block ", "term ")},
        make=lambda p, draw: one_date(draw),
        answer=lambda p, text: f"{p.name}{(date(text)[1] + 2) // 3}",
        held_out="no trained family maps months to groups",
    ),
    Family(
        "negate",
        "text",
        {"how": ("do not", "don't", "never", "no longer", "rarely", "can't", "won't", "used to")},
        make=lambda p, draw: my_habit(draw),
        answer=lambda p, text: re.sub(r"^I ", f"I {p.how} ", text),
        held_out="no trained family inserts words inside a sentence by its grammar",
    ),
    Family(
        "ask_back",
        "text",
        {"who": ("you", "we", "they", "Sam and Kate", "all of us", "people")},
        make=lambda p, draw: my_habit(draw),
        answer=lambda p, text: re.sub(r"^I (.*)\.$", rf"Do {p.who} \1?", text),
        held_out="no trained family makes a question of a statement",
    ),
    Family(
        "opposite",
        "word",
        {"template": ("not ___ but", "never ___, always", "less ___, more", "neither ___ nor", "first ___, then", "___ or")},
        make=lambda p, draw: one_word(draw, _OF_OPPOSITES),
        answer=lambda p, text: f"{p.template.replace('___', word(text))} {_BOTH_WAYS.get(word(text), 'none')}",
        held_out="no trained family asks what a word means",
    ),
)

#: How far from the trained families -> the families.
DISTANCES = {"near": NEAR, "in between": MIDDLE, "far": FAR}
FAMILIES = (*NEAR, *MIDDLE, *FAR)


def _double(text, index):
    letter = at(text, index)
    return text if letter == "none" else text[: index % len(text)] + letter + text[index % len(text) :]


def _odd(draw, size):
    """``size`` words, all but one of the same kind."""
    return mixed(draw, draw.pick(KIND_NAMES), size - 1, 1)


def _odd_one(words, size):
    """The first of the first ``size`` words whose kind no other of them has."""
    kinds = [KIND_OF.get(w, w) for w in words[:size]]
    return next((w for w, kind in zip(words, kinds, strict=False) if kinds.count(kind) == 1), "none")


def _shifted(clock, hours):
    return f"{(clock[0] + hours) % 24:02}:{clock[1]:02}"


def _sum(values, what):
    return sum(values) if what == "sum" else max(values) - min(values)


def _other_day(day, days):
    shifted = datetime.date(*day) + datetime.timedelta(days)
    return f"{shifted.day} {MONTHS[shifted.month - 1]} {shifted.year}"
