"""What the host side of an op owes a device: its stream, its guard, one launch, errors of what only the device sees."""

import dataclasses
import threading

import pytest
import torch

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing.cases import F64, GROUP_CASES, HYPER_CASES, LoraCase

pytestmark = pytest.mark.emu

INT32 = {"dtype": torch.int32}
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)
ROWS = LoraCase("rows", ((1, 0), (1, -1), (1, 1)), in_features=6, out_features=5, rank=2, adapters=2)


def group(name: str) -> dict:
    return next(case for case in GROUP_CASES if case.name == name).make()


def hyper(name: str):
    return next(case for case in HYPER_CASES if case.name == name)


def heads(name: str, modules: int) -> dict:
    return dataclasses.replace(hyper(name), modules=modules).make_heads()


@pytest.mark.parametrize(
    "call, launches",
    [
        (lambda: ops.lora_add_(**ROWS.make()), 1),
        (lambda: ops.lora_add_(**SMALL.make()), 1),
        (lambda: ops.lora_add_group_(**group("qkv")), 1),
        (lambda: ops.lora_add_group_(**group("nine_members")), 2),  # eight members a launch
        (lambda: ops.hypernet_trunk(**hyper("S_rotary").make_trunk()), 1),
        (lambda: ops.hypernet_heads(**heads("L", 7)), 1),
        (lambda: ops.hypernet_heads(**heads("L", 9)), 2),  # eight modules a launch
        (lambda: ops.lora_add_(**LoraCase("", ()).make()), 0),
        (lambda: ops.lora_add_(**LoraCase("", ((1, 0),), x_dtype=F64, w_dtype=F64).make()), 0),
        (lambda: ops.hypernet_trunk(**hyper("S_learnable_fp64_by_reference").make_trunk()), 0),
    ],
)
def test_number_of_launches(emulator, call, launches):
    call()
    assert emulator.t2l_emu_counter(b"launches") == launches


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


def test_threads_at_once(emulator):
    """Each on a stream of its own; results as alone."""
    expected = ops.lora_delta(**{k: v for k, v in SMALL.make().items() if k != "y"})
    got = [None] * 4

    def work(i):
        emulator.t2l_emu_set_stream(0x5000 + i)
        got[i] = [ops.lora_delta(**{k: v for k, v in SMALL.make().items() if k != "y"}) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, expected) for values in got for value in values)


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
