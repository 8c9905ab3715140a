"""Families on records, persons' names and file paths."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import (
    EXTENSIONS,
    FIELD_NAMES,
    file,
    filled,
    one_file,
    one_person,
    one_record,
    person,
    record,
    write_record,
)
from t2l_engine.research.tasks.specs.words import NOUNS, POOLS, STRINGS

DOMAINS = tuple(
    f"{word}.{end}" for word, end in zip(STRINGS[:60], ("com", "org", "net", "co.uk", "io", "edu") * 10, strict=True)
)
LOGINS = ("first.last", "f.last", "first", "last", "flast", "first_last")
FOLDERS = {"file name without its extension": 1, "extension": 2, "folder": 0}

FAMILIES = (
    Family(
        "get_field",
        "record",
        {"field": FIELD_NAMES},
        make=lambda p, draw: one_record(draw, p.field, others=draw.number(2, 3)),
        answer=lambda p, text: record(text).get(p.field) or "none",
    ),
    Family(
        "two_fields",
        "record",
        {"first": FIELD_NAMES, "second": FIELD_NAMES, "between": POOLS["field_joiners"]},
        make=lambda p, draw: one_record(draw, p.first, p.second, others=1),
        answer=lambda p, text: p.between.join(record(text).get(f) or "none" for f in (p.first, p.second)),
        valid=lambda p: p.first != p.second,
    ),
    Family(
        "record_template",
        "record",
        {"template": POOLS["record_templates"]},
        make=lambda p, draw: one_record(draw, *_slots(p.template), others=1),
        answer=lambda p, text: _fill(p.template, record(text)),
    ),
    Family(
        "drop_field",
        "record",
        {"field": FIELD_NAMES},
        make=lambda p, draw: one_record(draw, p.field, others=2),
        answer=lambda p, text: write_record({k: v for k, v in record(text).items() if k != p.field}),
    ),
    Family(
        "record_layout",
        "record",
        {"signs": POOLS["record_layouts"]},
        make=lambda p, draw: one_record(draw, others=3),
        answer=lambda p, text: write_record(record(text), *p.signs),
    ),
    Family(
        "rename_field",
        "record",
        {"field": FIELD_NAMES, "new": STRINGS},
        make=lambda p, draw: one_record(draw, p.field, others=2),
        answer=lambda p, text: write_record({p.new if k == p.field else k: v for k, v in record(text).items()}),
    ),
    Family(
        "label_age",
        "record",
        {"limit": (12, 16, 18, 21, 30, 40, 50, 60, 65), "labels": POOLS["age_labels"]},
        make=lambda p, draw: one_record(draw, "age", others=2, values={"age": str(draw.number(p.limit - 10, p.limit + 9))}),
        answer=lambda p, text: p.labels[int("0" + record(text).get("age", "")) >= p.limit],
    ),
    Family(
        "has_field",
        "record",
        {"field": FIELD_NAMES, "labels": POOLS["presence_labels"]},
        make=lambda p, draw: one_record(
            draw, *([p.field] if draw.chance() else [f for f in ("name", "city") if f != p.field][:1]), others=2
        ),
        answer=lambda p, text: p.labels[p.field not in record(text)],
    ),
    Family(
        "name_pattern",
        "person",
        {"pattern": POOLS["name_patterns"]},
        make=lambda p, draw: one_person(draw),
        answer=lambda p, text: _write_name(person(text), p.pattern),
    ),
    Family(
        "greet",
        "person",
        {"text": POOLS["greetings"], "which": ("first name", "surname")},
        make=lambda p, draw: one_person(draw),
        answer=lambda p, text: p.text.replace("_", person(text)[p.which == "surname"]),
    ),
    Family(
        "email",
        "person",
        {"domain": DOMAINS, "pattern": LOGINS},
        make=lambda p, draw: one_person(draw),
        answer=lambda p, text: f"{_write_name(person(text), p.pattern)}@{p.domain}",
    ),
    Family(
        "set_extension",
        "file",
        {"extension": (*EXTENSIONS, "tex", "svg", "yaml", "ini", "bin", "tar", "cfg", "old", "tmp", "epub", "dat", "sql")},
        make=lambda p, draw: one_file(draw),
        answer=lambda p, text: f"{file(text)[1]}.{p.extension}",
    ),
    Family(
        "file_part",
        "file",
        {"part": tuple(FOLDERS), "new": STRINGS},
        make=lambda p, draw: one_file(draw),
        answer=lambda p, text: f"{p.new}: {file(text)[FOLDERS[p.part]]}",
    ),
    Family(
        "move_file",
        "file",
        {"folder": (*STRINGS, *NOUNS[:60])},
        make=lambda p, draw: one_file(draw),
        answer=lambda p, text: f"{p.folder}/{file(text)[1]}.{file(text)[2]}",
    ),
)


def _slots(template):
    return [part.split(">")[0] for part in template.split("<")[1:]]


def _fill(template, fields):
    for name in _slots(template):
        template = template.replace(f"<{name}>", fields.get(name) or "none")
    return template


def _write_name(names, pattern):
    """``names`` (first, last) by a pattern of First, FIRST, first, F, f and the same for the last name."""
    first, last = names
    parts = {"First": first, "FIRST": first.upper(), "first": first.lower(), "F": first[0], "f": first[0].lower(),
             "Last": last, "LAST": last.upper(), "last": last.lower(), "L": last[0], "l": last[0].lower()}  # fmt: skip
    return filled(pattern, parts)
