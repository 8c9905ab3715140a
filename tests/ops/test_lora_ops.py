"""The ops of batched LoRA against their float64 references: values, bitwise promises, errors."""

import functools

import pytest
import torch
from torch.torch_version import TorchVersion

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics, oracle
from t2l_engine.testing.cases import BF16, F64, GROUP_CASES, LORA_CASES, GroupCase, LoraCase
from tests.ops.native import SMALL, by_name, kernel_case, needs_native, with_threads

group_cases = pytest.mark.parametrize("case", GROUP_CASES, **by_name)
lora_cases = pytest.mark.parametrize("case", LORA_CASES, **by_name)
_EIGHT = ((1, 0), (2, -1), (3, 3), (1, 1), (1, 0))


@kernel_case
@lora_cases
def test_lora_add(case):
    arguments = case.make(seed=1)
    before = arguments["y"].clone()
    around = arguments["y"]._base.clone()
    y, _, bound = oracle.lora(arguments)
    got = ops.lora_add_(**arguments)
    assert got is arguments["y"]
    assert ((got.double() - y).abs() <= bound).all()
    base_rows = torch.repeat_interleave(arguments["seg_adapters"] < 0, arguments["seg_indptr"].diff())
    assert torch.equal(got[base_rows], before[base_rows])
    frame = got._base.clone()
    frame[:, 3:-3] = around[:, 3:-3]
    assert torch.equal(frame, around), "wrote outside its columns"


@kernel_case
@lora_cases
def test_lora_delta(case):
    arguments = case.make(seed=2)
    arguments.pop("y")
    y, delta, bound = oracle.lora(arguments | {"y": torch.zeros(case.tokens, case.out_features, dtype=case.x_dtype)})
    got = ops.lora_delta(**arguments)
    assert got.dtype == case.x_dtype and got.is_contiguous()
    assert ((got.double() - delta).abs() <= bound).all()


@kernel_case
@group_cases
def test_lora_add_group(case):
    arguments, alone = case.make(seed=5), case.make(seed=5)
    exacts = [oracle.lora(m) for m in oracle.members_of(arguments)]
    got = ops.lora_add_group_(**arguments)
    assert got is arguments["y"]
    for member, (y, _, bound) in zip(oracle.members_of(arguments), exacts, strict=True):
        assert ((member["y"].double() - y).abs() <= bound).all()
    for member in oracle.members_of(alone):  # the same bits as one linear after the other, and nothing else touched
        ops.lora_add_(**member)
    assert torch.equal(got._base, alone["y"]._base)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"offsets": [0, 40, 64]},
            "offsets: expected rising columns .* that do not overlap, got columns 40 to 56 at member 1",
        ),
        ({"offsets": [0, 48, 65]}, r"offsets: expected rising columns of y \[66, 80\] .* got columns 65 to 81 at member 2"),
        ({"offsets": [-1, 48, 64]}, "got columns -1 to 47 at member 0"),
        ({"offsets": [2**62, 48, 64]}, "at member 0"),
        ({"x": torch.zeros(66, 65)}, r"lora_A: expected shape \[\*, \*, 65\], got \[.*\] at member 0"),
        ({"y": torch.zeros(80).expand(66, 80)}, "y: expected rows that do not overlap, got rows of 80 elements, 0 apart"),
    ],
)
def test_lora_add_group_errors(change, message):
    needs_native("the native kernels check their arguments")
    arguments = GROUP_CASES[0].make()
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.lora_add_group_(**(arguments | change))
    assert torch.equal(arguments["y"], kept)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": [0, 48]}, "offsets: expected one entry a member, .* got 2 for 3 entries"),
        ({"ranks": []}, "ranks: expected one entry a member, as many as lora_A and at least one, got 0 for 3 entries"),
        ({"lora_A": []}, "lora_B: expected one entry a member, as many as lora_A and at least one, got 3 for 0"),
        ({"lora_A": [], "lora_B": []}, "lora_B: expected one entry a member, .* at least one, got 0 for 0"),
    ],
)
def test_lora_add_group_lists(change, message):
    """Of the wrapper, whatever runs the op."""
    arguments = GROUP_CASES[0].make()
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=f"t2l_engine::lora_add_group_: {message}"):
        ops.lora_add_group_(**(arguments | change))
    assert torch.equal(arguments["y"], kept)


