"""What both ways to train a hypernetwork share: what adapters are generated from, the trained modules, the checkpoint.

Conditions are embeddings of texts, or the hidden states of their tokens.
"""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.files.errors import expect
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork.config import PERCEIVERS, POINTER, AnyConfig, HyperNetworkConfig, PerceiverConfig, PointerConfig
from t2l_engine.hypernetwork.network import HyperNetwork, new, save
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training import loop
from t2l_engine.research.training.context import Modules
from t2l_engine.research.training.sampling import Group, seeded, trained_descriptions
from t2l_engine.research.training.settings import BASE_MODEL, LLM, HyperNetworkSettings, SFTSettings
from t2l_engine.text.config import SAKANA_MAX_LENGTH, AnyEncoderConfig, DocumentEncoderConfig, EncoderConfig, OneHotConfig
from t2l_engine.text.documents import DocumentEncoder
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder
from t2l_engine.text.prompts import RAW

#: One example set in this many has no description.
_WITHOUT_DESCRIPTION = 8


class Conditions(ABC):
    """What the adapters of groups are generated from, as the trained model takes it.

    ``train``, ``val``: of each task, indices of the descriptions used in training, and in validation (those that are held
    out, or those of training if none is).  ``encoder_config``: of the text encoder; ``embed_dim``: width of ``task_emb``.

    Raises ConfigError if all descriptions of a task are held out.
    """

    encoder_config: AnyEncoderConfig
    embed_dim: int

    def __init__(self, settings: HyperNetworkSettings, tasks: Sequence[Task], device: torch.device):
        self._device, held_out = device, settings.held_out_descriptions
        self.train: list[Sequence[int]] = [*trained_descriptions(tasks, held_out)]
        self.val = [range(len(of), len(of) + held_out) if held_out else of for of in self.train]

    @abstractmethod
    def clean(self, groups: Sequence[Group]) -> Any:
        """The conditions of the groups' descriptions or inputs, without augmentation."""

    def augmented(self, groups: Sequence[Group]) -> Any:
        """As :meth:`clean`, with the augmentation of training, if there is any, drawn from a seed by each group's key."""
        return self.clean(groups)


class TaskEmbeddings(Conditions):
    """``task_emb [groups, embed_dim]``: the embedding of a group's description or, with ``condition`` "input", of its input.

    All descriptions are embedded here, after which the encoder is released; inputs are embedded when they are needed.
    With encoder "one-hot" only the tasks' names matter.
    """

    def __init__(self, settings: HyperNetworkSettings, tasks: Sequence[Task], device: torch.device):
        if settings.encoder == "one-hot":
            encoder = OneHotEncoder(OneHotConfig(tuple(task.name for task in tasks)))
            tasks = [dataclasses.replace(task, descriptions=(task.name,)) for task in tasks]
        super().__init__(settings, tasks, device)
        if settings.encoder != "one-hot":
            encoder = TextEncoder.from_pretrained(_encoder(settings), device=device)
        self.embed_dim, self.encoder_config = encoder.embed_dim, encoder.config
        by_input = isinstance(settings, SFTSettings) and settings.condition == "input"
        self._input_encoder = encoder if by_input else None
        self._rows = [] if by_input else [encoder.encode(list(task.descriptions)).to(device) for task in tasks]

    def clean(self, groups: Sequence[Group]) -> Tensor:
        if self._input_encoder is None:
            return torch.stack([self._rows[g.task][g.description] for g in groups])
        # One at a time: rounding depends on the batch, and a resumed run would batch other texts together.
        return self._input_encoder.encode([g.samples[0].input for g in groups], batch_size=1).to(self._device)


def _encoder(settings: HyperNetworkSettings) -> str | EncoderConfig:
    """Name or configuration of the text encoder."""
    name = settings.encoder
    if name == BASE_MODEL:
        # A second copy of the base model: the run's may use another attention than one loaded from the checkpoint.
        return EncoderConfig(settings.base_model.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype=settings.dtype)
    known = f"'minilm', {BASE_MODEL!r}, 'one-hot' or a local sentence-transformers folder"
    expect(name == MINILM.name or Path(name).is_dir(), "encoder", known, name)
    return name


