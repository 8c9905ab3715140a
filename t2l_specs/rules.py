"""The rules of the families: a maker of inputs, and the answer to what the family's reader makes of an input."""

import datetime
import re

from t2l_specs import english, inputs, operators
from t2l_specs.english import KIND_NAMES, KIND_OF, KINDS, MAPS, NAMES, NOUNS, nouns_like, nouns_of, plural, with_article
from t2l_specs.family import Rule
from t2l_specs.inputs import NONE, at, capital, filled, first_or_last, mention, mentioned, of_kind, put, tokens, write_record

PLACES, LETTERS = MAPS["places"], MAPS["letter_parts"]
_BOTH_WAYS = english.OPPOSITES | {b: a for a, b in english.OPPOSITES.items()}
_VERB, _ADJECTIVE = inputs.one_word(english.VERB_WORDS), inputs.one_word(english.ADJECTIVE_WORDS)
_NAME = rf"\b({'|'.join(NAMES)})\b"
_SLOT = "<(.*?)>"
_PATTERNS = {
    "first name": _NAME,
    "day of the week": rf"\b({'|'.join(english.DAYS)})\b",
    "plain number": r"(?<![\w.$:])(\d+)(?![\w.:]*\d|:)",
    "email address": r"([\w.]+@[\w.]*\w)",
    "price": r"(\$\d+(?:\.\d\d)?)",
    "time": r"(\d+:\d\d)",
}


# --- lists of words, and of numbers -----------------------------------------------------------------------------------


def beside(found, new, where):
    """``new`` before or after ``found``."""
    return (new, found) if where == "before" else (found, new)


def _with_neighbour(p, draw):
    """Words with one of ``p.kind``, which is not at the end of ``p.side``."""
    words = inputs.mixed(draw, p.kind, 1, 4)
    index = next(i for i, w in enumerate(words) if w in KINDS[p.kind])
    other = draw.number(0, 3) + (p.side == "before")
    words[index], words[other] = words[other], words[index]
    return inputs.listing(draw, words)


def _neighbour(words, kind, step):
    index = next((i for i, w in enumerate(words) if w in kind), None)
    return at(words, index + step) if index is not None and index + step >= 0 else NONE


def _with_one(draw, pattern):
    """A list with one noun in which ``pattern`` is found."""
    words = [draw.pick(nouns_like(pattern)), *draw.sample(nouns_like(pattern, False), 3)]
    return inputs.listing(draw, draw.sample(words, 4))


def _like(words, pattern):
    """The first word in which ``pattern`` is found."""
    return next((w for w in words if re.search(pattern, w.lower())), NONE)


def _insert(words, new, where):
    index = MAPS["insert_places"][where]
    return [*words[:index], new, *words[index:]]


def _odd_one(words):
    """The first of ``words`` whose kind no other of them has."""
    kinds = [KIND_OF.get(w, w) for w in words]
    return next((w for w, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1), NONE)


def _swap(words, first, second):
    words, a, b = list(words), PLACES[first], PLACES[second]
    if max(a, b) < len(words):
        words[a], words[b] = words[b], words[a]
    return words


def _alphabetical(words, order):
    return sorted(words, key=str.lower, reverse=order.endswith("A"))


_CASES = {"capital letters": str.upper, "title case": str.title, "alternating case": operators.alternating}


def _of_two_lengths(p, draw):
    words = draw.sample(NOUNS, 2)
    while len(words[0]) == len(words[1]):
        words = draw.sample(NOUNS, 2)
    return inputs.listing(draw, words)


def _by_length(words, which):
    return (max if which == "longest" else min)(words, key=len)


def _extreme(values, which):
    ordered = sorted(values, reverse=which.endswith("largest"))
    return ordered[min(which.startswith("second"), len(ordered) - 1)]


def _beyond(values, what, limit):
    return [str(n) for n in values if (n > limit if what == "more than" else n < limit)]


