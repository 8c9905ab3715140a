"""Gradients into the adapters of a stack, through a model, against the same delta written out in plain torch."""

import pytest
import torch
from torch import nn

from t2l_engine import AdapterStack, attach
from t2l_engine.testing.numerics import GRADIENT_RTOL, ROW_ATOL

IDS = (2, -1, 0, 2)  # a repeated adapter, the base model, and adapter 1 unused
SHAPES = {"q_proj": (16, 24), "o_proj": (24, 16)}


class Stack(nn.Module):
    """Two layers of two linears over ``[rows, tokens, 16]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape) for name, shape in SHAPES.items()}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["o_proj"](torch.tanh(layer["q_proj"](x)))
        return x


def plain(model, stack, x):
    """The same, row by row."""

    def linear(name, i, row, adapter):
        y = model.layers[i][name](row)
        if adapter < 0:
            return y
        A, B, r = stack.lora_A[name][adapter, i], stack.lora_B[name][adapter, i], stack.ranks[name][adapter, i]
        return y + stack.scaling[adapter] * (row @ A[:r].mT) @ B[:, :r].mT

    rows = []
    for row, adapter in zip(x, IDS, strict=True):
        for i in range(2):
            row = row + linear("o_proj", i, torch.tanh(linear("q_proj", i, row, adapter)), adapter)
        rows.append(row)
    return torch.stack(rows)


def leaves(stack):
    """The stack on fresh leaves, and these."""
    tensors = [t.detach().clone().requires_grad_() for t in (*stack.lora_A.values(), *stack.lora_B.values())]
    halves = (dict(zip(stack.lora_A, part, strict=True)) for part in (tensors[: len(SHAPES)], tensors[len(SHAPES) :]))
    return AdapterStack(*halves, stack.scaling, stack.ranks, stack.paths), tensors


@pytest.fixture
def stack(make_stack):
    stack = AdapterStack.cat([make_stack(SHAPES), make_stack(SHAPES, num_adapters=1, rank=6, seed=1)])
    return AdapterStack.cat([stack[0], stack[1], stack[3]])  # ranks 4, 4, 6 in storage of 6


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(stack, frozen):
    x = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(2))
    expected_model, model = Stack().requires_grad_(not frozen), Stack().requires_grad_(not frozen)
    expected_stack, expected_leaves = leaves(stack)
    expected_x = x.clone().requires_grad_()
    expected = plain(expected_model, expected_stack, expected_x)
    (expected * weight).sum().backward()

    handle = attach(model, stack)
    own, own_leaves = leaves(stack)
    own_x = x.clone().requires_grad_()
    with handle.differentiable(own, IDS):
        got = model(own_x)
    (got * weight).sum().backward()

    assert (got - expected).abs().max() <= ROW_ATOL
    handle.detach()
    pairs = [(own_x, expected_x), *zip(own_leaves, expected_leaves, strict=True)]
    if not frozen:
        pairs += zip(model.parameters(), expected_model.parameters(), strict=True)
    for a, b in pairs:
        assert b.grad.abs().max() > 0
        assert (a.grad - b.grad).abs().max() <= GRADIENT_RTOL * b.grad.abs().max()
    for leaf in own_leaves:
        assert not leaf.grad[1].any() and leaf.grad[0].any()


@pytest.mark.parametrize("outer", [None, (1, 1, 1, 1)], ids=["none", "set"])
def test_one_backward_of_several_forwards(stack, outer):
    """Gradient accumulation: the ids of a later forward pass leave an earlier one's gradients alone."""
    model = Stack().requires_grad_(False)
    x = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(1))
    handle = attach(model, stack)
    if outer is not None:
        handle.set(outer)

    def gradients(together):
        own, own_leaves = leaves(stack)
        losses = []
        for ids in (IDS, (0, 1, -1, 2)):
            with handle.differentiable(own, ids):
                losses.append(model(x).square().sum())
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        return [leaf.grad for leaf in own_leaves]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= GRADIENT_RTOL * b.abs().max()


def test_routing_returns_and_slots_are_left_alone(stack):
    model, x = Stack(), torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    handle = attach(model, stack)
    handle.set(0)
    with torch.no_grad():
        before = model(x)
        with handle.differentiable(stack[2], 0):
            inside = model(x)
            with handle.use(0):
                assert torch.equal(model(x), before)
            assert torch.equal(model(x), inside)
        assert not torch.equal(inside, before) and torch.equal(model(x), before)
        with pytest.raises(ZeroDivisionError), handle.differentiable(stack, 2):
            raise ZeroDivisionError
        assert torch.equal(model(x), before)
        with handle.use(2):
            assert (model(x) - inside).abs().max() <= ROW_ATOL


def test_refusals(stack, make_stack):
    model = Stack()
    handle = attach(model, stack)
    for other, ids, error, message in (
        (stack, 3, IndexError, "ids"),
        (stack[0], [0, 1], IndexError, "ids"),
        (make_stack({"q_proj": (16, 16)}), 0, ValueError, "q_proj: .* 16/16, the model has 16/24"),
        (make_stack({"q_proj": (16, 24)}, num_layers=3), 0, ValueError, "q_proj: .* 3 layers"),
        (make_stack({"v_proj": (16, 24)}), 0, ValueError, "v_proj: .* has no such module"),
    ):
        with pytest.raises(error, match=message), handle.differentiable(other, ids):
            pass
    handle.detach()
    handle = attach(model, make_stack({"q_proj": (16, 24)}))
    with pytest.raises(ValueError, match="o_proj is not attached"), handle.differentiable(stack, 0):
        pass
    handle.detach()
    with pytest.raises(RuntimeError, match="detached"), handle.differentiable(stack, 0):
        pass
