"""Oracles of the ops: the reference in float64 on the same rounded operands, and the allowed error of every element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import F64, HyperCase, mapped


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with their floating-point tensors in float64."""
    return mapped(lambda t: t.double() if t.is_floating_point() else t, arguments)


def lora(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, delta, allowed error of y), float64 ``[tokens, out]``, for arguments of ``ops.lora_add_``."""
    given = in_float64(arguments)
    y0 = given.pop("y")
    delta = reference.lora_delta(**given)
    y = y0 + delta
    bound = torch.zeros_like(y)
    ranks, bounds = arguments["ranks"], arguments["seg_indptr"].tolist()
    for s, adapter in enumerate(arguments["seg_adapters"].tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        if adapter >= 0:
            r = given["lora_A"].shape[1] if ranks is None else int(ranks[adapter])
            a, b = given["lora_A"][adapter, :r], given["lora_B"][adapter, :, :r]
            scaling = float(given["scaling"][adapter])
            bound[rows] = numerics.lora_bound(given["x"][rows], a, b, scaling, y[rows], delta[rows], arguments["y"].dtype)
    return y, delta, bound


def gradients(
    backward: Callable[..., tuple[Tensor, Tensor]], grad: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(of x, A, B) by ``backward``, an op like ``lora_backward_``, for arguments of ``ops.lora_delta``."""
    grad_x = torch.zeros_like(arguments["x"], memory_format=torch.contiguous_format)
    return grad_x, *backward(grad_x, grad, *arguments.values())


def problems_of(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of ``lora_add_`` for each problem of a group, ``y`` as its column slice."""
    lists = ("lora_A", "lora_B", "ranks", "offsets")
    rest = {k: v for k, v in arguments.items() if k not in (*lists, "y")}
    return [
        rest | {"y": arguments["y"][:, start : start + b.shape[1]], "lora_A": a, "lora_B": b, "ranks": r}
        for a, b, r, start in zip(*(arguments[k] for k in lists), strict=True)
    ]


def heads(case: HyperCase, seed: int) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """(arguments of the heads, A and B of every module in float64, the magnitudes that their errors are relative to)."""
    exact = case.make_heads(seed, dtype=F64)
    magnitude = reference.hypernet_heads(**mapped(torch.abs, exact))
    return case.make_heads(seed), reference.hypernet_heads(**exact), magnitude
