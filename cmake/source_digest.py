"""Prints a digest of the native sources: ``python source_digest.py [HEADER]``; with HEADER, writes it as ``T2L_SOURCES``.

Libraries hold it as text, ``t2l_sources:<digest>``, so that one that was built elsewhere can be told from a stale one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {".c", ".cpp", ".h", ".cu", ".cuh", ".map", ".cmake", ".in", ".txt", ".py"}


def digest() -> str:
    found = hashlib.sha256()
    paths = [ROOT / "CMakeLists.txt", *(p for folder in ("csrc", "cmake") for p in (ROOT / folder).rglob("*"))]
    for path in sorted(p for p in paths if p.suffix in KINDS and not p.name.startswith(".")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f'#define T2L_SOURCES "{digest()}"\n')
    else:
        print(digest())
