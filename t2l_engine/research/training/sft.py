"""Supervised fine-tuning of a hypernetwork through a frozen language model (paper section 3.2).

A step samples groups (a task, one of its descriptions, some examples), generates one adapter per group, applies it to the
group's rows and minimises the cross-entropy of the answers.  With ``condition`` "input" a group is one example, whose
adapter is generated from its input instead of the description.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2l_engine.files.errors import ConfigError, expect, short_repr
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.config import AnyConfig
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.hypernetwork.network import HyperNetwork, build
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.research.training import loop
from t2l_engine.research.training.context import TrainingContext
from t2l_engine.research.training.hypernetwork import HyperNetworkJob
from t2l_engine.research.training.objective import Batch, generated_l2
from t2l_engine.research.training.sampling import Examples, Group, Shard
from t2l_engine.research.training.settings import SFTSettings


class SFT(HyperNetworkJob):
    """Supervised fine-tuning of a hypernetwork; see :func:`train`."""

    settings: SFTSettings

    def __init__(self, settings: SFTSettings, context: TrainingContext):
        self._context, self._by_input = context, settings.condition == "input"
        if self._by_input:
            _check_inputs(context.train)
            _check_inputs(context.validation)
        super().__init__(settings, context.tasks, settings.base_model, context.device)
        self._initial = ""  # SHA-256 of the weights file that the run starts from
        self._before: set[str] = set()  # tasks that it was trained on
        sizes = {"rank": settings.rank, "lora_alpha": settings.lora_alpha, "scaling": settings.scaling}
        config = self._config(context.modules, **sizes)
        self.model = self._trained_before(config) if settings.initial else self._new(config, hyperinit=True)
        self.stream = context.stream(range(len(context.tasks)), self._conditions.train)
        with torch.no_grad():
            context.attach(self.model(self._conditions.clean(self.stream.step(0)[:1])))

    def _trained_before(self, config: AnyConfig) -> HyperNetwork | TokenHyperNetwork:
        """That of the checkpoint ``initial``; ConfigError if its configuration is not that of this run."""
        contents = checkpoint.read(resolve_checkpoint(self.settings.initial))
        for what, got, expected in (
            ("hypernetwork", _by_scaling(contents.config), _by_scaling(config)),
            ("encoder", contents.blocks.get("encoder") or {}, to_json(self._conditions.encoder_config)),
        ):
            # How many examples are read changes no parameter.
            other = {key for key in got.keys() | expected if got.get(key) != expected.get(key)} - {"max_examples"}
            differing, wanted = ({key: of[key] for key in sorted(other & of.keys())} for of in (got, expected))
            expect(not other, "initial", f"a checkpoint with the {what} {short_repr(wanted)} of this run", differing or None)
        self._initial = hashlib.sha256(contents.path.read_bytes()).hexdigest()
        self._before = checkpoint.trained_tasks(contents.blocks)
        # A published checkpoint may be in bfloat16, in which small updates would be lost.
        return build(contents).set_dtype(torch.float32).requires_grad_().to(self._device)

    def collate(self, groups: Sequence[Group], of_step: Sequence[Group]) -> Batch:
        return self._context.collate(groups, of_step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        stack = model(self._conditions.augmented(batch.groups))
        losses = self._context.losses(batch, stack).sum()
        weight = self.settings.generated_l2 * len(batch.groups) / self.settings.tasks_per_step
        return losses + weight * generated_l2(stack) if weight else losses

    def validate(self, shard: Shard) -> dict[str, float]:
        stack = lambda groups: self.model(self._conditions.clean(groups))  # noqa: E731
        return self._context.validate(shard, self._conditions.val, stack, one_sample=self._by_input)

    def write(self, folder: Path, step: int, *, best: bool) -> None:
        stated = {"method": "sft", "initial": self._initial, **self._context.stated()}  # no path of this machine
        if before := sorted(self._before - {task.name for task in self._context.tasks}):
            stated["tasks_before"] = before
        self._write(self.model, folder, step, **stated)

    def data(self) -> dict[str, Any]:
        return self._context.data(initial=self._initial)


def _by_scaling(config: AnyConfig) -> dict[str, Any]:
    """``config`` with the LoRA scaling as a number, whatever it is made of; as a library's, which is float32."""
    return to_json(config) | {"lora_alpha": None, "scaling": float(f"{config.scaling_value:.6g}")}


def _check_inputs(examples: Examples) -> None:
    """ConfigError if the input of a used example is blank and cannot be embedded."""
    for task, kept in zip(examples.tasks, examples.kept, strict=True):
        if not all(task.examples[i].input.strip() for i in kept):
            raise ConfigError(
                f"condition: expected inputs with text to generate adapters from, got an empty one in task {task.name}"
            )


def train(
    settings: SFTSettings,
    tasks_folder: str | Path,
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train a hypernetwork and write a native checkpoint to ``output``; resumes a run that was interrupted there.

    Args:
        settings: of the run.
        tasks_folder: a task folder (:mod:`t2l_engine.research.tasks.folder`) with splits "train" and, for validation, "val".
        output: gets the checkpoint as of the last step, ``best/`` as of the best validation, log and state
            (:mod:`t2l_engine.research.training.loop`).
        names: the tasks to train on; None: all of the folder.
        accelerator: from :func:`t2l_engine.research.training.loop.accelerator`; None: the CPU.

    Raises:
        ConfigError: settings, tasks and model do not fit together, or ``output`` holds another run.
        FileExistsError: ``output`` holds a model, or a checkpoint (lora: an adapter) that no run there has written.
        FloatingPointError: the loss is NaN or infinite; the last saved state is kept.
    """
    loop.check_output(Path(output))  # before everything is read
    accelerator = accelerator or loop.accelerator("cpu")
    with contextlib.closing(TrainingContext(settings, Path(tasks_folder), accelerator.device, names)) as context:
        return loop.run(SFT(settings, context), Path(output), accelerator)
