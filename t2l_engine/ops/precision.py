"""Precision that does not depend on what the caller runs."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Ops in the block have the dtypes of their operands on ``device``, also where the caller has autocast on."""
    on = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
