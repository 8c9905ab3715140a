"""What the study trains: names, settings and tasks of its runs.

The runs that are compared train on :data:`LEARNABLE`.  The library, and runs whose question is the number of tasks, draw on
all 90 permissively licensed tasks of tier train of the manifest ``skills``.  Runs of one example length see the same number
of examples; an example with the description in its prompt has almost twice the tokens, so those runs see fewer, and all runs
that are compared pass about the same tokens through the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings, SFTSettings

MANIFEST, MODEL = "skills", "smollm2-135m"
_BASE: dict[str, Any] = {"base_model": MODEL, "target_modules": ("q_proj", "v_proj")}
_SAVES: dict[str, Any] = {"validate_every": 0, "validation_samples": 4, "save_every": 250}
#: Optimiser steps: of T2L that is compared, of 32 examples each; of runs with the description in the prompt and of the
#: shorter ones that vary one thing, of 16 each.
STEPS, STEPS_DESCRIPTION, STEPS_SHORT = 1600, 1800, 600
#: Of the rival with the description in its prompts, for the share of its steps that the shorter runs are of T2L's.
_STEPS_FIFTH = STEPS_DESCRIPTION * 16 * STEPS_SHORT // (32 * STEPS)

#: Tokens of a task's answers on average that are short, and percent that its oracle must score on validation examples.
SHORT_ANSWER, LEAST_ORACLE = 4.5, 20
#: The tasks of tier train with short answers that their oracles learn (``headroom`` of the result).  What one adapter cannot
#: learn from 130 examples, the currencies of countries, teaches a hypernetwork little; long answers, of a third of the tasks
#: and half of all tokens, are not for exact match.
LEARNABLE = (
    "fv_adjective_v_verb_3", "fv_alphabetically_first_3", "fv_antonym", "fv_capitalize", "fv_capitalize_first_letter",
    "fv_capitalize_last_letter", "fv_choose_first_of_3", "fv_choose_last_of_3", "fv_color_v_animal_3",
    "fv_concept_v_object_3", "fv_fruit_v_animal_3", "fv_landmark_country", "fv_lowercase_first_letter",
    "fv_next_capital_letter", "fv_next_item", "fv_object_v_concept_3", "fv_person_instrument", "fv_person_occupation",
    "fv_person_sport", "fv_present_past", "fv_prev_item", "fv_sentiment", "fv_verb_v_adjective_3", "ii_antonyms",
    "ii_first_word_letter", "ii_sum", "ii_translation_en_es", "ii_translation_en_fr",
    "task082_babi_t1_single_supporting_fact_question_generation", "task1479_organization_entity_extraction_btc_corpus",
    "task1508_wordnet_antonyms", "task1581_eqasc-perturbed_answer_generation", "task1582_bless_hypernym_generation",
    "task382_hybridqa_answer_generation", "task388_torque_token_classification", "task647_answer_generation",
    "task899_freebase_qa_topic_generation",
)  # fmt: skip

ORACLE = LoRASettings(
    **_BASE, steps=50, warmup_steps=5, learning_rate=2e-3, samples_per_task=8, tasks_per_batch=4, accumulation=2,
    max_tokens=128, validate_every=25, validation_samples=16, save_every=25,
)  # fmt: skip
T2L = SFTSettings(
    **_BASE, **_SAVES, variant="L", latent_size=128, head_in_size=112, steps=STEPS, warmup_steps=60, learning_rate=3e-4,
    tasks_per_batch=32, prompt_form="raw", max_tokens=160, task_init="discriminant", embedding_noise=0.5,
    mix_descriptions=True,
)  # fmt: skip
MULTI_TASK = LoRASettings(
    **_BASE, **_SAVES, mode="multi-task", steps=2 * STEPS, warmup_steps=60, learning_rate=2e-3, tasks_per_batch=16,
    prompt_form="raw", max_tokens=320,
)  # fmt: skip
RECONSTRUCTION = ReconstructionSettings(
    target="z-score", task_init="discriminant", steps=1500, warmup_steps=50, learning_rate=2e-3, weight_decay=0.0,
    tasks_per_batch=8, latent_size=128, head_in_size=512, validate_every=500,
)  # fmt: skip
#: T2L and its rival with the description in the prompt at a part of their training, the full length last.
LENGTHS = (
    ("short-L", "fifth-multi-task-description"),
    ("half-t2l", "half-multi-task-description"),
    ("t2l", "multi-task-description"),
)
#: Adapters that are reconstructed, and tasks of the scaling runs beside those of LEARNABLE and all.
COUNTS = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Run:
    """``tier`` of the tasks and how many of them, None for all; ``learnable``: those of LEARNABLE.

    A reconstruction reads the library of tier train.
    """

    settings: SFTSettings | LoRASettings | ReconstructionSettings
    count: int | None = None
    tier: str = "train"
    learnable: bool = False


def _t2l(**changes: Any) -> SFTSettings:
    return SFTSettings(**{**T2L.model_dump(), **changes})


def _multi_task(**changes: Any) -> LoRASettings:
    return LoRASettings(**{**MULTI_TASK.model_dump(), **changes})


def _short(count: int | None = len(LEARNABLE), **changes: Any) -> Run:
    return Run(_t2l(steps=STEPS_SHORT, tasks_per_batch=16, **changes), count)


RUNS: dict[str, Run] = {
    "library-train": Run(ORACLE),
    "library-held-out": Run(ORACLE, tier="held-out"),
    "t2l": Run(T2L, learnable=True),
    "t2l-seed1": Run(_t2l(seed=1), learnable=True),
    "t2l-description": Run(
        _t2l(prompt="description", steps=STEPS_DESCRIPTION, tasks_per_batch=16, max_tokens=320), learnable=True
    ),
    "multi-task": Run(MULTI_TASK, learnable=True),
    "multi-task-description": Run(_multi_task(prompt="description", steps=STEPS_DESCRIPTION), learnable=True),
    "half-t2l": Run(_t2l(steps=STEPS // 2), learnable=True),
    "half-multi-task-description": Run(_multi_task(prompt="description", steps=STEPS_DESCRIPTION // 2), learnable=True),
    "fifth-multi-task-description": Run(_multi_task(prompt="description", steps=_STEPS_FIFTH), learnable=True),
    "short-L": _short(),
    **{f"short-L-{count}": _short(count) for count in COUNTS[1:]},
    "short-L-90": _short(None),
    "short-M": _short(variant="M"),
    "short-S": _short(variant="S-learnable"),
    "short-base-model": _short(encoder="base-model"),
    "short-one-hot": _short(encoder="one-hot", task_init="random", embedding_noise=0.0, mix_descriptions=False),
    "short-input": _short(condition="input", task_init="random", mix_descriptions=False),
    "short-random": _short(task_init="random"),
    "short-quiet": _short(embedding_noise=0.1),
    "short-chat": _short(prompt_form="chat"),
    **{f"reconstruction-{count}": Run(RECONSTRUCTION, count) for count in COUNTS},
}


def chosen(names: Sequence[str], count: int | None) -> list[str]:
    """``count`` of the tasks ``names``, those of LEARNABLE first, then by hash: 16 are among the 32, and so on."""
    ordered = sorted(names, key=lambda name: (name not in LEARNABLE, hashlib.sha256(name.encode()).digest()))
    return sorted(ordered[:count])
