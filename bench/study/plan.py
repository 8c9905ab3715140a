"""What the study trains, as ``plan.yaml`` says it: names, settings and tasks of its runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings, SFTSettings

_FILE = Path(__file__).with_name("plan.yaml")
_PLAN: dict[str, Any] = read_yaml(_FILE)
_KINDS = {"sft": SFTSettings, "lora": LoRASettings, "reconstruction": ReconstructionSettings}
MANIFEST, MODEL = _PLAN["manifest"], _PLAN["model"]
SHORT_ANSWER, LEAST_ORACLE = _PLAN["short_answer"], _PLAN["least_oracle"]
LEARNABLE, COUNTS, LENGTHS = (tuple(_PLAN[name]) for name in ("learnable", "counts", "lengths"))


@dataclasses.dataclass(frozen=True)
class Run:
    """``tier`` of the tasks and how many of them, None for all; a reconstruction reads the library of tier train."""

    settings: SFTSettings | LoRASettings | ReconstructionSettings
    count: int | None
    tier: str


def _run(name: str) -> Run:
    fields = dict(_PLAN["runs"][name])
    while like := fields.pop("like", None):
        fields = _PLAN["settings"][like] | fields
    kind, tier, count = _KINDS[fields.pop("kind")], fields.pop("tier", "train"), fields.pop("tasks", None)
    if kind is not ReconstructionSettings:
        fields |= {"base_model": MODEL, "target_modules": ("q_proj", "v_proj")}
    made = settings.build(kind, fields, source=f"{_FILE}: {name}")
    return Run(made, len(LEARNABLE) if count == "learnable" else count, tier)


RUNS = {name: _run(name) for name in _PLAN["runs"]}


def chosen(names: Sequence[str], count: int | None) -> list[str]:
    """``count`` of the tasks ``names``, those of LEARNABLE first, then by hash: 16 are among the 32, and so on."""
    ordered = sorted(names, key=lambda name: (name not in LEARNABLE, hashlib.sha256(name.encode()).digest()))
    return sorted(ordered[:count])