class Documents(Conditions):
    """Hidden states of the descriptions' tokens; read when a batch needs them.

    Also raises ConfigError if encoder and base model do not fit together.
    """

    def __init__(self, settings: SFTSettings, tasks: Sequence[Task], device: torch.device):
        super().__init__(settings, tasks, device)
        layers, reads = settings.llm_layers, {}
        if settings.variant == POINTER:
            reads = {"states": "layers", "layers": layers}
        elif settings.variant == PERCEIVERS[0]:
            reads = {"states": "all"}
        else:
            reads = {"states": "last", "num_layers": layers[0]} if layers[0] else {"states": "embeddings"}
        plain = {"prefix": "", "suffix": ""} if settings.prompt_form == RAW else {}
        self._share, self._most = settings.example_share, settings.max_examples
        most = self._most if self._share else 0
        self.encoder_config = DocumentEncoderConfig(
            settings.base_model.rstrip("/"), dtype=settings.dtype, max_examples=most, **reads, **plain
        )
        self._encoder = DocumentEncoder.from_config(self.encoder_config, device=device)
        fits = self._encoder.model.config.get_text_config().tie_word_embeddings or not settings.copied
        expect(fits, "copied", f"none, since {settings.base_model} does not tie its embeddings", settings.copied)
        self.embed_dim = self._encoder.feature_size
        self._tasks = tasks
        self._ids = [[chunk for (chunk,) in self._encoder.chunks(task.descriptions)] for task in tasks]

    def clean(self, groups: Sequence[Group]) -> list[tuple[list[int], Tensor, Tensor]]:
        return list(self._encoder.read([[self._ids[g.task][g.description]] for g in groups]))

    def augmented(self, groups: Sequence[Group]) -> list[tuple[list[int], Tensor, Tensor]]:
        """As :meth:`clean`; ``example_share`` of the groups read an example set."""
        return list(self._encoder.read([[self._drawn(g)] for g in groups]))

    def _drawn(self, group: Group) -> list[int]:
        """Token ids that ``group`` reads; its example set is drawn anew, and has no example that the group learns from."""
        task, draw = self._tasks[group.task], random.Random(seeded("condition", group.key))
        plain = self._ids[group.task][group.description]
        if draw.random() >= self._share:
            return plain
        learnt = {normalise(sample.input) for sample in group.samples}
        others = [example for example in task.examples if normalise(example.input) not in learnt]
        if not others:
            return plain
        chosen = draw.sample(others, min(draw.randint(1, self._most), len(others)))
        about = "" if draw.randrange(_WITHOUT_DESCRIPTION) == 0 else task.descriptions[group.description]
        shots = [(example.input, example.outputs[0]) for example in chosen]
        ((ids,),) = self._encoder.chunks([about], examples=[shots])
        return ids


# --- the job ------------------------------------------------------------------------------------------------------------


class HyperNetworkJob(loop.Job):
    """Training of a hypernetwork for adapters of ``base_model``; a subclass has data and loss."""

    model: HyperNetwork | TokenHyperNetwork

    def __init__(self, settings: HyperNetworkSettings, tasks: Sequence[Task], base_model: str | None, device: torch.device):
        super().__init__()
        self.settings, self._base_model, self._device = settings, base_model, device
        self._conditions: Conditions
        if isinstance(settings, SFTSettings) and settings.encoder == LLM:
            self._conditions = Documents(settings, tasks, device)
        else:
            self._conditions = TaskEmbeddings(settings, tasks, device)

    def _config(self, modules: Modules, **adapters: Any) -> AnyConfig:
        """Of a hypernetwork for ``modules``; ``adapters``: fields that the adapters decide."""
        s, width = self.settings, self._conditions.embed_dim
        shared: dict[str, Any] = {
            "variant": s.variant, "modules": modules.names, "in_features": modules.in_features,
            "out_features": modules.out_features, "num_layers": modules.num_layers, "latent_size": s.latent_size,
            "paths": modules.own_paths, **adapters,
        }  # fmt: skip
        if not isinstance(s, SFTSettings) or s.encoder != LLM:
            return HyperNetworkConfig(embed_dim=width, head_in_size=s.head_in_size, **shared)
        if s.variant in PERCEIVERS:
            sizes = {"num_latents": s.llm_queries, "num_blocks": s.llm_blocks, "num_mlps": s.llm_mlps}
            return PerceiverConfig(feature_size=width, **sizes, **shared)
        sizes = {"num_blocks": s.llm_blocks, "num_heads": s.llm_heads}
        return PointerConfig(feature_size=width, copied=s.copied, first_layer=s.first_layer, **sizes, **shared)

    def _new(self, config: AnyConfig, *, hyperinit: bool) -> HyperNetwork | TokenHyperNetwork:
        """A hypernetwork with initial parameters by the seed; ``hyperinit``: heads by Bias-HyperInit."""
        seed = self.settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = new(config)
            if hyperinit and isinstance(net, HyperNetwork):
                net.bias_hyperinit(torch.Generator().manual_seed(seed))
        return net.to(self._device)

    def _write(self, net: HyperNetwork | TokenHyperNetwork, folder: Path, step: int, **stated: Any) -> None:
        """A checkpoint of ``net``; ``stated``: what its training block says beside the settings."""
        training = {"steps_done": step, **self.settings.model_dump(mode="json"), **stated}
        blocks = {"encoder": to_json(self._conditions.encoder_config), "base_model": self._base_model, "training": training}
        save(net, folder, blocks)
