"""Rules of the families that read records, persons' names, file paths, dates and times of day."""

import datetime

from t2l_specs.english import MAPS, MONTHS
from t2l_specs.family import Rule
from t2l_specs.inputs import (
    NONE,
    date,
    file,
    filled,
    one_date,
    one_file,
    one_person,
    one_record,
    one_time,
    person,
    record,
    time,
    write_record,
)

RULES = {
    # Records.
    "get_field": Rule(
        lambda p, draw: one_record(draw, p.field, others=draw.number(2, 3)), lambda p, text: _value(record(text), p.field)
    ),
    "two_fields": Rule(
        lambda p, draw: one_record(draw, p.first, p.second, others=1),
        lambda p, text: p.between.join(_value(record(text), field) for field in (p.first, p.second)),
        valid=lambda p: p.first != p.second,
    ),
    "record_template": Rule(
        lambda p, draw: one_record(draw, *_slots(p.template), others=1), lambda p, text: _fill(p.template, record(text))
    ),
    "field_wrap": Rule(
        lambda p, draw: one_record(draw, p.field, others=2),
        lambda p, text: p.marks[0] + _value(record(text), p.field) + p.marks[1],
    ),
    "field_names": Rule(lambda p, draw: one_record(draw, others=3), lambda p, text: p.sep.join(record(text)) or NONE),
    "drop_field": Rule(
        lambda p, draw: one_record(draw, p.field, others=2),
        lambda p, text: write_record({k: v for k, v in record(text).items() if k != p.field}),
    ),
    "record_layout": Rule(lambda p, draw: one_record(draw, others=3), lambda p, text: write_record(record(text), *p.signs)),
    "rename_field": Rule(
        lambda p, draw: one_record(draw, p.field, others=2),
        lambda p, text: write_record({p.new if k == p.field else k: v for k, v in record(text).items()}),
    ),
    "label_age": Rule(
        lambda p, draw: one_record(draw, "age", others=2, values={"age": str(draw.number(p.limit - 10, p.limit + 9))}),
        lambda p, text: p.labels[int("0" + record(text).get("age", "")) >= p.limit],
    ),
    "has_field": Rule(
        lambda p, draw: one_record(draw, p.field if draw.chance() else ("city" if p.field == "name" else "name"), others=2),
        lambda p, text: p.labels[p.field not in record(text)],
    ),
    # Persons and files.
    "name_pattern": Rule(lambda p, draw: one_person(draw), lambda p, text: _write_name(person(text), p.pattern)),
    "greet": Rule(lambda p, draw: one_person(draw), lambda p, text: p.text.replace("_", person(text)[p.which == "surname"])),
    "email": Rule(lambda p, draw: one_person(draw), lambda p, text: f"{_write_name(person(text), p.pattern)}@{p.domain}"),
    "set_extension": Rule(lambda p, draw: one_file(draw), lambda p, text: f"{file(text)[1]}.{p.extension}"),
    "file_part": Rule(lambda p, draw: one_file(draw), lambda p, text: f"{p.new}: {file(text)[MAPS['file_parts'][p.part]]}"),
    "move_file": Rule(lambda p, draw: one_file(draw), lambda p, text: f"{p.folder}/{file(text)[1]}.{file(text)[2]}"),
    # Dates and times.
    "date_pattern": Rule(lambda p, draw: one_date(draw), lambda p, text: _write_date(date(text), p.pattern)),
    "date_part": Rule(
        lambda p, draw: one_date(draw), lambda p, text: p.lead + _write_date(date(text), MAPS["date_parts"][p.part])
    ),
    "date_age": Rule(
        lambda p, draw: one_date(draw, p.year - 12, p.year + 11), lambda p, text: p.labels[date(text)[0] >= p.year]
    ),
    "later_date": Rule(lambda p, draw: one_date(draw), lambda p, text: _other_day(date(text), p.by, p.what)),
    "quarter": Rule(lambda p, draw: one_date(draw), lambda p, text: f"{p.name}{(date(text)[1] + 2) // 3}"),
    "time_pattern": Rule(lambda p, draw: one_time(draw), lambda p, text: _write_time(*time(text), p.pattern)),
    "time_half": Rule(lambda p, draw: one_time(draw), lambda p, text: p.labels[time(text)[0] >= 12]),
    "later_time": Rule(lambda p, draw: one_time(draw), lambda p, text: _other_time(*time(text), p.by, p.what)),
}


def _value(fields, name):
    return fields.get(name) or NONE


def _slots(template):
    return [part.split(">")[0] for part in template.split("<")[1:]]


def _fill(template, fields):
    for name in _slots(template):
        template = template.replace(f"<{name}>", _value(fields, name))
    return template


def _write_name(names, pattern):
    """``names`` (first, last) by a pattern of First, FIRST, first, F, f and the same for the last name."""
    first, last = names
    parts = {"First": first, "FIRST": first.upper(), "first": first.lower(), "F": first[0], "f": first[0].lower(),
             "Last": last, "LAST": last.upper(), "last": last.lower(), "L": last[0], "l": last[0].lower()}  # fmt: skip
    return filled(pattern, parts)


def _write_date(day, pattern):
    """A date (year, month, day) by a pattern of YYYY, YY, Month, Mon, MM, M, DD and D."""
    y, m, d = day
    month = MONTHS[m - 1]
    parts = {"YYYY": f"{y:04}", "YY": f"{y % 100:02}", "Month": month, "Mon": month[:3], "MM": f"{m:02}", "M": str(m),
             "DD": f"{d:02}", "D": str(d)}  # fmt: skip
    return filled(pattern, parts)


def _write_time(hour, minute, pattern):
    """A time of day by a pattern of HH (24 hours), H (12 hours), MM, a.m., am and AM."""
    letter = "p" if hour > 11 else "a"
    parts = {"HH": f"{hour:02}", "H": str((hour + 11) % 12 + 1), "MM": f"{minute:02}",
             "a.m.": f"{letter}.m.", "am": f"{letter}m", "AM": f"{letter}m".upper()}  # fmt: skip
    return filled(pattern, parts)


def _other_day(day, by, what):
    days = MAPS["days_apart"][by]
    shifted = datetime.date(*day) + datetime.timedelta(days if what == "later" else -days)
    return f"{shifted.day} {MONTHS[shifted.month - 1]} {shifted.year}"


def _other_time(hour, minute, by, what):
    hours = MAPS["hours"][by]
    return f"{(hour + (hours if what == 'later' else -hours)) % 24:02}:{minute:02}"
