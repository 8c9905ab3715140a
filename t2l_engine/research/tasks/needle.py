"""Needle in a haystack: a text that holds facts among other sentences is a task's description, its examples ask for them.

The prompt of an example does not have the text, so that only an adapter made of it, or its text in the prompt, can answer
(the smallest experiment of Doc-to-LoRA, arXiv 2602.15902).
"""

from __future__ import annotations

import random
import re
import string

from t2l_engine.research.tasks.folder import Example, Task

NAMES = (
    "Adam Alice Anna Carol Daniel David Emma Frank George Helen Jack James John Julia Mark Mary Paul Peter Rose Sarah"
).split()
LETTERS = "ABCDEFGHKM"
#: Parts of the other sentences.
_PARTS = (
    "The farmer|A teacher|My neighbour|The old sailor|Their cousin|A young doctor|The baker|Our driver|The painter",
    "carried|painted|found|sold|repaired|forgot|bought|washed|moved|described|borrowed|hid",
    "a red bicycle|the wooden table|three green bottles|an old map|the broken lamp|a heavy box|some fresh bread|a blue coat",
    "near the river|in the morning|before dinner|at the market|behind the house|last winter|on the way home|after the storm",
)
_TOKEN = re.compile(r"[A-Za-z]+|\d|[^\w\s]")


def length(text: str) -> int:
    """Words, digits and signs of ``text``: about its number of tokens."""
    return len(_TOKEN.findall(text))


def texts(count: int, shortest: int, longest: int, facts: tuple[int, int], seed: int, split: str) -> list[Task]:
    """``count`` texts of about ``shortest`` to ``longest`` tokens, evenly on a logarithmic scale, as tasks.

    ``facts``: fewest and most of a text; of a number below 100, a name of 20, and a code of a letter (of ten) and a digit.
    ``split``: of the examples, one for each fact.

    Raises ValueError for lengths or numbers of facts out of order.
    """
    if not 1 <= facts[0] <= facts[1] <= 3:
        raise ValueError(f"facts: expected 1 to 3, the fewest first, got {facts}")
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest, longest: expected positive numbers, the smaller first, got {shortest}, {longest}")
    draw = random.Random(f"needle {split} {seed}")
    return [_text(draw, f"needle-{split}-{seed}-{i:05}", shortest, longest, facts, split) for i in range(count)]


def _text(draw: random.Random, name: str, shortest: int, longest: int, facts: tuple[int, int], split: str) -> Task:
    values = {
        "number": str(draw.randint(10, 99)),
        "name": draw.choice(NAMES),
        "code": draw.choice(LETTERS) + draw.choice(string.digits),
    }
    held = draw.sample(sorted(values), draw.randint(*facts))
    wanted = shortest * (longest / shortest) ** draw.random()
    others: list[str] = []
    about = [f"The {kind} is {values[kind]}." for kind in held]
    while length(" ".join(about + others)) < wanted - 5:  # half a sentence
        others.append(" ".join(draw.choice(part.split("|")) for part in _PARTS) + ".")
    for fact in about:
        others.insert(draw.randint(0, len(others)), fact)
    examples = tuple(Example(f"What is the {kind}?", (values[kind],), split) for kind in held)
    return Task(name, (" ".join(others),), examples)