@kernel_case
@lora_cases
def test_lora_gradients(case):
    arguments = case.make(seed=6)
    torch.manual_seed(7)
    grad = torch.randn(case.tokens, case.out_features + 2).to(case.x_dtype)[:, 1:-1]
    arguments.pop("y")
    wide = oracle.in_float64(arguments)
    got = oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, arguments)
    exact = oracle.gradients(reference.lora_backward_, grad.double(), wide)
    for name, value, expected in zip(("x", "lora_A", "lora_B"), got, exact, strict=True):
        operand = arguments[name]
        assert value.shape == operand.shape and value.dtype == operand.dtype
        bound = numerics.gradient_bound(expected, operand.dtype)
        assert ((value.double() - expected).abs() <= bound).all(), name
    assert (got[2].stride(1) == 1) == (arguments["lora_B"].stride(1) == 1), "stored unlike lora_B"


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_lora_backward_adds_to_grad_x_and_rounds_once(dtype):
    """Tokens of adapter -1 keep their bits; the others are the rounded sum, not the sum of two rounded ones."""
    case = LoraCase("adds", ((3, 0), (2, -1), (20, 1)), in_features=70, x_dtype=dtype, w_dtype=dtype)
    arguments = {k: v for k, v in case.make().items() if k != "y"}
    torch.manual_seed(8)
    grad, before = (torch.randn(case.tokens, n).to(dtype) for n in (case.out_features, case.in_features))
    exact, *_ = oracle.gradients(reference.lora_backward_, grad.double(), oracle.in_float64(arguments))
    grad_x = before.clone()
    torch.ops.t2l_engine.lora_backward_(grad_x, grad, *arguments.values())
    assert torch.equal(grad_x[3:5], before[3:5]) and not torch.equal(grad_x[:3], before[:3])
    bound = numerics.u(dtype) * (before.double() + exact).abs() + numerics.gradient_bound(exact, torch.float32)
    assert ((grad_x.double() - before.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "grad_x, message",
    [
        (lambda x: x.double(), "grad_x: expected float32, got float64"),
        (lambda x: x[1:], "grad_x: expected shape"),
        (lambda x: x.T.contiguous().T, "grad_x: expected a contiguous tensor"),
    ],
)
def test_lora_backward_checks_grad_x(grad_x, message):
    needs_native("the reference checks little")
    case = LoraCase("checks", ((3, 0), (2, 1)))
    arguments = {k: v for k, v in case.make().items() if k != "y"}
    given = grad_x(torch.zeros(case.tokens, case.in_features))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.t2l_engine.lora_backward_(given, torch.ones(case.tokens, case.out_features), *arguments.values())


@kernel_case
@pytest.mark.parametrize("leading", [(2, 4), (8, 1), (1, 8), (2, 1, 4), (1, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_lora_tokens_in_any_leading_dimensions(leading, dtype):
    """The same bits as rows, in slices of wider tensors too; gradients have the shape of x."""
    case = LoraCase("leading", _EIGHT, in_features=23, out_features=19, x_dtype=dtype, w_dtype=dtype)
    flat, arguments = case.make(), case.make()
    around = arguments["y"]._base
    arguments |= {name: arguments[name].unflatten(0, leading) for name in ("y", "x")}
    delta = ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})
    grad = torch.randn(case.tokens, case.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, expected = (
        oracle.gradients(torch.ops.t2l_engine.lora_backward_, g, {k: v for k, v in of.items() if k != "y"})
        for g, of in ((grad.unflatten(0, leading), arguments), (grad, flat))
    )
    assert grads[0].shape == arguments["x"].shape and torch.equal(grads[0].flatten(0, -2), expected[0])
    assert torch.equal(grads[1], expected[1]) and torch.equal(grads[2], expected[2])
    expected = ops.lora_delta(**{k: v for k, v in flat.items() if k != "y"})
    assert delta.shape == (*leading, case.out_features) and torch.equal(delta.flatten(0, -2), expected)
    group = {k: [v] if k in ("lora_A", "lora_B") else v for k, v in arguments.items()}
    group |= {"y": group["y"].clone(), "ranks": [torch.full((case.adapters,), case.rank, dtype=torch.int32)], "offsets": [0]}
    ops.lora_add_(**arguments)
    ops.lora_add_(**flat)
    assert torch.equal(around, flat["y"]._base)
    assert torch.equal(ops.lora_add_group_(**group).flatten(0, -2), flat["y"])


def test_lora_of_one_token_without_leading_dimensions():
    arguments = LoraCase("one", ((1, 2),)).make()
    expected = ops.lora_add_(**LoraCase("one", ((1, 2),)).make())
    arguments |= {name: arguments[name][0] for name in ("y", "x")}
    assert torch.equal(
        ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})[None],
        ops.lora_delta(**{k: v for k, v in LoraCase("one", ((1, 2),)).make().items() if k != "y"}),
    )
    assert torch.equal(ops.lora_add_(**arguments)[None], expected)


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("b_layout", ["r_out", "out_r"])
@pytest.mark.parametrize("rank, in_features, out_features", [(8, 111, 77), (8, 4500, 1100), (12, 2100, 600)])
def test_lora_rows_do_not_depend_on_neighbours(dtype, b_layout, rank, in_features, out_features, backend):
    """Bitwise: run twice, alone or in a batch, at any position, with any number of threads."""
    needs_native("torch's own products do not promise it")
    kinds = {"x_dtype": dtype, "w_dtype": dtype, "b_layout": b_layout}
    case = LoraCase("rows", ((37, 0), (1, 1), (20, 0)), in_features, out_features, rank, **kinds)
    group = GroupCase("rows", case, ((0, out_features, rank), (out_features, 16, 4)), out_features + 16)
    arguments = case.make()
    arguments.pop("y")
    torch.manual_seed(9)
    grad = torch.randn(case.tokens, out_features).to(dtype)
    backward = functools.partial(oracle.gradients, torch.ops.t2l_engine.lora_backward_)

    def results():
        made = [ops.lora_delta(**arguments), *backward(grad, arguments)]
        if backend == "cpu":
            made += ops.lora_add_(**case.make()), ops.lora_add_group_(**group.make())
        return made

    whole, grad_x, *_ = expected = with_threads(3, results)
    shared = {k: arguments[k] for k in ("lora_A", "lora_B", "scaling", "ranks")}
    for token, adapter in ((0, 0), (36, 0), (37, 1), (50, 0)):
        alone = {
            "x": arguments["x"][token : token + 1],
            "seg_indptr": torch.tensor([0, 1], dtype=torch.int32),
            "seg_adapters": torch.tensor([adapter], dtype=torch.int32),
            "max_seg_len": 1,
            **shared,
        }
        assert torch.equal(ops.lora_delta(**alone)[0], whole[token])
        ordered = {k: alone[k] for k in arguments}
        assert torch.equal(backward(grad[token : token + 1], ordered)[0][0], grad_x[token])
    for count in (1, 2) if backend == "cpu" else (1,):  # other backends have no threads of torch: they run twice
        assert all(map(torch.equal, with_threads(count, results), expected))


@kernel_case
@pytest.mark.parametrize("name", ["aligned_rows", "aligned_rows_fp16", "aligned_rows_mixed_ranks"])
def test_decode_steps_have_the_bits_of_prefill(name):
    """On sums that cancel: what is left is rounding, which any other order would change."""
    arguments = next(case for case in LORA_CASES if case.name == name).make(seed=11)
    x, a = arguments["x"], arguments["lora_A"]
    half = x.shape[1] // 2
    x[:, half:], a[..., half:] = x[:, :half], -a[..., :half]
    delta = ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})  # which no kernel for decode steps takes
    arguments["y"].zero_()
    assert delta.any() and torch.equal(ops.lora_add_(**arguments), delta)


