"""Gradients of the ops: against finite differences, of first order alone, and unchanged by autocast."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import F64, HyperCase
from tests.ops.kernel_cases import SMALL, TINY_HYPERS, by_name, without_y


def test_lora_delta_gradcheck():
    arguments = oracle.in_float64(without_y(SMALL.make()) | {"ranks": torch.tensor([2, 1], dtype=torch.int32)})
    arguments["scaling"] = arguments["scaling"].float()
    inputs = {name: arguments[name].detach().clone().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    run = lambda *tensors: ops.lora_delta(**arguments | dict(zip(inputs, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("case", TINY_HYPERS, **by_name)
def test_hypernet_gradcheck(case):
    trunk = case.make_trunk(dtype=F64)
    tensors = [
        t.requires_grad_() for t in (trunk["z"], *trunk["weights"], trunk["side_emb"], trunk["pos_emb"]) if t is not None
    ]

    def run_trunk(*_):
        return ops.hypernet_trunk(**trunk)

    assert torch.autograd.gradcheck(run_trunk, tensors, fast_mode=True)
    heads = case.make_heads(dtype=F64)
    heads["latent"] = heads["latent"].clone()
    tensors = [t.requires_grad_() for t in (heads["latent"], *heads["weight"], *(heads["bias"] or ()))]

    def run_heads(*_):
        lora_A, lora_B = ops.hypernet_heads(**heads)
        return *lora_A, *lora_B

    assert torch.autograd.gradcheck(run_heads, tensors, fast_mode=True)


def differentiable(dtype):
    """By op a call, and the inputs that it is differentiable in."""
    lora = without_y(SMALL.make())
    lora |= {name: lora[name].to(dtype).requires_grad_() for name in ("x", "lora_A", "lora_B")}
    trunk, heads = (make(dtype=dtype) for make in (TINY_HYPERS[0].make_trunk, TINY_HYPERS[0].make_heads))
    latent = heads["latent"].clone().requires_grad_()
    z = trunk["z"].requires_grad_()
    return {
        "lora_delta": (lambda: ops.lora_delta(**lora), [lora[name] for name in ("x", "lora_A", "lora_B")]),
        "hypernet_trunk": (lambda: ops.hypernet_trunk(**trunk), [z]),
        "hypernet_heads": (
            lambda: torch.cat([t.flatten() for t in ops.hypernet_heads(**heads | {"latent": latent})[0]]),
            [latent],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("op", ["lora_delta", "hypernet_trunk", "hypernet_heads"])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_second_derivatives_are_an_error(op, dtype, loss):
    """Not zero, and not a part; the first are those without a graph."""
    call, inputs = differentiable(dtype)[op]
    expected = torch.autograd.grad(loss(call()), inputs)
    grads = torch.autograd.grad(loss(call()), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    with pytest.raises(RuntimeError, match=f"t2l_engine::{op}: expected first derivatives alone, got a derivative of its"):
        sum(grad.square().sum() for grad in grads).backward()


def test_autocast_changes_no_op():
    """Neither a reference, nor a backward."""
    half = without_y(SMALL.make())
    half |= {name: half[name].half() for name in ("x", "lora_A", "lora_B")}
    case = TINY_HYPERS[0]
    torch.manual_seed(1)
    task_emb, encoder = torch.randn(2, 7), [torch.randn(4, 7), torch.randn(4), torch.ones(4), torch.zeros(4)]

    def calls():
        yield ops.lora_delta(**half)
        yield ops.hypernet_trunk(**case.make_trunk() | {"z": task_emb, "encoder": encoder})
        for call, inputs in differentiable(torch.float32).values():
            yield from torch.autograd.grad(call().square().sum(), inputs)

    outside = list(calls())
    with torch.autocast("cpu", torch.bfloat16):
        inside = list(calls())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_heads_backward_keeps_nothing():
    """It is no recording of the forward op, whose results would all be in memory."""
    order = ("latent", "weight", "bias", "mul_A", "mul_B", "rank", "in_features", "out_features")
    heads, saved = HyperCase("backward", modules=5).make_heads(), []
    grads = [torch.ones_like(t) for pair in zip(*ops.hypernet_heads(**heads), strict=True) for t in pair]
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        reference.hypernet_heads_backward(grads, *(heads[name] for name in order))
    assert not saved
