"""Inputs: how they are made and laid out, and how they are read back.

A maker takes the parameters ``p`` of a specification and a :class:`Draw`.  It lays its input out in one of the seen ways, or
in one of the unseen ways for split "test".  A reader takes any text, so that every specification answers every input of its
kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from t2l_specs import english
from t2l_specs.draw import Draw
from t2l_specs.english import DAYS, KIND_NAMES, KINDS, MONTHS, NAMES, NOUNS, SENTENCES, STRINGS, SURNAMES, with_article

Maker = Callable[[Any, Draw], str]
NONE = "none"
_SEPARATORS = ((", ", "; ", " | "), (" / ", "\n"))


# --- lists -------------------------------------------------------------------------------------------------------------


def listing(draw: Draw, words: Sequence[object]) -> str:
    """``words`` with separators between them."""
    return draw.layout(*_SEPARATORS).join(map(str, words))


def items(text: str) -> list[str]:
    """The items of a list, at least one."""
    return [item.strip() for item in re.split(r"[,;|/\n]", text) if item.strip()] or [NONE]


def of_kind(words: Sequence[str], kind: str) -> list[str]:
    """The words that are of ``kind``."""
    return [word for word in words if word in KINDS[kind]]


def mixed(draw: Draw, kind: str, inside: int, outside: int) -> list[str]:
    """``inside`` different words of ``kind`` and ``outside`` of other kinds, in random order."""
    words = draw.sample(KINDS[kind], inside)
    while len(words) < inside + outside:
        word = draw.pick(KINDS[draw.pick(KIND_NAMES)])
        if word not in words and word not in KINDS[kind]:
            words.append(word)
    return draw.sample(words, len(words))


def of_kinds(inside: int | tuple[int, int], outside: int | tuple[int, int]) -> Maker:
    """Lists of ``inside`` different words of the kind ``p.kind`` and ``outside`` of other kinds; pairs are bounds."""
    return lambda p, draw: listing(draw, mixed(draw, p.kind, _count(draw, inside), _count(draw, outside)))


def nouns(low: int, high: int) -> Maker:
    """Lists of ``low`` to ``high`` different nouns."""
    return lambda p, draw: listing(draw, draw.sample(NOUNS, draw.number(low, high)))


def lengths(count: int | tuple[int, int]) -> Maker:
    """Lists of ``count`` nouns of different lengths; a pair is bounds."""

    def make(p: Any, draw: Draw) -> str:
        words: list[str] = []
        wanted = _count(draw, count)
        while len(words) < wanted:
            words += [w for w in [draw.pick(NOUNS)] if len(w) not in map(len, words)]
        return listing(draw, words)

    return make


def either(one: Maker, other: Maker) -> Maker:
    """Inputs of ``one`` or ``other``, each with probability one half."""
    return lambda p, draw: (one if draw.chance() else other)(p, draw)


def _count(draw: Draw, count: int | tuple[int, int]) -> int:
    return draw.number(*count) if isinstance(count, tuple) else count


def put(words: Sequence[str]) -> str:
    """An answer that is a list."""
    return ", ".join(words) or NONE


def at(words: Sequence[str], index: int) -> str:
    """The word at ``index``, or NONE."""
    return words[index] if -len(words) <= index < len(words) else NONE


# --- single words and numbers ------------------------------------------------------------------------------------------


def one_word(words: Sequence[str] = NOUNS) -> Maker:
    """One of ``words``."""
    return lambda p, draw: draw.layout(("{}", "word: {}"), ("the word {}", '"{}"')).format(draw.pick(words))


def word(text: str) -> str:
    """The word in a text of kind "word": the last one."""
    return re.sub(r"^\W+|\W+$", "", text.split()[-1]) or NONE


def one_number(low: int, high: int) -> Maker:
    """A number from ``low`` to ``high``."""
    return lambda p, draw: draw.layout(("{}", "number: {}"), ("the number {}", "no. {}")).format(draw.number(low, high))


def number(text: str) -> int:
    """The last number in a text, or 0."""
    return int((re.findall(r"-?\d+", text) or ["0"])[-1])


def numbers_list(low: int, high: int, count: int) -> Maker:
    """``count`` different numbers from ``low`` to ``high``."""
    return lambda p, draw: listing(draw, draw.sample(range(low, high + 1), count))


def numbers(text: str) -> list[int]:
    """The numbers in a text, at least one."""
    return [int(digits) for digits in re.findall(r"\d+", text)] or [0]


# --- dates and times ---------------------------------------------------------------------------------------------------


def one_date(p: Any, draw: Draw, low: int = 1950, high: int = 2049) -> str:
    """A date of the years from ``low`` to ``high``; days are 1 to 28."""
    y, m, d = draw.number(low, high), draw.number(1, 12), draw.number(1, 28)
    seen = (f"{d} {MONTHS[m - 1]} {y}", f"{y}-{m:02}-{d:02}", f"{MONTHS[m - 1]} {d}, {y}")
    return draw.layout(seen, (f"{d} {MONTHS[m - 1][:3]} {y}", f"on {d} {MONTHS[m - 1]} {y}"))


def date(text: str) -> tuple[int, int, int]:
    """(year, month, day) of a date."""
    found = numbers(text)
    name = next((m for m, month in enumerate(MONTHS, 1) if month[:3] in text), 0)
    if name:
        return found[-1], name, found[0]
    return (found[0], found[1], found[2]) if len(found) == 3 else (2000, 1, 1)


def one_time(p: Any, draw: Draw) -> str:
    """A time of day."""
    h, m = draw.number(0, 23), draw.number(0, 59)
    half = f"{(h + 11) % 12 + 1}:{m:02}"
    am, a_m = ("pm", "p.m.") if h > 11 else ("am", "a.m.")
    return draw.layout((f"{h:02}:{m:02}", f"{half} {am}"), (f"at {h:02}:{m:02}", f"{half} {a_m}"))


def time(text: str) -> tuple[int, int]:
    """(hour from 0 to 23, minute) of a time of day."""
    found = re.search(r"(\d+):(\d\d)\s*([ap])?", text)
    if not found:
        return 0, 0
    hour = int(found[1])
    return (hour % 12 + 12 * (found[3] == "p") if found[3] else hour), int(found[2])


# --- records, names, files, quantities ---------------------------------------------------------------------------------

#: Field of a record -> the pools of its value's parts.
FIELDS: dict[str, tuple[Sequence[object], ...]] = {
    "name": (NAMES,), "surname": (SURNAMES,), "age": (range(5, 81),), "city": (KINDS["city"],),
    "country": (KINDS["country"],), "job": (KINDS["job"],),
    "pet": (("cat", "dog", "hamster", "parrot", "rabbit", "goldfish", "pony", "canary"),),
    "colour": (KINDS["colour"],), "sport": (KINDS["sport"],), "day": (DAYS,), "month": (MONTHS,),
    "item": (KINDS["piece of clothing"],), "price": ([f"${n}" for n in range(2, 100)],), "room": (range(100, 400),),
    "language": (KINDS["language"],), "phone": ([f"555 {n}" for n in range(1000, 10_000)],),
    "code": ("ABCDEFGHKLMNPRSTUVWXYZ", range(100, 1000)), "drink": (KINDS["drink"],), "team": (STRINGS,),
    "floor": (range(1, 10),),
}  # fmt: skip
_FIELD_NAMES = tuple(FIELDS)


def record_with(*params: str, others: int | tuple[int, int] = 2) -> Maker:
    """Records of the fields that the parameters ``params`` name, and ``others`` more."""
    return lambda p, draw: one_record(draw, *(getattr(p, name) for name in params), others=_count(draw, others))


def one_record(draw: Draw, *wanted: str, others: int = 2, **values: str) -> str:
    """A record of the fields ``wanted`` and ``others`` more, in random order; ``values`` fixes some."""
    names = list(wanted)
    while len(names) < len(wanted) + others:
        names += [name for name in [draw.pick(_FIELD_NAMES)] if name not in names]
    made = {name: values.get(name) or _field(draw, name) for name in draw.sample(names, len(names))}
    return write_record(made, *draw.layout(((": ", ", "), (" = ", "; ")), ((": ", " | "), (": ", "\n"))))


def _field(draw: Draw, name: str) -> str:
    return "".join(str(draw.pick(pool)) for pool in FIELDS[name])


def write_record(fields: dict[str, str], between: str = ": ", after: str = ", ") -> str:
    """``fields`` as text."""
    return after.join(f"{name}{between}{value}" for name, value in fields.items()) or NONE


def record(text: str) -> dict[str, str]:
    """The fields of a record."""
    parts = [re.split(r"\s*[:=]\s*", part.strip(), maxsplit=1) for part in re.split(r"[,;|\n]", text)]
    return {part[0]: part[1] for part in parts if len(part) == 2}


def one_person(p: Any, draw: Draw) -> str:
    """A first name and a surname, sometimes with a title."""
    title = draw.layout(("", "", "Mr ", "Ms "), ("Dr ", "Prof. "))
    return f"{title}{draw.pick(NAMES)} {draw.pick(SURNAMES)}"


def person(text: str) -> tuple[str, str]:
    """(first name, surname) of a person."""
    names = [name for name in text.split() if name not in {"Mr", "Ms", "Dr", "Prof."}] or [NONE]
    return names[0], names[-1]


def one_file(p: Any, draw: Draw) -> str:
    """A path of a file in a folder."""
    stem, folder, further = draw.pick(NOUNS), draw.pick(STRINGS), draw.pick(STRINGS)
    stem += draw.pick(("", f"_{draw.number(1, 99)}"))
    return f"{draw.layout((folder,), (f'{folder}/{further}',))}/{stem}.{draw.pick(english.POOLS['extensions'])}"


def file(text: str) -> tuple[str, str, str]:
    """(folders, stem, extension) of a path."""
    folder, _, name = text.rpartition("/")
    stem, _, extension = name.rpartition(".")
    return folder or NONE, stem or NONE, extension or NONE


# --- sentences ---------------------------------------------------------------------------------------------------------


def fill(draw: Draw, frames: Sequence[Sequence[str]], word: str) -> str:
    """A sentence with ``word``, in one of ``frames`` (seen, unseen)."""
    frame = draw.layout(*frames)
    return capital(frame.format(w=word, a=with_article(word), name=draw.pick(NAMES), day=draw.pick(DAYS)))


def mention(p: Any, draw: Draw, kind: str = "") -> str:
    """A sentence that mentions one thing of ``kind``, or of ``p.kind``, and none of another kind."""
    kind = kind or p.kind
    return fill(draw, SENTENCES[kind], draw.pick(KINDS[kind]))


def sentence(p: Any, draw: Draw) -> str:
    """A sentence about anything."""
    return mention(p, draw, draw.pick(KIND_NAMES))


def tokens(text: str) -> list[str]:
    """The words of a text without punctuation."""
    return re.findall(r"[\w'$@.-]*\w", text) or [NONE]


def mentioned(text: str, words: Sequence[str]) -> str:
    """The first word of a text that is one of ``words``, or NONE."""
    return next((found for found in tokens(text) if found in words), NONE)


# --- answers -----------------------------------------------------------------------------------------------------------


def capital(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[0].upper() + text[1:]


def first_or_last(values: Sequence[str], side: str, count: int) -> Sequence[str]:
    """The first ``count`` of ``values`` or, where ``side`` is "last", the last ones."""
    return values[:count] if side == "first" else values[-count:]


def filled(pattern: str, parts: dict[str, str]) -> str:
    """``pattern`` with the value of each key of ``parts``; at every place the first key that fits is taken.

    >>> filled("F. Last", {"First": "Ada", "F": "A", "Last": "King", "L": "K"})
    'A. King'
    """
    return re.sub("|".join(map(re.escape, parts)), lambda key: parts[key[0]], pattern)


#: What a family reads -> its reader.
READERS: dict[str, Callable[[str], Any]] = {
    "list": items, "numbers": numbers, "word": word, "number": number, "quantity": number, "date": date, "time": time,
    "record": record, "person": person, "file": file, "text": str,
}  # fmt: skip
