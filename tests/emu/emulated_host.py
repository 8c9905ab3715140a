"""What the host side of an op owes a device: its stream, its guard, one launch, errors of what only the device sees."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import profile
from bench.cases import LAYERS
from bench.harness import Context
from bench.timing import Dry
from t2l_engine import AdapterStack, attach, ops
from t2l_engine.ops import reference
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import BF16, F64, GROUP_CASES, HYPER_CASES, LoraCase
from tests.networks import HyperShape

pytestmark = pytest.mark.emu

INT32 = {"dtype": torch.int32}
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)
ROWS = LoraCase("rows", ((1, 0), (1, -1), (1, 1)), in_features=6, out_features=5, rank=2, adapters=2)


def group(name: str) -> dict:
    return next(case for case in GROUP_CASES if case.name == name).make()


def backward(case: LoraCase):
    arguments = {k: v for k, v in case.make().items() if k != "y"}
    grad = torch.ones(case.tokens, case.out_features, dtype=case.x_dtype)
    return oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, arguments)


def hyper(name: str):
    return next(case for case in HYPER_CASES if case.name == name)


def heads(name: str, modules: int) -> dict:
    return dataclasses.replace(hyper(name), modules=modules).make_heads()


@pytest.mark.parametrize("call, launches", [
    (lambda: ops.lora_add_(**ROWS.make()), 1),
    (lambda: ops.lora_add_(**SMALL.make()), 1),
    (lambda: ops.lora_add_group_(**group("qkv")), 1),
    (lambda: ops.lora_add_group_(**group("nine_problems")), 2),  # eight problems a launch
    (lambda: backward(SMALL), 2),
    (lambda: backward(dataclasses.replace(SMALL, x_dtype=F64, w_dtype=F64)), 0),
    (lambda: ops.hypernet_trunk(**hyper("S_rotary").make_trunk()), 1),
    (lambda: ops.hypernet_heads(**heads("L", 7)), 1),
    (lambda: ops.hypernet_heads(**heads("L", 9)), 2),  # eight modules a launch
    (lambda: ops.lora_add_(**LoraCase("", ()).make()), 0),
    (lambda: ops.lora_add_(**LoraCase("", ((1, 0),), x_dtype=F64, w_dtype=F64).make()), 0),
    (lambda: ops.hypernet_trunk(**hyper("S_learnable_fp64_by_reference").make_trunk()), 0),
])  # fmt: skip
def test_number_of_launches(emulator, call, launches):
    call()
    assert emulator.t2l_emu_counter(b"launches") == launches


class Calls(TorchDispatchMode):
    """What would be launches of torch on a device, and reads of values by the host."""

    FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh", "t2l_engine::")

    def __init__(self):
        super().__init__()
        self.launches, self.reads = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(name)
        elif not func.is_view and not name.startswith(self.FREE):
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows, seq_len", [(4, 24), (3, 1)])
def test_training_of_a_linear_never_waits(emulator, rows, seq_len, dropout):
    """A step of SFT of an adapted linear, forward and backward: three launches of the engine's.  Without dropout torch adds
    two products and a copy of the ids, and three for each module, whose layers' gradients it puts together."""
    model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 48, dtype=BF16)})])
    model.requires_grad_(False)
    A, B = torch.randn(2, 1, 8, 32, dtype=BF16), torch.randn(2, 1, 8, 48, dtype=BF16)
    stack = AdapterStack({"q_proj": A.requires_grad_()}, {"q_proj": B.requires_grad_().mT}, torch.ones(2))
    lora = attach(model, stack)
    x = torch.randn(rows, seq_len, 32, dtype=BF16, requires_grad=True)
    layer, grad = model[0]["q_proj"], torch.randn(rows, seq_len, 48, dtype=BF16)
    with lora.differentiable(stack, [0, 1, -1, 0][:rows], dropout=dropout):
        layer(x)  # makes the segments, once for all linears of a step
        emulator.t2l_emu_reset_counters()
        with Calls() as calls:
            layer(x).backward(grad)
    assert calls.reads == []
    assert emulator.t2l_emu_counter(b"launches") == 3
    assert dropout or len(calls.launches) == 6, calls.launches
    assert A.grad is not None and B.grad is not None and x.grad is not None


