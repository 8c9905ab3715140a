"""The log of a run, ``log.jsonl``, and its plot."""

from __future__ import annotations

import json
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


class Log:
    """Appends rows to the log of ``folder``, first dropping rows after ``step``, which a resumed run repeats."""

    def __init__(self, folder: Path, step: int, enabled: bool = True):
        self._file = None
        if not enabled:
            return
        path = folder / NAME
        rows = [row for row in read_log(folder) if row["step"] <= step] if step and path.is_file() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *args: object) -> None:
        if self._file is not None:
            self._file.close()


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
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val_loss" in row]
    if not steps:
        raise ConfigError(f"{folder / NAME}: expected at least one step, got none")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [row["loss"] for row in steps]
    axes.plot([row["step"] for row in steps], losses, color="#b8c4d6", linewidth=0.8, label="loss of a step")
    window = max(1, len(losses) // 25)
    if window > 1:
        smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axes.plot([r["step"] for r in steps], smooth, color="#1f4e9c", linewidth=1.8, label=f"mean of the last {window}")
    if validations:
        axes.plot(
            [row["step"] for row in validations], [row["val_loss"] for row in validations],
            color="#c8102e", marker="o", markersize=4, label="validation",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path
