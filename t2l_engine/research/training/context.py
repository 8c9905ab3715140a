"""What a training run through the base model shares: the frozen model, its tasks, the objective, validation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.adapters.paths import DEFAULT_PATHS, LAYER, path_template
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.files.weights import content_checksum
from t2l_engine.lora.handle import attach
from t2l_engine.lora.locate import features, find
from t2l_engine.research.tasks.folder import Task, load_tasks
from t2l_engine.research.tasks.manifest import summary
from t2l_engine.research.training.objective import Adapter, Batch, Objective, collate, token_weights
from t2l_engine.research.training.sampling import Descriptions, Examples, Group, Shard, Stream
from t2l_engine.research.training.settings import LoRASettings, SFTSettings
from t2l_engine.text import base_model

#: Tasks whose digests a checkpoint states one by one; a configuration may have 1 MiB.
MANY_TASKS = 1000


@dataclasses.dataclass(frozen=True)
class Modules:
    """The adapted linears of a model, in the given order.

    ``paths``: with ``{layer}`` in place of the layer's index; ``in_features``, ``out_features``: per module.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]
    num_layers: int

    @property
    def own_paths(self) -> tuple[str, ...] | None:
        """``paths``, or None if all are Llama's default ones."""
        usual = all(DEFAULT_PATHS.get(name) == path for name, path in zip(self.names, self.paths, strict=True))
        return None if usual else self.paths


def locate(model: nn.Module, names: Sequence[str]) -> Modules:
    """The linears ``names`` of ``model``; ConfigError if one is missing in a layer or differs in shape between layers."""
    paths, sizes, depths = [], [], {}
    for name in names:
        expect(name.isidentifier(), "target_modules", "plain names of linears such as 'q_proj'", name)
        try:
            targets = find(model, name, DEFAULT_PATHS.get(name, f"{LAYER}.{name}"))
        except ValueError as error:
            raise ConfigError(f"target_modules: {name}: {type(model).__name__} has no such linear: {error}") from None
        found = set()
        for target in targets.values():
            n_in, n_out = features(target.linear) or (None, None)
            if n_in is None:
                raise ConfigError(f"target_modules: {name}: {type(target.linear).__name__} does not state its features")
            found.add((n_in, n_out if target.columns is None else target.columns[1] - target.columns[0]))
        expect(len(found) == 1, f"target_modules: {name}", "the same features in every layer", sorted(found))
        path = path_template(next(iter(targets.values())).path)
        paths.append(f"{path.rpartition('.')[0]}.{name}")  # a packed projection has another name
        sizes.append(found.pop())
        depths[name] = sorted(targets)
    num_layers = max(map(len, depths.values()))
    for name, layers in depths.items():
        if layers != list(range(num_layers)):
            raise ConfigError(f"target_modules: {name}: expected one in each of {num_layers} layers, got layers {layers}")
    return Modules(tuple(names), tuple(paths), *map(tuple, zip(*sizes, strict=True)), num_layers)


def _of_split(task: Task, split: str | None) -> Task:
    return dataclasses.replace(task, examples=tuple(e for e in task.examples if e.split == split))


