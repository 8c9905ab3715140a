"""The stacks that hypernetworks write: made without memory, and checked when they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.hypernetwork.config import TargetConfig


def meta_stack(
    config: TargetConfig, paths: Mapping[str, str], ranks: Sequence[int], dtype: torch.dtype, first_layer: int = 0
) -> AdapterStack:
    """A stack of adapters of ``ranks``, 0 below ``first_layer``: A, B and scaling on the meta device, ranks on the CPU.

    ``paths``: of the stack, in the order of ``config.modules``.
    """
    count, layers, rank, lora_A, lora_B = len(ranks), config.num_layers, max(ranks), {}, {}
    for name, n_in, n_out in zip(paths, config.in_features, config.out_features, strict=True):
        lora_A[name] = torch.empty(count, layers, rank, n_in, dtype=dtype, device="meta")
        lora_B[name] = torch.empty(count, layers, n_out, rank, dtype=dtype, device="meta")
    of_layers = torch.tensor(ranks, dtype=torch.int32)[:, None].repeat(1, layers)
    of_layers[:, :first_layer] = 0
    scaling = torch.empty(count, dtype=torch.float32, device="meta")
    return AdapterStack(lora_A, lora_B, scaling, {name: of_layers.clone() for name in paths}, dict(paths))


def check_out(
    out: object,
    config: TargetConfig,
    paths: Mapping[str, str],
    ranks: Sequence[int],
    device: torch.device,
    *,
    higher_rank: bool = False,
) -> None:
    """ValueError unless ``out`` is a stack on ``device`` with the shapes of :func:`meta_stack`; ``higher_rank``: or of more.

    From sizes alone: this runs before every generation into slots.
    """
    if not isinstance(out, AdapterStack) or out.paths != paths:
        got = out.paths if isinstance(out, AdapterStack) else type(out).__name__
        raise ValueError(f"out: expected a stack for the modules {paths}, got {got}")
    first, least = [len(ranks), config.num_layers], max(ranks)
    for name, n_in, n_out in zip(paths, config.in_features, config.out_features, strict=True):
        a, b = out.lora_A[name], out.lora_B[name]
        rank = max(a.shape[2], least) if higher_rank else least
        wanted, got = ([*first, rank, n_in], [*first, n_out, rank]), ([*a.shape], [*b.shape])
        if got != wanted or a.device != device:
            more = ", or of higher rank," if higher_rank else ""
            raise ValueError(f"out: {name}: expected lora_A and lora_B {wanted}{more} on {device}, got {got} on {a.device}")
