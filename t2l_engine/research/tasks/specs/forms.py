"""Families on the forms of English words, and words put into templates."""

from t2l_engine.research.tasks.specs.family import Family
from t2l_engine.research.tasks.specs.inputs import one_word, word
from t2l_engine.research.tasks.specs.words import (
    ADJECTIVE_WORDS,
    NAMES,
    NOUNS,
    POOLS,
    VERB_WORDS,
    comparative,
    ing,
    past,
    plural,
    superlative,
    third_person,
    with_article,
)

SUBJECTS = ("he", "she", *NAMES[:40])

FAMILIES = (
    Family(
        "amount",
        "word",
        {"amount": POOLS["amounts"]},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: f"{p.amount} {plural(word(text))}",
    ),
    Family(
        "habit",
        "word",
        {"who": SUBJECTS, "when": POOLS["habit_times"]},
        make=lambda p, draw: one_word(draw, VERB_WORDS),
        answer=lambda p, text: f"{p.who} {third_person(word(text))} {p.when}",
    ),
    Family(
        "past",
        "word",
        {"who": SUBJECTS, "when": POOLS["past_times"]},
        make=lambda p, draw: one_word(draw, VERB_WORDS),
        answer=lambda p, text: f"{p.who} {past(word(text))} {p.when}",
    ),
    Family(
        "verb_form",
        "word",
        {"start": POOLS["verb_starts"]},
        make=lambda p, draw: one_word(draw, VERB_WORDS),
        answer=lambda p, text: (
            f"{p.start} {ing(word(text)) if p.start.split()[-1] in {'is', 'are', 'were', 'am'} else word(text)}"
        ),
    ),
    Family(
        "article",
        "word",
        {"template": POOLS["article_templates"]},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: _capital(p.template.replace("___", with_article(word(text)))),
    ),
    Family(
        "template",
        "word",
        {"template": POOLS["templates"]},
        make=lambda p, draw: one_word(draw),
        answer=lambda p, text: p.template.replace("___", word(text)),
    ),
    Family(
        "compare",
        "word",
        {
            "start": POOLS["compare_starts"],
            "end": POOLS["than"],
        },
        make=lambda p, draw: one_word(draw, ADJECTIVE_WORDS),
        answer=lambda p, text: f"{p.start} {comparative(word(text))} {p.end}",
    ),
    Family(
        "superlative",
        "word",
        {"thing": tuple(NOUNS[:120])},
        make=lambda p, draw: one_word(draw, ADJECTIVE_WORDS),
        answer=lambda p, text: f"the {superlative(word(text))} {p.thing} of all",
    ),
)


def _capital(text):
    return text[0].upper() + text[1:]
