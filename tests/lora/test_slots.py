"""Models whose layers lie on several devices: without a second one, CPU memory under two names, and torch's fake devices."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from t2l_engine import AdapterBatch, AdapterStack, attach
from t2l_engine.lora import slots
from t2l_engine.lora.locate import device_of
from tests.lora.blocks import SHAPES, TwoLinears, leaves

SECOND = torch.device("cpu", 1)  # to a dictionary another device than "cpu", but the same memory


@pytest.fixture
def stack(make_stack):
    return make_stack(SHAPES, num_layers=4)


@pytest.fixture
def spread(monkeypatch):
    """Makes the layers of a model that are named lie on a second device, as far as the handle knows."""

    def of(model, layers):
        there = {id(linear) for i in layers for linear in model.layers[i].values()}
        place = lambda linear, without: SECOND if id(linear) in there else device_of(linear, without)  # noqa: E731
        monkeypatch.setattr(slots, "device_of", place)
        return model

    return of


RAGGED = AdapterBatch(torch.tensor([0, 4, 5, 15]).int(), torch.tensor([1, -1, 0]).int(), 10)


@pytest.mark.parametrize("layers", [(2, 3), (0,), (1, 3)], ids=str)
def test_the_bits_of_one_device(spread, stack, layers):
    """Filled, used, changed, merged and restored; also where the layers of a device are not neighbours."""
    x, flat, made = torch.randn(3, 5, 16), torch.randn(15, 16), []
    for elsewhere in ((), layers):
        model = spread(TwoLinears([None] * 4), elsewhere)
        lora, results = attach(model, stack, slots=3, max_rank=6), []
        assert len(next(iter(lora._slots.values())).parts) == (2 if elsewhere else 1)
        for ids in ([1, -1, 0], 1, [0, 0, 1]):
            with lora.use(ids):
                results.append(model(x))
        with lora.use(RAGGED):
            results.append(model(flat))
        lora.put(2, stack[1])
        lora.put(0, stack[1])
        with lora.use([2, 1, 0]):
            results.append(model(x))
            with lora.use(-1):
                results.append(model(x))
            results.append(model(x))
        lora.merge(2)
        results.append(model(x))
        lora.unmerge()
        results.append(model(x))
        made.append(results)
    assert all(map(torch.equal, *made))
    assert torch.equal(made[1][-1], TwoLinears([None] * 4)(x)) and not torch.equal(made[1][0], made[1][-1])


def test_gradients(spread, stack):
    x, made = torch.randn(3, 5, 16), []
    for elsewhere in ((), (2, 3)):
        model = spread(TwoLinears([None] * 4).requires_grad_(False), elsewhere)
        lora = attach(model, stack)
        trained, tensors = leaves(stack)
        with lora.differentiable(trained, [1, -1, 0]):
            model(x).square().sum().backward()
        made.append([t.grad for t in tensors])
    assert all(map(torch.equal, *made)) and all(bool(grad.any()) for grad in made[0])


@pytest.fixture
def stacks(make_stack):
    """Three adapters of q_proj, three of both linears, and one of both in the first two of four layers."""
    few = make_stack(SHAPES, num_layers=2, seed=2, partial=True)
    return make_stack({"q_proj": (16, 24)}, num_layers=4), make_stack(SHAPES, num_layers=4, seed=1), few


def put_inside_use(lora, model, x, stacks):
    lora.set([0, -1])
    with lora.use([-1, 0]):
        lora.put(0, stacks[1][0])
        yield model(x)
    yield model(x)


def put_after_set(lora, model, x, stacks):
    """Slots on another device adopt the ids in use."""
    lora.set([0, -1])
    lora.put(0, stacks[1][0])
    yield model(x)
    with lora.differentiable(stacks[0][1], 0):
        yield model(x)


def put_inside_differentiable(lora, model, x, stacks):
    """Their layers run the base model there: the stack lacks them."""
    with lora.differentiable(stacks[0], [2, -1]):
        lora.put(1, stacks[1][0])
        yield model(x)
    with lora.use([1, 0]):
        yield model(x)


def put_of_the_first_layers_alone(lora, model, x, stacks):
    """A partial stack, of which the second device has no layer."""
    lora.put(1, stacks[2][0])
    with lora.use([1, 0]):
        yield model(x)


PUTS = (put_inside_use, put_after_set, put_inside_differentiable, put_of_the_first_layers_alone)


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_modules_of_a_device_that_come_later(spread, stacks, put):
    x, made = torch.randn(2, 5, 16), []
    for elsewhere in ((), (2, 3)):
        model = spread(TwoLinears([None] * 4), ())
        lora = attach(model, stacks[0][0], slots=2)
        spread(model, elsewhere)
        made.append([y.detach() for y in put(lora, model, x, stacks)])
    assert all(map(torch.equal, *made))
    base = TwoLinears([None] * 4)(x)
    assert not torch.equal(made[0][-1], base)


def test_one_stack_cannot_be_slots_of_two_devices(spread, stack):
    lora = attach(spread(TwoLinears([None] * 4), (3,)), stack)
    with (
        pytest.raises(ValueError, match="like: expected layers on one device, got cpu, cpu:1; use put"),
        lora.borrow_slots(0, stack),
    ):
        pass


@pytest.fixture
def fake():
    """(Model, its four layers' devices, a stack on the first.)  torch's fake devices compute nothing, and refuse operands of
    two devices.  Of the kinds that have several, "lazy" is one that a torch for the CPU can copy between."""
    with FakeTensorMode():
        cards = [torch.device("lazy", i) for i in (0, 0, 1, 1)]
        A = {name: torch.empty(1, 4, 4, n_in, device=cards[0]) for name, (n_in, _) in SHAPES.items()}
        B = {name: torch.empty(1, 4, n_out, 4, device=cards[0]) for name, (_, n_out) in SHAPES.items()}
        yield TwoLinears(cards), cards, AdapterStack(A, B, torch.ones(1, device=cards[0]))


def test_every_tensor_lies_where_its_layer_does(fake):
    model, cards, stack = fake
    lora = attach(model, stack)
    for layer, card in zip(model.layers, cards, strict=True):
        for linear in layer.values():
            (m,) = linear.adapted_modules
            assert {t.device for t in (m.lora_A, m.lora_B, m.scaling, m.ranks)} == {card}
    x = torch.empty(1, 5, 16, device=cards[0])
    with lora.use(0):
        assert model(x).device == cards[3]
    with lora.differentiable(stack, 0), torch.no_grad():
        assert model(x).device == cards[3]
    with lora.use(0), pytest.raises(FakeTensorDeviceMismatchError):  # the check itself
        model.layers[3]["q_proj"](x)


def test_a_linear_that_moves_its_input(fake):
    """As accelerate's hooks do where one linear alone lies elsewhere."""
    model, cards, stack = fake
    linear = model.layers[3]["q_proj"]
    linear.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.device),))
    lora = attach(model, stack)
    x = torch.empty(1, 5, 16, device=cards[0])
    with lora.use(0):
        assert model.layers[3]["q_proj"](x).device == cards[3]
