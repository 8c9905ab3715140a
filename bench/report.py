"""Writes the result tables of the README from ``bench/results``; ``--check`` fails where a table was edited by hand.

python -m bench.report [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
QUALITY = ROOT / "bench" / "results" / "smollm2-135m-quality.json"
ARMS = {
    "t2l": "T2L, input only",
    "t2l-shuffled": "T2L, another task's description",
    "base-raw": "base, description in prompt (raw)",
    "base-raw-3shot": "base, description + 3 examples",
    "base-chat": "base, description in chat",
}


def quality_table() -> str:
    """Tasks by gain over the base model's raw zero-shot prompt, trained tasks first."""
    result = json.loads(QUALITY.read_text(encoding="utf-8"))
    arms = [a for a in ARMS if a in result["mean"]]
    trained = set(result["trained_tasks"])
    rows = ["| task | " + " | ".join(ARMS[a] for a in arms) + " |", "|---|" + "---:|" * len(arms)]

    def line(name: str, scores: dict) -> str:
        return f"| {name} | " + " | ".join(f"{scores[a]:.1f}" for a in arms) + " |"

    for seen, title in ((True, "trained tasks"), (False, "tasks never trained on (siblings of trained skills)")):
        names = [n for n in result["tasks"] if (n in trained) == seen]
        if not names:
            continue
        names.sort(key=lambda n: result["tasks"][n]["base-raw"] - result["tasks"][n]["t2l"])
        mean = {a: sum(result["tasks"][n][a] for n in names) / len(names) for a in arms}
        rows.append(line(f"**mean of {len(names)} {title}**", mean))
        rows += [line(n, result["tasks"][n]) for n in names]
    items = sorted(set(result["items"].values()))
    span = str(items[0]) if len(items) == 1 else f"{items[0]} to {items[-1]}"
    rows.append("")
    rows.append(
        f"Exact match in percent on {span} held-out items a task, one unseen description each, greedy, scaling "
        f"{result['scaling']:g}, base model in {result['dtype']}; a standard error is up to 7 points. "
        f"From `{QUALITY.relative_to(ROOT)}`."
    )
    return "\n".join(rows)


TABLES = {"quality": quality_table}


def render(text: str) -> str:
    """``text`` with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(\n<!-- {name}: end -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{README.name}: markers of table {name!r} are missing")
        text = pattern.sub(lambda m, make=make: m.group(1) + make() + m.group(2), text)
    return text


def main() -> None:
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            raise SystemExit(f"{README.name}: a table differs from bench/results; run: python -m bench.report")
        return
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
