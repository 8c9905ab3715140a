"""Gradients into the adapters of a stack, through a model, against the same delta written out in plain torch."""

import dataclasses

import pytest
import torch
from torch import nn

from t2l_engine import AdapterStack, attach
from t2l_engine.lora.autograd import AdaptedLinear
from t2l_engine.testing.cases import F64, LoraCase
from t2l_engine.testing.numerics import GRADIENT_RTOL, ROW_ATOL
from tests.lora.blocks import SHAPES, TwoLinears, leaves

IDS = (2, -1, 0, 2)  # a repeated adapter, the base model, and adapter 1 unused
FACTORS = ("lora_A", "lora_B")


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


@pytest.fixture
def stack(make_stack):
    stack = AdapterStack.cat([make_stack(SHAPES), make_stack(SHAPES, num_adapters=1, rank=6, seed=1)])
    return AdapterStack.cat([stack[0], stack[1], stack[3]])  # ranks 4, 4, 6 in storage of 6


def test_layers_without_adapters_keep_no_graph(stack):
    """Where an adapter begins above the first layer, a training step costs no backward pass below it."""
    for ranks in stack.ranks.values():
        ranks[:, 0] = 0
    model = TwoLinears().requires_grad_(False)
    handle, (own, own_leaves) = attach(model, stack), leaves(stack)
    x, graphs = torch.randn(len(IDS), 5, 16), []
    for layer in model.layers:
        layer["o_proj"].register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    with handle.differentiable(own, IDS):
        model(x).sum().backward()
    assert graphs == [False, True]
    assert all(leaf.grad[:, 0].abs().max() == 0 < leaf.grad[:, 1].abs().max() for leaf in own_leaves)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(stack, frozen):
    x = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(2))
    expected_model, model = TwoLinears().requires_grad_(not frozen), TwoLinears().requires_grad_(not frozen)
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
    model = TwoLinears().requires_grad_(False)
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
    model, x = TwoLinears(), torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
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
    model = TwoLinears()
    handle = attach(model, stack)
    for other, ids, error, message in (
        (stack, 3, IndexError, "ids"),
        (stack[0], [0, 1], IndexError, "ids"),
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


@pytest.mark.parametrize(
    ("bias", "dropped", "starts"), [(False, True, [None]), (True, False, [0, 3]), (True, True, [None, 1])], ids=str
)
def test_adapted_linear_gradcheck(bias, dropped, starts):
    """Of a whole linear, of columns of a packed one, and of both."""
    case = LoraCase("small", ((2, 0), (1, -1), (3, 1)), 6, 5, rank=2, adapters=2, x_dtype=F64, w_dtype=F64)
    widths = [5 if start is None else 2 for start in starts]
    made = [dataclasses.replace(case, out_features=width).make(seed) for seed, width in enumerate(widths)]
    weight, shift = torch.randn(5, 6, dtype=F64), torch.randn(5, dtype=F64) if bias else None
    x, *tensors = (t.detach().clone().requires_grad_() for t in (made[0]["x"], *(m[k] for m in made for k in FACTORS)))
    inner = x.detach().clone().requires_grad_() if dropped else None
    segments = [made[0][name] for name in ("scaling", "seg_indptr", "seg_adapters", "max_seg_len")]
    ranks = torch.tensor([2, 1], dtype=torch.int32)

    def apply(x, inner, *factors):
        members = [t for A, B in zip(factors[::2], factors[1::2], strict=True) for t in (A, B, ranks)]
        return AdaptedLinear.apply(x, inner, weight, shift, *segments, starts, *members)

    assert torch.autograd.gradcheck(apply, (x, inner, *tensors))


def test_second_derivatives_of_an_adapted_linear_are_an_error(stack):
    model = TwoLinears().requires_grad_(False)
    handle, (own, _) = attach(model, stack), leaves(stack)
    x = torch.randn(len(IDS), 4, 16, requires_grad=True)
    with handle.differentiable(own, IDS):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="expected first derivatives alone, got a derivative of its backward"):
            grad.square().sum().backward()


def test_a_linear_under_two_paths(make_stack, uses):
    """Both modules adapt all of it: the general way, which adds both."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(16, 24)})])
            self.decoder = self.encoder

    model = Twice().requires_grad_(False)
    paths = {path: path for path in ("encoder.{layer}.q_proj", "decoder.{layer}.q_proj")}
    stack = make_stack(dict.fromkeys(paths, (16, 24)), num_layers=1, paths=paths)
    x, lora = torch.randn(2, 5, 16), attach(model, stack)
    with torch.no_grad(), lora.use(0):
        expected = model.encoder[0]["q_proj"](x)
    with lora.differentiable(stack[0], 0):
        got = model.encoder[0]["q_proj"](x.requires_grad_())
    got.sum().backward()
    assert (got - expected).abs().max() <= ROW_ATOL and not uses and x.grad.any()


def one(stack, change=lambda model: None):
    """A frozen model that ``change`` was applied to, its handle, and leaves of ``stack``."""
    model = TwoLinears().requires_grad_(False)
    change(model)
    return model, attach(model, stack), *leaves(stack)


def gradients_of(x, model, handle, own, own_leaves, **more):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with handle.differentiable(own, IDS, **more):
        y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *own_leaves])]


@pytest.fixture
def uses(monkeypatch):
    """Calls of AdaptedLinear."""
    made, apply = [], AdaptedLinear.apply
    monkeypatch.setattr(AdaptedLinear, "apply", lambda *args: made.append(1) or apply(*args))
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_both_ways_agree(stack, uses, monkeypatch, dropout):
    x = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(1))
    got = gradients_of(x, *one(stack), dropout=dropout)
    assert len(uses) == 4
    monkeypatch.setattr("t2l_engine.lora.layer.is_plain", lambda *_: False)
    expected = gradients_of(x, *one(stack), dropout=dropout)
    assert len(uses) == 4
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= GRADIENT_RTOL * b.abs().max()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


#: What makes a frozen linear more than one.
CHANGES = {
    "subclass": lambda linear: setattr(linear, "__class__", Doubled),
    "patched": lambda linear: setattr(linear, "forward", lambda x: 2 * nn.functional.linear(x, linear.weight, linear.bias)),
    "trained": lambda linear: linear.requires_grad_(),
    "forward hook": lambda linear: linear.register_forward_hook(lambda *_: None),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda linear: linear.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_more_than_a_frozen_linear_is_called(stack, uses, change):
    x = torch.randn(len(IDS), 5, 16, generator=torch.Generator().manual_seed(1))
    gradients_of(x, *one(stack, lambda model: CHANGES[change](model.layers[1]["q_proj"])))
    assert len(uses) == 3  # the three other linears


def test_autocast_and_global_hooks_are_seen(stack, uses):
    x, made = torch.randn(len(IDS), 5, 16), one(stack)
    with torch.autocast("cpu", torch.bfloat16):
        gradients_of(x, *made)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    gradients_of(x, *made)
    hook.remove()
    assert not uses and seen.count(nn.Linear) == 4


def test_changed_weights_are_noticed(stack):
    """Between forward and backward: the gradient of the input would be wrong."""
    model, handle, own, _ = one(stack)
    x = torch.randn(len(IDS), 5, 16, requires_grad=True)
    with handle.differentiable(own, IDS):
        loss = model(x).sum()
    model.layers[0]["q_proj"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