@kernel_case
def test_lora_nan_stays_in_its_row():
    arguments = LoraCase("nan", ((1, 0), (1, 0), (1, 1))).make()
    arguments["x"][1, 5] = float("nan")
    y, *_ = oracle.lora(arguments)
    got = ops.lora_add_(**arguments)
    assert torch.equal(got.isnan(), y.isnan()) and got[1].isnan().all() and not got[0].isnan().any()


@kernel_case
@pytest.mark.parametrize("segments", [((1, 0), (1, 1), (1, -1), (1, 2), (1, 0)), ((2, 0), (20, 1), (1, -1), (3, 2))])
@pytest.mark.parametrize("rank, dtype", [(3, torch.float32), (3, BF16), (8, torch.float32), (8, BF16)])
def test_lora_infinite_inputs(rank, dtype, segments):
    """Infinities and NaN stand where exact sums have them: also where a kernel pads ranks, or splits numbers in two."""
    case = LoraCase("infinite", segments, in_features=71, rank=rank, x_dtype=dtype, w_dtype=dtype)
    arguments = case.make(seed=8)
    x, last = arguments["x"], case.tokens - 1
    x[1, 5], x[last - 1, 70] = float("inf"), float("-inf")
    x[last, 3], x[last, 40] = float("inf"), float("-inf")  # NaN in every rank where A has one sign, else infinite
    for columns in (5, 70, 3):
        arguments["lora_A"][:, :, columns].abs_()
    arguments["lora_B"][:, :20].abs_()  # one sign over the ranks: infinite outputs, beside outputs that are NaN
    before, (y, delta, _) = arguments["y"].clone(), oracle.lora(arguments)
    got_delta = ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})
    got = ops.lora_add_(**arguments)
    assert delta.isnan().any() and (delta == float("inf")).any() and (delta == float("-inf")).any()
    for value, expected in ((got, y), (got_delta, delta)):
        assert torch.equal(value.isnan(), expected.isnan())
        for infinity in (float("inf"), float("-inf")):
            assert torch.equal(value == infinity, expected == infinity)
    base_rows = torch.repeat_interleave(arguments["seg_adapters"] < 0, arguments["seg_indptr"].diff())
    assert torch.equal(got[base_rows], before[base_rows])


