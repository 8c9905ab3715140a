"""Baselines on a library of adapters: its average, and routing of tokens over it (Arrow).

A library is an :class:`t2l_engine.AdapterStack` of N adapters for the same modules.  Plain torch, without PEFT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import short_repr
from t2l_engine.lora.handle import attach
from t2l_engine.lora.locate import Packed, Target, check_stack, device_of, find_all, slot_dtype
from t2l_engine.ops.reference import accumulation_dtype, without_autocast

#: Experts per token in the paper.
TOP_K = 4


@torch.no_grad()
def average(stack: AdapterStack) -> AdapterStack:
    """One adapter whose A and B are the means of the library's A and B: the mean of factors, not of the products B A.

    Sensible for adapters that share their initial A.  Equals PEFT's "linear" combination with weights 1 / N^2, since PEFT
    multiplies each factor by the square root of the weight.

    Source: model soups (arXiv 2203.05482), on the factors.

    Args:
        stack: N adapters, A ``[N, n, r, in]``, B ``[N, n, out, r]``, any floating-point dtype.

    Returns:
        A stack of one adapter in the dtype of ``stack``; means are taken in float32 (float64 for float64).

    Raises:
        ValueError: no adapter, or adapters of different scalings or, in some module and layer, of different ranks.
    """
    _check_library(stack)
    scalings = stack.scaling.unique().tolist()
    if len(scalings) > 1:
        raise ValueError(f"stack: expected one scaling to average, got {short_repr(scalings)}")
    for name, ranks in stack.ranks.items():
        unequal = (ranks != ranks[0]).any(dim=0).nonzero().flatten().tolist()
        if unequal:
            found = ranks[:, unequal[0]].unique().tolist()
            raise ValueError(f"stack: {name}: layer {unequal[0]}: expected one rank to average, got {short_repr(found)}")

    def mean(side: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.mean(0, keepdim=True, dtype=accumulation_dtype(t)).to(t.dtype) for name, t in side.items()}

    ranks = {name: r[:1].clone() for name, r in stack.ranks.items()}
    scaling = stack.scaling[:1].clone()
    return AdapterStack(mean(stack.lora_A), mean(stack.lora_B), scaling, ranks, stack.paths, partial=stack.partial)


def prototypes(a: Tensor, b: Tensor) -> Tensor:
    """Per adapter, the unit input direction with the largest response of B A: Arrow's routing prototypes.

    Source: Arrow (arXiv 2405.11157): the right singular vector of B A with the largest singular value.

    Args:
        a, b: A ``[..., r, in]`` and the transposed B ``[..., r, out]``, zero beyond the true ranks.

    Returns:
        ``[..., in]``, rows of norm 1 (their sign is arbitrary), zero where B A is zero; float32, or float64 for float64.
    """
    # B A = Q_b (R_b R_a^T) Q_a^T with orthogonal Q_a, Q_b: an SVD of the r x r matrix in brackets suffices.
    basis, r_a = torch.linalg.qr(a.double().mT)
    r_b = torch.linalg.qr(b.double().mT, mode="r").R
    _, sizes, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    vectors = (basis @ right[..., 0, :, None]).squeeze(-1)
    return (vectors * (sizes[..., :1] > 0)).to(accumulation_dtype(a))


def routing_weights(x: Tensor, directions: Tensor, top_k: int) -> Tensor:
    """Weight of every expert for every token: softmax over the ``top_k`` largest ``|x . v_i|``, 0 for the others.

    Source: Arrow (arXiv 2405.11157), at temperature 1.

    Args:
        x: inputs of a layer, ``[T, in]``, any floating-point dtype.
        directions: the experts' :func:`prototypes` of that layer, ``[N, in]``.

    Returns:
        ``[T, N]`` float32 (float64 if an operand is), rows sum to 1.  Products are computed in that dtype.

    Raises:
        RuntimeError: ``top_k`` exceeds N.
    """
    acc = accumulation_dtype(x, directions)
    top = (x.to(acc) @ directions.to(acc).mT).abs().topk(top_k, dim=-1)
    weights = torch.zeros(len(x), len(directions), dtype=acc, device=x.device)
    return weights.scatter(-1, top.indices, top.values.softmax(dim=-1))


@contextlib.contextmanager
def arrow(model: nn.Module, stack: AdapterStack, top_k: int = TOP_K, *, packed: Packed | None = None) -> Iterator[None]:
    """A context with Arrow routing: in every adapted layer, each token uses the ``top_k`` adapters with the closest
    :func:`prototypes`.

    A layer's output is ``W h + sum_i w_i s_i B_i A_i h`` with the :func:`routing_weights` ``w`` of its input ``h``, as in
    PEFT's Arrow.  An adapter with B A = 0 in a layer has the logit 0 there; if it is among the ``top_k``, its term is zero.

    Inputs ``[..., in]`` give outputs ``[..., out]`` in the dtype of the layer.  A and B are copied in the dtype of the
    layer's weight, in which their products are computed; logits and weights are float32 (:func:`routing_weights`).

    Source: Arrow (arXiv 2405.11157).

    Args:
        model, packed: as :func:`t2l_engine.attach` takes them.  Modules of a packed projection are routed separately.
        stack: the library of N adapters, the experts.
        top_k: experts a token uses, of fewer adapters all; 4 in the paper.

    Raises ValueError: the errors of :func:`t2l_engine.attach`; a linear that is in several places.
    """
    _check_library(stack)
    attach(model, packed=packed)  # without a stack: only checks the model
    places = find_all(model, stack, packed)
    clean, routed, paths = stack.to(device_of(model)).zero_padded(), [], {}
    for name, targets in places.items():
        for layer, target in targets.items():
            other = paths.setdefault(id(target.linear), target.path)
            if other != target.path:  # its hook would serve both
                raise ValueError(f"{name}: {other} and {target.path} are one linear; they cannot be routed apart")
            # A partial stack has fewer layers.
            if layer < clean.ranks[name].shape[1] and clean.ranks[name][:, layer].any():
                routed.append((target.linear, _Routed(target, clean, name, layer, min(top_k, len(stack)))))
    with contextlib.ExitStack() as hooks:  # last: errors above (non-finite adapters) leave the model unchanged
        for linear, hook in routed:
            hooks.enter_context(linear.register_forward_hook(hook, with_kwargs=True))
        yield


class _Routed:
    """Forward hook of one module."""

    @torch.no_grad()
    def __init__(self, target: Target, stack: AdapterStack, name: str, layer: int, top_k: int):
        a, b = stack.lora_A[name][:, layer], stack.lora_B[name][:, layer].mT
        dtype = slot_dtype(target.linear, a.dtype)
        self._path, self._columns, self._top_k = target.path, target.columns, top_k
        self._A, self._B = (side.flatten(0, 1).to(dtype, copy=True) for side in (a, b))  # [N r, in], [N r, out]
        self._scaling, self._directions = stack.scaling.clone(), prototypes(a, b)  # [N], [N, in]

    def __call__(self, linear: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))  # the first argument, as in LoRALinear
        if not isinstance(y, Tensor):
            raise RuntimeError(f"{self._path}: expected a layer that returns a tensor, got {type(y).__name__}")
        with without_autocast(x.device):  # autocast would round the logits
            flat = x.reshape(-1, x.shape[-1])
            weights = routing_weights(flat, self._directions, self._top_k) * self._scaling  # [T, N]
            inner = F.linear(flat.to(self._A.dtype), self._A).unflatten(-1, (len(self._scaling), -1))  # [T, N, r]
            inner = (inner * weights[..., None]).to(self._B.dtype).flatten(1)
            delta = (inner @ self._B).view(*y.shape[:-1], self._B.shape[1])
        if self._columns is not None:
            start, end = self._columns
            delta = F.pad(delta, (start, y.shape[-1] - end))
        return y + delta.to(y.dtype)


def _check_library(stack: AdapterStack) -> None:
    check_stack("stack", stack)
    if not len(stack):
        raise ValueError("stack: expected at least one adapter, got none")
