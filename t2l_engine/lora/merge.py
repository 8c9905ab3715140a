"""Adapters added to the weights of their linears: which linears allow it, and the new weights."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from t2l_engine.files.weights import WEIGHT_DTYPES
from t2l_engine.lora.layer import LoRALinear
from t2l_engine.lora.locate import Target, features, is_transposed
from t2l_engine.lora.sharding import is_fully_sharded, local
from t2l_engine.ops.reference import without_autocast

_CONV1D_FORWARD = "transformers.pytorch_utils.Conv1D.forward"


def check_mergeable(model: nn.Module, wrapped: list[tuple[Target, LoRALinear]]) -> None:
    """ValueError unless every layer is a plain linear with a weight of its own."""
    if is_fully_sharded(model):
        raise ValueError("merge: fully_shard has divided weights of the model, which have no part to merge into")
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    owners = Counter(_memory(p) for p in parameters)
    bases = Counter(id(layer.base) for _, layer in wrapped)
    for target, layer in wrapped:
        base = layer.base
        weight = _plain_weight(base)
        if weight is None:
            raise ValueError(f"merge: {target.path} is a {type(base).__name__} without a plain weight to merge into")
        if owners[_memory(weight)] > 1 or bases[id(base)] > 1:
            raise ValueError(f"merge: {target.path}: other modules share its weight, and merging would change them too")


def _plain_weight(base: nn.Module) -> Tensor | None:
    """The weight of a linear that computes with it as ``nn.Linear`` or ``Conv1D`` do, None for any other layer."""
    forward = type(base).forward
    if forward is not nn.Linear.forward and f"{forward.__module__}.{forward.__qualname__}" != _CONV1D_FORWARD:
        return None
    weight = (base._parameters | base._buffers).get("weight")  # hooks and parametrizations compute one that is in neither
    if weight is None or type(local(weight)) not in (Tensor, nn.Parameter):  # a subclass may compute in its own way
        return None
    n_in, n_out = features(base) or (None, None)
    shape = (n_in, n_out) if is_transposed(base) else (n_out, n_in)
    return weight if weight.dtype in WEIGHT_DTYPES and weight.shape == shape else None


def _memory(weight: Tensor) -> int:
    """An id that is equal for weights that share memory, even as two parameters."""
    return weight.data_ptr() or id(weight) if type(weight) is nn.Parameter else id(weight)


def merged_weight(layer: LoRALinear, index: int) -> Tensor:
    """The weight of ``layer`` plus adapter ``index``, in float32 or wider."""
    weight = local(layer.weight)
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(exact, copy=True)
    rows = merged.T if is_transposed(layer.base) else merged
    with without_autocast(weight.device):
        for m in layer.adapted_modules:
            r, start = int(m.ranks[index]), m.start or 0
            delta = m.lora_B[index, :, :r].to(exact) @ m.lora_A[index, :r].to(exact)
            rows[start : start + len(delta)] += delta * m.scaling[index]
    return merged


def overwrite(weight: Tensor, values: Tensor) -> None:
    """Write ``values`` into ``weight``, in inference mode if it was created there: no other mode can."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(values)
