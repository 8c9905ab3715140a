"""The notes of a release: its part of CHANGELOG.md.  ``python docs/release_notes.py [VERSION]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """The package's, from its one place."""
    text = (ROOT / "t2l_engine" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.M)[1]


def notes(wanted: str) -> str:
    """What CHANGELOG.md says under ``## VERSION - DATE``; ValueError if it says nothing."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(wanted)} - (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None or not found[2].strip():
        raise ValueError(f"CHANGELOG.md: expected a part ## {wanted} - DATE with text, found none")
    return f"# t2l_engine {wanted} ({found[1]})\n\n{found[2].strip()}\n"


if __name__ == "__main__":
    print(notes(sys.argv[1] if len(sys.argv) > 1 else version()), end="")
