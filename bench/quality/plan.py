"""What the study trains and judges: ``plan.yaml``, as runs with their settings."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from t2l_engine.files.yaml import read_yaml
from t2l_engine.research.evaluation.methods import OTHERS
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, SFTSettings

#: Kind of ``t2l train`` -> its settings.
KINDS = {"sft": SFTSettings, "lora": LoRASettings}
#: Parts of the result: a sample of the trained tasks, tasks for choosing settings, and those held out.
TRAINED, DEVELOPMENT, NATURAL = "trained", "development", "natural"
HELD_OUT = ("value", "combination", "out-of-family", NATURAL)
PARTS = (TRAINED, DEVELOPMENT, *HELD_OUT)
#: Runs: the default checkpoint, the same with another seed, the paper's network, and the multi-task LoRA that reads the
#: description in every prompt.
T2L, SECOND, PAPER, RIVAL = "t2l", "t2l-second", "paper", "multi-task"
#: Numbers of worked examples; methods without a number show the first.
SHOTS = (3, 6)
#: Methods of ``t2l evaluate``; MULTI_TASK is RIVAL's.
MULTI_TASK = "multi-task-description"
METHODS = (
    *(name + suffix for name in (T2L, SECOND) for suffix in ("", *OTHERS)),
    *("t2l-examples", PAPER, MULTI_TASK, "base-description", "icl", "icl-6"),
)
#: Method that another run than T2L answers -> the run.
RUN_OF = {PAPER: PAPER, MULTI_TASK: RIVAL} | {SECOND + suffix: SECOND for suffix in ("", *OTHERS)}


@dataclasses.dataclass(frozen=True)
class Run:
    """``kind``: of ``t2l train``."""

    kind: str
    settings: SFTSettings | LoRASettings


def _run(plan: Mapping[str, Any], name: str, where: str) -> Run:
    """``like`` names the shared settings that a run, or other shared ones, change; the base model is the same for all."""
    fields = dict(plan["runs"][name])
    while like := fields.pop("like", None):
        fields = plan["settings"][like] | fields
    kind = fields.pop("kind")
    return Run(kind, settings.build(KINDS[kind], fields | {"base_model": plan["model"]}, source=where))


FILE = Path(__file__).with_name("plan.yaml")
PLAN: dict[str, Any] = read_yaml(FILE)
RUNS = {name: _run(PLAN, name, f"{FILE}: {name}") for name in PLAN["runs"]}


def drawn(names: Iterable[str], count: int, seed: int) -> set[str]:
    """``count`` of ``names`` at random."""
    ordered = sorted(names)
    random.Random(seed).shuffle(ordered)
    return set(ordered[:count])
