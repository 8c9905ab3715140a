"""The log of a run, ``log.jsonl``, and its plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.weights import write_text

NAME, PICTURE = "log.jsonl", "loss.png"
COUNTS = ("examples", "tokens")  # of a step


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without an incomplete last line.

    Raises FileNotFoundError if there is no log, ConfigError for a line that is not an object with a step.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the folder of a training run")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # after the last line break: nothing, or an incomplete row
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            raise ConfigError(f"{path}:{number}: expected a JSON object with a step") from None
        rows.append(row)
    return rows


def rewind(folder: Path, step: int) -> None:
    """Drop the rows of the log after ``step``, which a resumed run repeats; without a log, start one."""
    rows = [row for row in read_log(folder) if row["step"] <= step] if step and (folder / NAME).is_file() else []
    write_text(folder / NAME, "".join(json.dumps(row) + "\n" for row in rows))


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the log that :func:`rewind` started."""
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def speed(folder: Path) -> str:
    """Steps of a run and what passed through the model in a second of them, for people; only the steps if nothing did."""
    rows = [row for row in read_log(folder) if "loss" in row]
    seconds = sum(row["seconds"] for row in rows)
    rates = [f"{sum(row[name] for row in rows) / seconds:,.0f} {name}/s" for name in COUNTS if name in rows[0]]
    return f"{len(rows)} steps in {seconds:,.0f} s" + (f" ({', '.join(rates)})" if rates else "")


def plot(folder: Path) -> Path:
    """Plot loss and validation loss over steps to ``loss.png`` in ``folder``; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(folder)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    validations = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    if not losses:
        raise ConfigError(f"{folder / NAME}: expected at least one step, got none")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*losses.items(), strict=True), color="#b8c4d6", linewidth=0.8, label="loss of a step")
    window = len(losses) // 25
    if window > 1:
        values = list(losses.values())
        smooth = [statistics.fmean(values[max(0, i - window) : i]) for i in range(1, len(values) + 1)]
        axes.plot([*losses], smooth, color="#1f4e9c", linewidth=1.8, label=f"mean of the last {window}")
    if validations:
        style: dict[str, Any] = {"color": "#c8102e", "marker": "o", "markersize": 4, "label": "validation"}
        axes.plot(*zip(*validations.items(), strict=True), **style)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE
