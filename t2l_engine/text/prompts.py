"""Prompts: a description, worked examples and an input as text for the language model; files of worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, one_of, short_repr
from t2l_engine.files.text import is_unicode, read_rows

#: Prompt templates, the values of ``prompt_form``: the tokenizer's chat template (:func:`chat_prompt`), or plain text
#: (:func:`raw_prompt`).
PROMPT_FORMS = CHAT, RAW = "chat", "raw"
#: Between worked examples of raw prompts: a base model that goes on after its answer writes the next one.
NEXT_EXAMPLE = "\n\nInput:"
#: How a raw prompt ends.
_LAST = "Output:"
#: A fixed date for chat templates that print today's.  Llama 3's takes it as a variable; others call ``strftime_now``, which
#: the template then defines, since transformers does not pass functions.
_DATE = "26 Jul 2024"
_CALLED, _DATED = "strftime_now(", f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}"


def check_prompt_form(prompt_form: Any, *where: object) -> str:
    """``prompt_form``; ConfigError, prefixed by ``where``, unless it is one of :data:`PROMPT_FORMS`."""
    one_of(": ".join(map(str, (*where, "prompt_form"))), prompt_form, PROMPT_FORMS)
    return prompt_form


def prompt_of(prompt_form: str, tokenizer, text: str, description: str = "", shots: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt for ``text`` by :func:`chat_prompt` ("chat") or :func:`raw_prompt` ("raw").

    Raises ConfigError for another ``prompt_form``.
    """
    if check_prompt_form(prompt_form) == RAW:
        return raw_prompt(description, text, shots)
    return chat_prompt(tokenizer, text, description, shots)


def answer_of(prompt_form: str, text: str) -> str:
    """``text`` as the continuation of a prompt: "raw" needs a space after "Output:", which tokenizers join to the word."""
    return f" {text}" if prompt_form == RAW else text


def answer_in(prompt_form: str, text: str) -> str:
    """The answer in generated ``text``, which :func:`answer_of` undoes: without the space that raw prompts are followed by.

    Nothing tells a base model that reads a raw prompt to stop after its answer.
    """
    return text.split(NEXT_EXAMPLE)[0].removeprefix(" ") if prompt_form == RAW else text


def continuation(tokenizer, prompt: str, ids: Sequence[int]) -> str:
    """The text of generated ``ids``, without special tokens; of raw prompts exactly as it goes on, a first space included.

    Alone, the tokenizers of Llama 2 and Mistral drop the space of a first token, others keep it: of a program that is one
    level of indentation.
    """
    if not prompt.endswith(_LAST):
        return tokenizer.decode(ids, skip_special_tokens=True)
    before = tokenizer(_LAST, add_special_tokens=False)["input_ids"]
    own, whole = (tokenizer.decode(all_ids, skip_special_tokens=True) for all_ids in (before, [*before, *ids]))
    return whole.removeprefix(own)


def answer_ids(tokenizer, answer: str) -> list[int]:
    """Token ids of ``answer``, of :func:`answer_of`, where it goes on after a prompt.

    Those of raw prompts are read after their last word: alone, a text that begins with a space has one more before it with
    the tokenizers of Llama 2 and Mistral, which put a space before every text.
    """
    if answer.startswith(" "):
        before, whole = tokenizer([_LAST, _LAST + answer], add_special_tokens=False)["input_ids"]
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def has_chat(tokenizer) -> bool:
    """Whether ``tokenizer`` has a chat template; tokenizers of base models often have none."""
    return getattr(tokenizer, "chat_template", "") is not None  # one without the attribute needs no template


def chat_prompt(tokenizer, text: str, description: str = "", shots: Sequence[tuple[str, str]] = ()) -> str:
    """``text`` as a user turn in the tokenizer's chat template, with the generation prompt.

    ``description``: put before the first user turn's text; ``shots``: worked examples (input, answer), each a user and an
    assistant turn before ``text``.  Where the template knows ``enable_thinking`` (Qwen3, SmolLM3), it is
    false.

    Raises ConfigError for a tokenizer without a chat template.
    """
    if not has_chat(tokenizer):
        raise ConfigError("prompt_form: expected 'raw', for the tokenizer has no chat template, got 'chat'")
    turns = []
    for x, y in shots:
        turns += [{"role": "user", "content": x}, {"role": "assistant", "content": y}]
    turns.append({"role": "user", "content": text})
    if description:
        turns[0] = {"role": "user", "content": f"{description}\n\n{turns[0]['content']}"}
    own = getattr(tokenizer, "chat_template", "")
    dated = {"chat_template": _DATED + own} if isinstance(own, str) and _CALLED in own else {}
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, date_string=_DATE, enable_thinking=False, **dated
    )


def worked_example(text: str, answer: str) -> str:
    """An input with its answer, as raw prompts show it."""
    return f"Input: {text}\n{_LAST} {answer}"


def raw_prompt(description: str, text: str, shots: Sequence[tuple[str, str]] = ()) -> str:
    """Description (unless empty), worked examples (input, answer) and input as plain text, ending with "Output:"."""
    examples = "".join(f"{worked_example(x, y)}\n\n" for x, y in shots)
    return (f"{description}\n\n" if description else "") + f"{examples}Input: {text}\n{_LAST}"


def prompt_ids(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each of ``prompts``.

    They begin with the token that ``tokenizer`` puts before a text (``bos_token`` of Llama, Gemma and Mistral; others have
    none), which chat templates write themselves.
    """
    if not prompts:  # tokenizers raise IndexError
        return []
    found = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    first = tokenizer("a")["input_ids"][:1]
    begins = first if first == [getattr(tokenizer, "bos_token_id", None)] else []
    return [ids if ids[:1] == begins else begins + ids for ids in found]


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """(input, answer) of each line of a JSON Lines file.

    A line is ``{"input": text, "output": text}``; of a list of accepted answers, as task folders have, the first is taken.
    Other keys are ignored, and the same line twice is one example.

    Raises FileNotFoundError for a missing file, IsADirectoryError for a folder, ConfigError naming file and line for
    anything else, and for no example.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file of JSON Lines, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found")
    found = {}
    for where, row in read_rows(path):
        outputs = row.get("output")
        pair = row.get("input"), outputs[0] if isinstance(outputs, list) and outputs else outputs
        for key, value in zip(("input", "output"), pair, strict=True):
            if not isinstance(value, str) or not value.strip() or not is_unicode(value):
                raise ConfigError(f"{where}: {key}: expected a non-empty text, got {short_repr(row.get(key))}")
        found[pair] = None
    if not found:
        raise ConfigError(f"{path}: expected at least one example, got none")
    return list(found)  # pyright: ignore[reportReturnType]  # pairs of strings, as checked
