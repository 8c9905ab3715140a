"""What runs leave in their folders: the log; how the adapters of ``t2l train lora`` are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_json
from t2l_engine.files.weights import write_text
from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.tasks.folder import read_descriptions
from t2l_engine.text.prompts import CHAT, check_prompt_form

ADAPTERS, LAST, WAVES, RECORD, MULTI_TASK = "adapters", "last", "waves", "done.json", "multi-task"
#: Folder of the run in that of an adapter of ``t2l adapt``.
RUN = "run"
#: Files in the folder of a run, or of a wave.
SETTINGS, LOG = "settings.yaml", "log.jsonl"
#: What a step counts, beside its loss.
COUNTS = ("examples", "tokens")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without an incomplete last line.

    Raises FileNotFoundError if there is no log, ConfigError for a line that is not an object with a step.
    """
    path = folder / LOG
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
    rows = [row for row in read_log(folder) if row["step"] <= step] if step and (folder / LOG).is_file() else []
    write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the log that :func:`rewind` started."""
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def speed(folder: Path) -> str:
    """Steps of a run and what passed through the model in a second of them, for people; only the steps if nothing did."""
    rows = [row for row in read_log(folder) if "loss" in row]
    seconds = sum(row["seconds"] for row in rows)
    rates = [f"{sum(row[name] for row in rows) / seconds:,.0f} {name}/s" for name in COUNTS if name in rows[0]]
    return f"{len(rows)} steps in {seconds:,.0f} s" + (f" ({', '.join(rates)})" if rates else "")


class Prompt(NamedTuple):
    """How adapters were trained to be asked: by which template, and whether the prompt has the task description."""

    form: str = CHAT
    described: bool = False


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in ``folder``; None if not even its first wave has finished."""
    path = folder / WAVES / "000" / RECORD
    if not path.is_file():
        return None
    record = read_json(path, MAX_DESCRIPTIONS_BYTES)
    settings = record.get("settings") if isinstance(record, dict) else None
    expect(isinstance(settings, dict), str(path), "an object with settings", record)
    return settings


def begun_with(folder: Path) -> dict[str, Any]:
    """The settings with which a run, or its first wave, was begun in ``folder``; empty if none was."""
    path = next((p for p in (folder / SETTINGS, folder / WAVES / "000" / SETTINGS) if p.is_file()), None)
    found = {} if path is None else read_yaml(path)
    expect(isinstance(found, dict), str(path), "settings", found)
    return found


def _stated(adapters: Path) -> dict[str, Any]:
    """The settings of the run that folder ``adapters`` belongs to, finished or not; else of the runs of its adapters.

    Empty if there are none.  Raises ConfigError for adapters whose runs had different prompts.
    """
    run = adapters.absolute().parent  # Path(".").parent would be "."
    found = settings_of(run) or begun_with(run)
    if not found:
        runs = {path.parent.name: made for path in sorted(adapters.glob(f"*/{RUN}")) if (made := settings_of(path))}
        stated = {name: (made.get("prompt_form"), made.get("prompt")) for name, made in runs.items()}
        expect(len(set(stated.values())) < 2, str(adapters), "adapters of one prompt_form and prompt", stated)
        found = next(iter(runs.values()), None)
    return found or {}


def prompt_of_run(adapters: Path) -> Prompt:
    """How to ask the adapters in folder ``adapters``, as stated by their run; ``Prompt()`` if nothing states it."""
    stated = _stated(adapters)
    return Prompt(check_prompt_form(stated.get("prompt_form", CHAT), adapters.parent), stated.get("prompt") == "description")


def descriptions_of(adapters: Path, held_out: int = 0) -> dict[str, list[str]]:
    """The descriptions of the adapters in folder ``adapters`` by name, without those that their run held out.

    ``held_out``: at least this many last ones are left out, but never the first.

    Raises FileNotFoundError if the folder has none.
    """
    own = _stated(adapters).get("held_out_descriptions", 0)
    known = read_descriptions(adapters)
    return {name: texts[: len(texts) - own][: max(1, len(texts) - held_out)] for name, texts in known.items()}
