"""LoRA training without a hypernetwork: one adapter per task, many tasks in one batch, or one adapter for all tasks.

With an adapter per task, the tasks of a batch are independent up to rounding and dropout: losses, gradient clipping and
optimiser act per adapter.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
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
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, read_json
from t2l_engine.files.weights import expect_none, write_text
from t2l_engine.hypernetwork.config import resolve_scaling, same_scaling
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task
from t2l_engine.research.training import loop
from t2l_engine.research.training.context import Modules, TrainingContext
from t2l_engine.research.training.objective import Batch
from t2l_engine.research.training.runs import ADAPTERS, LAST, MULTI_TASK, RECORD, WAVES
from t2l_engine.research.training.sampling import Group, Shard, trained_descriptions
from t2l_engine.research.training.settings import LoRASettings
from t2l_engine.text.packaged import hub_name


class LoRABank(nn.Module):
    """``count`` adapters as parameters, ``lora_A.<module> [count, layers, r, in]`` and ``lora_B.<module> [.., out, r]``.

    A is initialised as in PEFT (Kaiming uniform, ±1/sqrt(in)) with one draw per module, shared by all layers and adapters as
    in Bias-HyperInit: averaging and reconstruction need it, since from different draws equal products B A have factors that
    differ by a rotation.  B is initialised to zero.
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

    @torch.no_grad()
    def start_from(self, folder: Path, names: Sequence[str]) -> str:
        """Copy the adapter in PEFT folder ``folder``, or for each of ``names`` that in the folder of its name.

        Returns the SHA-256 of their weights.

        Raises FileNotFoundError for a missing one, ConfigError if rank, scaling, modules or layers are not the bank's.
        """
        single, wanted = (folder / "adapter_config.json").is_file(), _shapes(self())
        for i, name in enumerate(names):
            path = folder if single else folder / name
            stack = AdapterStack.from_peft(path)
            got, scaling = _shapes(stack), float(stack.scaling[0])
            if got != wanted or not same_scaling(scaling, self._scaling):
                raise ConfigError(
                    f"initial: {path}: expected the shapes of A and B and the scaling of this run, {wanted} and "
                    f"{self._scaling}, got {got} and {scaling}"
                )
            modules = {at: module for module, at in stack.paths.items()}
            for module, at in self._paths.items():
                self.lora_A[module][i] = stack.lora_A[modules[at]][0].float()
                self.lora_B[module][i] = stack.lora_B[modules[at]][0].float()
        weights = hashlib.sha256()
        for tensor in itertools.chain(self.lora_A.values(), self.lora_B.values()):
            weights.update(tensor.detach().numpy().tobytes())
        return weights.hexdigest()

    def forward(self) -> AdapterStack:
        A, B = dict(self.lora_A.items()), dict(self.lora_B.items())
        first = next(iter(A.values()))
        return AdapterStack(A, B, torch.full((len(first),), self._scaling, device=first.device), paths=self._paths)


def _shapes(stack: AdapterStack) -> dict[str, list[list[int]]]:
    """Of A and B of one adapter, by path."""
    return {at: [list(side[name].shape[1:]) for side in (stack.lora_A, stack.lora_B)] for name, at in stack.paths.items()}


