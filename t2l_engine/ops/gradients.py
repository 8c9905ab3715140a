"""Autograd of the differentiable ops: what they save, and their backwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2l_engine.ops.reference import fail


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Decorates a backward of ``op``: its results have no derivatives; autograd would take them for constants."""
    message = f"t2l_engine::{op}: expected first derivatives alone, got a derivative of its backward".encode()

    def marked(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(marked, value))
        if not isinstance(value, Tensor):
            return value
        delayed = torch._C._functions.DelayedError(message, 1)  # pyright: ignore[reportAttributeAccessIssue]
        return delayed(value.detach().requires_grad_())

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            with torch.no_grad():
                made = backward(ctx, *grads)
            return marked(made) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else made

        return run

    return decorate


def _trunk_setup(ctx, inputs, output):
    z, weights, side_emb, pos_emb, rotary_ranks, encoder = inputs
    if encoder:
        fail("hypernet_trunk", "encoder", "none where gradients are recorded", f"{len(encoder)} tensors")
    ctx.save_for_backward(z, *weights, side_emb, pos_emb)
    ctx.rotary_ranks = rotary_ranks


@first_order("hypernet_trunk")
def _trunk_backward(ctx, grad):
    z, *weights, side_emb, pos_emb = ctx.saved_tensors
    made = torch.ops.t2l_engine.hypernet_trunk_backward(grad, z, weights, side_emb, pos_emb, ctx.rotary_ranks)
    grad_z, *grad_weights = made[: 1 + len(weights)]
    rest = iter(made[1 + len(weights) :])
    grad_side, grad_pos = (None if t is None else next(rest) for t in (side_emb, pos_emb))
    return grad_z, grad_weights, grad_side, grad_pos, None, []


def _heads_setup(ctx, inputs, output):
    latent, weight, bias, mul_A, add_A, mul_B, add_B, *sizes = inputs
    # For autograd a list that contains None is one argument, a list of tensors one argument per tensor.
    nothing = [None if None in tensors else [None] * len(tensors) for tensors in (mul_A, add_A, mul_B, add_B)]
    ctx.save_for_backward(latent, *weight, *mul_A, *mul_B, *bias)
    ctx.rest = len(weight), nothing, *sizes


@first_order("hypernet_heads")
def _heads_backward(ctx, grads):
    latent, *saved = ctx.saved_tensors
    count, nothing, *sizes = ctx.rest
    weight, mul_A, mul_B, bias = (saved[i : i + count] for i in range(0, 4 * count, count))
    made = torch.ops.t2l_engine.hypernet_heads_backward(grads, latent, weight, bias, mul_A, mul_B, *sizes)
    return made[0], made[1 : 1 + count], made[1 + count :], *nothing, None, None, None


def _delta_setup(ctx, inputs, output):
    x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks = inputs
    # A copy: LoRAHandle writes the ids of the next forward pass into the same tensor.
    ctx.save_for_backward(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters.clone(), ranks)
    ctx.rest = max_seg_len, x.shape


@first_order("lora_delta")
def _delta_backward(ctx, grad):
    *tensors, ranks = ctx.saved_tensors
    max_seg_len, shape = ctx.rest
    grad_x = grad.new_zeros(shape)
    grads = torch.ops.t2l_engine.lora_backward_(grad_x, grad.contiguous(), *tensors, max_seg_len, ranks)
    return grad_x, *grads, *(None,) * 5


def register() -> None:
    """Register the backwards with torch, once the ops have their kernels."""
    for name, backward, setup in (
        ("hypernet_trunk", _trunk_backward, _trunk_setup),
        ("hypernet_heads", _heads_backward, _heads_setup),
        ("lora_delta", _delta_backward, _delta_setup),
    ):
        torch.library.register_autograd(f"t2l_engine::{name}", backward, setup_context=setup)
