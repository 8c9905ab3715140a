"""Plans of training runs: YAML files with ``model``, ``settings`` and ``runs``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings, SFTSettings

#: Kind of ``t2l train`` -> its settings; its module in research/training has the same name.
KINDS = {"sft": SFTSettings, "lora": LoRASettings, "reconstruction": ReconstructionSettings}
#: Kind -> the kinds of runs that it can start from.
STARTS = {"sft": ("sft", "reconstruction"), "lora": ("lora",)}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    ``kind``: of ``t2l train``; ``initial``: name of the run that it starts from, "": none; ``other``: its fields that are no
    settings.
    """

    kind: str
    settings: SFTSettings | LoRASettings | ReconstructionSettings
    initial: str
    other: Mapping[str, Any]


def read(file: Path, other: Sequence[str]) -> tuple[dict[str, Any], dict[str, Run]]:
    """The plan and its runs by name.

    A run is fields of its settings, beside ``like`` (the settings, by name, that it changes), ``kind``, ``initial`` and
    those named in ``other``; the base model and its q_proj and v_proj are the same for all.
    """
    plan = read_yaml(file)
    return plan, {name: _run(plan, name, f"{file}: {name}", other) for name in plan["runs"]}


def _fields(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    fields = dict(plan["runs"][name])
    while like := fields.pop("like", None):
        fields = plan["settings"][like] | fields
    return fields


def _run(plan: Mapping[str, Any], name: str, where: str, other: Sequence[str]) -> Run:
    fields = _fields(plan, name)
    kind, initial = fields.pop("kind"), fields.pop("initial", "")
    if initial and (initial not in plan["runs"] or _fields(plan, initial)["kind"] not in STARTS.get(kind, ())):
        raise ConfigError(f"{where}: initial: expected a run of the plan that {kind} can start from, got {initial!r}")
    beside = {field: fields.pop(field) for field in other if field in fields}
    if kind != "reconstruction":
        fields |= {"base_model": plan["model"], "target_modules": ("q_proj", "v_proj")}
    return Run(kind, settings.build(KINDS[kind], fields, source=where), initial, beside)
