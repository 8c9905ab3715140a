"""What the study trains: names, settings and tasks of its runs.

The runs that are compared train on the same tasks: those of tier train of the manifest ``skills`` that are permissively
licensed and whose answers have at most SHORT_ANSWER characters on average, which exact match can judge.  Questions that
have many good answers (a third of the 90 tasks, half of all tokens) teach little that it sees.  The library and the runs
whose question is the number of tasks draw on all 90.  An example costs a run with the description in its prompt more
tokens; it has fewer steps for it, so that runs that are compared pass about the same tokens through the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from t2l_engine.training.settings import LoRASettings, ReconstructionSettings, SFTSettings

MANIFEST, MODEL = "skills", "smollm2-135m"
_BASE: dict[str, Any] = {"base_model": MODEL, "target_modules": ("q_proj", "v_proj")}
_SAVES: dict[str, Any] = {"validate_every": 0, "validation_samples": 4, "save_every": 250}
#: Steps of the runs that are compared with each other, and of the shorter ones that vary one thing.
STEPS, STEPS_DESCRIPTION, STEPS_SHORT = 4000, 2600, 1000

ORACLE = LoRASettings(
    **_BASE, steps=50, warmup_steps=5, learning_rate=2e-3, samples_per_task=8, tasks_per_batch=4, accumulation=2,
    max_tokens=128, validate_every=25, validation_samples=16, save_every=25,
)  # fmt: skip
T2L = SFTSettings(
    **_BASE, **_SAVES, variant="L", latent_size=128, head_in_size=112, steps=STEPS, warmup_steps=60, learning_rate=3e-4,
    tasks_per_batch=8, max_tokens=160, embedding_noise=0.1, mix_descriptions=True,
)  # fmt: skip
MULTI_TASK = LoRASettings(
    **_BASE, **_SAVES, mode="multi-task", steps=STEPS, warmup_steps=60, learning_rate=2e-3, tasks_per_batch=8, max_tokens=320
)  # fmt: skip
RECONSTRUCTION = ReconstructionSettings(
    target="z-score", steps=1500, warmup_steps=50, learning_rate=5e-4, weight_decay=0.0, tasks_per_batch=8, latent_size=128,
    head_in_size=512, validate_every=500,
)  # fmt: skip
#: Adapters that are reconstructed, and tasks of the scaling runs; None: all.
COUNTS = (8, 16, 32, 64)
#: Characters of a task's answers on average that are short.
SHORT_ANSWER = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """``tier`` of the tasks and how many of them, None for all; ``short_answers``: only those with such.

    A reconstruction reads the library of tier train.
    """

    settings: SFTSettings | LoRASettings | ReconstructionSettings
    count: int | None = None
    tier: str = "train"
    short_answers: bool = False


def _t2l(**changes: Any) -> SFTSettings:
    return SFTSettings(**{**T2L.model_dump(), **changes})


def _multi_task(**changes: Any) -> LoRASettings:
    return LoRASettings(**{**MULTI_TASK.model_dump(), **changes})


_SHORT = {"steps": STEPS_SHORT}
RUNS: dict[str, Run] = {
    "library-train": Run(ORACLE),
    "library-held-out": Run(ORACLE, tier="held-out"),
    "t2l": Run(T2L, short_answers=True),
    "t2l-seed1": Run(_t2l(seed=1), short_answers=True),
    "t2l-description": Run(_t2l(prompt="description", steps=STEPS_DESCRIPTION, max_tokens=320), short_answers=True),
    "multi-task": Run(MULTI_TASK, short_answers=True),
    "multi-task-description": Run(_multi_task(prompt="description", steps=STEPS_DESCRIPTION), short_answers=True),
    **{f"short-L-{count}": Run(_t2l(**_SHORT), count) for count in COUNTS[1:]},
    "short-L": Run(_t2l(**_SHORT)),
    "short-M": Run(_t2l(**_SHORT, variant="M")),
    "short-S": Run(_t2l(**_SHORT, variant="S-learnable")),
    "short-base-model": Run(_t2l(**_SHORT, encoder="base-model")),
    "short-one-hot": Run(_t2l(**_SHORT, encoder="one-hot", embedding_noise=0.0, mix_descriptions=False)),
    "short-input": Run(_t2l(**_SHORT, condition="input", mix_descriptions=False)),
    **{f"reconstruction-{count}": Run(RECONSTRUCTION, count) for count in COUNTS},
}


def chosen(names: Sequence[str], count: int | None) -> list[str]:
    """``count`` of the tasks ``names``, by hash: 16 are among the 32, and so on."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return sorted(ordered[:count])
