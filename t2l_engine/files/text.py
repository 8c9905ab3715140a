"""JSON, JSON Lines and dataclasses out of files: bounded, strict, nothing executed.

An unknown, missing or doubled field is a ``ConfigError`` that names it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from t2l_engine.files.errors import MAX_CONFIG_BYTES, ConfigError, short_repr

T = TypeVar("T")
MAX_LINE_BYTES = 1 << 20
#: Of a JSON file of texts: two bytes of it can be a value, which takes some 80 in memory.
MAX_VALUES = 1 << 20
_VALUES = re.compile(rb'"[^"]*"?|[\[{,]')  # of JSON without escapes: texts, and what a value follows
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """False where ``text`` holds lone surrogates, as Python reads bytes that are no UTF-8: no tokenizer takes them."""
    return not _SURROGATE.search(text)


def to_json(config: Any) -> dict[str, Any]:
    """``config`` (a dataclass instance) as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[T], values: Any, where: str) -> T:
    """Build ``cls`` from JSON ``values``; ``where`` names the source in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object for {cls.__name__}, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown field {short_repr(key)}; expected some of {sorted(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: missing field {name!r}")
    try:
        return cls(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def read_start(path: Path, count: int, error: type[ValueError]) -> bytes:
    """At most the first ``count`` bytes of ``path``; ``error`` names a file that cannot be read.

    Raises FileNotFoundError where there is none.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None


def read_text(path: Path, most: int = MAX_CONFIG_BYTES) -> str:
    """The UTF-8 text of a file of up to ``most`` bytes; a ``ConfigError`` names one that is larger, no text or unreadable.

    Raises FileNotFoundError where there is none.
    """
    content = read_start(path, most + 1, ConfigError)  # not the size it states: some files have none
    if len(content) > most:
        raise ConfigError(f"{path}: expected a configuration of at most {most} bytes, got more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of JSON that refuses doubled keys: which one counts would be a guess."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def read_json(path: Path) -> Any:
    """Parse the JSON file ``path``; a ``ConfigError`` names the file when it is no JSON, or is too large or too deep."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """As :func:`read_json`, of the text of ``path``."""
    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def read_texts(path: Path, most: int) -> Any:
    """Parse a JSON file of many texts; a ``ConfigError`` names one that is no JSON, too deep, or over ``most`` bytes.

    So does one of more than MAX_VALUES values (a text counts twice).
    """
    text = read_text(path, most)
    if count_values(text.encode()) > MAX_VALUES:
        raise ConfigError(f"{path}: expected JSON of at most {MAX_VALUES} values, got more")
    return parse_json(text, path)


def count_values(content: bytes) -> int:
    """The values of JSON, or MAX_VALUES + 1 where there are more."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(1 for _ in itertools.islice(_VALUES.finditer(plain), MAX_VALUES + 1))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with ``"path:line"``; blank lines are passed over.

    Raises OSError where it cannot be read, ConfigError naming a line that is too long or no JSON object.
    """
    with path.open("rb") as lines:
        for number in itertools.count(1):
            line = lines.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{where}: expected lines of at most {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=distinct)
            except (ValueError, RecursionError) as error:
                reason = f"{type(error).__name__}: {short_repr(str(error))}"
                raise ConfigError(f"{where}: expected a JSON object: {reason}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: expected a JSON object, got {short_repr(row)}")
            yield where, row
