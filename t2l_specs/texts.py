"""Rules of the families that read sentences and other short texts."""

import re

from t2l_specs.english import (
    ADJECTIVE_WORDS,
    BAD,
    DAYS,
    FRAMES,
    GOOD,
    KINDS,
    MONTHS,
    NAMES,
    NOUNS,
    POOLS,
    REVIEWED,
    STRINGS,
    TOPICS,
    VERBS,
    third_person,
    with_article,
)
from t2l_specs.family import Rule
from t2l_specs.inputs import NONE, at, capital, fill, mention, mentioned, sentence, tokens
from t2l_specs.lists import PLACES

_NAME = rf"\b({'|'.join(NAMES)})\b"
_PATTERNS = {
    "first name": _NAME,
    "day of the week": rf"\b({'|'.join(DAYS)})\b",
    "plain number": r"(?<![\w.$:])(\d+)(?![\w.:]*\d|:)",
    "email address": r"([\w.]+@[\w.]*\w)",
    "price": r"(\$\d+(?:\.\d\d)?)",
    "time": r"(\d+:\d\d)",
}

RULES = {
    # Finding something in a text.
    "extract_kind": Rule(lambda p, draw: mention(draw, p.kind), lambda p, text: mentioned(text, KINDS[p.kind])),
    "mention_template": Rule(
        lambda p, draw: mention(draw, p.kind),
        lambda p, text: p.template.replace("___", mentioned(text, KINDS[p.kind])),
    ),
    "echo_reply": Rule(
        lambda p, draw: mention(draw, p.kind), lambda p, text: f"{mentioned(text, KINDS[p.kind])}: {p.reply}"
    ),
    "extract": Rule(lambda p, draw: _message(draw), lambda p, text: p.lead + _find(text, p.what)),
    "redact": Rule(lambda p, draw: _message(draw), lambda p, text: text.replace(_find(text, p.what), p.tag)),
    "word_place": Rule(lambda p, draw: sentence(draw), lambda p, text: at(tokens(text), PLACES[p.place])),
    "first_words": Rule(lambda p, draw: sentence(draw), lambda p, text: " ".join(tokens(text)[: p.n]) + p.mark),
    # Editing and wrapping a text.
    "wrap": Rule(lambda p, draw: sentence(draw), lambda p, text: f"{p.marks[0]}{text}{p.marks[1]}"),
    "lead": Rule(lambda p, draw: sentence(draw), lambda p, text: f"{p.text} {text}"),
    "ending": Rule(lambda p, draw: sentence(draw), lambda p, text: text.rstrip(".?!") + p.mark),
    "append": Rule(lambda p, draw: sentence(draw), lambda p, text: f"{text} {capital(p.text)}."),
    "constant": Rule(lambda p, draw: sentence(draw), lambda p, text: p.reply),
    "replace_name": Rule(
        lambda p, draw: _about(draw, "note", draw.pick(NAMES)), lambda p, text: capital(re.sub(_NAME, p.new, text))
    ),
    "space": Rule(lambda p, draw: _phrase(draw), lambda p, text: _cased(p.sep.join(tokens(text)), p.case)),
    "hashtag": Rule(lambda p, draw: _phrase(draw), lambda p, text: p.sign + "".join(map(capital, tokens(text)))),
    "about_someone": Rule(lambda p, draw: _habit(draw), lambda p, text: _third(text, p.name)),
    "negate": Rule(lambda p, draw: _habit(draw), lambda p, text: re.sub(r"^I ", f"I {p.how} ", text)),
    "ask_back": Rule(lambda p, draw: _habit(draw), lambda p, text: re.sub(r"^I (.*)\.$", rf"Do {p.who} \1?", text)),
    # Labels of texts.
    "label_mention": Rule(
        lambda p, draw: mention(draw, p.kind) if draw.chance() else sentence(draw),
        lambda p, text: p.labels[mentioned(text, KINDS[p.kind]) == NONE],
    ),
    "label_review": Rule(lambda p, draw: _review(draw), lambda p, text: p.labels[mentioned(text, BAD) != NONE]),
    "label_question": Rule(
        lambda p, draw: fill(draw, FRAMES["question" if draw.chance() else "statement"], draw.pick(NOUNS)),
        lambda p, text: p.labels[not text.endswith("?")],
    ),
    "topic": Rule(
        lambda p, draw: fill(draw, FRAMES["topic"], draw.pick(TOPICS[draw.pick(p.topics)])),
        lambda p, text: next((t for t in p.topics if mentioned(text, TOPICS[t]) != NONE), p.topics[-1]),
    ),
    "if_name": Rule(
        lambda p, draw: _about(draw, "note_or_more", p.name if draw.chance() else draw.pick(NAMES)),
        lambda p, text: p.labels[p.name not in tokens(text)],
    ),
}


def _message(draw):
    """A note with a first name, a day, a number of things, an email address, a price and a time, or some of them."""
    name, day, count = draw.pick(NAMES), draw.pick(DAYS), draw.number(11, 99)
    mail = f"{draw.pick(STRINGS)}@{draw.pick(STRINGS)}.com"
    price, time = f"${draw.number(2, 9)}.{draw.number(10, 99)}", f"{draw.number(10, 23)}:{draw.number(10, 59)}"
    return draw.layout(*FRAMES["message"]).format(d=day, k=count, n=name, m=mail, p=price, i=time)


def _find(text, what):
    found = re.search(_PATTERNS[what], text)
    return found[1] if found else NONE


def _about(draw, frames, name):
    return draw.layout(*FRAMES[frames]).format(name, draw.pick(NOUNS))


def _review(draw):
    word, thing = draw.pick(draw.pick((GOOD, BAD))), draw.pick(REVIEWED)
    frame = draw.layout(*FRAMES["review"])
    return frame.format(w=thing, adj=word, a=with_article(word), name=draw.pick(NAMES), day=draw.pick(DAYS))


def _phrase(draw):
    words = draw.pick(ADJECTIVE_WORDS), draw.pick(NOUNS)
    return draw.layout(*FRAMES["phrase"]).format(*words, draw.pick(MONTHS))


def _cased(text, case):
    return {"small letters": text.lower(), "capital letters": text.upper()}.get(case, text)


def _habit(draw):
    """A sentence of what I do with a thing."""
    thing = draw.pick(NOUNS)
    return draw.layout(*FRAMES["habit"]).format(v=draw.pick(POOLS["transitive_verbs"]), n=thing, d=draw.pick(DAYS))


def _third(text, name):
    """``text`` about ``name``: the first verb after I gets its -s."""
    words = text.split()
    if words[0] != "I":
        return text
    index = next((i for i, w in enumerate(words[1:], 1) if w in VERBS), None)
    words[0] = capital(name)
    if index is not None:
        words[index] = third_person(words[index])
    return " ".join(words)
