"""Reading the run folders of ``t2l train lora``, without the packages that training itself needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_texts
from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.tasks.folder import read_descriptions
from t2l_engine.text.prompts import CHAT, check_prompt_form

ADAPTERS, LAST, WAVES, RECORD, MULTI_TASK = "adapters", "last", "waves", "done.json", "multi-task"
#: Folder of the run in that of an adapter of ``t2l adapt``.
RUN = "run"
#: File of the settings in the folder of a run, or of a wave.
SETTINGS = "settings.yaml"


class Prompt(NamedTuple):
    """How adapters were trained to be asked: by which template, and whether the prompt has the task description."""

    form: str = CHAT
    described: bool = False


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in ``folder``; None if not even its first wave has finished."""
    path = folder / WAVES / "000" / RECORD
    if not path.is_file():
        return None
    record = read_texts(path, MAX_DESCRIPTIONS_BYTES)
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected an object with settings")
    return settings


def _stated(adapters: Path) -> dict[str, Any]:
    """The settings of the run that folder ``adapters`` belongs to, finished or not; else of the runs of its adapters.

    Empty if there are none.  Raises ConfigError for adapters whose runs had different prompts.
    """
    run = adapters.absolute().parent  # Path(".").parent would be "."
    unfinished = run / WAVES / "000" / SETTINGS
    found = settings_of(run)
    if found is None and unfinished.is_file():
        found = read_yaml(unfinished)
        if not isinstance(found, dict):
            raise ConfigError(f"{unfinished}: expected settings, got {short_repr(found)}")
    if found is None:
        runs = {path.parent.name: made for path in sorted(adapters.glob(f"*/{RUN}")) if (made := settings_of(path))}
        stated = {name: (made.get("prompt_form"), made.get("prompt")) for name, made in runs.items()}
        if len(set(stated.values())) > 1:
            raise ConfigError(f"{adapters}: expected adapters of one prompt_form and prompt, got {short_repr(stated)}")
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