LISTS = {
    # Choosing from lists.
    "pick_place": Rule(inputs.nouns(5, 6), lambda p, words: at(words, PLACES[p.place])),
    "pick_kind": Rule(inputs.of_kinds(1, (2, 4)), lambda p, words: at(of_kind(words, p.kind), 0)),
    "keep_kind": Rule(inputs.of_kinds((2, 3), (2, 3)), lambda p, words: put(of_kind(words, p.kind))),
    "drop_kind": Rule(inputs.of_kinds((1, 3), (2, 3)), lambda p, words: put([w for w in words if w not in KINDS[p.kind]])),
    "take": Rule(lambda p, draw: inputs.nouns(p.n + 1, 6)(p, draw), lambda p, words: put(first_or_last(words, p.side, p.n))),
    "drop_place": Rule(
        inputs.nouns(4, 5), lambda p, words: put([w for i, w in enumerate(words) if i != PLACES[p.place] % len(words)])
    ),
    "next_to": Rule(_with_neighbour, lambda p, words: _neighbour(words, KINDS[p.kind], 1 if p.side == "after" else -1)),
    "pick_initial": Rule(lambda p, draw: _with_one(draw, f"^{p.letter}"), lambda p, words: _like(words, f"^{p.letter}")),
    "pick_ending": Rule(lambda p, draw: _with_one(draw, f"{p.letter}$"), lambda p, words: _like(words, f"{p.letter}$")),
    "pick_length": Rule(inputs.lengths(4), lambda p, words: _by_length(words, p.which)),
    "insert_word": Rule(inputs.nouns(3, 4), lambda p, words: put(_insert(words, p.new, p.where))),
    "odd_one_out": Rule(
        lambda p, draw: inputs.listing(draw, inputs.mixed(draw, draw.pick(KIND_NAMES), p.size - 1, 1)),
        lambda p, words: _odd_one(words[: p.size]),
    ),
    "alphabet_end": Rule(inputs.nouns(4, 4), lambda p, words: sorted(words, key=str.lower)[0 if p.which == "first" else -1]),
    "every_other": Rule(inputs.nouns(5, 6), lambda p, words: put(words[p.start == "second" :: 2])),
    # Rewriting lists.
    "join": Rule(inputs.nouns(3, 4), lambda p, words: p.sep.join(words)),
    "reverse_list": Rule(inputs.nouns(3, 4), lambda p, words: p.sep.join(words[::-1])),
    "acronym": Rule(inputs.nouns(3, 5), lambda p, words: p.sep.join(w[0].upper() for w in words)),
    "number_items": Rule(
        inputs.nouns(3, 4), lambda p, words: ", ".join(p.style.replace("1", str(i)) + w for i, w in enumerate(words, 1))
    ),
    "conjunction": Rule(inputs.nouns(3, 4), lambda p, words: english.listed(words, p.word)),
    "swap": Rule(inputs.nouns(4, 5), lambda p, words: put(_swap(words, *p.pair))),
    "sort_letters": Rule(inputs.nouns(3, 4), lambda p, words: put(_alphabetical(words, p.order))),
    "sort_join": Rule(inputs.nouns(3, 3), lambda p, words: p.sep.join(_alphabetical(words, p.order))),
    "sort_length": Rule(inputs.lengths(3), lambda p, words: put(sorted(words, key=len, reverse=p.order.startswith("long")))),
    "replace_kind": Rule(
        inputs.of_kinds((1, 2), 3),
        lambda p, words: put([p.new if w in KINDS[p.kind] else w for w in words]),
        valid=lambda p: p.new not in KINDS[p.kind],
    ),
    "repeat_place": Rule(inputs.nouns(3, 4), lambda p, words: " ".join([at(words, PLACES[p.place])] * p.n)),
    "keep_join": Rule(inputs.of_kinds(2, 2), lambda p, words: p.sep.join(of_kind(words, p.kind)) or NONE),
    # One word of a list, in other words or letters.
    "kind_word": Rule(
        inputs.of_kinds(1, (2, 3)), lambda p, words: " ".join(beside(at(of_kind(words, p.kind), 0), p.new, p.where))
    ),
    "place_case": Rule(inputs.nouns(4, 5), lambda p, words: _CASES[p.case](at(words, PLACES[p.place]).lower())),
    "place_wrap": Rule(inputs.nouns(4, 5), lambda p, words: p.marks[0] + at(words, PLACES[p.place]) + p.marks[1]),
    "template_place": Rule(inputs.nouns(4, 5), lambda p, words: p.template.replace("___", at(words, PLACES[p.place]))),
    # Counts and labels.
    "count_items": Rule(
        inputs.nouns(2, 7), lambda p, words: f"{len(words)} {p.unit if len(words) == 1 else plural(p.unit)}"
    ),
    "count_kind": Rule(inputs.of_kinds((0, 4), 2), lambda p, words: str(len(of_kind(words, p.kind)))),
    "kind_place": Rule(
        inputs.of_kinds(1, 4), lambda p, words: str(next((i for i, w in enumerate(words, 1) if w in KINDS[p.kind]), 0))
    ),
    "label_list": Rule(
        inputs.either(inputs.of_kinds(1, 3), inputs.of_kinds(0, 4)), lambda p, words: p.labels[not of_kind(words, p.kind)]
    ),
    "label_longer": Rule(_of_two_lengths, lambda p, words: p.labels[len(words[0]) <= len(words[-1])]),
    # Lists of numbers.
    "extreme": Rule(inputs.numbers_list(1, 99, 4), lambda p, values: str(_extreme(values, p.which))),
    "extreme_unit": Rule(inputs.numbers_list(1, 99, 4), lambda p, values: f"{_extreme(values, p.which)}{p.unit}"),
    "filter_numbers": Rule(inputs.numbers_list(1, 99, 5), lambda p, values: put(_beyond(values, p.what, p.limit))),
    "count_numbers": Rule(inputs.numbers_list(1, 99, 5), lambda p, values: str(len(_beyond(values, p.what, p.limit)))),
    "sort_numbers": Rule(
        inputs.numbers_list(1, 99, 4),
        lambda p, values: p.sep.join(map(str, sorted(values, reverse=p.order.startswith("l")))),
    ),
    "sum": Rule(
        lambda p, draw: inputs.numbers_list(1, 60, p.n)(p, draw),
        lambda p, values: str(sum(values) if p.what == "sum" else max(values) - min(values)),
        valid=lambda p: p.what == "sum" or p.n == 2,
    ),
}


