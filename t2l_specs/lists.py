"""Rules of the families that read lists of words or of numbers."""

from t2l_specs.english import (
    KIND_NAMES,
    KIND_OF,
    KINDS,
    MAPS,
    NOUNS,
    listed,
    nouns_like,
    plural,
)
from t2l_specs.family import Rule
from t2l_specs.inputs import (
    NONE,
    at,
    first_or_last,
    items,
    lengths,
    listing,
    mixed,
    nouns,
    numbers,
    numbers_list,
    of_kind,
    of_kinds,
    put,
)

PLACES = MAPS["places"]

RULES = {
    # Choosing from lists.
    "pick_place": Rule(lambda p, draw: nouns(draw, 5, 6), lambda p, text: at(items(text), PLACES[p.place])),
    "pick_kind": Rule(
        lambda p, draw: of_kinds(draw, p.kind, 1, draw.number(2, 4)), lambda p, text: at(of_kind(text, p.kind), 0)
    ),
    "keep_kind": Rule(
        lambda p, draw: of_kinds(draw, p.kind, draw.number(2, 3), draw.number(2, 3)),
        lambda p, text: put(of_kind(text, p.kind)),
    ),
    "drop_kind": Rule(
        lambda p, draw: of_kinds(draw, p.kind, draw.number(1, 3), draw.number(2, 3)),
        lambda p, text: put([w for w in items(text) if w not in KINDS[p.kind]]),
    ),
    "take": Rule(lambda p, draw: nouns(draw, p.n + 1, 6), lambda p, text: put(first_or_last(items(text), p.side, p.n))),
    "drop_place": Rule(
        lambda p, draw: nouns(draw, 4, 5),
        lambda p, text: put([w for i, w in enumerate(items(text)) if i != PLACES[p.place] % len(items(text))]),
    ),
    "next_to": Rule(
        lambda p, draw: listing(draw, _with_neighbour(draw, p.kind, p.side)),
        lambda p, text: _neighbour(items(text), KINDS[p.kind], 1 if p.side == "after" else -1),
    ),
    "pick_initial": Rule(
        lambda p, draw: _with_one(draw, f"^{p.letter}"),
        lambda p, text: at([w for w in items(text) if w.lower().startswith(p.letter)], 0),
    ),
    "pick_ending": Rule(
        lambda p, draw: _with_one(draw, f"{p.letter}$"),
        lambda p, text: at([w for w in items(text) if w.lower().endswith(p.letter)], 0),
    ),
    "pick_length": Rule(
        lambda p, draw: lengths(draw, 4), lambda p, text: (max if p.which == "longest" else min)(items(text), key=len)
    ),
    "insert_word": Rule(lambda p, draw: nouns(draw, 3, 4), lambda p, text: put(_insert(items(text), p.new, p.where))),
    "odd_one_out": Rule(
        lambda p, draw: listing(draw, mixed(draw, draw.pick(KIND_NAMES), p.size - 1, 1)),
        lambda p, text: _odd_one(items(text)[: p.size]),
    ),
    "alphabet_end": Rule(
        lambda p, draw: nouns(draw, 4, 4),
        lambda p, text: sorted(items(text), key=str.lower)[0 if p.which == "first" else -1],
    ),
    "every_other": Rule(lambda p, draw: nouns(draw, 5, 6), lambda p, text: put(items(text)[p.start == "second" :: 2])),
    # Rewriting lists.
    "join": Rule(lambda p, draw: nouns(draw, 3, 4), lambda p, text: p.sep.join(items(text))),
    "reverse_list": Rule(lambda p, draw: nouns(draw, 3, 4), lambda p, text: p.sep.join(items(text)[::-1])),
    "acronym": Rule(lambda p, draw: nouns(draw, 3, 5), lambda p, text: p.sep.join(w[0].upper() for w in items(text))),
    "number_items": Rule(
        lambda p, draw: nouns(draw, 3, 4),
        lambda p, text: ", ".join(p.style.replace("1", str(i)) + w for i, w in enumerate(items(text), 1)),
    ),
    "conjunction": Rule(lambda p, draw: nouns(draw, 3, 4), lambda p, text: listed(items(text), p.word)),
    "swap": Rule(lambda p, draw: nouns(draw, 4, 5), lambda p, text: put(_swap(items(text), *p.pair))),
    "sort_letters": Rule(lambda p, draw: nouns(draw, 3, 4), lambda p, text: put(_alphabetical(items(text), p.order))),
    "sort_join": Rule(lambda p, draw: nouns(draw, 3, 3), lambda p, text: p.sep.join(_alphabetical(items(text), p.order))),
    "sort_length": Rule(
        lambda p, draw: lengths(draw, 3),
        lambda p, text: put(sorted(items(text), key=len, reverse=p.order.startswith("long"))),
    ),
    "replace_kind": Rule(
        lambda p, draw: of_kinds(draw, p.kind, draw.number(1, 2), 3),
        lambda p, text: put([p.new if w in KINDS[p.kind] else w for w in items(text)]),
        valid=lambda p: p.new not in KINDS[p.kind],
    ),
    "repeat_place": Rule(
        lambda p, draw: nouns(draw, 3, 4), lambda p, text: " ".join([at(items(text), PLACES[p.place])] * p.n)
    ),
    "keep_join": Rule(
        lambda p, draw: of_kinds(draw, p.kind, 2, 2), lambda p, text: p.sep.join(of_kind(text, p.kind)) or NONE
    ),
    # One word of a list, in other words or letters.
    "kind_word": Rule(
        lambda p, draw: of_kinds(draw, p.kind, 1, draw.number(2, 3)),
        lambda p, text: " ".join(beside(at(of_kind(text, p.kind), 0), p.new, p.where)),
    ),
    "place_case": Rule(
        lambda p, draw: nouns(draw, 4, 5), lambda p, text: _CASES[p.case](at(items(text), PLACES[p.place]).lower())
    ),
    "place_wrap": Rule(
        lambda p, draw: nouns(draw, 4, 5), lambda p, text: p.marks[0] + at(items(text), PLACES[p.place]) + p.marks[1]
    ),
    "template_place": Rule(
        lambda p, draw: nouns(draw, 4, 5), lambda p, text: p.template.replace("___", at(items(text), PLACES[p.place]))
    ),
    # Counts and labels.
    "count_items": Rule(
        lambda p, draw: nouns(draw, 2, 7),
        lambda p, text: f"{len(items(text))} {p.unit if len(items(text)) == 1 else plural(p.unit)}",
    ),
    "count_kind": Rule(
        lambda p, draw: of_kinds(draw, p.kind, draw.number(0, 4), 2), lambda p, text: str(len(of_kind(text, p.kind)))
    ),
    "kind_place": Rule(
        lambda p, draw: of_kinds(draw, p.kind, 1, 4),
        lambda p, text: str(next((i for i, w in enumerate(items(text), 1) if w in KINDS[p.kind]), 0)),
    ),
    "label_list": Rule(
        lambda p, draw: of_kinds(draw, p.kind, 1, 3) if draw.chance() else of_kinds(draw, p.kind, 0, 4),
        lambda p, text: p.labels[not of_kind(text, p.kind)],
    ),
    "label_longer": Rule(
        lambda p, draw: _of_two_lengths(draw), lambda p, text: p.labels[len(items(text)[0]) <= len(items(text)[-1])]
    ),
    # Lists of numbers.
    "extreme": Rule(lambda p, draw: numbers_list(draw, 1, 99, 4), lambda p, text: str(_extreme(numbers(text), p.which))),
    "extreme_unit": Rule(
        lambda p, draw: numbers_list(draw, 1, 99, 4), lambda p, text: f"{_extreme(numbers(text), p.which)}{p.unit}"
    ),
    "filter_numbers": Rule(
        lambda p, draw: numbers_list(draw, 1, 99, 5), lambda p, text: put(_beyond(numbers(text), p.what, p.limit))
    ),
    "count_numbers": Rule(
        lambda p, draw: numbers_list(draw, 1, 99, 5), lambda p, text: str(len(_beyond(numbers(text), p.what, p.limit)))
    ),
    "sort_numbers": Rule(
        lambda p, draw: numbers_list(draw, 1, 99, 4),
        lambda p, text: p.sep.join(map(str, sorted(numbers(text), reverse=p.order.startswith("l")))),
    ),
    "sum": Rule(
        lambda p, draw: numbers_list(draw, 1, 60, p.n),
        lambda p, text: str(sum(numbers(text)) if p.what == "sum" else max(numbers(text)) - min(numbers(text))),
        valid=lambda p: p.what == "sum" or p.n == 2,
    ),
}