def test_large_offsets():
    """Adapter offsets beyond 2^31 elements: the last of many adapters in one huge, mostly untouched buffer."""
    adapters, rank, n = 3, 8, 64
    stride = 2**30 + 1024
    a = torch.empty(2 * stride + rank * n, dtype=BF16).as_strided((adapters, rank, n), (stride, n, 1))
    case = LoraCase("far", ((2, 2), (1, 0)), in_features=n, adapters=adapters, x_dtype=BF16, w_dtype=BF16)
    arguments = case.make()
    near = ops.lora_delta(**{k: v for k, v in arguments.items() if k != "y"})
    a.copy_(arguments["lora_A"])
    far = ops.lora_delta(**{k: v for k, v in (arguments | {"lora_A": a}).items() if k != "y"})
    assert torch.equal(near, far)


INT32 = {"dtype": torch.int32}


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
@pytest.mark.parametrize("segments", [((1, 0), (1, 1), (1, -1), (1, 2), (1, 0)), ((2, 0), (20, 1), (1, -1), (3, 2))])
def test_bad_ids_are_counted_and_are_the_base_model(segments, dtype):
    case = LoraCase("bad", segments, in_features=23, out_features=19, x_dtype=dtype, w_dtype=dtype)
    arguments, right = case.make(), case.make()
    arguments["seg_adapters"][1:4:2] = torch.tensor([case.adapters, -2], **INT32)[: len(arguments["seg_adapters"][1:4:2])]
    right["seg_adapters"][1:4:2] = -1
    given, bad_ids = arguments["seg_adapters"].clone(), torch.tensor([5], **INT32)
    assert ops.lora_add_(**arguments, bad_ids=bad_ids) is arguments["y"]
    assert torch.equal(arguments["y"]._base, ops.lora_add_(**right)._base)
    assert bad_ids.tolist() == [7] and torch.equal(arguments["seg_adapters"], given)
    ops.lora_add_(**right, bad_ids=bad_ids)
    assert bad_ids.tolist() == [7]


