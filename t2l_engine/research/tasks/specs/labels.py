"""Families that label words, numbers, lists and sentences with names that the description gives."""

from t2l_engine.research.tasks.draw import Draw
from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import (
    fill,
    items,
    listing,
    mention,
    mentioned,
    mixed,
    number,
    of_kind,
    one_number,
    one_word,
    sentence,
    tokens,
    word,
)
from t2l_engine.research.tasks.specs.words import (
    BAD,
    DAYS,
    FRAMES,
    GOOD,
    KIND_NAMES,
    KIND_OF,
    KINDS,
    NAMES,
    NOUNS,
    POOLS,
    REVIEWED,
    TOPICS,
    nouns_like,
    with_article,
)


def _pairs() -> tuple[tuple[str, ...], ...]:
    """Pairs of labels: common ones, and pairs of any two nouns."""
    draw = Draw("label pairs")
    drawn = (tuple(draw.sample(NOUNS, 2)) for _ in range(60))
    return (*POOLS["common_labels"], *drawn)


def _triples(names: list[str], count: int) -> tuple[tuple[str, ...], ...]:
    """``count`` different choices of three of ``names``, each in alphabetical order."""
    draw, found = Draw("triples"), {}
    while len(found) < count:
        found[tuple(sorted(draw.sample(names, 3)))] = None
    return tuple(found)


PAIRS = _pairs()

FAMILIES = (
    Family(
        "label_kind",
        "word",
        {"kind": KIND_NAMES, "labels": PAIRS},
        make=lambda p, draw: one_word(draw, KINDS[p.kind] if draw.chance() else KINDS[draw.pick(KIND_NAMES)]),
        answer=lambda p, text: p.labels[KIND_OF.get(word(text)) != p.kind],
    ),
    Family(
        "which_kind",
        "word",
        {"kinds": _triples(KIND_NAMES, 400)},
        make=lambda p, draw: one_word(draw, KINDS[draw.pick(p.kinds)]),
        answer=lambda p, text: next((kind for kind in p.kinds if KIND_OF.get(word(text)) == kind), p.kinds[-1]),
    ),
    Family(
        "label_letter",
        "word",
        {"letter": tuple("aeiorstnlcdm"), "labels": PAIRS},
        make=lambda p, draw: one_word(draw, nouns_like(p.letter, draw.chance())),
        answer=lambda p, text: p.labels[p.letter not in word(text).lower()],
    ),
    Family(
        "label_limit",
        "number",
        {"limit": (20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100, 150, 200, 250, 300, 400, 500), "labels": PAIRS},
        make=lambda p, draw: one_number(draw, 0, p.limit - 1) if draw.chance() else one_number(draw, p.limit, 2 * p.limit),
        answer=lambda p, text: p.labels[number(text) >= p.limit],
    ),
    Family(
        "label_parity",
        "number",
        {"labels": PAIRS},
        make=lambda p, draw: one_number(draw, 0, 999),
        answer=lambda p, text: p.labels[number(text) % 2],
    ),
    Family(
        "label_list",
        "list",
        {"kind": KIND_NAMES, "labels": PAIRS},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, 1, 3) if draw.chance() else mixed(draw, p.kind, 0, 4)),
        answer=lambda p, text: p.labels[not of_kind(text, p.kind)],
    ),
    Family(
        "label_longer",
        "list",
        {"labels": PAIRS},
        make=lambda p, draw: _two(draw),
        answer=lambda p, text: p.labels[len(items(text)[0]) <= len(items(text)[-1])],
    ),
    Family(
        "label_mention",
        "text",
        {"kind": KIND_NAMES, "labels": PAIRS},
        make=lambda p, draw: mention(draw, p.kind) if draw.chance() else sentence(draw),
        answer=lambda p, text: p.labels[mentioned(text, KINDS[p.kind]) == "none"],
    ),
    Family(
        "label_review",
        "text",
        {"labels": PAIRS},
        make=lambda p, draw: _review(draw),
        answer=lambda p, text: p.labels[mentioned(text, BAD) != "none"],
    ),
    Family(
        "label_question",
        "text",
        {"labels": PAIRS},
        make=lambda p, draw: fill(draw, FRAMES["question" if draw.chance() else "statement"], draw.pick(NOUNS)),
        answer=lambda p, text: p.labels[not text.endswith("?")],
    ),
    Family(
        "topic",
        "text",
        {"topics": _triples(list(TOPICS), 300)},
        make=lambda p, draw: fill(draw, FRAMES["topic"], draw.pick(TOPICS[draw.pick(p.topics)])),
        answer=lambda p, text: next((t for t in p.topics if mentioned(text, TOPICS[t]) != "none"), p.topics[-1]),
    ),
    Family(
        "if_name",
        "text",
        {"name": NAMES, "labels": PAIRS},
        make=lambda p, draw: _with_name(draw, p.name if draw.chance() else draw.pick(NAMES)),
        answer=lambda p, text: p.labels[p.name not in tokens(text)],
    ),
)


def _two(draw):
    words = draw.sample(NOUNS, 2)
    while len(words[0]) == len(words[1]):
        words = draw.sample(NOUNS, 2)
    return listing(draw, words)


def _review(draw):
    word, thing = draw.pick(draw.pick((GOOD, BAD))), draw.pick(REVIEWED)
    frame = draw.layout(FRAMES["review"]["seen"], FRAMES["review"]["unseen"])
    return frame.format(w=thing, adj=word, a=with_article(word), name=draw.pick(NAMES), day=draw.pick(DAYS))


def _with_name(draw, name):
    frames = ("{} likes the {}.", "The {1} belongs to {0}.", "{} sold the {} on Monday.", "We asked {} about the {}.")
    text = draw.layout(frames, ("Did {} take the {}?", "The {1} was a present from {0}.", "Yesterday {} lost the {}."))
    return text.format(name, draw.pick(NOUNS))
