"""Adapters without a hypernetwork: one a task, many tasks in one batch, or one for all tasks.

All start from one draw of A, as adapters that are to be averaged or reconstructed must: A and B of unaligned ones may be
turned against each other.  With an adapter a task, what a task's adapter becomes does not depend, up to rounding and to
dropout, on the tasks that train beside it: losses, clipping and optimiser act on each alone.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json
from t2l_engine.files.weights import replacing
from t2l_engine.hypernetwork.config import resolve_scaling
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task
from t2l_engine.research.training import loop
from t2l_engine.research.training.context import Modules, TrainingContext
from t2l_engine.research.training.objective import Batch
from t2l_engine.research.training.runs import ADAPTERS, LAST, MULTI_TASK, RECORD, WAVES
from t2l_engine.research.training.sampling import Group, Shard, Stream, divide
from t2l_engine.research.training.settings import LoRASettings


class LoRABank(nn.Module):
    """``count`` adapters as parameters, ``lora_A.<module> [count, layers, r, in]`` and ``lora_B.<module> [.., out, r]``.

    A starts as PEFT's Kaiming-uniform draw, ±1/sqrt(in), one a module, the same for all layers and adapters, as
    Bias-HyperInit's: what a hypernetwork has to reproduce is what was learned.  B starts as zero.
    """

    def __init__(self, modules: Modules, count: int, rank: int, scaling: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._paths, self._scaling = dict(zip(modules.names, modules.paths, strict=True)), scaling
        for name, n_in, n_out in zip(modules.names, modules.in_features, modules.out_features, strict=True):
            draw = (torch.rand(rank, n_in, generator=generator) * 2 - 1) / math.sqrt(n_in)
            self.lora_A[name] = nn.Parameter(draw.repeat(count, modules.num_layers, 1, 1))
            self.lora_B[name] = nn.Parameter(torch.zeros(count, modules.num_layers, n_out, rank))

    def forward(self) -> AdapterStack:
        A, B = dict(self.lora_A.items()), dict(self.lora_B.items())
        first = next(iter(A.values()))
        return AdapterStack(A, B, torch.full((len(first),), self._scaling, device=first.device), paths=self._paths)


class LoRA(loop.Job):
    """The adapters of ``tasks`` (numbers in ``frozen``), or one for all; ``names`` of the adapters, in order."""

    def __init__(self, settings: LoRASettings, frozen: TrainingContext, tasks: Sequence[int], folder: Path):
        super().__init__()
        self.settings, self._frozen, self._tasks, self.folder = settings, frozen, list(tasks), folder
        self._shared = settings.mode == "multi-task"
        self.names = [MULTI_TASK] if self._shared else [frozen.tasks[i].name for i in self._tasks]
        validated = [bool(frozen.validation.kept(i)) for i in self._tasks]
        self._chosen = [any(validated)] if self._shared else validated  # adapters whose best a validation chooses
        scaling = resolve_scaling(settings.scaling, settings.lora_alpha, settings.rank)
        self.trained = LoRABank(frozen.modules, len(self.names), settings.rank, scaling, settings.seed).to(frozen.device)
        self._stream = Stream(
            len(self._tasks), settings.tasks_per_step if self._shared else len(self._tasks), settings.seed,
            self._group, lambda g: g.longest, settings.bucket_steps if self._shared else 1,
        )  # fmt: skip
        with torch.no_grad():
            first = self.trained()[0]
        self._objective = frozen.objective(first)

    def _group(self, task: int, visit: int) -> Group:
        s = self.settings
        return self._frozen.train.group(self._tasks[task], visit, s.samples_per_task, s.seed, self._descriptions)

    def _descriptions(self, task: int) -> range:
        return range(len(self._frozen.tasks[task].descriptions))

    def _adapter(self, number: int, group: Group) -> int:
        return 0 if self._shared else self._tasks.index(group.task)

    def batches(self, step: int, shard: Shard) -> Sequence[Batch]:
        groups = self._stream.step(step)
        parts = divide(groups, self.settings.tasks_per_batch, shard)
        return [self._frozen.collate(part, groups, self._adapter, per_task=not self._shared) for part in parts]

    def loss(self, trained: nn.Module, batch: Batch) -> Tensor:
        s = self.settings
        return self._objective.losses(
            batch, trained(), label_smoothing=s.label_smoothing, neftune_alpha=s.neftune_alpha, lora_dropout=s.lora_dropout
        ).sum()

    def reported(self, loss: float) -> float:
        return loss / len(self.names)  # one task's, or the mean of them

    def clip(self, limit: float) -> Tensor:
        """Each adapter's gradient alone; the largest norm."""
        grads = [p.grad for p in self.trained.parameters()]
        norms = sum(g.flatten(1).square().sum(dim=1) for g in grads).sqrt()
        if limit:
            factors = (limit / (norms + 1e-6)).clamp_max(1.0)
            for grad in grads:
                grad.mul_(factors.view(-1, 1, 1, 1))
        return norms.max()

    def validate(self, shard: Shard) -> dict[str, float]:
        stack = self.trained()
        return self._frozen.validate(
            self._objective, shard, self._descriptions, lambda groups: stack, self._adapter, self._tasks
        )

    def improved(self, losses: dict[str, float], step: int) -> bool:
        if self._shared:
            better = [0] if super().improved(losses, step) else []
        else:
            known = self.best.setdefault("losses", {})
            better = [i for i, name in enumerate(self.names) if losses.get(name, math.nan) < known.get(name, math.inf)]
            known.update({self.names[i]: losses[self.names[i]] for i in better})
        kept = self.best.setdefault("adapters", {})
        for key, parameter in self.trained.named_parameters():
            now = parameter.detach().cpu()
            kept.setdefault(key, now.clone())[better] = now[better]
        return bool(better)

    def write(self, folder: Path, step: int, *, best: bool) -> None:
        """PEFT folders ``adapters/<name>`` and, where validation chooses those, ``last/<name>``; not below ``folder``."""
        bank = self.trained
        if best:
            bank = copy.deepcopy(bank)
            bank.load_state_dict(self.best["adapters"])
        with torch.no_grad():
            stack = bank().to("cpu")
        for i, name in enumerate(self.names):
            if self._chosen[i] or not best:
                target = self.folder / (LAST if self._chosen[i] and not best else ADAPTERS) / name
                stack.save_pretrained(target, adapter=i, base_model_name_or_path=self.settings.base_model)

    def data(self) -> dict[str, Any]:
        return self._frozen.data(self._tasks)


