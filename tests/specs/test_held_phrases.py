"""Held-out phrases share no content words with the training phrases of their family."""

import re

import pytest

from t2l_specs.suite import FAMILIES

STOP = """a an the and or but nor so if then else otherwise than as that this these those such same there here it its itself
    they them he she i me my you your we our one ones other others another who whom which what when where why how while
    whatever whichever whether wherever unless until because once of to in on at by for with from into onto out off up about
    is are was were be been isn do does did done don doesn has have had having can could may might must should will would
    let not no none nothing any some all each every both either neither more most much many few just only too s t""".split()
#: What a family reads -> what every phrase may call that and its parts.
READ = {"list": "list item word", "numbers": "list number", "word": "word letter", "text": "text sentence message word",
        "number": "number digit", "quantity": "quantity", "date": "date day month year", "time": "time",
        "record": "record field", "person": "person name", "file": "file name path folder extension"}  # fmt: skip


def stem(word):
    word = re.sub(r"(?<=[sxz])es$|(?<=[cs]h)es$|(?<=..[^sui])s$", "", re.sub(r"(?<=..)ies$", "y", word))
    word = re.sub(r"([bdgmnprt]?)\1(ing|ed|ly)$", r"\1", word) if re.search("[aeiouy].+(ing|ed|ly)$", word) else word
    return re.sub("(?<=..)e$", "", word)


def content(*phrases):
    """The stems of the content words of ``phrases``, without their parameters."""
    words = re.findall(r"(?<!\w)[a-z]+", re.sub(r"\{[^{}]*\}", " ", " ".join(phrases)).lower())
    return {stem(word) for word in words if word not in STOP}


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if not family.held_out], ids=lambda f: f.name)
def test_held_phrases_share_no_content_word_with_training(family):
    phrases = (p for use in ("do", "noun", "ask") for far in (False, True) for p in family.phrases(use, further=far))
    trained = content(*phrases)
    held, names = family.phrases("held"), content(*family.phrases("names"))
    assert 2 <= len(held) <= 4 and names <= content(*held) & trained
    exempt = names | content(READ[family.reads], *family.phrases("given"))
    assert not {p: shared for p in held if (shared := (content(p) & trained) - exempt)}
