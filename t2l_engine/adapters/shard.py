"""Shard: the part of a linear that one process has in tensor parallelism."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """Half-open ranges of the input and output features of a linear that this process has.

    Where output features are divided, a process has rows of B ``[out, r]`` and all of A ``[r, in]``; where input features
    are, columns of A and all of B.  What takes a Shard raises ValueError for ranges that the linear does not have.

    Source: tensor parallelism as in Megatron-LM (arXiv 1909.08053).

    >>> import t2l_engine as t2l
    >>> t2l.Shard((0, 576), (96, 192)).sizes  # rows 96 to 191 of B, all of A
    (576, 96)
    """

    in_features: tuple[int, int]
    out_features: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of (input, output) features of this process."""
        return self.in_features[1] - self.in_features[0], self.out_features[1] - self.out_features[0]

    def take(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Views of what this process has of A ``[..., r, in]`` and B ``[..., out, r]``."""
        return A[..., slice(*self.in_features)], B[..., slice(*self.out_features), :]

    def check(self, argument: str, features: tuple[int, int] | None) -> None:
        """ValueError naming ``argument`` unless these are ranges of ``features`` (in, out); None: no such module."""
        if features is None:
            raise ValueError(f"{argument}: expected one of the modules, got another")
        for (start, end), size in zip(self, features, strict=True):
            if not 0 <= start < end <= size:
                raise ValueError(f"{argument}: expected ranges of the in/out features {features}, got {tuple(self)}")
