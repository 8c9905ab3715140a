"""Checked access to the fields of JSON objects in files that are not trusted."""

from __future__ import annotations

from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import is_unicode


class Row:
    """A JSON object; ConfigError names place and field where a field is missing or of another type."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where, self.values = where, values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def fault(self, name: str, expected: str) -> ConfigError:
        """The error for a field that is not as ``expected``."""
        found = f"got {short_repr(self.values[name])}" if name in self.values else "found none"
        return ConfigError(f"{self.where}: {name}: expected {expected}, {found}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string; ``default`` (if any) where the field is absent."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or not is_unicode(value):
            raise self.fault(name, "a string of Unicode text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) and is_unicode(value) for value in values):
            raise self.fault(name, "a list of strings of Unicode text")
        return tuple(values)

    def one_or_more(self, name: str, limit: int) -> tuple[str, ...]:
        """A string or a list of strings, of at most ``limit`` characters and strings in all; none where it is absent."""
        values = self.values.get(name, [])
        values = [values] if isinstance(values, str) else values
        valid = isinstance(values, list) and all(isinstance(value, str) for value in values)
        if valid and len(values) + sum(map(len, values)) > limit:
            raise self.fault(name, f"at most {limit} characters and texts")
        if not valid or not all(map(is_unicode, values)):
            raise self.fault(name, "a string or a list of strings of Unicode text")
        return tuple(values)

    def object(self, name: str) -> Row:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Row(f"{self.where}: {name}", value)

    def objects(self, name: str) -> list[Row]:
        """A list of objects."""
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.fault(name, "a list of objects")
        return [Row(f"{self.where}: {name}[{i}]", value) for i, value in enumerate(values)]
