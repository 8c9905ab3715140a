"""Descriptions of a specification: sentences made of its family's phrases, frames around them, and its parameters.

``families.txt`` has the phrases of every family: ``do`` imperatives, ``noun`` what the answer is, ``ask`` questions,
``held`` imperatives that are held out, and ``given`` what the input is called, if not as in section ``given``.  A ``held``
phrase shares no content words with the family's other phrases, save those that name what the family reads, and the words
after ``names``, without which the family cannot be described.  A phrase may have alternatives, ``[write|give] the word``,
and parameters: ``{n}``, ``{text.q}`` (in quotation marks), ``{kind.plural}``, ``{kind.a}`` (with its article), ``{n.word}``
(three) and ``{pair[0]}``.

Frames name what they take: ``{do}``, ``{noun}``, ``{ask}``, ``{held}``, ``{given}``, ``{example}``; a capital letter begins
a sentence.  Descriptions of training never use a ``held`` phrase or a frame of HELD_FRAMES.

``further.txt`` has phrases and frames of further descriptions, which training may have besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.examples import normalise
from t2l_specs.draw import Draw
from t2l_specs.english import number_word, plural, with_article
from t2l_specs.family import FAMILIES, FURTHER, Specification, sections

FRAMES, HELD_FRAMES, EXAMPLES = (sections(FAMILIES)["frames"][key] for key in ("frame", "held_frame", "example"))
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


class Text(str):
    """A string parameter in a phrase; ``mark`` is the quotation mark of the sentence."""

    mark = '"'
    a = property(with_article)
    plural = property(plural)

    @property
    def q(self) -> str:
        mark = self.mark if self.mark not in self else "'" if '"' in self else '"'
        return f"{mark}{self}{mark}"


class Number(int):
    """A number parameter in a phrase."""

    word = property(number_word)


def wordings(spec: Specification, seed: int, example: tuple[str, str]) -> tuple[list[str], list[str]]:
    """(descriptions for training, held-out descriptions) of ``spec``, one for each frame, all different.

    Args:
        example: input and answer that some of them quote.

    Raises ConfigError naming the specification if the phrases of its family do not give so many.
    """
    writer = _Writer(spec, Draw(f"{seed}/wordings/{spec.family.name}/{spec.values!r}"), example)
    trained, held = ([writer.write(lambda frame=frame: frame) for frame in frames] for frames in (FRAMES, HELD_FRAMES))
    return trained, held


def further(spec: Specification, seed: int, example: tuple[str, str], known: Iterable[str], count: int) -> list[str]:
    """``count`` further descriptions of ``spec`` for training, different from each other and from those ``known``.

    Raises ConfigError naming the specification if the phrases of its family do not give so many.
    """
    draw = Draw(f"{seed}/further/{spec.family.name}/{spec.values!r}")
    writer, frames = _Writer(spec, draw, example, known, further=True), _turns(draw, sections(FURTHER)["frames"]["frame"])
    return [writer.write(lambda: next(frames)) for _ in range(count)]


class _Writer:
    """Writes descriptions that differ from each other and from those ``known``, with the phrases in turns."""

    def __init__(self, spec: Specification, draw: Draw, example: tuple[str, str], known: Iterable[str] = (), further=False):
        self.spec, self.draw, self.example, self.taken = spec, draw, example, set(map(normalise, known))
        uses = {use: spec.family.phrases(use, further=further) for use in ("do", "noun", "ask", "held")}
        self.phrases = {use: _turns(draw, phrases) for use, phrases in uses.items()}
        self.tries = 50 if uses["do"] else 0  # families that are held out whole have no further phrases

    def write(self, frame: Callable[[], str]) -> str:
        for _ in range(self.tries):
            sentence = self._sentence(frame())
            if normalise(sentence) not in self.taken:
                self.taken.add(normalise(sentence))
                return sentence
        raise ConfigError(f"{self.spec.name}: expected more phrases: no further description beside {len(self.taken)}")

    def _sentence(self, frame: str) -> str:
        spec, draw = self.spec, self.draw
        mark = draw.pick(('"', '"', "'"))
        said = {name: _said(value, mark) for name, value in zip(spec.family.params, spec.values, strict=True)}
        of_kind = sections(FAMILIES)["given"][spec.family.reads]
        given = _choose(draw.pick(spec.family.phrases("given") or of_kind), draw)

        def phrase(match: re.Match[str]) -> str:
            name = match[1]
            if name == "example":
                return draw.pick(EXAMPLES).format(x=self.example[0], y=self.example[1])
            if name == "given":
                return given
            if name == "given_the":
                return re.sub("^an? ", "the ", given)
            text = _choose(next(self.phrases[name.lower()]), draw).format(**said)
            return text[0].upper() + text[1:] if name[0].isupper() else text

        return re.sub(r"\{(\w+)\}", phrase, _choose(frame, draw)).strip()


def _turns(draw: Draw, values: Sequence[str]) -> Iterator[str]:
    """``values`` in random order, again and again."""
    while values:
        yield from reversed(draw.shuffled(values))


def _said(value: Any, mark: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_said(part, mark) for part in value)
    if isinstance(value, int):
        return Number(value)
    text = Text(value)
    text.mark = mark
    return text


def _choose(text: str, draw: Draw) -> str:
    """``text`` with one of each of its alternatives."""
    return _CHOICE.sub(lambda match: draw.pick(match[1].split("|")), text)
