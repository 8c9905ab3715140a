"""Prints a digest of the native sources: ``python source_digest.py [HEADER]``; with HEADER, writes it as ``T2L_SOURCES``.

A library says of which sources it was built (``t2l_engine._native.about()``), wherever it is carried.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def digest() -> str:
    found = hashlib.sha256()
    for path in sorted(p for folder in ("csrc", "cmake") for p in (ROOT / folder).rglob("*") if p.is_file()):
        if path.suffix != ".pyc":
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f'#define T2L_SOURCES "{digest()}"\n')
    else:
        print(digest())
