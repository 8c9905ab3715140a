"""Checked access to the fields of JSON objects in files that are not trusted."""

from __future__ import annotations

from typing import Any

from t2l_engine.files.errors import ConfigError, expect, short_repr
from t2l_engine.files.text import is_unicode


def check_text(name: str, value: object) -> None:
    """ConfigError naming ``name`` unless ``value`` is a string that is not blank, without lone surrogates."""
    holds = isinstance(value, str) and value.strip() and is_unicode(value)
    expect(holds, name, "a non-empty string of Unicode text", value)


class Row:
    """A JSON object; ConfigError names place and field where a field is missing or of another type."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where, self.values = where, values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def expect(self, holds: object, name: str, expected: str) -> None:
        """ConfigError for the field ``name``, which is not as ``expected``, unless it ``holds``."""
        if not holds:
            found = f"got {short_repr(self.values[name])}" if name in self.values else "found none"
            raise ConfigError(f"{self.where}: {name}: expected {expected}, {found}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string; ``default`` (if any) where the field is absent."""
        value = self.values.get(name, default)
        self.expect(isinstance(value, str) and is_unicode(value), name, "a string of Unicode text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.values.get(name)
        valid = isinstance(values, list) and all(isinstance(value, str) and is_unicode(value) for value in values)
        self.expect(valid, name, "a list of strings of Unicode text")
        return tuple(values)

    def one_or_more(self, name: str, limit: int) -> tuple[str, ...]:
        """A string or a list of strings, of at most ``limit`` characters and strings in all; none where it is absent."""
        values = self.values.get(name, [])
        values = [values] if isinstance(values, str) else values
        valid = isinstance(values, list) and all(isinstance(value, str) for value in values)
        self.expect(not valid or len(values) + sum(map(len, values)) <= limit, name, f"at most {limit} characters and texts")
        self.expect(valid and all(map(is_unicode, values)), name, "a string or a list of strings of Unicode text")
        return tuple(values)

    def object(self, name: str) -> Row:
        value = self.values.get(name)
        self.expect(isinstance(value, dict), name, "an object")
        return Row(f"{self.where}: {name}", value)

    def objects(self, name: str) -> list[Row]:
        """A list of objects."""
        values = self.values.get(name)
        self.expect(isinstance(values, list) and all(isinstance(v, dict) for v in values), name, "a list of objects")
        return [Row(f"{self.where}: {name}[{i}]", value) for i, value in enumerate(values)]
