"""Task embeddings of training groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import config as cfg
from t2l_engine.config import ConfigError, OneHotConfig
from t2l_engine.encoder import OneHotEncoder, TextEncoder
from t2l_engine.training.sampling import Group, seeded
from t2l_engine.training.settings import ReconstructionSettings, SFTSettings


class TaskEmbeddings:
    """Embeddings of every description of every task, and those that a group reads.

    Args:
        settings: encoder, noise, mixing and how many descriptions are held out.
        texts: name and descriptions of each task; with encoder "one-hot" the names alone count.

    Raises ConfigError where a task has no description left to train on.
    """

    def __init__(
        self,
        settings: SFTSettings | ReconstructionSettings,
        texts: Sequence[tuple[str, Sequence[str]]],
        device: torch.device,
    ):
        self._settings, self._device = settings, device
        if settings.encoder == "one-hot":
            encoder = OneHotEncoder(OneHotConfig(tuple(name for name, _ in texts)))
            texts = [(name, [name]) for name, _ in texts]
        else:
            encoder = TextEncoder.from_pretrained(_encoder(settings.encoder))
        self.embed_dim, self._config = encoder.embed_dim, encoder.config
        self._rows = [encoder.encode(list(descriptions)) for _, descriptions in texts]
        for (name, _), rows in zip(texts, self._rows, strict=True):
            if len(rows) <= settings.held_out_descriptions:
                raise ConfigError(
                    f"held_out_descriptions: expected fewer than the {len(rows)} descriptions of task {name}, "
                    f"got {settings.held_out_descriptions}"
                )

    def config(self) -> dict[str, Any]:
        """The encoder, for the checkpoint."""
        return cfg.to_json(self._config)

    def trained(self, task: int) -> range:
        """Numbers of the descriptions that training reads."""
        return range(len(self._rows[task]) - self._settings.held_out_descriptions)

    def validated(self, task: int) -> range:
        """Numbers of the descriptions that validation reads: the held-out ones, or all where none is."""
        count = len(self._rows[task])
        return range(count - self._settings.held_out_descriptions if self._settings.held_out_descriptions else 0, count)

    def exact(self, groups: Sequence[Group]) -> Tensor:
        """``task_emb [groups, embed_dim]`` of the groups' descriptions as they are."""
        return torch.stack([self._rows[g.task][g.description] for g in groups]).to(self._device)

    def varied(self, groups: Sequence[Group]) -> Tensor:
        """As :meth:`exact`, with the settings' mixing and noise: functions of each group's key."""
        settings, rows = self._settings, []
        for g in groups:
            row = self._rows[g.task][g.description]
            generator = torch.Generator().manual_seed(seeded("task_emb", g.key))
            if settings.mix_descriptions:
                other = torch.randint(len(self.trained(g.task)), (), generator=generator)
                weight = torch.rand((), generator=generator)
                row = weight * row + (1 - weight) * self._rows[g.task][other]
                row = row * (math.sqrt(row.numel()) / row.norm())
            if settings.embedding_noise:
                row = row + settings.embedding_noise * torch.randn(row.shape, generator=generator)
            rows.append(row)
        return torch.stack(rows).to(self._device)


def _encoder(name: str) -> str:
    if name != "minilm" and not Path(name).is_dir():
        raise ConfigError(f"encoder: expected 'minilm', 'one-hot' or a local sentence-transformers folder, got {name!r}")
    return name