@pytest.mark.parametrize("variant", ["L", "M"])
def test_generation_is_two_launches(emulator, variant):
    """Into a stack that was generated into before; nothing of torch's."""
    net = HyperShape("tiny", 2, 32, 32, 16, embed_dim=24, latent_size=16, head_in_size=24, variant=variant).make(BF16)
    task_emb = torch.randn(3, 24)
    out = net.generate(task_emb)
    net.generate(task_emb, out=out)
    emulator.t2l_emu_reset_counters()
    with Calls() as calls:
        net.generate(task_emb, out=out)
    assert emulator.t2l_emu_counter(b"launches") == 2
    assert calls.launches == calls.reads == []


def test_a_rank_beyond_shared_memory_is_the_references(emulator):
    arguments = LoraCase("", ((1, 0), (3, 1)), in_features=8, out_features=8, rank=1025, adapters=2).make()
    arguments.pop("y")
    assert torch.equal(ops.lora_delta(**arguments), reference.lora_delta(**arguments))
    assert emulator.t2l_emu_counter(b"launches") == 0


def test_launches_on_the_current_stream(emulator):
    """Every op of this process also fails if it launches on another one."""
    emulator.t2l_emu_set_stream(0xABC0)
    ops.lora_add_(**SMALL.make())
    assert emulator.t2l_emu_last_launch(b"stream") == 0xABC0


def test_launches_on_the_device_of_the_memory(emulator):
    emulator.t2l_emu_set_memory_device(3)
    try:
        for call in (
            lambda: ops.lora_delta(**{k: v for k, v in SMALL.make().items() if k != "y"}),
            lambda: ops.hypernet_trunk(**hyper("L").make_trunk()),
            lambda: ops.hypernet_heads(**hyper("L").make_heads()),
        ):
            call()
            assert emulator.t2l_emu_last_launch(b"device") == 3
            assert emulator.t2l_emu_current_device() == 0, "left another device current"
    finally:
        emulator.t2l_emu_set_memory_device(0)


@pytest.mark.parametrize("name, make", profile.profiled(False).items())
def test_profiled_cases_launch_their_kernels(emulator, name, make):
    call = make(Context.of("tiny", 1, Dry("emulator")))
    call()
    emulator.t2l_emu_reset_counters()
    call()
    launches = {"generate": 2, "apply": len(LAYERS["tiny"].groups), "gradients": 3}  # a group of linears is one launch
    assert emulator.t2l_emu_counter(b"launches") == launches[name.split()[0]]


@pytest.mark.parametrize("case, field, value, message", [
    *((case, "seg_adapters", ids, "seg_adapters: an id") for case in (SMALL, ROWS) for ids in ([0, 2, 1], [0, -2, 1])),
    *((SMALL, "seg_indptr", bounds, "seg_indptr: not rising") for bounds in ([1, 2, 3, 6], [0, 2, 3, 5], [0, 3, 2, 6])),
    (ROWS, "seg_indptr", [0, 0, 2, 3], "seg_indptr: not one token"), (SMALL, "max_seg_len", 2, "seg_indptr: .*max_seg_len"),
    (SMALL, "ranks", [1, 3], "ranks: a rank"), (ROWS, "ranks", [1, -1], "ranks: a rank"),
])  # fmt: skip
def test_values_that_only_the_device_sees(emulator, case, field, value, message):
    change = {field: torch.tensor(value, **INT32) if isinstance(value, list) else value}
    with pytest.raises(RuntimeError, match=f"lora_add_: launch: {message}"):
        ops.lora_add_(**(case.make() | change))
    ops.lora_add_(**case.make())  # and the next launch works
