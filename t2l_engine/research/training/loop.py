"""The training loop of every kind of run: steps, validation, saved states, exact resume; one process or several.

A run's folder holds its settings, its log (a line per step and per validation), ``training_state.pt`` and the job's
checkpoint or adapters as of the last save, and under ``best/`` as of the best validation.  A killed run resumes from the
state; on one process of the same machine, with the same number of threads, the result equals that of an uninterrupted run
bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.weights import check_no_model, expect_none, remove_unfinished, replacing, save_torch, write_text
from t2l_engine.hypernetwork.folder import SAKANA_NAMES, WEIGHTS_NAME
from t2l_engine.research.training.runs import COUNTS, SETTINGS, append, rewind
from t2l_engine.research.training.sampling import Group, Shard, Stream, divide, seeded
from t2l_engine.research.training.settings import ADAMW, MUON, Settings, differences, to_yaml
from t2l_engine.text.base_model import check_device

STATE, BEST = "training_state.pt", "best"


class Job(ABC):
    """One kind of training: what :func:`run` trains, on which batches, with which loss.

    ``model``: the module whose parameters are trained (a hypernetwork or a bank of adapters, not the frozen base model);
    with several processes :meth:`loss` gets it wrapped in DistributedDataParallel.
    """

    settings: Settings
    model: nn.Module
    #: The groups of every step.
    stream: Stream
    #: Of the loss that a step minimises; the log says the loss in ones.
    unit = 1.0

    def __init__(self) -> None:
        #: State of :meth:`improved`, with the ``step`` of the last improvement; saved with the run's state.
        self.best: dict[str, Any] = {}

    def batches(self, step: int, shard: Shard) -> Sequence[Any]:
        """This process's shard of each of the step's ``accumulation`` batches; a batch may have attributes COUNTS."""
        groups = self.stream.step(step)
        return [self.collate(part, groups) for part in divide(groups, self.settings.tasks_per_batch, shard)]

    def collate(self, groups: Sequence[Group], of_step: Sequence[Group]) -> Any:
        """A batch of ``groups``, some of those ``of_step``."""
        return groups

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar; a step minimises its sum over batches and processes."""

    @abstractmethod
    def validate(self, shard: Shard) -> dict[str, float]:
        """Per task, this process's summand of its validation loss; empty without validation data."""

    @abstractmethod
    def write(self, folder: Path, step: int, *, best: bool) -> None:
        """Write the checkpoint or the adapters: as of ``step``, or with ``best`` as of the best validation."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """Digests of the run's input data; a run is resumed only with equal ones."""

    def clip(self, limit: float) -> Tensor:
        """Clip gradients to the L2 norm ``limit`` (0: no clipping); returns the norm before clipping."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit or math.inf)

    def improved(self, losses: dict[str, float], step: int) -> bool:
        """Whether this validation has the lowest mean loss so far, by at least ``min_delta``."""
        mean = math.fsum(losses.values()) / len(losses)
        better = mean < self.best.get("val_loss", math.inf) - self.settings.min_delta
        if better:
            self.best = {"val_loss": mean, "step": step}
        return better


def check_output(output: Path) -> None:
    """FileExistsError for a folder with a model, or with a checkpoint but no state of the run that would be resumed."""
    check_no_model(output)
    if not (output / STATE).is_file():
        expect_none(output, (WEIGHTS_NAME, SAKANA_NAMES[0]), f"but no {STATE} of a run to go on with")


def accelerator(device: str) -> Accelerator:
    """Hugging Face Accelerate for ``device`` ("cpu" or "cuda"); under ``accelerate launch`` one of several processes.

    Raises ConfigError for any other device, for "cuda" without a CUDA device, and when ``accelerate launch`` set up the
    environment of several processes but started only one.
    """
    check_device(device)
    # Buffers (offsets) are constants; every parameter has a gradient in every step.
    options = DistributedDataParallelKwargs(broadcast_buffers=False)
    # The settings state the precision, not `accelerate config`.
    accelerate = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[options])
    if accelerate.device.type != device:  # Accelerate keeps its state per process
        raise ConfigError(f"--device: got {device!r}, but this process has trained on {accelerate.device.type!r} before")
    if accelerate.num_processes == 1 and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise ConfigError(
            "accelerate launch: expected several processes, got one (with --cpu it starts several through MPI only); use "
            "accelerate launch --multi_gpu --num_processes N, on CPUs too"
        )
    return accelerate


def learning_rate(settings: Settings, step: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0): a linear warm-up, then ``settings.schedule``."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    constant = settings.schedule == "constant"
    decay = settings.decay_steps if constant else settings.steps - settings.warmup_steps
    if constant and step < settings.steps - decay:
        return settings.learning_rate
    return settings.learning_rate * max(0.0, (settings.steps - step) / max(1, decay))


def _constant_until(settings: Mapping[str, Any]) -> int:
    """The step before which the learning rate does not depend on the number of steps, 0 where it always does."""
    return settings["steps"] - settings.get("decay_steps", 0) if settings["schedule"] == "constant" else 0


def expect_same(
    path: Path, settings: Settings, of_settings: Mapping[str, Any], data: Mapping[str, Any], of_data: Mapping[str, Any]
) -> None:
    """ConfigError naming what differs from the settings and the :meth:`Job.data` that the run in ``path`` had."""
    found = differences(settings, of_settings)
    for kind in sorted(data.keys() | of_data):
        ours, theirs = (json.loads(json.dumps(of.get(kind))) for of in (data, of_data))
        if isinstance(ours, dict) and isinstance(theirs, dict):
            names = [name for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]
            found += [f"{kind}: {short_repr(names)}"] if names else []
        elif ours != theirs:
            found.append(kind)
    if found:
        raise ConfigError(
            f"{path}: written by a run with other settings or data ({'; '.join(found)}); choose another output folder"
        )


def run(job: Job, output: Path, accelerate: Accelerator, title: str = "") -> Path:
    """Train ``job`` to its last step, resuming from the state in ``output`` if there is one; returns ``output``.

    On the first interrupt (Ctrl-C, SIGTERM) a single process saves after the current step and raises KeyboardInterrupt.

    Raises:
        ConfigError: ``output`` holds a run with other settings or data, or a batch has fewer tasks than processes.
        FloatingPointError: the loss, its gradient or a validation loss is NaN or infinite; names the step and the last good
            state.
    """
    job.model.to(accelerate.device)
    going, main, settings = _Run(job, output, accelerate), accelerate.is_main_process, job.settings
    step = going.load()
    saved = False  # by this process
    accelerate.wait_for_everyone()  # all processes have read the state before one writes
    if main:
        remove_unfinished(output)
        write_text(output / SETTINGS, to_yaml(settings))
        rewind(output, step)
    with (
        tqdm(total=settings.steps, initial=step, unit="step", desc=title or None, disable=not main) as bar,
        _interrupts(single=going.shard.world_size == 1) as interrupted,
        torch.random.fork_rng(),  # leaves the caller's generator as it is
    ):
        if step == 0 and settings.patience:
            going.validate(step)
        while not going.ended(step):
            began = time.perf_counter()
            row = going.step(step)
            step += 1
            going.log({"step": step, **row, "seconds": round(time.perf_counter() - began, 4)})
            bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
            bar.update()
            if settings.validate_every and (step % settings.validate_every == 0 or step == settings.steps):
                going.validate(step)
            if main and (step % settings.save_every == 0 or going.ended(step) or interrupted):
                going.save(step)
                job.write(output, step, best=False)
                saved = True
            if interrupted:
                message = f"saved at step {step} in {output}; the same command goes on from there"
                tqdm.write(message, file=sys.stderr)
                raise KeyboardInterrupt(message)
        if main and not saved:
            job.write(output, step, best=False)  # an earlier run was killed after saving its state and before this
    accelerate.wait_for_everyone()
    accelerate.free_memory()  # it keeps references to wrapped modules; this process may start another run
    return output


class _Run:
    """A run in progress: the job, its optimisers and saved state, and this process's part of it."""

    def __init__(self, job: Job, output: Path, accelerate: Accelerator):
        self.job, self.output, self.accelerate = job, output, accelerate
        self.shard = Shard(accelerate.process_index, accelerate.num_processes)
        self.optimizers = _optimizers(job)
        self.state = "no state was saved before"  # what errors say of the last good one

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained module, with several processes in DistributedDataParallel."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch's new name for what Accelerate passes
            return self.accelerate.prepare(self.job.model) if self.shard.world_size > 1 else self.job.model

    def log(self, row: Mapping[str, Any]) -> None:
        if self.accelerate.is_main_process:
            append(self.output, row)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over processes."""
        summed = self.accelerate.reduce(torch.tensor(values, dtype=torch.float64, device=self.accelerate.device), "sum")
        return summed.tolist()

    def check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(f"{what} is {value} at step {step}; {self.state}")

    def ended(self, step: int) -> bool:
        """Whether ``step`` is the last one: of the settings, or after ``patience`` validations without improvement."""
        s, best = self.job.settings, self.job.best.get("step")
        stale = s.patience > 0 and best is not None and step - best >= s.patience * s.validate_every
        return stale or step >= s.steps

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; returns its row of the log."""
        job, settings, accelerate = self.job, self.job.settings, self.accelerate
        rate = learning_rate(settings, step)
        torch.manual_seed(seeded(settings.seed, "step", step, self.shard.rank))  # dropout
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        batches = job.batches(step, self.shard)
        total = torch.zeros((), dtype=torch.float64, device=accelerate.device)
        for number, batch in enumerate(batches):
            # Gradients are reduced once a step, with the last micro-batch.
            reduce = number == len(batches) - 1 or self.shard.world_size == 1
            with contextlib.nullcontext() if reduce else accelerate.no_sync(self.model):
                loss = job.loss(self.model, batch)
                (loss * self.shard.world_size).backward()  # DDP averages over processes; the loss is a sum
            total += loss.detach().double()
        counts = [sum(getattr(batch, name, 0) for batch in batches) for name in COUNTS]
        loss, *counts = self.sum([float(total) * job.unit, *counts])
        self.check_finite("loss", loss, step + 1)
        norm = float(job.clip(settings.grad_clip))
        self.check_finite("the gradient's norm", norm, step + 1)
        for optimizer in self.optimizers:
            optimizer.step()
        counted = {name: int(count) for name, count in zip(COUNTS, counts, strict=True) if count}
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate, **counted}

    @torch.no_grad()
    def validate(self, step: int) -> None:
        job = self.job
        if not (summands := job.validate(self.shard)):
            return
        losses = dict(zip(summands, self.sum(list(summands.values())), strict=True))
        for task, loss in losses.items():
            self.check_finite(f"validation loss of task {task}", loss, step)
        better = job.improved(losses, step)
        self.log({"step": step, "val_loss": math.fsum(losses.values()) / len(losses), "best": better, "tasks": losses})
        if better and self.accelerate.is_main_process:
            job.write(self.output / BEST, step, best=True)

    def save(self, step: int) -> None:
        content = {
            "settings": self.job.settings.model_dump_json(),
            "data": json.dumps(self.job.data(), sort_keys=True),
            "step": step,
            "trained": self.job.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": self.job.best,
        }
        with replacing(self.output, STATE) as temporary:
            save_torch(content, temporary / STATE, self.output / STATE)
        self.state = f"last good state: {self.output / STATE}, step {step}"

    def load(self) -> int:
        """The step to go on from; 0 where there is no state."""
        path = self.output / STATE
        if not path.is_file():
            return 0
        # Not mapped to the device: AdamW keeps its step counter on the host.
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: cannot be read, perhaps cut short: {short_repr(str(error))}") from None
        theirs, data = json.loads(content["settings"]), json.loads(content["data"])
        if content["step"] <= min(_constant_until(theirs), _constant_until(ours := self.job.settings.model_dump())):
            theirs |= {name: ours[name] for name in ("steps", "decay_steps")}  # without effect so far
        expect_same(path, self.job.settings, theirs, self.job.data(), data)
        self.job.model.load_state_dict(content["trained"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.job.best = content["best"]
        self.state = f"last good state: {path}, step {content['step']}"
        return content["step"]


def _optimizers(job: Job) -> list[torch.optim.Optimizer]:
    """AdamW of all parameters; with ``optimizer`` "muon", Muon of the weights of linears and AdamW of the rest."""
    matrices: list[nn.Parameter] = []
    if getattr(job.settings, "optimizer", ADAMW) == MUON:
        matrices = [module.weight for module in job.model.modules() if isinstance(module, nn.Linear)]
    taken = set(map(id, matrices))
    rest = [parameter for parameter in job.model.parameters() if id(parameter) not in taken]
    options = {"lr": job.settings.learning_rate, "weight_decay": job.settings.weight_decay}
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, **options)]
    if matrices:
        # Updates with the RMS of AdamW's (Liu et al., arXiv 2502.16982, section 2.2), so that both share a learning rate.
        made.append(torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw"))
    return made


@contextlib.contextmanager
def _interrupts(single: bool) -> Iterator[list[int]]:
    """A list that an interrupt appends to; a second interrupt has its usual effect.

    With several processes interrupts always have their usual effect: signals do not arrive at the same step.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    caught = single and threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
