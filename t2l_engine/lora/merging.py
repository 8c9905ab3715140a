"""Adapters in the weights of linears: what merging writes, and putting it there."""

from __future__ import annotations

import torch
from torch import Tensor

from t2l_engine.lora.layer import LoRALinear
from t2l_engine.lora.locate import is_transposed
from t2l_engine.lora.sharding import local
from t2l_engine.ops.precision import without_autocast


def merged_weight(wrapped: LoRALinear, index: int) -> Tensor:
    """The weight of ``wrapped`` plus adapter ``index``, in float32 or wider."""
    weight = local(wrapped.weight)
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(exact, copy=True)
    rows = merged.T if is_transposed(wrapped.base) else merged
    with without_autocast(weight.device):
        for m in wrapped.members:
            r, start = int(m.ranks[index]), m.start or 0
            delta = m.lora_B[index, :, :r].to(exact) @ m.lora_A[index, :r].to(exact)
            rows[start : start + len(delta)] += delta * m.scaling[index]
    return merged


def overwrite(weight: Tensor, values: Tensor) -> None:
    # Weights created in inference mode can be written in that mode only.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(values)
