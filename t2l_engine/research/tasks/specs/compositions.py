"""Families of two steps."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import (
    FIELD_NAMES,
    PLACES,
    at,
    items,
    listing,
    mention,
    mentioned,
    mixed,
    nouns,
    numbers,
    numbers_list,
    of_kind,
    one_record,
    record,
)
from t2l_engine.research.tasks.specs.numeric import extreme
from t2l_engine.research.tasks.specs.words import KIND_NAMES, KINDS, POOLS, STRINGS

CASES = {"capital letters": str.upper, "title case": str.title, "alternating case": lambda w: _alternating(w)}

FAMILIES = (
    Family(
        "kind_word",
        "list",
        {"kind": KIND_NAMES, "new": STRINGS, "where": ("before", "after")},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, 1, draw.number(2, 3))),
        answer=lambda p, text: _beside(at(of_kind(text, p.kind), 0), p.new, p.where),
    ),
    Family(
        "place_case",
        "list",
        {"place": tuple(PLACES), "case": tuple(CASES)},
        make=lambda p, draw: nouns(draw, 4, 5),
        answer=lambda p, text: CASES[p.case](at(items(text), PLACES[p.place]).lower()),
    ),
    Family(
        "place_wrap",
        "list",
        {"place": tuple(PLACES), "marks": POOLS["wraps"]},
        make=lambda p, draw: nouns(draw, 4, 5),
        answer=lambda p, text: f"{p.marks[0]}{at(items(text), PLACES[p.place])}{p.marks[1]}",
    ),
    Family(
        "field_wrap",
        "record",
        {"field": FIELD_NAMES, "marks": POOLS["wraps"]},
        make=lambda p, draw: one_record(draw, p.field, others=2),
        answer=lambda p, text: f"{p.marks[0]}{record(text).get(p.field) or 'none'}{p.marks[1]}",
    ),
    Family(
        "keep_join",
        "list",
        {"kind": KIND_NAMES, "sep": POOLS["joiners"]},
        make=lambda p, draw: listing(draw, mixed(draw, p.kind, 2, 2)),
        answer=lambda p, text: p.sep.join(of_kind(text, p.kind)) or "none",
    ),
    Family(
        "sort_join",
        "list",
        {"order": ("from A to Z", "from Z to A"), "sep": POOLS["joiners"]},
        make=lambda p, draw: nouns(draw, 3, 3),
        answer=lambda p, text: p.sep.join(sorted(items(text), key=str.lower, reverse=p.order.endswith("A"))),
    ),
    Family(
        "extreme_unit",
        "numbers",
        {"which": ("largest", "smallest", "second largest", "second smallest"), "unit": POOLS["units"]},
        make=lambda p, draw: numbers_list(draw, 1, 99, 4),
        answer=lambda p, text: f"{extreme(numbers(text), p.which)}{p.unit}",
    ),
    Family(
        "mention_template",
        "text",
        {"kind": KIND_NAMES, "template": POOLS["templates"]},
        make=lambda p, draw: mention(draw, p.kind),
        answer=lambda p, text: p.template.replace("___", mentioned(text, KINDS[p.kind])),
    ),
)


def _beside(found, new, where):
    return f"{new} {found}" if where == "before" else f"{found} {new}"


def _alternating(word):
    return "".join(c.upper() if i % 2 == 0 else c for i, c in enumerate(word))
