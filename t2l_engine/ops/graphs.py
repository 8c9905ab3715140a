"""CUDA graphs: what is kept for later calls must not be made while one is captured, for replays alone compute it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is done with ``tensor`` now becomes a part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
