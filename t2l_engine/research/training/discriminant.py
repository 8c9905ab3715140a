"""Initialisation of a task encoder by linear discriminant analysis (Fisher 1936) of the descriptions' embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Added to the within-task variance along every axis, which few descriptions underestimate, per mean square of embeddings.
WORDING_VARIANCE = 0.1
#: Least variance of an axis before scaling, in units of the within-task variance: keeps noise from being amplified.
MIN_VARIANCE = 0.01


@torch.no_grad()
def initialise(linear: nn.Linear, classes: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Initialise ``linear`` with the axes along which tasks differ most, compared with the wordings of a task.

    Embeddings are centred at the mean over tasks, whitened by the within-task covariance and projected onto the axes of
    largest total variance, each divided by the fourth root of its variance; a random rotation by ``seed`` follows.  With a
    random start most of the encoder's output is wording or common to all texts, and the first steps learn to suppress it.

    Args:
        classes: of each task, embeddings ``[descriptions, embed_dim]``.
        scale: root mean square of the embeddings, as far as texts differ in them.
    """
    embed_dim = linear.in_features
    classes = [rows.double() / scale for rows in classes]
    means = torch.stack([rows.mean(dim=0) for rows in classes])
    # Every task counts alike, whatever its number of descriptions.
    residuals = [(rows - mean) / len(rows) ** 0.5 for rows, mean in zip(classes, means, strict=True)]
    within = torch.cat(residuals)
    within = within.T @ within / len(classes)
    centre = means.mean(dim=0)
    between = (means - centre).T @ (means - centre) / len(means)
    values, axes = torch.linalg.eigh(within + WORDING_VARIANCE * torch.eye(embed_dim, dtype=torch.float64))
    whiten = axes / values.sqrt() @ axes.T
    values, axes = torch.linalg.eigh(whiten @ (within + between) @ whiten)
    kept = min(linear.out_features, embed_dim)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(linear.out_features, kept, dtype=torch.float64, generator=generator)
    rotation, scales = torch.linalg.qr(random)[0], values[-kept:].clamp_min(MIN_VARIANCE) ** -0.25
    weight = rotation @ (axes[:, -kept:] * scales).T @ whiten / scale
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ centre * scale)