@pytest.mark.parametrize("segments, counted", [((), 0), (((0, 9), (3, 1)), 1), (((0, 9),), 1)])
def test_bad_ids_without_tokens(segments, counted):
    case = LoraCase("empty", segments, in_features=8, out_features=8)
    bad_ids = torch.zeros(1, **INT32)
    ops.lora_add_(**case.make(), bad_ids=bad_ids)
    assert bad_ids.tolist() == [counted]


@kernel_case
@pytest.mark.parametrize("name", ["qkv", "nine_members", "bf16"])
def test_bad_ids_of_a_group_are_counted_once(name):
    case = next(case for case in GROUP_CASES if case.name == name)
    arguments, right = case.make(), case.make()
    arguments["seg_adapters"][0], right["seg_adapters"][0] = 2**31 - 1, -1
    bad_ids = torch.zeros(1, **INT32)
    got = ops.lora_add_group_(**arguments, bad_ids=bad_ids)
    assert torch.equal(got._base, ops.lora_add_group_(**right)._base) and bad_ids.tolist() == [1]


@pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
def test_what_is_wrong_changes_nothing(module, backend):
    """Also where it is the last member's, and neither y nor the count of bad ids."""
    if backend != "cpu" and module is ops:
        pytest.skip("only the device sees the values")
    single, group, bad_ids = SMALL.make(), GROUP_CASES[0].make(), torch.zeros(1, **INT32)
    single["seg_indptr"][-1] += 1
    group["ranks"][-1] = torch.full_like(group["ranks"][-1], 10_000)
    for op, arguments in ((module.lora_add_, single), (module.lora_add_group_, group)):
        arguments["seg_adapters"][0] = 2**31 - 1
        before = arguments["y"].clone()
        with pytest.raises(RuntimeError, match="seg_indptr: |ranks"):
            op(**{"ranks": None} | arguments, bad_ids=bad_ids)
        assert torch.equal(arguments["y"], before) and bad_ids.tolist() == [0]


@pytest.mark.parametrize(
    "bad_ids, message",
    [(torch.zeros(2, **INT32), r"expected shape \[1\], got \[2\]"), (torch.zeros(1), "expected int32, got float32")],
)
def test_bad_ids_errors(bad_ids, message):
    needs_native("the native kernels check their arguments")
    for op, arguments in ((ops.lora_add_, SMALL.make()), (ops.lora_add_group_, GROUP_CASES[0].make())):
        with pytest.raises(RuntimeError, match=f"bad_ids: {message}"):
            op(**arguments, bad_ids=bad_ids)


@pytest.mark.parametrize("op", [ops.lora_add_, reference.lora_add_], ids=["op", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"seg_adapters": torch.tensor([0, 2, 1], **INT32)}, r"seg_adapters: expected ids in \[-1, 2\), got 2 at segment 1"),
        ({"seg_adapters": torch.tensor([0, -2, 1], **INT32)}, r"seg_adapters: expected ids in \[-1, 2\), got -2"),
        ({"seg_indptr": torch.tensor([1, 2, 3, 6], **INT32)}, "seg_indptr: expected 0 first, got 1"),
        ({"seg_indptr": torch.tensor([0, 2, 5, 7], **INT32)}, "expected the number of tokens 6 last, got 7"),
        (
            {"seg_indptr": torch.tensor([0, 3, 2, 6], **INT32)},
            "segments of 0 to max_seg_len = 3 tokens, got -1 at segment 1",
        ),
        ({"seg_indptr": torch.tensor([0, 6], **INT32)}, r"seg_indptr: expected shape \[4\], got \[2\]"),
        ({"seg_indptr": torch.tensor([], **INT32)}, r"seg_indptr: expected shape \[4\], got \[0\]"),
        ({"max_seg_len": 2}, "segments of 0 to max_seg_len = 2 tokens, got 3"),
        ({"ranks": torch.tensor([1, 3], **INT32)}, r"ranks: expected values in \[0, 2\], got 3 at adapter 1"),
        ({"ranks": torch.tensor([1], **INT32)}, r"ranks: expected shape \[2\], got \[1\]"),
    ],
)
def test_segment_errors(op, change, message, backend):
    if backend != "cpu" and op is ops.lora_add_ and "shape" not in message:
        pytest.skip("only the device sees the values")
    arguments = SMALL.make()
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        op(**(arguments | change))
    assert torch.equal(arguments["y"], kept)


