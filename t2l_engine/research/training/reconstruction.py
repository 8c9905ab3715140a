"""Reconstruction: a hypernetwork learns to reproduce a library of adapters from their descriptions (paper section 3.1)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2l_engine.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError, expect
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.config import same_scaling
from t2l_engine.hypernetwork.modules import STD_EPS
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, read_descriptions
from t2l_engine.research.training import loop
from t2l_engine.research.training.context import Modules
from t2l_engine.research.training.hypernetwork import HyperNetworkJob
from t2l_engine.research.training.runs import prompt_of_run
from t2l_engine.research.training.sampling import Group, Shard, Stream, seeded
from t2l_engine.research.training.settings import ReconstructionSettings
from t2l_engine.text.packaged import own_name

#: Factor of the "delta-w" loss, as in SakanaAI's code; brings weight differences to the order of 1.
DELTA_W_SCALING = 10_000.0


class Library:
    """The adapters of a folder (``<name>/``, PEFT folders) with their ``descriptions.json``, as one stack.

    Args:
        folder: as :func:`t2l_engine.research.training.lora.train` writes it below its output (``adapters/``).
        names: the adapters to use; None: all in ``descriptions.json``.

    Raises ConfigError unless all have the same modules and layers, one rank and one scaling.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None):
        known = read_descriptions(folder)
        unknown = [name for name in names or () if name not in known]
        expect(not unknown, "names", f"some of {folder / DESCRIPTIONS_NAME}", unknown)
        self.names = sorted(set(names or known))
        self.descriptions = {name: known[name] for name in self.names}
        folders = {name: folder / name for name in self.names}
        self.stack = AdapterStack.from_peft([*folders.values()], dtype=torch.float32)
        self.scaling = float(self.stack.scaling[0])
        self.rank = int(next(iter(self.stack.ranks.values()))[0, 0])
        for name, scaling in zip(self.names, self.stack.scaling.tolist(), strict=True):
            if not same_scaling(scaling, self.scaling):
                raise ConfigError(
                    f"{folder / name}: expected scaling {self.scaling:g} as in {self.names[0]}, got {scaling:g}"
                )
        for module, of_adapters in self.stack.ranks.items():
            for name, ranks in zip(self.names, of_adapters.tolist(), strict=True):
                same = set(ranks) == {self.rank}
                expect(same, f"{folder / name}: {module}", f"rank {self.rank} in all {len(ranks)} layers", ranks)
        depths = {module: layers for module, (layers, _, _) in self.stack.sizes.items()}
        expect(len(set(depths.values())) == 1, str(folder), "modules of the same number of layers", depths)
        layers, n_in, n_out = zip(*self.stack.sizes.values(), strict=True)
        self.modules = Modules(tuple(self.stack.paths), tuple(self.stack.paths.values()), n_in, n_out, layers[0])
        #: The base model in the adapters' configurations; None unless all state the same one.
        named = [read_json(path / CONFIG_NAME).get("base_model_name_or_path") for path in folders.values()]
        stated = {own_name(name) if isinstance(name, str) else None for name in named}
        self.base_model = stated.pop() if len(stated) == 1 else None
        #: Of each adapter the start of the SHA-256 of its weights file and of its descriptions, which every save states.
        self.digests = {
            name: [_digest((path / WEIGHTS_NAME).read_bytes()), _digest("\n".join(self.descriptions[name]).encode())]
            for name, path in folders.items()
        }
        form, described = prompt_of_run(folder)
        self.prompt = {"prompt_form": form, "prompt": "description" if described else "input"}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def delta_l1(A: Tensor, B: Tensor, target_A: Tensor, target_B: Tensor) -> Tensor:
    """``mean|B A - B' A'|`` over layers and entries, ``[N]``; only one layer's difference is in memory at a time.

    ``A, target_A [N, n, r, in]``, ``B, target_B [N, n, out, r]``.
    """

    def layer(a: Tensor, b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
        difference = torch.cat((b, -target_b), dim=2) @ torch.cat((a, target_a), dim=1)
        return difference.abs().sum(dim=(1, 2))

    of_layers = zip(*(side.unbind(dim=1) for side in (A, B, target_A, target_B)), strict=True)
    total = sum(checkpoint(layer, *sides, use_reentrant=False, preserve_rng_state=False) for sides in of_layers)
    return total / (A.shape[1] * A.shape[3] * B.shape[2])


def z_scores(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, std), float32, of ``targets [N, ...]`` over N; computed in float64, so that constant entries have z = 0."""
    exact = targets.double()
    mean, std = exact.mean(dim=0), exact.std(dim=0)
    return ((exact - mean) / (std + STD_EPS)).float(), mean.float(), std.float()


def spread(stack: AdapterStack) -> float:
    """The power of two nearest to the RMS over all entries of A and B of their standard deviation over the adapters.

    With outputs in this unit the heads learn at the learning rate that suits z-scores; entries are of the order of 0.01.
    """
    sides = [*stack.lora_A.values(), *stack.lora_B.values()]
    square = sum(float((t.double() - t.double().mean(dim=0)).square().sum()) for t in sides) / sum(t.numel() for t in sides)
    return 2.0 ** round(math.log2(square) / 2) if square > 0 else 1.0


class Reconstruction(HyperNetworkJob):
    """Reconstruction of a library of adapters, without their base model.

    The loss of a task is the L1 distance to its adapter, the mean over modules of

    - "z-score": ``(mean|A - A'| + mean|B - B'|) / 2`` between z-scores, by the mean and unbiased standard deviation of each
      entry over the tasks; the checkpoint's offsets invert the normalisation;
    - "raw": the same between A and B themselves.  The hypernetwork generates the difference to the mean over the tasks (an
      offset of the checkpoint), in units of :func:`spread`, which are folded into the heads of the checkpoint;
    - "delta-w": ``10,000 mean|B A - B' A'|``; the heads' output is scaled by 1/100 (``output_scale``).
    """

    settings: ReconstructionSettings

    def __init__(self, settings: ReconstructionSettings, library: Library, device: torch.device):
        if settings.target == "z-score" and len(library.names) < 2:
            raise ConfigError("target: z-score needs at least two adapters, since one has no standard deviation; got one")
        tasks = [Task(name, tuple(texts), ()) for name, texts in library.descriptions.items()]
        super().__init__(settings, tasks, library.base_model, device)
        self._library = library
        self._statistics: dict[str, dict[str, Tensor]] = {}  # module -> offsets that invert the z-scores
        self.unit = spread(library.stack) if settings.target == "raw" else 1.0
        self._targets: dict[str, tuple[Tensor, Tensor]] = {}
        for module, A in library.stack.lora_A.items():
            sides = {"A": A, "B": library.stack.lora_B[module]}
            if settings.target == "z-score":
                for side, values in sides.items():
                    sides[side], mean, std = z_scores(values)
                    self._statistics.setdefault(module, {}).update({f"mean_{side}": mean, f"std_{side}": std})
            self._targets[module] = sides["A"].to(device), sides["B"].to(device)
        config = self._config(
            library.modules, rank=library.rank, lora_alpha=library.scaling * library.rank, scaling="plain",
            head_bias=settings.target != "z-score",
            output_scale=DELTA_W_SCALING**-0.5 if settings.target == "delta-w" else self.unit,
        )  # fmt: skip
        self.model = self._new(config, hyperinit=False)
        if settings.target == "raw":
            for module, offsets in self.model.offsets.items():
                offsets.add_A, offsets.add_B = (side.mean(dim=0) for side in self._targets[module])
        self.stream = Stream(len(library.names), settings.tasks_per_step, settings.seed, self._group)

    def _group(self, task: int, visit: int) -> Group:
        choices = self._conditions.train[task]
        key = f"{self.settings.seed}/{self._library.names[task]}/{visit}"
        return Group(task, choices[seeded("description", key) % len(choices)], (), key)

    def _distances(self, stack: AdapterStack, groups: Sequence[Group]) -> Tensor:
        """The loss of each group, ``[groups]``."""
        tasks = [group.task for group in groups]
        total = torch.zeros((), device=stack.scaling.device)
        for module, (target_A, target_B) in self._targets.items():
            A, B, target_A, target_B = stack.lora_A[module], stack.lora_B[module], target_A[tasks], target_B[tasks]
            if self.settings.target == "delta-w":
                total = total + DELTA_W_SCALING * delta_l1(A, B, target_A, target_B)
            else:
                sides = ((A - target_A).abs(), (B - target_B).abs())
                total = total + sum(side.mean(dim=(1, 2, 3)) for side in sides) / 2
        return total / len(self._targets)

    def loss(self, model: nn.Module, batch: Sequence[Group]) -> Tensor:
        distances = self._distances(model(self._conditions.augmented(batch)), batch)
        return distances.sum() / (self.settings.tasks_per_step * self.unit)

    def validate(self, shard: Shard) -> dict[str, float]:
        """The loss of every task, with its first held-out description (its first one if none is held out)."""
        names, size = self._library.names, self.settings.tasks_per_batch
        groups = [Group(task, self._conditions.val[task][0], (), "") for task in range(len(names))]
        found = dict.fromkeys(names, 0.0)
        for start in range(0, len(groups), size):
            if mine := shard.of(groups[start : start + size]):
                distances = self._distances(self.model(self._conditions.clean(mine)), mine)
                found.update({names[g.task]: d for g, d in zip(mine, distances.tolist(), strict=True)})
        return found

    def write(self, folder: Path, step: int, *, best: bool) -> None:
        """What is written generates A and B themselves: z-scores are inverted by offsets, the unit is in the heads."""
        net = copy.deepcopy(self.model)
        for module, values in self._statistics.items():
            for name, value in values.items():
                setattr(net.offsets[module], name, value)
        if self.unit != 1.0:
            net.config = dataclasses.replace(net.config, output_scale=1.0)
            for parameter in net.heads.parameters():
                parameter.data *= self.unit  # a power of two: exact
        stated = {"method": "reconstruction", **self._library.prompt, "tasks": self._library.digests}
        self._write(net, folder, step, **stated)

    def data(self) -> dict[str, Any]:
        return {"adapters": self._library.digests}


def train(
    settings: ReconstructionSettings,
    adapters_folder: str | Path,
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train a hypernetwork on a library of adapters and write a native checkpoint to ``output``.

    Args:
        adapters_folder: see :class:`Library`.
        names: the adapters to train on; None: all of the folder.

    Other arguments, files and errors as in :func:`t2l_engine.research.training.sft.train`.
    """
    loop.check_output(Path(output))  # before everything is read
    accelerator = accelerator or loop.accelerator("cpu")
    library = Library(Path(adapters_folder), names)
    return loop.run(Reconstruction(settings, library, accelerator.device), Path(output), accelerator)
