"""Families on dates and times of day."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import date, filled, one_date, one_time, time
from t2l_engine.research.tasks.specs.words import MONTHS, POOLS

DATE_PARTS = {
    "day": "D",
    "day, in two digits": "DD",
    "month, in letters": "Month",
    "month, in three letters": "Mon",
    "month, as a number": "M",
    "month, in two digits": "MM",
    "year": "YYYY",
    "year, in two digits": "YY",
}

FAMILIES = (
    Family(
        "date_pattern",
        "date",
        {"pattern": POOLS["date_patterns"]},
        make=lambda p, draw: one_date(draw),
        answer=lambda p, text: write_date(text, p.pattern),
    ),
    Family(
        "date_part",
        "date",
        {"part": tuple(DATE_PARTS), "lead": POOLS["date_leads"]},
        make=lambda p, draw: one_date(draw),
        answer=lambda p, text: p.lead + write_date(text, DATE_PARTS[p.part]),
    ),
    Family(
        "date_age",
        "date",
        {"year": tuple(range(1960, 2040, 5)), "labels": POOLS["date_labels"]},
        make=lambda p, draw: one_date(draw, p.year - 12, p.year + 11),
        answer=lambda p, text: p.labels[date(text)[0] >= p.year],
    ),
    Family(
        "time_pattern",
        "time",
        {"pattern": POOLS["time_patterns"]},
        make=lambda p, draw: one_time(draw),
        answer=lambda p, text: _write_time(text, p.pattern),
    ),
    Family(
        "time_half",
        "time",
        {"labels": POOLS["day_halves"]},
        make=lambda p, draw: one_time(draw),
        answer=lambda p, text: p.labels[time(text)[0] >= 12],
    ),
)


def write_date(text: str, pattern: str) -> str:
    """The date in ``text`` by a pattern of YYYY, YY, Month, Mon, MM, M, DD and D."""
    y, m, d = date(text)
    month = MONTHS[m - 1]
    parts = {"YYYY": f"{y:04}", "YY": f"{y % 100:02}", "Month": month, "Mon": month[:3], "MM": f"{m:02}", "M": str(m),
             "DD": f"{d:02}", "D": str(d)}  # fmt: skip
    return filled(pattern, parts)


def _write_time(text, pattern):
    hour, minute = time(text)
    half = (hour + 11) % 12 + 1
    letter = "p" if hour > 11 else "a"
    parts = {
        "HH": f"{hour:02}",
        "H": str(half),
        "MM": f"{minute:02}",
        "a.m.": f"{letter}.m.",
        "am": f"{letter}m",
        "AM": f"{letter}m".upper(),
    }
    return filled(pattern, parts)
