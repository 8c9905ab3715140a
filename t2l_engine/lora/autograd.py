"""An adapted linear under autograd: one node, whose sums are made in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.ops.gradients import first_order
from t2l_engine.ops.reference import without_autocast
from t2l_engine.ops.registry import lora_add_group_op, lora_add_op, lora_backward_op


def is_plain(base: Any, x: Tensor) -> bool:
    """Whether ``base(x)`` is no more than ``linear(x, weight, bias)`` of frozen parameters.

    False for subclasses with their own forward, hooks, tensor subclasses as weights (quantised, distributed) and autocast.
    """
    if type(base).forward is not nn.Linear.forward or "forward" in base.__dict__:
        return False
    weight, bias = base.weight, base.bias
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == weight.dtype
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
        and not torch.is_autocast_enabled(x.device.type)
    )


class AdaptedLinear(torch.autograd.Function):
    """``linear(x, weight, bias)`` plus the LoRA updates of ``inner``, with gradients of ``x``, ``inner`` and every A and B.

    ``x``: contiguous.  ``inner``: ``x`` after dropout, None for ``x`` itself.  ``starts``: the first column of each module,
    None for the whole linear (first in the list).  ``modules``: A, B and ranks of each in turn.  Other arguments as
    in ``lora_add_``.  Updates are added to the product in place, and their gradients of ``x`` to that of the product.
    """

    @staticmethod
    def forward(
        x: Tensor,
        inner: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        scaling: Tensor,
        seg_indptr: Tensor,
        seg_adapters: Tensor,
        max_seg_len: int,
        starts: list[int | None],
        *modules: Tensor,
    ) -> Tensor:
        y, inner = nn.functional.linear(x, weight, bias), x if inner is None else inner
        segments = scaling, seg_indptr, seg_adapters, max_seg_len
        lora_A, lora_B, ranks = (list(modules[i::3]) for i in range(3))
        if starts[0] is None:
            lora_add_op(y, inner, lora_A.pop(0), lora_B.pop(0), *segments, ranks.pop(0))
        if lora_A:
            lora_add_group_op(y, inner, lora_A, lora_B, *segments, ranks, [start for start in starts if start is not None])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, inner, weight, _, scaling, seg_indptr, seg_adapters, max_seg_len, starts, *modules = inputs
        # A copy: LoRAHandle writes the ids of the next forward pass into the same tensor.
        segments = scaling, seg_indptr, seg_adapters.clone()
        ctx.save_for_backward(x if inner is None else inner, weight, *segments, *modules)
        ctx.dropped, ctx.max_seg_len, ctx.starts = inner is not None, max_seg_len, starts

    @staticmethod
    @first_order("AdaptedLinear")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inner, weight, *segments = ctx.saved_tensors
        segments, modules = segments[:3], segments[3:]
        grad, grad_x, grads = grad.contiguous(), None, []
        if ctx.needs_input_grad[0]:
            with without_autocast(grad.device):  # as the forward pass was, see is_plain
                grad_x = (grad.view(-1, grad.shape[-1]) @ weight).view(inner.shape)
        grad_inner = torch.zeros_like(inner) if grad_x is None or ctx.dropped else grad_x
        for start, A, B, ranks in zip(ctx.starts, modules[::3], modules[1::3], modules[2::3], strict=True):
            columns = grad if start is None else grad[..., start : start + B.shape[1]]
            grads += [*lora_backward_op(grad_inner, columns, inner, A, B, *segments, ctx.max_seg_len, ranks), None]
        return grad_x, grad_inner if ctx.dropped else None, *(None,) * 7, *grads