def waves(settings: LoRASettings, frozen: TrainingContext) -> list[list[int]]:
    """Numbers of the tasks that train together: alike in length, so that little is padded, and alike in number."""
    count = len(frozen.tasks)
    if settings.mode == "multi-task":
        return [list(range(count))]
    order = sorted(range(count), key=lambda i: (frozen.train.mean_length(i), frozen.tasks[i].name))
    number = -(-count // settings.tasks_per_step)
    return [order[count * i // number : count * (i + 1) // number] for i in range(number)]


def train(
    settings: LoRASettings,
    tasks_folder: str | Path,
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train one adapter a task, or one for all; goes on where an earlier run in ``output`` stopped.

    Tasks are trained in waves of ``tasks_per_batch * accumulation``, each wave ``steps`` steps.  ``output`` gets

    - ``adapters/<task>/`` (or ``adapters/multi-task/``): PEFT folders, as of each adapter's best validation, and beside
      those of tasks ``descriptions.json``: what :func:`t2l_engine.research.training.reconstruction.train` reads;
    - ``last/``: the same as of the last step, where there is validation;
    - ``waves/<number>/``: settings, log, and state while it runs (:mod:`t2l_engine.research.training.loop`).

    Arguments and errors as in :func:`t2l_engine.research.training.sft.train`.
    """
    accelerator, output = accelerator or loop.accelerator("cpu"), Path(output)
    frozen = TrainingContext(settings, Path(tasks_folder), accelerator.device, names)
    plan = waves(settings, frozen)
    for number, tasks in enumerate(plan):
        folder = output / WAVES / f"{number:03}"
        try:
            job = LoRA(settings, frozen, tasks, output)
            if not _finished(folder, job):
                loop.run(job, folder, accelerator, f"wave {number + 1}/{len(plan)}")
                if accelerator.is_main_process:
                    _finish(folder, job, frozen.tasks)
        finally:
            frozen.close()
    return output


def _record(job: LoRA) -> dict[str, Any]:
    return {"settings": job.settings.model_dump(mode="json"), "adapters": job.names, "data": job.data()["tasks"]}


def _finished(folder: Path, job: LoRA) -> bool:
    """Whether the wave in ``folder`` is done; ConfigError where it was another one."""
    path = folder / RECORD
    if not path.is_file():
        return False
    if read_json(path) != json.loads(json.dumps(_record(job))):
        raise ConfigError(f"{path}: written by a run with other settings, tasks or examples; choose another output folder")
    return True


def _finish(folder: Path, job: LoRA, tasks: Sequence[Task]) -> None:
    """The record that says the wave is done comes last."""
    if job.settings.mode == "per-task":
        path = job.folder / ADAPTERS / DESCRIPTIONS_NAME
        known = read_json(path) if path.is_file() else {}
        _write(path, known | {task.name: list(task.descriptions) for task in tasks if task.name in job.names})
    _write(folder / RECORD, _record(job))
    (folder / loop.STATE).unlink()


def _write(path: Path, values: Any) -> None:
    with replacing(path.parent, path.name) as temporary:
        (temporary / path.name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
