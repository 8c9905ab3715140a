"""lora_add_bound_ has the bits of lora_add_group_, for what is bound when it runs."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import GROUP_CASES
from tests.ops.kernel_cases import needs_native

bound = torch.ops.t2l_engine
F32 = torch.float32
LAYER, BATCH = torch.tensor([1 << 40]), torch.tensor([2 << 40])


@pytest.fixture(autouse=True)
def unbound(backend):
    needs_native("the reference has no numbers")
    if backend != "cpu":
        pytest.skip("bound ops are the CPU kernels'")
    yield
    bound.lora_unbind(LAYER)
    bound.lora_unbind(BATCH)


def bind(arguments, rows=0):
    """Bind all but x and y; ``rows``: of those calls that have another number of rows than the batch, without adapters."""
    a = arguments
    none = torch.full((rows,), -1, dtype=torch.int32)
    iota = torch.arange(rows + 1, dtype=torch.int32)
    bound.lora_bind_batch(BATCH, a["seg_indptr"], a["seg_adapters"], iota, none, len(a["x"]), a["max_seg_len"])
    bound.lora_bind_layer(LAYER, a["lora_A"], a["lora_B"], a["scaling"], a["ranks"], a["offsets"], BATCH)


@pytest.mark.parametrize("case", GROUP_CASES, ids=lambda case: case.name)
def test_equals_the_group(case):
    arguments, given = case.make(), case.make()
    expected = ops.lora_add_group_(**arguments)
    bind(given)
    bound.lora_add_bound_(given["y"], given["x"], LAYER)
    assert torch.equal(given["y"], expected)


def test_other_rows_have_the_adapters_of_their_places():
    arguments = GROUP_CASES[0].make()
    ids = torch.tensor([1, -1, 0, 1, -1], dtype=torch.int32)
    bind(arguments, len(ids))
    bound.lora_bind_batch(
        BATCH, arguments["seg_indptr"], arguments["seg_adapters"], torch.arange(6, dtype=torch.int32), ids, 99, 1
    )
    x, y = (arguments[name][:3].clone() for name in "xy")
    expected = {**arguments, "x": x, "y": y.clone(), "seg_indptr": torch.arange(4, dtype=torch.int32)}
    ops.lora_add_group_(**expected | {"seg_adapters": ids[:3].clone(), "max_seg_len": 1})
    bound.lora_add_bound_(y, x, LAYER)
    assert torch.equal(y, expected["y"]) and not torch.equal(y, arguments["y"][:3])
    with pytest.raises(RuntimeError, match="lora_add_bound_: x: expected at most 5 rows, got 6"):
        bound.lora_add_bound_(arguments["y"][:6], arguments["x"][:6], LAYER)


def test_a_batch_without_adapters_and_a_layer_without_slices_are_left_alone():
    arguments = GROUP_CASES[0].make()
    before, x = arguments["y"].clone(), arguments["x"]
    bind(arguments | {"max_seg_len": 0})
    bound.lora_add_bound_(arguments["y"], x, LAYER)
    bind(arguments | dict.fromkeys(("lora_A", "lora_B", "ranks", "offsets"), []))
    bound.lora_add_bound_(arguments["y"], x, LAYER)
    assert torch.equal(arguments["y"], before)


def test_calls_of_other_shapes_and_dtypes_follow_each_other():
    """What one call has checked is not taken for another."""
    arguments = GROUP_CASES[0].make()
    bind(arguments, len(arguments["x"]))
    of_reference = torch.float16
    for rows, dtype in ((None, F32), (None, of_reference), (None, F32), (2, F32), (None, F32)):
        x, y = (arguments[name][:rows].to(dtype, copy=True) for name in "xy")
        expected = {**arguments, "x": x, "y": y.clone()}
        if rows:
            expected |= {"seg_indptr": torch.tensor([0, rows], dtype=torch.int32), "max_seg_len": rows}
            expected["seg_adapters"] = torch.tensor([-1], dtype=torch.int32)
        ops.lora_add_group_(**expected)
        bound.lora_add_bound_(y, x, LAYER)
        assert torch.equal(y, expected["y"])


def test_what_is_not_bound_is_an_error():
    arguments = GROUP_CASES[0].make()
    bind(arguments)
    for number, name in ((BATCH, "batch"), (LAYER, "layer")):
        bound.lora_unbind(number)
        with pytest.raises(
            RuntimeError, match=f"lora_add_bound_: {name}: expected a number that is bound, got {int(number)}"
        ):
            bound.lora_add_bound_(arguments["y"], arguments["x"], LAYER)


def test_opcheck():
    arguments = GROUP_CASES[0].make()
    bind(arguments)
    torch.library.opcheck(bound.lora_add_bound_.default, (arguments["y"], arguments["x"], LAYER))
