"""An adapter for a user's task: generated from a description and examples, then tuned on the examples."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.peft_write import check_place
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import TextToLoRA
from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.files.text import to_json
from t2l_engine.files.weights import expect_none, replacing
from t2l_engine.research.tasks.examples import input_digest, pool
from t2l_engine.research.tasks.folder import Example, Task, load_tasks, write_tasks
from t2l_engine.research.training import lora
from t2l_engine.research.training.runs import ADAPTERS, RUN, WAVES, read_log
from t2l_engine.research.training.settings import LoRASettings, build
from t2l_engine.text.encoder import WorkedExamples
from t2l_engine.text.packaged import hub_name

#: Name of the task and of its adapter, folder of the adapter as generated, name of the report.
NAME, START, REPORT = "adapted", "start", "adapt.json"
#: One example in HELD_OUT is held out, at most MOST_HELD_OUT.
HELD_OUT, MOST_HELD_OUT = 4, 64
#: Fewest examples: three to learn from, one held out.
FEWEST = 4
DEFAULTS: dict[str, Any] = {
    "steps": 200, "learning_rate": 1e-3, "warmup_steps": 5, "schedule": "constant", "save_every": 50,
    "tasks_per_batch": 1, "samples_per_task": 8, "max_tokens": 1024,
    "validate_every": 10, "validation_samples": MOST_HELD_OUT, "patience": 3, "min_delta": 1e-3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """The gain of tuning: mean loss of the held-out examples' answers before and after.

    ``examples``, ``held_out``: numbers of examples for training and held out, those above ``max_tokens`` included;
    ``read``: number of examples that the adapter was generated from; ``steps``: of the run; ``best_step``: the step that
    was kept (0: the generated adapter); ``seconds``: of training.
    """

    examples: int
    held_out: int
    read: int
    loss_before: float
    loss_after: float
    steps: int
    best_step: int
    seconds: float


def split(examples: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(examples to train on, examples held out), by the SHA-256 of their inputs.

    Inputs that differ in case and white space alone count once, the first of them.

    Raises ConfigError for fewer than FEWEST different inputs.
    """
    different = sorted(pool(Example(x, (y,), "train") for x, y in examples), key=input_digest)
    order = [(example.input, example.outputs[0]) for example in different]
    expect(len(order) >= FEWEST, "examples", f"at least {FEWEST} different inputs", len(order))
    count = min(max(1, len(order) // HELD_OUT), MOST_HELD_OUT)
    return order[count:], order[:count]


def settings_for(engine: TextToLoRA, base_model: str, start: Path, changes: Mapping[str, Any]) -> LoRASettings:
    """Settings that tune an adapter that ``engine`` generated; ``changes`` override DEFAULTS.

    Raises ConfigError for changes of what the adapter decides, or for ``patience`` 0, which would not validate the start.
    """
    config = engine.hypernetwork.config
    of_adapter = {
        "base_model": base_model, "target_modules": config.modules, "rank": config.rank, "lora_alpha": config.lora_alpha,
        "scaling": config.scaling, "prompt_form": engine.prompt_form,
        "prompt": "description" if engine.description_in_prompt else "input", "initial": str(start),
    }  # fmt: skip
    if fixed := sorted(changes.keys() & ({*of_adapter, "mode"} - {"prompt", "prompt_form"})):
        raise ConfigError(f"{fixed[0]}: expected no value, for the generated adapter decides it, got {changes[fixed[0]]!r}")
    settings = build(LoRASettings, DEFAULTS | of_adapter | dict(changes))
    wanted = "at least 1 to tune an adapter, whose start is then validated too"
    expect(settings.patience, "patience", wanted, settings.patience)
    return settings


def adapt(
    engine: TextToLoRA,
    base_model: str,
    description: str,
    examples: Sequence[tuple[str, str]],
    output: str | Path,
    /,
    **changes: Any,
) -> Report:
    """Write the PEFT folder ``output``: the adapter that ``engine`` generates, tuned on ``examples``.

    The held-out examples decide which step is kept and when to stop.  An encoder that reads examples gets as many of
    the others as it was trained with.  The same call resumes an interrupted run.

    Args:
        base_model: "smollm2-135m" or a local transformers folder.
        description: of the task.
        examples: (input, answer).
        output: also gets ``start/``, the adapter as generated, ``run/``, that of training, and the report, ``adapt.json``.
        changes: fields of :class:`LoRASettings`, instead of DEFAULTS.

    Raises:
        ConfigError: too few examples, or ``output`` has an adapter of other examples.
        FileExistsError: ``output`` has a model, or an adapter that no such call has written.
        Others: as :func:`t2l_engine.research.training.lora.train`.
    """
    output = Path(output)
    check_place(output)
    if not (output / START).is_dir():
        expect_none(output, [CONFIG_NAME], f"but no {START}/ of a run to go on with")
    trained, held_out = split(examples)
    read = trained[: engine.encoder.max_examples]
    shots: WorkedExamples = [read] if read else None
    stack = engine.generate([description], shots)
    rows = [Example(x, (y,), name) for name, pairs in (("train", trained), ("val", held_out)) for x, y in pairs]
    task, tasks = Task(NAME, (description,), tuple(rows)), output / RUN / "tasks"
    if not (output / START / CONFIG_NAME).is_file():  # written last, with the weights
        write_tasks(tasks, [task], overwrite=True)
        stack.save_pretrained(output / START, adapter=0, base_model_name_or_path=hub_name(base_model))
    elif load_tasks(tasks, None) != [task] or not AdapterStack.from_peft(output / START).allclose(stack):
        raise ConfigError(
            f"{output}: has an adapter of another description, other examples or another checkpoint; choose another folder"
        )
    settings = settings_for(engine, base_model, output / START, changes)
    began = time.perf_counter()
    lora.train(settings, tasks, output / RUN)
    log = read_log(output / RUN / WAVES / "000")
    losses = {row["step"]: row["val_loss"] for row in log if "val_loss" in row}
    best = max(row["step"] for row in log if row.get("best"))  # what is kept: the lowest only if by min_delta
    report = Report(
        len(trained), len(held_out), len(read), loss_before=losses[0], loss_after=losses[best],
        steps=max(row["step"] for row in log), best_step=best, seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    tuned = output / RUN / ADAPTERS / NAME
    names = [path.name for path in sorted(tuned.iterdir()) if path.is_file()]
    with replacing(output, *names, REPORT) as temporary:
        for name in names:
            shutil.copy2(tuned / name, temporary / name)
        (temporary / REPORT).write_text(json.dumps(to_json(report), indent=1) + "\n", encoding="utf-8")
    return report