def test_tokens_without_segments():
    arguments = SMALL.make() | {"seg_indptr": torch.zeros(1, **INT32), "seg_adapters": torch.zeros(0, **INT32)}
    for op in (ops.lora_add_, ops.lora_delta):
        with pytest.raises(RuntimeError, match=r"seg_(adapters|indptr): expected"):
            op(**{k: v for k, v in arguments.items() if k != "y" or op is ops.lora_add_})


def test_a_negative_max_seg_len():
    """Without segments, which would be longer than that."""
    needs_native("the native kernels check their arguments")
    arguments, group = (next(c for c in cases if c.name == "no_tokens").make() for cases in (LORA_CASES, GROUP_CASES))
    without_y = {k: v for k, v in arguments.items() if k != "y"}
    for op, given in ((ops.lora_add_, arguments), (ops.lora_delta, without_y), (ops.lora_add_group_, group)):
        with pytest.raises(RuntimeError, match=f"t2l_engine::{op.__name__}: max_seg_len: expected >= 0, got -1"):
            op(**given | {"max_seg_len": -1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seg_adapters": torch.tensor([0, 1, 1])}, "seg_adapters: expected int32, got int64"),
        ({"lora_B": torch.zeros(2, 5, 3)}, r"lora_B: expected shape \[2, \*, 2\], got \[2, 5, 3\]"),
        ({"lora_B": torch.zeros(2, 5, 2, dtype=BF16)}, "lora_B: expected float32, got bfloat16"),
        ({"lora_A": torch.zeros(2, 6, 2).mT}, "lora_A: expected last stride 1"),
        ({"y": torch.zeros(6, 5, dtype=BF16)}, "y: expected float32, got bfloat16"),
        ({"x": torch.zeros(6, 6, dtype=torch.int64), "y": torch.zeros(6, 5, dtype=torch.int64)}, "x: expected float32, bf"),
        ({"x": torch.zeros(6, 6, dtype=F64), "y": torch.zeros(6, 4, dtype=F64)}, r"y: expected shape \[6, 5\]"),
        ({"y": torch.zeros(6, 4)}, r"y: expected shape \[6, 5\], got \[6, 4\]"),
        ({"scaling": torch.ones(2, dtype=F64)}, "scaling: expected float32, got float64"),
        ({"x": torch.zeros(3, 2, 6).transpose(0, 1)}, "x: expected rows at one distance from each other"),
        ({"x": torch.zeros(2, 3, 6), "y": torch.zeros(2, 4, 5)}, r"y: expected shape \[2, 3, 5\], got \[2, 4, 5\]"),
        ({"x": torch.zeros(())}, r"x: expected shape \[\.\.\., features\], got \[\]"),
        ({"y": torch.zeros(5).expand(6, 5)}, "y: expected rows that do not overlap, got rows of 5 elements, 0 apart"),
        ({"y": torch.zeros(40).as_strided((6, 5), (3, 1))}, "y: expected rows .*, got rows of 5 elements, 3 apart"),
    ],
)
def test_lora_errors(change, message):
    needs_native("the native kernels check their arguments")
    arguments = SMALL.make()
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.lora_add_(**(arguments | change))
    assert torch.equal(arguments["y"], kept)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="this torch does not say what failed in it")
def test_torchs_own_reasons_are_told():
    needs_native("the reference is torch itself")
    rows = 2**20
    x, A, B = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).expand(1, 2**30, 1)
    segments = torch.tensor([0, rows], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="memory.*API call failed"):
        ops.lora_delta(x, A, B, torch.ones(1), *segments, rows)
