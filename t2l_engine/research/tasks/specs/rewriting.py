"""Families that rewrite lists: order, separators, numbering, replacement, counts."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import PLACES, at, items, lengths, listing, mixed, nouns, of_kind, put
from t2l_engine.research.tasks.specs.words import KIND_NAMES, KINDS, POOLS, STRINGS, listed, plural

PAIRS = (
    ("first", "second"),
    ("first", "third"),
    ("second", "third"),
    ("first", "last"),
    ("second", "last"),
    ("third", "last"),
)
CONTAINERS = tuple(KINDS["container"])

FAMILIES = (
    Family(
        "join",
        "list",
        {"sep": POOLS["joiners"]},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: p.sep.join(items(text)),
    ),
    Family(
        "number_items",
        "list",
        {"style": POOLS["numberings"]},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: ", ".join(p.style.replace("1", str(i)) + w for i, w in enumerate(items(text), 1)),
    ),
    Family(
        "conjunction",
        "list",
        {"word": POOLS["conjunctions"]},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: listed(items(text), p.word),
    ),
    Family(
        "swap",
        "list",
        {"pair": PAIRS},
        make=lambda p, draw: nouns(draw, 4, 5),
        answer=lambda p, text: put(_swap(items(text), *p.pair)),
    ),
    Family(
        "sort_letters",
        "list",
        {"order": ("from A to Z", "from Z to A")},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: put(sorted(items(text), key=str.lower, reverse=p.order.endswith("A"))),
    ),
    Family(
        "sort_length",
        "list",
        {"order": ("shortest first", "longest first")},
        make=lambda p, draw: lengths(draw, 3),
        answer=lambda p, text: put(sorted(items(text), key=len, reverse=p.order.startswith("long"))),
    ),
    Family(
        "replace_kind",
        "list",
        {"kind": KIND_NAMES, "new": STRINGS},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, draw.number(1, 2), 3)),
        answer=lambda p, text: put([p.new if w in KINDS[p.kind] else w for w in items(text)]),
        valid=lambda p: p.new not in KINDS[p.kind],
    ),
    Family(
        "count_items",
        "list",
        {"unit": CONTAINERS},
        make=lambda p, draw: nouns(draw, 2, 7),
        answer=lambda p, text: f"{len(items(text))} {p.unit if len(items(text)) == 1 else plural(p.unit)}",
    ),
    Family(
        "count_kind",
        "list",
        {"kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, draw.number(0, 4), 2)),
        answer=lambda p, text: str(len(of_kind(text, p.kind))),
    ),
    Family(
        "repeat_place",
        "list",
        {"place": ("first", "second", "third", "last"), "n": (2, 3)},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: " ".join([at(items(text), PLACES[p.place])] * p.n),
    ),
)


def _swap(words, first, second):
    a, b = PLACES[first], PLACES[second]
    if max(a, b) < len(words):
        words[a], words[b] = words[b], words[a]
    return words