class TrainingContext:
    """Base model, tokenised tasks and objective of a run; :meth:`close` restores the model.

    Training reads split "train" of the tasks ``names`` (None: all) in ``tasks_folder``, validation split "val".

    Raises ConfigError if settings and files do not fit together.
    """

    def __init__(
        self,
        settings: SFTSettings | LoRASettings,
        tasks_folder: Path,
        device: torch.device,
        names: Sequence[str] | None = None,
    ):
        self.settings, self._handle = settings, None
        loaded = load_tasks(tasks_folder, None, names=names)
        self._digests = summary(loaded)
        self.tasks = [_of_split(task, "train") for task in loaded]
        for task in self.tasks:
            if not task.examples:
                raise ConfigError(f"{tasks_folder}: expected examples of split 'train' of task {task.name}, got none")
        validation = [_of_split(task, "val" if settings.validate_every else None) for task in loaded]
        if settings.validate_every and not any(task.examples for task in validation):
            expected = f"0, since no task of {tasks_folder} has examples of split 'val'"
            raise ConfigError(f"validate_every: expected {expected}, got {settings.validate_every}")
        # On CPUs the backward pass of SDPA in bfloat16 is slower than eager attention at these lengths.
        attention = "eager" if device.type == "cpu" and settings.dtype == "bfloat16" else None
        dtype = getattr(torch, settings.dtype)
        self.model, self.tokenizer = base_model.load(settings.base_model, dtype, attention=attention)
        # A folder of the same name may hold other weights when the run is resumed.
        self._base = content_checksum(dict(self.model.named_parameters()))
        self.model.requires_grad_(False).to(device)
        self.device = device
        self.modules = locate(self.model, settings.target_modules)
        prompts = {"with_description": settings.prompt == "description", "template": settings.prompt_form}
        self.train = Examples(self.tasks, self.tokenizer, settings.max_tokens, **prompts)
        self.validation = Examples(
            validation, self.tokenizer, settings.max_tokens, **prompts, limit=settings.validation_samples, allow_empty=True
        )  # fmt: skip
        for what, of in (("training", self.train), ("validation", self.validation)):
            if of.dropped:
                total = sum(len(task.examples) for task in of.tasks)
                warnings.warn(
                    f"max_tokens: {of.dropped} of {total} {what} examples have more than {settings.max_tokens} tokens "
                    "and are left out",
                    stacklevel=3,
                )
        if settings.validate_every and not any(self.validation.kept):
            raise ConfigError(f"max_tokens: no example of split 'val' fits into {settings.max_tokens} tokens")

    def data(self, tasks: Sequence[int] | None = None, initial: str = "") -> dict[str, Any]:
        """Digests of descriptions and examples, of every split, of ``tasks`` (indices; None: all), and of the base model.

        ``initial``: digest of the weights that the run starts from, if it starts from any.
        """
        chosen = self.tasks if tasks is None else [self.tasks[i] for i in tasks]
        data: dict[str, Any] = {"tasks": {task.name: self._digests[task.name] for task in chosen}}
        return data | {"base_model_sha256": self._base} | ({"initial": initial} if initial else {})

    def stated(self) -> dict[str, Any]:
        """:meth:`data` for a checkpoint: of many tasks the names and one digest of all, so that it stays small."""
        data = self.data()
        if len(self.tasks) <= MANY_TASKS:
            return data
        digest = hashlib.sha256(json.dumps({"tasks": data["tasks"]}).encode()).hexdigest()
        return data | {"tasks": list(data["tasks"]), "tasks_sha256": digest}

    def attach(self, stack: AdapterStack) -> None:
        """Attach to the model; ``stack``: one adapter, whose shapes the slots get."""
        self._handle = attach(self.model, stack)
        self._objective = Objective(self.model, self._handle)

    def losses(self, batch: Batch, stack: AdapterStack) -> Tensor:
        """The training loss of each row, with the settings' smoothing, noise and dropout; after :meth:`attach`."""
        s = self.settings
        return self._objective.losses(
            batch, stack, label_smoothing=s.label_smoothing, neftune_alpha=s.neftune_alpha, lora_dropout=s.lora_dropout
        )

    def close(self) -> None:
        """Detach from the model."""
        if self._handle is not None:
            self._handle.detach()
            self._handle = None

    def stream(self, tasks: Sequence[int], descriptions: Descriptions, *, every: bool = False) -> Stream:
        """Groups of ``tasks`` (indices); ``every``: all of them in each step."""
        s = self.settings

        def make(task: int, visit: int) -> Group:
            return self.train.group(tasks[task], visit, s.samples_per_task, s.seed, descriptions)

        per_step, bucket_steps = (len(tasks), 1) if every else (s.tasks_per_step, s.bucket_steps)
        return Stream(len(tasks), per_step, s.seed, make, lambda group: group.longest, bucket_steps)

    def collate(
        self, groups: Sequence[Group], of_step: Sequence[Group], adapter: Adapter | None = None, *, per_task: bool = False
    ) -> Batch:
        """A batch of ``groups``, some of those ``of_step``; ``per_task``: the loss is the sum over tasks, not the mean."""
        weight = token_weights(self.settings.weighting, of_step, per_task)
        return collate(groups, self.tokenizer.pad_token_id, weight, adapter)

    def validate(
        self,
        shard: Shard,
        descriptions: Descriptions,
        stack: Callable[[Sequence[Group]], AdapterStack],
        adapter: Adapter | None = None,
        tasks: Collection[int] | None = None,
        *,
        one_sample: bool = False,
    ) -> dict[str, float]:
        """Per task, this process's summand of its validation loss.

        The loss is the mean over the task's samples of the mean cross-entropy of their answer tokens, without label
        smoothing, noise or dropout.

        Args:
            stack: groups -> their adapters, indexed by ``adapter``.
            tasks: indices; None: all.
            one_sample: a group has one sample instead of several of its task.
        """
        settings, counts = self.settings, [len(kept) for kept in self.validation.kept]
        sums = {i: 0.0 for i, count in enumerate(counts) if count and (tasks is None or i in tasks)}
        rows = settings.tasks_per_batch * settings.samples_per_task
        group_size = 1 if one_sample else min(rows, settings.validation_samples)
        groups = [g for g in self.validation.all_groups(group_size, descriptions) if g.task in sums]
        per_batch = rows // group_size
        batches = (shard.of(groups[start : start + per_batch]) for start in range(0, len(groups), per_batch))
        for mine in filter(None, batches):
            weight = lambda s, g: 1 / (s.answer_len * counts[g.task])  # noqa: E731
            batch = collate(mine, self.tokenizer.pad_token_id, weight, adapter)
            for task, loss in zip(batch.tasks, self._objective.losses(batch, stack(mine)).tolist(), strict=True):
                sums[task] += loss
        return {self.tasks[task].name: loss for task, loss in sums.items()}
