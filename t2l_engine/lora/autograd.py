"""An adapted linear under autograd: one node, whose sums are made in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_add = torch.ops.t2l_engine.lora_add_.default
_backward = torch.ops.t2l_engine.lora_backward_.default


def is_plain(base: Any, x: Tensor) -> bool:
    """Whether ``base(x)`` is ``linear(x, weight, bias)`` of frozen parameters and nothing else would notice the call.

    False for subclasses with a forward of their own, hooks, weights that are a tensor subclass (quantised, distributed) and
    autocast.
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
    """``linear(x, weight, bias)`` plus the LoRA update of ``inner``, with gradients of ``x``, ``inner``, A and B.

    ``x``: contiguous.  ``inner``: ``x`` after dropout, None for ``x`` itself.  Other arguments as of ``lora_add_``.  The
    update is added to the product in place, and in the backward its gradient of ``x`` to that of the product.
    """

    @staticmethod
    def forward(
        x: Tensor,
        inner: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        seg_indptr: Tensor,
        seg_adapters: Tensor,
        max_seg_len: int,
        ranks: Tensor,
    ) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        _add(y, x if inner is None else inner, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, inner, weight, _, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks = inputs
        # A copy: LoRAHandle writes the ids of the next forward pass into the same tensor.
        segments = seg_indptr, seg_adapters.clone(), ranks
        ctx.save_for_backward(x if inner is None else inner, weight, lora_A, lora_B, scaling, *segments)
        ctx.dropped, ctx.max_seg_len = inner is not None, max_seg_len

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inner, weight, lora_A, lora_B, scaling, seg_indptr, seg_adapters, ranks = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = (grad.view(-1, grad.shape[-1]) @ weight).view(inner.shape)
        grad_inner = torch.zeros_like(inner) if grad_x is None or ctx.dropped else grad_x
        segments = seg_indptr, seg_adapters, ctx.max_seg_len, ranks
        grads = _backward(grad_inner, grad, inner, lora_A, lora_B, scaling, *segments)
        return grad_x, grad_inner if ctx.dropped else None, None, None, *grads, *(None,) * 5