class LoRA(loop.Job):
    """Training of the adapters of ``tasks`` (indices into ``context.tasks``), or of one for all.

    ``names``: of the adapters, in their order in the bank; ``folder``: of the PEFT folders.
    """

    def __init__(self, settings: LoRASettings, context: TrainingContext, tasks: Sequence[int], folder: Path):
        super().__init__()
        self.settings, self._context, self._tasks, self.folder = settings, context, list(tasks), folder
        self._shared = settings.mode == MULTI_TASK  # one adapter for all tasks
        self.names = [MULTI_TASK] if self._shared else [context.tasks[i].name for i in self._tasks]
        self.unit = 1 / len(self.names)  # the log says the mean over adapters
        self._descriptions = trained_descriptions(context.tasks, settings.held_out_descriptions)
        validated = [bool(context.validation.kept[i]) for i in self._tasks]
        self._validated = [any(validated)] if self._shared else validated  # by adapter: whether validation selects it
        scaling = resolve_scaling(settings.scaling, settings.lora_alpha, settings.rank)
        self.model = LoRABank(context.modules, len(self.names), settings.rank, scaling, settings.seed)
        self._initial = self.model.start_from(Path(settings.initial), self.names) if settings.initial else ""
        self.model.to(context.device)
        self.stream = context.stream(self._tasks, self._descriptions, every=not self._shared)
        with torch.no_grad():
            context.attach(self.model()[0])

    def _adapter(self, group: Group) -> int:
        return 0 if self._shared else self._tasks.index(group.task)

    def collate(self, groups: Sequence[Group], of_step: Sequence[Group]) -> Batch:
        return self._context.collate(groups, of_step, self._adapter, per_task=not self._shared)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._context.losses(batch, model()).sum()

    def clip(self, limit: float) -> Tensor:
        """Clip the gradient of each adapter by its own norm; returns the largest norm."""
        grads = [p.grad for p in self.model.parameters()]
        norms = sum(g.flatten(1).square().sum(dim=1) for g in grads).sqrt()
        if limit:
            factors = (limit / (norms + 1e-6)).clamp_max(1.0)
            for grad in grads:
                grad.mul_(factors.view(-1, 1, 1, 1))
        return norms.max()

    def validate(self, shard: Shard) -> dict[str, float]:
        stack = self.model()
        return self._context.validate(shard, self._descriptions, lambda groups: stack, self._adapter, self._tasks)

    def improved(self, losses: dict[str, float], step: int) -> bool:
        better = []
        if self._shared:
            better = [0] if super().improved(losses, step) else []
        for i, name in enumerate(() if self._shared else self.names):
            lowest, at = self.best.setdefault("losses", {}), self.best.setdefault("steps", {})
            # An adapter whose patience is over has ended, though others of its wave go on.
            ended = step - at.get(name, step) > (self.settings.patience * self.settings.validate_every or math.inf)
            if not ended and losses.get(name, math.nan) < lowest.get(name, math.inf) - self.settings.min_delta:
                better.append(i)
                lowest[name], at[name], self.best["step"] = losses[name], step, step
        saved = self.best.setdefault("adapters", {})
        for key, parameter in self.model.named_parameters():
            current = parameter.detach().cpu()
            saved.setdefault(key, current.clone())[better] = current[better]
        return bool(better)

    def write(self, folder: Path, step: int, *, best: bool) -> None:
        """PEFT folders below the run's own folder, not ``folder``: ``adapters/<name>``; adapters that validation selects are
        written there as of their best, and to ``last/<name>`` as of ``step``."""
        bank = self.model
        if best:
            bank = copy.deepcopy(bank)
            bank.load_state_dict(self.best["adapters"])
        with torch.no_grad():
            stack = bank().to("cpu")
        for i, name in enumerate(self.names):
            if self._validated[i] or not best:
                target = self.folder / (LAST if self._validated[i] and not best else ADAPTERS) / name
                stack.save_pretrained(target, adapter=i, base_model_name_or_path=hub_name(self.settings.base_model))

    def data(self) -> dict[str, Any]:
        return self._context.data(self._tasks, self._initial)

    def record(self) -> dict[str, Any]:
        """What the record of the finished wave says beside its settings."""
        data = self.data()
        return {"adapters": self.names, "data": data.pop("tasks"), **data}


def waves(settings: LoRASettings, context: TrainingContext) -> list[list[int]]:
    """Indices of the tasks of each wave: waves of nearly equal size, of tasks of similar length to reduce padding."""
    count = len(context.tasks)
    if settings.mode == MULTI_TASK:
        return [list(range(count))]
    order = sorted(range(count), key=lambda i: (context.train.mean_length(i), context.tasks[i].name))
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
    """Train one adapter per task, or one for all; resumes a run that was interrupted in ``output``.

    Tasks are trained in waves of ``tasks_per_batch * accumulation``, each for ``steps`` steps.  ``output`` gets

    - ``adapters/<task>/`` (or ``adapters/multi-task/``): PEFT folders, as of each adapter's best validation; with an adapter
      per task also ``descriptions.json``, which :func:`t2l_engine.research.training.reconstruction.train` reads;
    - ``last/``: the same as of the last step, if there is validation;
    - ``waves/<number>/``: settings, log, and the state until the wave is done (:mod:`t2l_engine.research.training.loop`).

    Arguments and errors as in :func:`t2l_engine.research.training.sft.train`.
    """
    accelerator, output = accelerator or loop.accelerator("cpu"), Path(output)
    context = TrainingContext(settings, Path(tasks_folder), accelerator.device, names)
    plan = waves(settings, context)
    if not (output / WAVES).is_dir():
        known = [MULTI_TASK] if settings.mode == MULTI_TASK else [task.name for task in context.tasks]
        expect_none(output / ADAPTERS, known, "but no run to go on with")
    for number, tasks in enumerate(plan):
        folder = output / WAVES / f"{number:03}"
        with contextlib.closing(context):
            job = LoRA(settings, context, tasks, output)
            if not _finished(folder, job):
                loop.run(job, folder, accelerator, f"wave {number + 1}/{len(plan)}")
                if accelerator.is_main_process:
                    _finish(folder, job, context.tasks)
    return output


def _finished(folder: Path, job: LoRA) -> bool:
    """Whether the wave in ``folder`` is done; ConfigError if the record there is of another run."""
    path = folder / RECORD
    if not path.is_file():
        return False
    theirs = read_json(path, MAX_DESCRIPTIONS_BYTES)
    loop.expect_same(path, job.settings, theirs.pop("settings", {}), job.record(), theirs)
    (folder / loop.STATE).unlink(missing_ok=True)  # of a run that was killed between the record and this
    return True


def _finish(folder: Path, job: LoRA, tasks: Sequence[Task]) -> None:
    """Write the wave's descriptions, then the record that marks it as done; remove its state."""
    if job.settings.mode == "per-task":
        path = job.folder / ADAPTERS / DESCRIPTIONS_NAME
        known = read_json(path, MAX_DESCRIPTIONS_BYTES) if path.is_file() else {}
        _write(path, known | {task.name: list(task.descriptions) for task in tasks if task.name in job.names})
    _write(folder / RECORD, {"settings": job.settings.model_dump(mode="json"), **job.record()})
    (folder / loop.STATE).unlink()


def _write(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
