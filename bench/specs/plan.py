"""What the study trains and judges: ``plan.yaml``, as runs with their settings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, SFTSettings

#: Kind of ``t2l train`` -> its settings.
KINDS = {"sft": SFTSettings, "lora": LoRASettings}
#: Fields of a run that are no settings: tasks of MORE or FURTHER instead of TRAINED; how many; only those with two answers.
OTHER = ("more", "further", "tasks", "two_answers")
#: Parts of the result: a sample of the trained tasks, tasks kept for choosing settings, and by task split those held out.
TRAINED, DEVELOPMENT, HELD_OUT = "trained", "development", {"sibling": "in-family", "novel": "out-of-family"}
PARTS = (TRAINED, DEVELOPMENT, *HELD_OUT)
#: Trained on, too: more tasks; the same with further descriptions.
MORE, FURTHER = "more", "further"
#: Part of the result: trained tasks that have a per-task LoRA.
STORED = "stored"
#: Runs: the checkpoint, what it had learnt after as many tokens as the multi-task LoRA, that LoRA, and per-task LoRAs.
T2L, EVEN, RIVAL, LIBRARY = "t2l", "t2l-first", "multi-task-description", "library"
#: Numbers of worked examples; methods without a number show the first.
SHOTS = (3, 6)
METHODS = ("t2l", "t2l-shuffled", "t2l-examples", "t2l-examples-6", RIVAL, "nearest", "base-description", "icl", "icl-6")
STORED_METHODS = ("oracle", "t2l", "t2l-examples", RIVAL, "icl")


@dataclasses.dataclass(frozen=True)
class Run:
    """``kind``: of ``t2l train``; ``initial``: name of the run that it starts from, "": none; ``other``: fields of OTHER."""

    kind: str
    settings: SFTSettings | LoRASettings
    initial: str
    other: Mapping[str, Any]


def _run(plan: Mapping[str, Any], name: str, where: str) -> Run:
    """``like`` names the shared settings that a run changes; base model and target modules are the same for all."""
    fields = dict(plan["runs"][name])
    while like := fields.pop("like", None):
        fields = plan["settings"][like] | fields
    kind, initial = fields.pop("kind"), fields.pop("initial", "")
    if initial and initial not in plan["runs"]:
        raise ConfigError(f"{where}: initial: expected a run of the plan, got {initial!r}")
    other = {field: fields.pop(field) for field in OTHER if field in fields}
    fields |= {"base_model": plan["model"], "target_modules": ("q_proj", "v_proj")}
    return Run(kind, settings.build(KINDS[kind], fields, source=where), initial, other)


FILE = Path(__file__).with_name("plan.yaml")
PLAN: dict[str, Any] = read_yaml(FILE)
RUNS = {name: _run(PLAN, name, f"{FILE}: {name}") for name in PLAN["runs"]}


def ordered(names: Iterable[str], key: str) -> list[str]:
    """``names`` by a hash of them and ``key``."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


def drawn(names: Iterable[str], count: int | None, key: str) -> list[str]:
    """The first ``count`` of ``ordered`` (None: all), sorted."""
    return sorted(ordered(names, key)[:count])
