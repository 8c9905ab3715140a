"""Task embeddings of training groups: of a task's descriptions, or of the examples' own inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import to_json
from t2l_engine.research.training.sampling import Group, seeded
from t2l_engine.research.training.settings import BASE_MODEL, ReconstructionSettings, SFTSettings
from t2l_engine.text.config import SAKANA_MAX_LENGTH, EncoderConfig, OneHotConfig
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder

#: Added to the variance of wording along every axis, where entries of task_emb have RMS 1: what few descriptions leave out.
WORDING_VARIANCE = 0.1
#: Of an axis that is scaled up, in units of wording: along one where descriptions do not differ, noise is all there is.
LEAST_VARIANCE = 0.01


class TaskEmbeddings:
    """What a group's adapter is generated from: the embedding of its description, or of its sample's input.

    Every description is embedded at once, and the encoder is let go.  Inputs are embedded when they are first read.

    Args:
        settings: encoder, noise, mixing and how many descriptions are held out.
        texts: name and descriptions of each task; with encoder "one-hot" the names alone count.
        device: of the encoder and of what a group reads.
        by_input: whether groups are of one sample each, whose input counts; then no description is embedded.

    Raises ConfigError where a task has no description left to train on.
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
        for name, descriptions in texts:
            if len(descriptions) <= settings.held_out_descriptions:
                raise ConfigError(
                    f"held_out_descriptions: expected fewer than the {len(descriptions)} descriptions of task {name}, "
                    f"got {settings.held_out_descriptions}"
                )
        if settings.encoder == "one-hot":
            encoder = OneHotEncoder(OneHotConfig(tuple(name for name, _ in texts)))
            texts = [(name, [name]) for name, _ in texts]
        else:
            encoder = TextEncoder.from_pretrained(_encoder(settings), device=device)
        self.embed_dim, self._config = encoder.embed_dim, encoder.config
        self._counts = [len(descriptions) for _, descriptions in texts]
        self._of_inputs = encoder if by_input else None
        # On the host, where mixes and noise are drawn.
        self._rows = [] if by_input else [encoder.encode(list(descriptions)).cpu() for _, descriptions in texts]

    def config(self) -> dict[str, Any]:
        """The encoder, for the checkpoint."""
        return to_json(self._config)

    def train_indices(self, task: int) -> range:
        """Numbers of the descriptions that training reads."""
        return range(self._counts[task] - self._settings.held_out_descriptions)

    def val_indices(self, task: int) -> range:
        """Numbers of the descriptions that validation reads: the held-out ones, or all where none is."""
        count = self._counts[task]
        return range(count - self._settings.held_out_descriptions if self._settings.held_out_descriptions else 0, count)

    @torch.no_grad()
    def initialise(self, linear: nn.Linear) -> None:
        """With ``task_init`` "discriminant", start the task encoder's ``linear`` at those of the descriptions trained on.

        Embeddings are centred at the mean of the tasks, whitened by how the descriptions of one task differ, and turned to
        the axes along which tasks then differ most, each scaled down by the root of its standard deviation; the seed
        draws a last rotation.  Without this start most of what the encoder passes on is wording, which the first steps
        learn to ignore.
        """
        if self._settings.task_init != "discriminant":
            return
        generator = torch.Generator().manual_seed(self._settings.seed)
        rows = [self._rows[task][: len(self.train_indices(task))].double() for task in range(len(self._rows))]
        means = torch.stack([of.mean(dim=0) for of in rows])
        within = sum(_covariance(of, mean) for of, mean in zip(rows, means, strict=True)) / len(rows)
        centre = means.mean(dim=0)
        values, axes = torch.linalg.eigh(within + WORDING_VARIANCE * torch.eye(self.embed_dim, dtype=torch.float64))
        whiten = axes / values.sqrt() @ axes.T
        values, axes = torch.linalg.eigh(whiten @ (within + _covariance(means, centre)) @ whiten)
        kept = min(linear.out_features, self.embed_dim)
        turned = torch.randn(linear.out_features, kept, dtype=torch.float64, generator=generator)
        weight = (
            torch.linalg.qr(turned)[0] @ (axes[:, -kept:] * values[-kept:].clamp_min(LEAST_VARIANCE) ** -0.25).T @ whiten
        )
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ centre)

    def clean(self, groups: Sequence[Group]) -> Tensor:
        """``task_emb [groups, embed_dim]`` of the groups' descriptions or inputs as they are."""
        return self._read(groups).to(self._device)

    def _read(self, groups: Sequence[Group]) -> Tensor:
        if self._of_inputs is None:
            return torch.stack([self._rows[g.task][g.description] for g in groups])
        # Each by itself: a batch rounds by what else is in it, which is what a resumed run has not embedded yet.
        return self._of_inputs.encode([g.samples[0].input for g in groups], batch_size=1).cpu()

    def augmented(self, groups: Sequence[Group]) -> Tensor:
        """As :meth:`clean`, with the settings' mixing and noise: functions of each group's key."""
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


def _covariance(rows: Tensor, mean: Tensor) -> Tensor:
    return (rows - mean).T @ (rows - mean) / len(rows)


def _encoder(settings: SFTSettings | ReconstructionSettings) -> str | EncoderConfig:
    name = settings.encoder
    if name == BASE_MODEL:
        # A copy beside the model that is trained through, which may attend in another way than whoever loads the
        # checkpoint: so both embed alike.
        return EncoderConfig(settings.base_model.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype=settings.dtype)
    if name != MINILM.name and not Path(name).is_dir():
        raise ConfigError(
            f"encoder: expected 'minilm', {BASE_MODEL!r}, 'one-hot' or a local sentence-transformers folder, got {name!r}"
        )
    return name
