"""Families that choose from lists."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import PLACES, at, items, lengths, listing, mixed, nouns, of_kind, put
from t2l_engine.research.tasks.specs.words import KIND_NAMES, KINDS, NOUNS, nouns_like

LETTERS = tuple("abcdefghklmnoprstvw")
ENDINGS = tuple("aderhklnotyspgmw")

FAMILIES = (
    Family(
        "pick_place",
        "list",
        {"place": tuple(PLACES)},
        make=lambda p, draw: nouns(draw, 5, 6),
        answer=lambda p, text: at(items(text), PLACES[p.place]),
    ),
    Family(
        "pick_kind",
        "list",
        {"kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, 1, draw.number(2, 4))),
        answer=lambda p, text: at(of_kind(text, p.kind), 0),
    ),
    Family(
        "keep_kind",
        "list",
        {"kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, draw.number(2, 3), draw.number(2, 3))),
        answer=lambda p, text: put(of_kind(text, p.kind)),
    ),
    Family(
        "drop_kind",
        "list",
        {"kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, draw.number(1, 3), draw.number(2, 3))),
        answer=lambda p, text: put([w for w in items(text) if w not in KINDS[p.kind]]),
    ),
    Family(
        "take",
        "list",
        {"side": ("first", "last"), "n": (2, 3, 4)},
        make=lambda p, draw: nouns(draw, p.n + 1, 6),
        answer=lambda p, text: put(items(text)[: p.n] if p.side == "first" else items(text)[-p.n :]),
    ),
    Family(
        "drop_place",
        "list",
        {"place": tuple(PLACES)},
        make=lambda p, draw: nouns(draw, 4, 5),
        answer=lambda p, text: put([w for i, w in enumerate(items(text)) if i != PLACES[p.place] % len(items(text))]),
    ),
    Family(
        "next_to",
        "list",
        {"side": ("before", "after"), "kind": KIND_NAMES},
        make=lambda p, draw: listing(draw, _beside(draw, p.kind, p.side)),
        answer=lambda p, text: _next_to(items(text), KINDS[p.kind], 1 if p.side == "after" else -1),
    ),
    Family(
        "pick_initial",
        "list",
        {"letter": LETTERS},
        make=lambda p, draw: _with_one(draw, f"^{p.letter}"),
        answer=lambda p, text: at([w for w in items(text) if w.lower().startswith(p.letter)], 0),
    ),
    Family(
        "pick_ending",
        "list",
        {"letter": ENDINGS},
        make=lambda p, draw: _with_one(draw, f"{p.letter}$"),
        answer=lambda p, text: at([w for w in items(text) if w.lower().endswith(p.letter)], 0),
    ),
    Family(
        "pick_length",
        "list",
        {"which": ("longest", "shortest")},
        make=lambda p, draw: lengths(draw, 4),
        answer=lambda p, text: (max if p.which == "longest" else min)(items(text), key=len),
    ),
    Family(
        "insert_word",
        "list",
        {"new": tuple(NOUNS[:100]), "where": ("at the start", "at the end", "after the first word", "before the last word")},
        make=lambda p, draw: nouns(draw, 3, 4),
        answer=lambda p, text: put(_insert(items(text), p.new, p.where)),
    ),
)


def _beside(draw, kind, side):
    words = mixed(draw, kind, 1, 4)
    index = next(i for i, w in enumerate(words) if w in KINDS[kind])
    other = draw.number(0, 3) + (side == "before")
    words[index], words[other] = words[other], words[index]
    return words


def _next_to(words, kind, step):
    index = next((i for i, w in enumerate(words) if w in kind), None)
    return at(words, index + step) if index is not None and index + step >= 0 else "none"


def _with_one(draw, pattern):
    """A list with one noun in which ``pattern`` is found."""
    words = [draw.pick(nouns_like(pattern)), *draw.sample(nouns_like(pattern, False), 3)]
    return listing(draw, draw.sample(words, 4))


def _insert(words, new, where):
    index = {"at the start": 0, "at the end": len(words), "after the first word": 1, "before the last word": len(words) - 1}
    return [*words[: index[where]], new, *words[index[where] :]]
