"""Reading the run folders of ``t2l train lora``, without the packages that training itself needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def adapters_of(folder: Path) -> set[str]:
    """Names of the adapters of the waves in run folder ``folder`` that are done."""
    return {
        name
        for path in (folder / WAVES).glob(f"*/{RECORD}")
        for name in read_texts(path, MAX_DESCRIPTIONS_BYTES)["adapters"]
    }


def _stated(adapters: Path) -> dict[str, Any]:
    """The settings of the run that folder ``adapters`` belongs to, finished or not; else of the runs of its adapters.

    Empty if there are none.  Raises ConfigError for adapters whose runs had different prompts.
    """
    run = adapters.absolute().parent  # that of "." is no "."
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


def prompt_form_of(adapters: Path) -> str:
    """The prompt template of the adapters in folder ``adapters``, as stated by the run that it belongs to; default: chat."""
    return check_prompt_form(_stated(adapters).get("prompt_form", CHAT), adapters.parent)


def descriptions_of(adapters: Path, held_out: int = 0) -> dict[str, list[str]]:
    """The descriptions of the adapters in folder ``adapters`` by name, without those that their run held out.

    ``held_out``: so many last ones are left out anyway, but for the first.

    Raises FileNotFoundError where the folder has none.
    """
    own = _stated(adapters).get("held_out_descriptions", 0)
    kept = lambda texts: texts[: len(texts) - own][: max(1, len(texts) - held_out)]  # noqa: E731
    return {name: kept(texts) for name, texts in read_descriptions(adapters).items()}


def in_prompt_of(adapters: Path) -> bool:
    """Whether the adapters in folder ``adapters`` were trained with the description in the prompt."""
    return _stated(adapters).get("prompt") == "description"
