"""Settings that the methods of an evaluation share; ``t2l evaluate`` has an option for each."""

from __future__ import annotations

import dataclasses
from typing import Any


def _field(default: Any, text: str, **bounds: float) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **bounds})


@dataclasses.dataclass(frozen=True)
class Settings:
    """How items are asked and which are left out; ``metadata`` of a field: its help text and its bounds."""

    repeats: int = _field(3, "Draws of description, few-shot examples and baselines.", min=1)
    max_new_tokens: int = _field(16, "Longest answer, in tokens.", min=1)
    max_long_tokens: int = _field(256, "Longest answer with reasoning to a number, or of code, in tokens.", min=1)
    max_prompt_tokens: int = _field(
        1024, "Leave out an item, for all methods, whose prompt is longer in any of them.", min=1
    )
    validation_items: int = _field(8, "Examples of split val per task that choose a method's prompt template.", min=1)
    run_code: bool = _field(False, "Run model-written Python in a sandbox (HumanEval, MBPP).")
    verify: bool = _field(False, "Check in one pass whether greedy decoding gives an accepted answer; scores only.")
    choose: bool = _field(False, "Of a task with few answers, judge the likeliest of them; adds calibration.")
