"""Families on sentences: extraction, edits, wrappers, and answers that are always the same."""

import re

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import PLACES, at, mention, mentioned, sentence, tokens
from t2l_engine.research.tasks.specs.words import (
    ADJECTIVE_WORDS,
    DAYS,
    KIND_NAMES,
    KINDS,
    MONTHS,
    NAMES,
    NOUNS,
    POOLS,
    REPLIES,
    STRINGS,
    VERBS,
    third_person,
)

FINDS = ("first name", "day of the week", "plain number", "email address", "price", "time")

FAMILIES = (
    Family(
        "extract_kind",
        "text",
        {"kind": KIND_NAMES},
        make=lambda p, draw: mention(draw, p.kind),
        answer=lambda p, text: mentioned(text, KINDS[p.kind]),
    ),
    Family(
        "extract",
        "text",
        {"what": FINDS, "lead": POOLS["finding_leads"]},
        make=lambda p, draw: _message(draw),
        answer=lambda p, text: p.lead + _find(text, p.what),
    ),
    Family(
        "word_place",
        "text",
        {"place": tuple(PLACES)},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: at(tokens(text), PLACES[p.place]),
    ),
    Family(
        "wrap",
        "text",
        {"marks": POOLS["wraps"]},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: f"{p.marks[0]}{text}{p.marks[1]}",
    ),
    Family(
        "lead",
        "text",
        {"text": POOLS["leads"]},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: f"{p.text} {text}",
    ),
    Family(
        "ending",
        "text",
        {"mark": POOLS["endings"]},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: text.rstrip(".?!") + p.mark,
    ),
    Family(
        "append",
        "text",
        {"text": REPLIES},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: f"{text} {p.text[0].upper()}{p.text[1:]}.",
    ),
    Family(
        "replace_name",
        "text",
        {"new": (*NAMES, "someone", "my boss", "the neighbour", "nobody", "a stranger", "the king")},
        make=lambda p, draw: _about(draw, draw.pick(NAMES)),
        answer=lambda p, text: _renamed(text, p.new),
    ),
    Family(
        "space",
        "text",
        {"sep": POOLS["word_joiners"], "case": ("small letters", "capital letters", "unchanged letters")},
        make=lambda p, draw: phrase(draw),
        answer=lambda p, text: _cased(p.sep.join(tokens(text)), p.case),
    ),
    Family(
        "redact",
        "text",
        {"what": FINDS, "tag": POOLS["tags"]},
        make=lambda p, draw: _message(draw),
        answer=lambda p, text: text.replace(_find(text, p.what), p.tag),
    ),
    Family(
        "first_words",
        "text",
        {"n": (2, 3, 4), "mark": POOLS["cut_marks"]},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: " ".join(tokens(text)[: p.n]) + p.mark,
    ),
    Family(
        "about_someone",
        "text",
        {"name": (*NAMES, "my brother", "the teacher", "our dog", "the new girl", "everybody", "she", "he")},
        make=lambda p, draw: my_habit(draw),
        answer=lambda p, text: _third(text, p.name),
    ),
    Family(
        "constant",
        "text",
        {"reply": (*REPLIES, *STRINGS)},
        make=lambda p, draw: sentence(draw),
        answer=lambda p, text: p.reply,
        constant=True,
    ),
    Family(
        "echo_reply",
        "text",
        {"reply": REPLIES, "kind": KIND_NAMES},
        make=lambda p, draw: mention(draw, p.kind),
        answer=lambda p, text: f"{mentioned(text, KINDS[p.kind])}: {p.reply}",
    ),
)


def _message(draw):
    """A note with a first name, a day, a number of things, an email address, a price and a time, or some of them."""
    name, day, n = draw.pick(NAMES), draw.pick(DAYS), draw.number(11, 99)
    mail = f"{draw.pick(STRINGS)}@{draw.pick(STRINGS)}.com"
    price, time = f"${draw.number(2, 9)}.{draw.number(10, 99)}", f"{draw.number(10, 23)}:{draw.number(10, 59)}"
    return draw.layout(
        (
            "On {d} {n} sends {p} to {k} people by {i}, see {m}.",
            "{n}: {k} boxes on {d} at {i} for {p}, see {m}",
            "Write to {m} by {i} on {d}, {n} pays {p} for {k} more.",
            "{p} for all {k}, says {n} ({m}), on {d} at {i}",
        ),
        ("{d}, {i}: {n} ({m}) wants {k} at {p} each", "At {i} {n} asked {m} for {k}, {p} in all, before {d}."),
    ).format(n=name, d=day, k=n, m=mail, p=price, i=time)


def _find(text, what):
    pattern = {
        "first name": rf"\b({'|'.join(NAMES)})\b",
        "day of the week": rf"\b({'|'.join(DAYS)})\b",
        "plain number": r"(?<![\w.$:])(\d+)(?![\w.:]*\d|:)",
        "email address": r"([\w.]+@[\w.]*\w)",
        "price": r"(\$\d+(?:\.\d\d)?)",
        "time": r"(\d+:\d\d)",
    }[what]
    found = re.search(pattern, text)
    return found[1] if found else "none"


def _renamed(text, new):
    """``text`` with ``new`` for the names in it."""
    found = re.sub(rf"\b({'|'.join(NAMES)})\b", new, text)
    return found[0].upper() + found[1:]


def _about(draw, name):
    frames = ("{} likes the {}.", "The {1} belongs to {0}.", "{} sold the {}.", "We asked {} about the {}.")
    return draw.layout(frames, ("Did {} take the {}?", "The {1} was a present from {0}.")).format(name, draw.pick(NOUNS))


def phrase(draw):
    words = [draw.pick(ADJECTIVE_WORDS), draw.pick(NOUNS)]
    return draw.layout(("{} {}", "The {} {}", "{} {} for sale"), ("My {} {}", "One {} {} in {}")).format(
        *words, draw.pick(MONTHS)
    )


def _cased(text, case):
    return {"small letters": text.lower(), "capital letters": text.upper()}.get(case, text)


def my_habit(draw):
    thing = draw.pick(NOUNS)
    return draw.layout(
        ("I {v} the {n}.", "I {v} the {n} every day."), ("I often {v} the {n}.", "I {v} the {n} on {d}.")
    ).format(v=draw.pick(POOLS["transitive_verbs"]), n=thing, d=draw.pick(DAYS))


def _third(text, name):
    """``text`` about ``name``: the first verb after I gets its -s."""
    words = text.split()
    if words[0] != "I":
        return text
    index = next((i for i, w in enumerate(words[1:], 1) if w in VERBS), None)
    words[0] = name[0].upper() + name[1:]
    if index is not None:
        words[index] = third_person(words[index])
    return " ".join(words)
