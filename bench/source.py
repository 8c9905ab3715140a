"""What was measured: date and commit.  Standard library only, for suites that must run where the package does not load."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Bundled checkpoints, of which some results are.
BUNDLED, SPECS = "smollm2-135m", "smollm2-135m-specs"


def source() -> dict[str, Any]:
    """Date, commit and bundled checkpoint of the measured tree; without a history ``commit`` and ``dirty`` are None."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # Results themselves do not count: writing the first file would make the tree of the second dirty.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    date = datetime.date.today().isoformat()
    return {
        "date": date,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "checkpoint": bundled(),
    }


def bundled(name: str = BUNDLED) -> str:
    """SHA-256 of the weights of a bundled checkpoint."""
    return hashlib.sha256((ROOT / "t2l_engine" / "checkpoints" / name / "hypernet.safetensors").read_bytes()).hexdigest()