# --- words, numbers and quantities ------------------------------------------------------------------------------------


def _upper(found):
    return found[0].upper()


def _double(text, index):
    letter = at(text, index)
    return text if letter == NONE else text[: index % len(text)] + letter + text[index % len(text) :]


def _form(start, verb):
    return english.verb_forms(verb)[2] if start.endswith(("is", "are", "were", "am")) else verb


WORDS = {
    # The letters of a word.
    "letter_at": Rule(inputs.one_word(nouns_of(4)), lambda p, word: at(word, PLACES[p.place])),
    "prefix": Rule(inputs.one_word(), lambda p, word: p.text + word),
    "suffix": Rule(inputs.one_word(), lambda p, word: word + p.text),
    "replace_letter": Rule(
        lambda p, draw: inputs.one_word(nouns_like(p.old))(p, draw),
        lambda p, word: word.replace(p.old, p.new),
        valid=lambda p: p.old != p.new,
    ),
    "remove_letter": Rule(
        lambda p, draw: inputs.one_word(nouns_like(p.letter))(p, draw), lambda p, word: word.replace(p.letter, "") or NONE
    ),
    "mask_vowels": Rule(inputs.one_word(), lambda p, word: re.sub("[aeiou]", p.mark, word.lower())),
    "word_case": Rule(inputs.one_word(), lambda p, word: re.sub(MAPS["capitals"][p.style], _upper, word.lower())),
    "spell": Rule(inputs.one_word(nouns_of(1, 7)), lambda p, word: p.sep.join(word[:20])),
    "cut": Rule(
        lambda p, draw: inputs.one_word(nouns_of(p.n + 1))(p, draw), lambda p, word: first_or_last(word, p.side, p.n)
    ),
    "drop_letters": Rule(inputs.one_word(nouns_of(5)), lambda p, word: re.sub(LETTERS[p.what], "", word) or NONE),
    "letter_marks": Rule(
        inputs.one_word(nouns_of(5)),
        lambda p, word: re.sub(LETTERS[p.what], lambda part: part[0].join(p.marks), word),
    ),
    "double_letter": Rule(inputs.one_word(nouns_of(4)), lambda p, word: _double(word, PLACES[p.place])),
    "reverse_word": Rule(inputs.one_word(nouns_of(1, 6)), lambda p, word: word[::-1] + p.end),
    "move_letter": Rule(inputs.one_word(), lambda p, word: word[1:] + word[0] + p.end),
    # The word beside others, and in a form.
    "repeat_word": Rule(inputs.one_word(), lambda p, word: p.sep.join([word] * p.n)),
    "add_word": Rule(inputs.one_word(), lambda p, word: " ".join(beside(word, p.new, p.where))),
    "template": Rule(inputs.one_word(), lambda p, word: p.template.replace("___", word)),
    "article": Rule(inputs.one_word(), lambda p, word: capital(p.template.replace("___", with_article(word)))),
    "amount": Rule(inputs.one_word(), lambda p, word: f"{p.amount} {plural(word)}"),
    "habit": Rule(_VERB, lambda p, word: f"{p.who} {english.verb_forms(word)[0]} {p.when}"),
    "past": Rule(_VERB, lambda p, word: f"{p.who} {english.verb_forms(word)[1]} {p.when}"),
    "verb_form": Rule(_VERB, lambda p, word: f"{p.start} {_form(p.start, word)}"),
    "compare": Rule(_ADJECTIVE, lambda p, word: f"{p.start} {english.degrees(word)[0]} {p.end}"),
    "superlative": Rule(_ADJECTIVE, lambda p, word: f"the {english.degrees(word)[1]} {p.thing} of all"),
    "opposite": Rule(
        inputs.one_word(list(_BOTH_WAYS)), lambda p, word: f"{p.template.replace('___', word)} {_BOTH_WAYS.get(word, NONE)}"
    ),
    "word_length": Rule(inputs.one_word(), lambda p, word: f"{len(word)} {plural(p.unit)}"),
    # Labels of words.
    "label_kind": Rule(
        lambda p, draw: inputs.one_word(KINDS[p.kind] if draw.chance() else KINDS[draw.pick(KIND_NAMES)])(p, draw),
        lambda p, word: p.labels[KIND_OF.get(word) != p.kind],
    ),
    "which_kind": Rule(
        lambda p, draw: inputs.one_word(KINDS[draw.pick(p.kinds)])(p, draw),
        lambda p, word: next((kind for kind in p.kinds if KIND_OF.get(word) == kind), p.kinds[-1]),
    ),
    "label_letter": Rule(
        lambda p, draw: inputs.one_word(nouns_like(p.letter, draw.chance()))(p, draw),
        lambda p, word: p.labels[p.letter not in word.lower()],
    ),
    "label_vowel": Rule(
        lambda p, draw: inputs.one_word(nouns_like("^[aeiou]", draw.chance()))(p, draw),
        lambda p, word: p.labels[word[0].lower() not in "aeiou"],
    ),
    "label_length": Rule(
        lambda p, draw: inputs.one_word(nouns_of(p.limit + 1) if draw.chance() else nouns_of(1, p.limit))(p, draw),
        lambda p, word: p.labels[len(word) <= p.limit],
    ),
    # Numbers and quantities.
    "add": Rule(inputs.one_number(100, 899), lambda p, n: str(n + (p.n if p.what == "plus" else -p.n))),
    "times": Rule(inputs.one_number(2, 99), lambda p, n: str(n * p.n)),
    "sequence": Rule(inputs.one_number(10, 800), lambda p, n: ", ".join(str(n + p.step * i) for i in range(1, p.count + 1))),
    "round": Rule(inputs.one_number(1001, 9999), lambda p, n: str((n + p.to // 2) // p.to * p.to)),
    "unit": Rule(inputs.one_number(2, 999), lambda p, n: f"{n}{p.unit}"),
    "sign": Rule(inputs.one_number(2, 999), lambda p, n: f"{p.sign}{n}"),
    "pad": Rule(inputs.one_number(1, 999), lambda p, n: str(n).rjust(p.width, p.fill)),
    "thousands": Rule(
        inputs.one_number(1000, 9_999_999), lambda p, n: f"{n:,}".replace(",", MAPS["thousands_marks"][p.mark])
    ),
    "ordinal": Rule(inputs.one_number(1, 400), lambda p, n: f"the {english.ordinal(n)} {p.thing}"),
    "number_words": Rule(inputs.one_number(2, 999), lambda p, n: f"{english.number_word(n % 1000)} {plural(p.unit)}"),
    "convert": Rule(
        lambda p, draw: draw.layout(("{} {}", "{} {} in all"), ("exactly {} {}", "a total of {} {}")).format(
            draw.number(2, 99), p.units[0]
        ),
        lambda p, n: f"{n * english.UNITS[p.units]} {p.units[1]}",
    ),
    "label_limit": Rule(
        lambda p, draw: inputs.one_number(*((0, p.limit - 1) if draw.chance() else (p.limit, 2 * p.limit)))(p, draw),
        lambda p, n: p.labels[n >= p.limit],
    ),
    "label_parity": Rule(inputs.one_number(0, 999), lambda p, n: p.labels[n % 2]),
}


# --- records, persons, files, dates and times -------------------------------------------------------------------------


def _value(fields, name):
    return fields.get(name) or NONE


def _write_name(names, pattern):
    """``names`` (first, last) by a pattern of First, FIRST, first, F, f and the same for the last name."""
    first, last = names
    parts = {"First": first, "FIRST": first.upper(), "first": first.lower(), "F": first[0], "f": first[0].lower(),
             "Last": last, "LAST": last.upper(), "last": last.lower(), "L": last[0], "l": last[0].lower()}  # fmt: skip
    return filled(pattern, parts)


def _write_date(day, pattern):
    """A date (year, month, day) by a pattern of YYYY, YY, Month, Mon, MM, M, DD and D."""
    y, m, d = day
    month = english.MONTHS[m - 1]
    parts = {"YYYY": f"{y:04}", "YY": f"{y % 100:02}", "Month": month, "Mon": month[:3], "MM": f"{m:02}", "M": str(m),
             "DD": f"{d:02}", "D": str(d)}  # fmt: skip
    return filled(pattern, parts)


def _write_time(time, pattern):
    """A time of day (hour, minute) by a pattern of HH (24 hours), H (12 hours), MM, a.m., am and AM."""
    hour, minute = time
    letter = "p" if hour > 11 else "a"
    parts = {"HH": f"{hour:02}", "H": str((hour + 11) % 12 + 1), "MM": f"{minute:02}",
             "a.m.": f"{letter}.m.", "am": f"{letter}m", "AM": f"{letter}m".upper()}  # fmt: skip
    return filled(pattern, parts)


def _other_day(day, by, what):
    days = MAPS["days_apart"][by]
    shifted = datetime.date(*day) + datetime.timedelta(days if what == "later" else -days)
    return f"{shifted.day} {english.MONTHS[shifted.month - 1]} {shifted.year}"


def _other_time(time, by, what):
    hours = MAPS["hours"][by]
    return f"{(time[0] + (hours if what == 'later' else -hours)) % 24:02}:{time[1]:02}"


RECORDS = {
    # Records.
    "get_field": Rule(inputs.record_with("field", others=(2, 3)), lambda p, fields: _value(fields, p.field)),
    "two_fields": Rule(
        inputs.record_with("first", "second", others=1),
        lambda p, fields: p.between.join(_value(fields, field) for field in (p.first, p.second)),
        valid=lambda p: p.first != p.second,
    ),
    "record_template": Rule(
        lambda p, draw: inputs.one_record(draw, *re.findall(_SLOT, p.template), others=1),
        lambda p, fields: re.sub(_SLOT, lambda slot: _value(fields, slot[1]), p.template),
    ),
    "field_wrap": Rule(inputs.record_with("field"), lambda p, fields: p.marks[0] + _value(fields, p.field) + p.marks[1]),
    "field_names": Rule(inputs.record_with(others=3), lambda p, fields: p.sep.join(fields) or NONE),
    "drop_field": Rule(
        inputs.record_with("field"), lambda p, fields: write_record({k: v for k, v in fields.items() if k != p.field})
    ),
    "record_layout": Rule(inputs.record_with(others=3), lambda p, fields: write_record(fields, *p.signs)),
    "rename_field": Rule(
        inputs.record_with("field"),
        lambda p, fields: write_record({p.new if k == p.field else k: v for k, v in fields.items()}),
    ),
    "label_age": Rule(
        lambda p, draw: inputs.one_record(draw, "age", age=str(draw.number(p.limit - 10, p.limit + 9))),
        lambda p, fields: p.labels[int("0" + fields.get("age", "")) >= p.limit],
    ),
    "has_field": Rule(
        lambda p, draw: inputs.one_record(draw, p.field if draw.chance() else ("city" if p.field == "name" else "name")),
        lambda p, fields: p.labels[p.field not in fields],
    ),
    # Persons and files.
    "name_pattern": Rule(inputs.one_person, lambda p, names: _write_name(names, p.pattern)),
    "greet": Rule(inputs.one_person, lambda p, names: p.text.replace("_", names[p.which == "surname"])),
    "email": Rule(inputs.one_person, lambda p, names: f"{_write_name(names, p.pattern)}@{p.domain}"),
    "set_extension": Rule(inputs.one_file, lambda p, parts: f"{parts[1]}.{p.extension}"),
    "file_part": Rule(inputs.one_file, lambda p, parts: f"{p.new}: {parts[MAPS['file_parts'][p.part]]}"),
    "move_file": Rule(inputs.one_file, lambda p, parts: f"{p.folder}/{parts[1]}.{parts[2]}"),
    # Dates and times.
    "date_pattern": Rule(inputs.one_date, lambda p, day: _write_date(day, p.pattern)),
    "date_part": Rule(inputs.one_date, lambda p, day: p.lead + _write_date(day, MAPS["date_parts"][p.part])),
    "date_age": Rule(
        lambda p, draw: inputs.one_date(p, draw, p.year - 12, p.year + 11), lambda p, day: p.labels[day[0] >= p.year]
    ),
    "later_date": Rule(inputs.one_date, lambda p, day: _other_day(day, p.by, p.what)),
    "quarter": Rule(inputs.one_date, lambda p, day: f"{p.name}{(day[1] + 2) // 3}"),
    "time_pattern": Rule(inputs.one_time, lambda p, time: _write_time(time, p.pattern)),
    "time_half": Rule(inputs.one_time, lambda p, time: p.labels[time[0] >= 12]),
    "later_time": Rule(inputs.one_time, lambda p, time: _other_time(time, p.by, p.what)),
}


# --- sentences and other short texts ----------------------------------------------------------------------------------


def _message(p, draw):
    """A note with a first name, a day, a number of things, an email address, a price and a time, or some of them."""
    name, day, count = draw.pick(NAMES), draw.pick(english.DAYS), draw.number(11, 99)
    mail = f"{draw.pick(english.STRINGS)}@{draw.pick(english.STRINGS)}.com"
    price, time = f"${draw.number(2, 9)}.{draw.number(10, 99)}", f"{draw.number(10, 23)}:{draw.number(10, 59)}"
    return draw.layout(*english.FRAMES["message"]).format(d=day, k=count, n=name, m=mail, p=price, i=time)


def _find(text, what):
    found = re.search(_PATTERNS[what], text)
    return found[1] if found else NONE


def _about(draw, frames, name):
    return draw.layout(*english.FRAMES[frames]).format(name, draw.pick(NOUNS))


def _review(p, draw):
    word, thing = draw.pick(draw.pick((english.GOOD, english.BAD))), draw.pick(english.REVIEWED)
    frame = draw.layout(*english.FRAMES["review"])
    return frame.format(w=thing, adj=word, a=with_article(word), name=draw.pick(NAMES), day=draw.pick(english.DAYS))


def _phrase(p, draw):
    words = draw.pick(english.ADJECTIVE_WORDS), draw.pick(NOUNS)
    return draw.layout(*english.FRAMES["phrase"]).format(*words, draw.pick(english.MONTHS))


def _cased(text, case):
    return {"small letters": text.lower(), "capital letters": text.upper()}.get(case, text)


def _habit(p, draw):
    """A sentence of what I do with a thing."""
    thing = draw.pick(NOUNS)
    return draw.layout(*english.FRAMES["habit"]).format(
        v=draw.pick(english.POOLS["transitive_verbs"]), n=thing, d=draw.pick(english.DAYS)
    )


def _third(text, name):
    """``text`` about ``name``: the first verb after I gets its -s."""
    words = text.split()
    if words[0] != "I":
        return text
    index = next((i for i, w in enumerate(words[1:], 1) if w in english.VERBS), None)
    words[0] = capital(name)
    if index is not None:
        words[index] = english.verb_forms(words[index])[0]
    return " ".join(words)


TEXTS = {
    # Finding something in a text.
    "extract_kind": Rule(mention, lambda p, text: mentioned(text, KINDS[p.kind])),
    "mention_template": Rule(mention, lambda p, text: p.template.replace("___", mentioned(text, KINDS[p.kind]))),
    "echo_reply": Rule(mention, lambda p, text: f"{mentioned(text, KINDS[p.kind])}: {p.reply}"),
    "extract": Rule(_message, lambda p, text: p.lead + _find(text, p.what)),
    "redact": Rule(_message, lambda p, text: text.replace(_find(text, p.what), p.tag)),
    "word_place": Rule(inputs.sentence, lambda p, text: at(tokens(text), PLACES[p.place])),
    "first_words": Rule(inputs.sentence, lambda p, text: " ".join(tokens(text)[: p.n]) + p.mark),
    # Editing and wrapping a text.
    "wrap": Rule(inputs.sentence, lambda p, text: f"{p.marks[0]}{text}{p.marks[1]}"),
    "lead": Rule(inputs.sentence, lambda p, text: f"{p.text} {text}"),
    "ending": Rule(inputs.sentence, lambda p, text: text.rstrip(".?!") + p.mark),
    "append": Rule(inputs.sentence, lambda p, text: f"{text} {capital(p.text)}."),
    "constant": Rule(inputs.sentence, lambda p, text: p.reply),
    "replace_name": Rule(
        lambda p, draw: _about(draw, "note", draw.pick(NAMES)), lambda p, text: capital(re.sub(_NAME, p.new, text))
    ),
    "space": Rule(_phrase, lambda p, text: _cased(p.sep.join(tokens(text)), p.case)),
    "hashtag": Rule(_phrase, lambda p, text: p.sign + "".join(map(capital, tokens(text)))),
    "about_someone": Rule(_habit, lambda p, text: _third(text, p.name)),
    "negate": Rule(_habit, lambda p, text: re.sub(r"^I ", f"I {p.how} ", text)),
    "ask_back": Rule(_habit, lambda p, text: re.sub(r"^I (.*)\.$", rf"Do {p.who} \1?", text)),
    # Labels of texts.
    "label_mention": Rule(
        inputs.either(mention, inputs.sentence), lambda p, text: p.labels[mentioned(text, KINDS[p.kind]) == NONE]
    ),
    "label_review": Rule(_review, lambda p, text: p.labels[mentioned(text, english.BAD) != NONE]),
    "label_question": Rule(
        lambda p, draw: inputs.fill(draw, english.FRAMES["question" if draw.chance() else "statement"], draw.pick(NOUNS)),
        lambda p, text: p.labels[not text.endswith("?")],
    ),
    "topic": Rule(
        lambda p, draw: inputs.fill(draw, english.FRAMES["topic"], draw.pick(english.TOPICS[draw.pick(p.topics)])),
        lambda p, text: next((t for t in p.topics if mentioned(text, english.TOPICS[t]) != NONE), p.topics[-1]),
    ),
    "if_name": Rule(
        lambda p, draw: _about(draw, "note_or_more", p.name if draw.chance() else draw.pick(NAMES)),
        lambda p, text: p.labels[p.name not in tokens(text)],
    ),
}


# --- operators --------------------------------------------------------------------------------------------------------


def _composed(make, choose, valid=lambda p: True):
    """What is chosen from an input, after the operators ``p.change`` and ``p.form``."""
    return Rule(make, lambda p, read: operators.applied(choose(p, read), p.change, p.form), valid, operators=True)


COMPOSED = {
    "item_change_form": _composed(inputs.lengths((5, 6)), lambda p, words: operators.chosen(words, p.which, _by_length)),
    "kind_change_form": _composed(
        inputs.of_kinds(1, (2, 4)),
        lambda p, words: at(of_kind(words, p.kind), 0),
        valid=lambda p: p.change not in operators.NOUN_CHANGES or KINDS[p.kind][0] in NOUNS,
    ),
    "mention_change_form": _composed(mention, lambda p, text: mentioned(text, KINDS[p.kind])),
    "field_change_form": _composed(inputs.record_with("field"), lambda p, fields: _value(fields, p.field)),
    "number_change_form": _composed(
        inputs.numbers_list(30, 99, 4), lambda p, values: str(operators.chosen(values, p.which, _extreme))
    ),
}