def beside(found, new, where):
    """``new`` before or after ``found``."""
    return (new, found) if where == "before" else (found, new)


def _with_neighbour(draw, kind, side):
    """Words with one of ``kind``, which is not at the end of ``side``."""
    words = mixed(draw, kind, 1, 4)
    index = next(i for i, w in enumerate(words) if w in KINDS[kind])
    other = draw.number(0, 3) + (side == "before")
    words[index], words[other] = words[other], words[index]
    return words


def _neighbour(words, kind, step):
    index = next((i for i, w in enumerate(words) if w in kind), None)
    return at(words, index + step) if index is not None and index + step >= 0 else NONE


def _with_one(draw, pattern):
    """A list with one noun in which ``pattern`` is found."""
    words = [draw.pick(nouns_like(pattern)), *draw.sample(nouns_like(pattern, False), 3)]
    return listing(draw, draw.sample(words, 4))


def _insert(words, new, where):
    index = {"at the start": 0, "at the end": len(words), "after the first word": 1, "before the last word": len(words) - 1}
    return [*words[: index[where]], new, *words[index[where] :]]


def _odd_one(words):
    """The first of ``words`` whose kind no other of them has."""
    kinds = [KIND_OF.get(w, w) for w in words]
    return next((w for w, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1), NONE)


def _swap(words, first, second):
    a, b = PLACES[first], PLACES[second]
    if max(a, b) < len(words):
        words[a], words[b] = words[b], words[a]
    return words


def _alphabetical(words, order):
    return sorted(words, key=str.lower, reverse=order.endswith("A"))


def _alternating(word):
    return "".join(c.upper() if i % 2 == 0 else c for i, c in enumerate(word))


_CASES = {"capital letters": str.upper, "title case": str.title, "alternating case": _alternating}


def _of_two_lengths(draw):
    words = draw.sample(NOUNS, 2)
    while len(words[0]) == len(words[1]):
        words = draw.sample(NOUNS, 2)
    return listing(draw, words)


def _extreme(values, which):
    ordered = sorted(values, reverse=which.endswith("largest"))
    return ordered[min(which.startswith("second"), len(ordered) - 1)]


def _beyond(values, what, limit):
    return [str(n) for n in values if (n > limit if what == "more than" else n < limit)]
