"""How an input is shown to the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2l_engine.files.errors import ConfigError

#: How a prompt may show an input: a turn of the chat template (:func:`chat_prompt`), or plain text (:func:`raw_prompt`).
FORMS = CHAT, RAW = "chat", "raw"


def checked_form(form: Any, *where: object) -> str:
    """``form``; ConfigError, which begins with ``where``, unless it is one of :data:`FORMS`."""
    if form not in FORMS:
        told = ": ".join(map(str, (*where, "prompt_form")))
        raise ConfigError(f"{told}: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


def prompt_of(form: str, tokenizer, text: str, description: str = "", shots: Sequence[tuple[str, str]] = ()) -> str:
    """``text`` in one of :data:`FORMS`; ``description``, ``shots``: as in the functions of that form.

    Raises ConfigError for another form.
    """
    return (
        raw_prompt(description, text, shots)
        if checked_form(form) == RAW
        else chat_prompt(tokenizer, text, description, shots)
    )


def answer_of(form: str, text: str) -> str:
    """``text`` as it follows a prompt: after "Output:" a space, whose token is that of the word."""
    return f" {text}" if form == RAW else text


def has_chat(tokenizer) -> bool:
    """Whether ``tokenizer`` has a template for :func:`chat_prompt`: those of base models often have none."""
    return getattr(tokenizer, "chat_template", "") is not None  # without the attribute: one that needs no template


def chat_prompt(tokenizer, text: str, description: str = "", shots: Sequence[tuple[str, str]] = ()) -> str:
    """``text`` as a user's turn in the tokenizer's chat template, ready for the answer.

    ``description``: in front of the first turn; ``shots``: worked examples (input,
    answer), each a turn of the user and one of the assistant, before.

    Raises ConfigError for a tokenizer without a template.
    """
    if not has_chat(tokenizer):
        raise ConfigError("prompt_form: expected 'raw', for the tokenizer has no chat template, got 'chat'")
    turns = []
    for x, y in shots:
        turns += [{"role": "user", "content": x}, {"role": "assistant", "content": y}]
    turns.append({"role": "user", "content": text})
    if description:
        turns[0] = {"role": "user", "content": f"{description}\n\n{turns[0]['content']}"}
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def raw_prompt(description: str, text: str, shots: Sequence[tuple[str, str]] = ()) -> str:
    """Description, worked examples and input as plain text; the answer ends its line.

    An empty ``description`` is left out.
    """
    examples = "".join(f"Input: {x}\nOutput: {y}\n\n" for x, y in shots)
    return (f"{description}\n\n" if description else "") + f"{examples}Input: {text}\nOutput:"
