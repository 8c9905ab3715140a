"""Descriptions of a specification: sentences made of its family's phrases, frames around them, and its parameters.

``families.txt`` has the phrases of every family: ``do`` imperatives, ``noun`` what the answer is, ``ask`` questions,
``held`` imperatives that are held out, and ``given`` what the input is called, if not as in GIVEN.  A phrase may have
alternatives, ``[write|give] the word``, and parameters: ``{n}``, ``{text.q}`` (in quotation marks), ``{kind.plural}``,
``{kind.a}`` (with its article), ``{n.word}`` (three) and ``{pair[0]}``.

Frames name what they take: ``{do}``, ``{noun}``, ``{ask}``, ``{held}``, ``{given}``, ``{example}``; a capital letter begins
a sentence.  Descriptions of training never use a ``held`` phrase or a frame of HELD_FRAMES.

``further.txt`` has phrases and frames of further descriptions, which training may have besides: written later, without
knowledge of what is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.examples import normalise
from t2l_specs.draw import Draw
from t2l_specs.english import number_word, plural, with_article
from t2l_specs.family import FAMILIES, FURTHER, Specification, sections

FRAMES, HELD_FRAMES, EXAMPLES = (sections(FAMILIES)["frames"][key] for key in ("frame", "held_frame", "example"))
#: What a family reads -> how a description may call it.
GIVEN = {
    "list": "a list[| of words| of items]",
    "word": "a[| single] word",
    "text": "a [sentence|short text|short message]",
    "number": "a number",
    "numbers": "a list of numbers",
    "date": "a date",
    "time": "a time of day",
    "record": "a record[| with named fields]",
    "person": "a person's name",
    "file": "a file path",
    "quantity": "a quantity [with|and] its unit",
}
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


class Text(str):
    """A string parameter in a phrase; ``mark`` is the quotation mark of the sentence."""

    mark: str

    def __new__(cls, value: str, mark: str) -> Text:
        made = super().__new__(cls, value)
        made.mark = mark
        return made

    @property
    def q(self) -> str:
        mark = self.mark if self.mark not in self else "'" if '"' in self else '"'
        return f"{mark}{self}{mark}"

    @property
    def a(self) -> str:
        return with_article(self)

    @property
    def plural(self) -> str:
        return plural(str(self))


class Number(int):
    """A number parameter in a phrase."""

    @property
    def word(self) -> str:
        return number_word(self)


def wordings(spec: Specification, seed: int, example: tuple[str, str]) -> tuple[list[str], list[str]]:
    """(descriptions for training, held-out descriptions) of ``spec``, one for each frame, all different.

    Args:
        example: input and answer that some of them quote.

    Raises ConfigError naming the family if its phrases do not give so many.
    """
    draw = Draw(f"{seed}/wordings/{spec.family.name}/{spec.values!r}")
    phrases = {use: _Turns(draw, spec.family.phrases(use)) for use in ("do", "noun", "ask", "held")}
    made: dict[str, bool] = {}
    for frames, held in ((FRAMES, False), (HELD_FRAMES, True)):
        for frame in frames:
            for _ in range(50):
                sentence = _sentence(spec, frame, phrases, example, draw)
                if sentence not in made:
                    break
            else:
                raise ConfigError(f"{spec.name}: expected more phrases: no further description with {frame!r}")
            made[sentence] = held
    return [text for text, held in made.items() if not held], [text for text, held in made.items() if held]


def further(spec: Specification, seed: int, example: tuple[str, str], known: Iterable[str], count: int) -> list[str]:
    """``count`` further descriptions of ``spec`` for training, different from each other and from those ``known``.

    Raises ConfigError naming the specification if the phrases of its family do not give so many.
    """
    draw = Draw(f"{seed}/further/{spec.family.name}/{spec.values!r}")
    phrases = {use: _Turns(draw, spec.family.phrases(use, further=True)) for use in ("do", "noun", "ask")}
    frames = _Turns(draw, sections(FURTHER)["frames"]["frame"])
    made, taken = [], {normalise(text) for text in known}
    tries = 50 if spec.family.phrases("do", further=True) else 0  # families that are held out whole have none
    for _ in range(count):
        for _ in range(tries):
            sentence = _sentence(spec, frames.next(), phrases, example, draw)
            if normalise(sentence) not in taken:
                break
        else:
            raise ConfigError(f"{spec.name}: expected more phrases: no further description beside {len(taken)}")
        taken.add(normalise(sentence))
        made.append(sentence)
    return made


class _Turns:
    """Phrases in random order, again and again."""

    def __init__(self, draw: Draw, phrases: tuple[str, ...]):
        self._draw, self._phrases, self._left = draw, phrases, []

    def next(self) -> str:
        self._left = self._left or self._draw.shuffled(self._phrases)
        return self._left.pop()


def _sentence(spec: Specification, frame: str, phrases: dict[str, _Turns], example: tuple[str, str], draw: Draw) -> str:
    mark = draw.pick(('"', '"', "'"))
    said = {name: _said(value, mark) for name, value in zip(spec.family.params, spec.values, strict=True)}
    given = _choose(draw.pick(spec.family.phrases("given") or (GIVEN[spec.family.reads],)), draw)

    def phrase(match: re.Match[str]) -> str:
        name = match[1]
        if name == "example":
            return draw.pick(EXAMPLES).format(x=example[0], y=example[1])
        if name == "given":
            return given
        if name == "given_the":
            return re.sub("^an? ", "the ", given)
        text = _choose(phrases[name.lower()].next(), draw).format(**said)
        return text[0].upper() + text[1:] if name[0].isupper() else text

    return re.sub(r"\{(\w+)\}", phrase, _choose(frame, draw)).strip()


def _said(value: Any, mark: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_said(part, mark) for part in value)
    return Number(value) if isinstance(value, int) else Text(value, mark)


def _choose(text: str, draw: Draw) -> str:
    """``text`` with one of each of its alternatives."""
    return _CHOICE.sub(lambda match: draw.pick(match[1].split("|")), text)
