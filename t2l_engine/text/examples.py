"""Reads a user's worked examples."""

from __future__ import annotations

from pathlib import Path

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import is_unicode, read_rows


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
