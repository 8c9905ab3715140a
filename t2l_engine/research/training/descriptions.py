"""What adapters are generated from: embeddings of a task's descriptions, or of the examples' own inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import to_json
from t2l_engine.research.training import discriminant
from t2l_engine.research.training.sampling import Group, seeded, trained_descriptions
from t2l_engine.research.training.settings import BASE_MODEL, ReconstructionSettings, SFTSettings
from t2l_engine.text.config import SAKANA_MAX_LENGTH, EncoderConfig, LLMEncoderConfig, OneHotConfig
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder
from t2l_engine.text.llm_encoder import AttentionPooling


class Conditions(ABC):
    """What the adapters of groups are generated from, as the trained model takes it.

    ``encoder_config``: of the text encoder, for the checkpoint; ``embed_dim``: width of ``task_emb``.
    """

    encoder_config: EncoderConfig | OneHotConfig | LLMEncoderConfig
    embed_dim: int

    @abstractmethod
    def train_indices(self, task: int) -> Sequence[int]:
        """Indices of the descriptions used in training."""

    @abstractmethod
    def val_indices(self, task: int) -> Sequence[int]:
        """Indices of the descriptions used in validation: the held-out ones, or those of training if none is held out."""

    @abstractmethod
    def clean(self, groups: Sequence[Group]) -> Any:
        """The conditions of the groups' descriptions or inputs, without augmentation."""

    @abstractmethod
    def augmented(self, groups: Sequence[Group]) -> Any:
        """As :meth:`clean`, with the settings' augmentation, drawn from a seed by each group's key."""

    @abstractmethod
    def initialise(self, linear: nn.Linear, pooling: AttentionPooling | None) -> None:
        """With ``task_init`` "discriminant", initialise the task encoder's ``linear`` by the training descriptions."""

    def pooling(self) -> AttentionPooling | None:
        """A new pooling with random parameters, on the CPU; None where conditions are ``task_emb`` themselves."""
        return None

    def config(self) -> dict[str, Any]:
        """The encoder's configuration, for the checkpoint."""
        return to_json(self.encoder_config)


class TaskEmbeddings(Conditions):
    """``task_emb`` of groups: the embedding of a group's description, or of its sample's input.

    All descriptions are embedded here, after which the encoder is released; inputs are embedded when they are needed.

    Args:
        settings: encoder, noise, mixing and number of held-out descriptions.
        texts: name and descriptions of each task; with encoder "one-hot" only the names matter.
        device: of the encoder and of the embeddings.
        by_input: embed the input of each group's only sample instead of descriptions.

    Raises ConfigError if all descriptions of a task are held out.
    """

    def __init__(
        self,
        settings: SFTSettings | ReconstructionSettings,
        texts: Sequence[tuple[str, Sequence[str]]],
        device: torch.device,
        *,
        by_input: bool = False,
    ):
        self._settings, self._device = settings, device
        held_out = settings.held_out_descriptions
        self._train = [trained_descriptions(name, len(descriptions), held_out) for name, descriptions in texts]
        if settings.encoder == "one-hot":
            encoder = OneHotEncoder(OneHotConfig(tuple(name for name, _ in texts)))
            texts = [(name, [name]) for name, _ in texts]
            self._train = [range(1) for _ in texts]
        else:
            encoder = TextEncoder.from_pretrained(_encoder(settings), device=device)
        self.embed_dim, self.encoder_config = encoder.embed_dim, encoder.config
        self._input_encoder = encoder if by_input else None
        # On the CPU, where mixes and noise are drawn.
        self._rows = [] if by_input else [encoder.encode(list(descriptions)).cpu() for _, descriptions in texts]

    def train_indices(self, task: int) -> range:
        return self._train[task]

    def val_indices(self, task: int) -> range:
        held_out, last = self._settings.held_out_descriptions, self._train[task].stop
        return range(last, last + held_out) if held_out else self._train[task]

    def initialise(self, linear: nn.Linear, pooling: AttentionPooling | None = None) -> None:
        if self._settings.task_init == "discriminant":
            classes = [self._rows[task][: len(self.train_indices(task))] for task in range(len(self._rows))]
            discriminant.initialise(linear, classes, self._settings.seed)

    def clean(self, groups: Sequence[Group]) -> Tensor:
        """``task_emb [groups, embed_dim]`` of the groups' descriptions or inputs, without augmentation."""
        return self._read(groups).to(self._device)

    def _read(self, groups: Sequence[Group]) -> Tensor:
        if self._input_encoder is None:
            return torch.stack([self._rows[g.task][g.description] for g in groups])
        # One at a time: rounding depends on the batch, and a resumed run would batch other texts together.
        return self._input_encoder.encode([g.samples[0].input for g in groups], batch_size=1).cpu()

    def augmented(self, groups: Sequence[Group]) -> Tensor:
        settings, rows = self._settings, []
        for g, row in zip(groups, self._read(groups), strict=True):
            generator = torch.Generator().manual_seed(seeded("task_emb", g.key))
            if settings.mix_descriptions:
                other = torch.randint(len(self.train_indices(g.task)), (), generator=generator)
                weight = torch.rand((), generator=generator)
                row = weight * row + (1 - weight) * self._rows[g.task][other]
                row = row * (math.sqrt(row.numel()) / row.norm())
            if settings.embedding_noise:
                row = row + settings.embedding_noise * torch.randn(row.shape, generator=generator)
            rows.append(row)
        return torch.stack(rows).to(self._device)


def _encoder(settings: SFTSettings | ReconstructionSettings) -> str | EncoderConfig:
    name = settings.encoder
    if name == BASE_MODEL:
        # A second copy of the base model: the run's may use another attention than one loaded from the checkpoint.
        return EncoderConfig(settings.base_model.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype=settings.dtype)
    if name != MINILM.name and not Path(name).is_dir():
        raise ConfigError(
            f"encoder: expected 'minilm', {BASE_MODEL!r}, 'one-hot' or a local sentence-transformers folder, got {name!r}"
        )
    return name
