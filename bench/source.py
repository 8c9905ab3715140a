"""What was measured: date and commit.  Standard library only, for suites that must run where the package does not load."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def source() -> dict[str, Any]:
    """Date, and commit of the tree that is measured; commit and whether it is dirty are None without a history."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # Results themselves do not count: writing the first file would make the tree of the second dirty.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    date = datetime.date.today().isoformat()
    return {"date": date, "commit": git("rev-parse", "--short", "HEAD"), "dirty": None if changed is None else bool(changed)}
