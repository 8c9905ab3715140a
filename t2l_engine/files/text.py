"""Reads JSON, JSON Lines and dataclasses from files, strictly and within bounds.

An unknown, missing or duplicate field raises a ``ConfigError`` that names it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from t2l_engine.files.errors import MAX_CONFIG_BYTES, ConfigError, short_repr

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
MAX_LINE_BYTES = 1 << 20
#: Of a file with the descriptions of many tasks: about five times the paper's 479 tasks with 128 descriptions each.
MAX_DESCRIPTIONS_BYTES = 1 << 25
#: Values in a JSON file of texts: two bytes of JSON can become a value of 80 bytes in memory.
MAX_VALUES = 1 << 20
_VALUES = re.compile(rb'"[^"]*"?|[\[{,]')  # in JSON without escapes: strings, and the characters before a value
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """Whether ``text`` has no lone surrogates, which Python makes of bytes that are not UTF-8 and tokenizers refuse."""
    return not _SURROGATE.search(text)


def headline(text: str, most: int = 200) -> str:
    """``text`` in one line, of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


def to_json(config: DataclassInstance) -> dict[str, Any]:
    """``config`` as plain JSON values."""
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
    """The first ``count`` bytes of ``path``, or fewer; raises ``error`` naming a file that cannot be read.

    Raises FileNotFoundError for a missing file.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None


def read_text(path: Path, most: int = MAX_CONFIG_BYTES) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes.

    Raises FileNotFoundError for a missing file, ConfigError for one that is larger, not UTF-8 or unreadable.
    """
    content = read_start(path, most + 1, ConfigError)  # not st_size: it is 0 for pipes and /proc
    if len(content) > most:
        raise ConfigError(f"{path}: expected at most {most} bytes, got more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for ``json`` that raises ValueError for duplicate keys, which would be ambiguous."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def read_json(path: Path, most: int = MAX_CONFIG_BYTES) -> Any:
    """Parse the JSON file ``path``.

    ConfigError names a file that is not JSON, nested too deeply, or has more than ``most`` bytes or MAX_VALUES values
    (a text counts twice).
    """
    text = read_text(path, most)
    if count_values(text.encode()) > MAX_VALUES:
        raise ConfigError(f"{path}: expected JSON of at most {MAX_VALUES} values, got more")
    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def count_values(content: bytes) -> int:
    """Number of values in JSON ``content``, at most MAX_VALUES + 1."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(1 for _ in itertools.islice(_VALUES.finditer(plain), MAX_VALUES + 1))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("path:line", object)`` for every line of a JSON Lines file; blank lines are skipped.

    Raises OSError if the file cannot be read, ConfigError naming a line that is too long or not a JSON object.
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
