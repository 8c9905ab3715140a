"""Every op against its float64 reference: values, bitwise promises, gradients, registration, errors."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

from t2l_engine import _native, ops, reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import BF16, F64, GROUP_CASES, HYPER_CASES, LORA_CASES, HyperCase, LoraCase

by_name = {"ids": lambda case: case.name}
group_cases = pytest.mark.parametrize("case", GROUP_CASES, **by_name)
lora_cases = pytest.mark.parametrize("case", LORA_CASES, **by_name)
hyper_cases = pytest.mark.parametrize("case", HYPER_CASES, **by_name)
kernel_case = pytest.mark.kernel_case  # what runs under every instruction set, schedule and sanitizer
#: How many of them there are at least.
KERNEL_CASES = 3 * len(LORA_CASES) + len(GROUP_CASES) + 3 * len(HYPER_CASES)
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)
TINY = {
    "task_width": 4,
    "width": 8,
    "head_in": 6,
    "in_features": 5,
    "out_features": 4,
    "rank": 2,
    "layers": 2,
    "tasks": 2,
}
TINY_HYPERS = [HyperCase("L", **TINY), HyperCase("M", sides=2, affine=True, **TINY)] + [
    HyperCase(p, sides=2, position=p, bias=False, **TINY) for p in ("learned", "rotary")
]


def is_native(op: str = "lora_add_") -> bool:
    """Whether operands on the default device are a kernel's."""
    return ops.has_kernel(op, "CUDA" if torch.get_default_device().type == "cuda" else "CPU")


def needs_native(why: str) -> None:
    if not is_native():
        pytest.skip(why)


def test_native_kernels_run(backend):
    """A run that silently used the fallback fails here."""
    if backend == "cpu" and os.environ.get(_native.DISABLE_VARIABLE) == "1":
        pytest.skip("the reference was asked for")
    for name in ops.NATIVE_OPS:
        assert is_native(name) != (backend != "cpu" and name == "lora_delta_backward"), name
    with pytest.raises(ValueError, match="name: expected one of"):
        ops.has_kernel("nothing", "CPU")


# --- batched LoRA ----------------------------------------------------------------------------------------------------


def exact(arguments: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, delta, allowed error of y) in float64 from the same rounded operands."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    y0 = wide.pop("y")
    delta = reference.lora_delta(**wide)
    y = y0 + delta
    bound = torch.zeros_like(y)
    ranks = arguments["ranks"]
    bounds = arguments["seg_indptr"].tolist()
    for s, adapter in enumerate(arguments["seg_adapters"].tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        if adapter >= 0:
            r = wide["lora_A"].shape[1] if ranks is None else int(ranks[adapter])
            a, b = wide["lora_A"][adapter, :r], wide["lora_B"][adapter, :, :r]
            scaling = float(wide["scaling"][adapter])
            bound[rows] = numerics.lora_bound(wide["x"][rows], a, b, scaling, y[rows], delta[rows], arguments["y"].dtype)
    return y, delta, bound


@kernel_case
@lora_cases
def test_lora_add(case):
    arguments = case.make(seed=1)
    before = arguments["y"].clone()
    around = arguments["y"]._base.clone()
    y, _, bound = exact(arguments)
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
    y, delta, bound = exact(arguments | {"y": torch.zeros(case.tokens, case.out_features, dtype=case.x_dtype)})
    got = ops.lora_delta(**arguments)
    assert got.dtype == case.x_dtype and got.is_contiguous()
    assert ((got.double() - delta).abs() <= bound).all()


def members_of(arguments: dict) -> list[dict]:
    """Arguments of ``lora_add_`` for each member of a group, ``y`` as its column slice."""
    lists = ("lora_A", "lora_B", "ranks", "offsets")
    rest = {k: v for k, v in arguments.items() if k not in (*lists, "y")}
    return [
        rest | {"y": arguments["y"][:, start : start + b.shape[1]], "lora_A": a, "lora_B": b, "ranks": r}
        for a, b, r, start in zip(*(arguments[k] for k in lists), strict=True)
    ]


@kernel_case
@group_cases
def test_lora_add_group(case):
    arguments, alone = case.make(seed=5), case.make(seed=5)
    exacts = [exact(m) for m in members_of(arguments)]
    got = ops.lora_add_group_(**arguments)
    assert got is arguments["y"]
    for member, (y, _, bound) in zip(members_of(arguments), exacts, strict=True):
        assert ((member["y"].double() - y).abs() <= bound).all()
    for member in members_of(alone):  # the same bits as one linear after the other, and nothing else touched
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
        ({"x": torch.zeros(66, 65)}, r"lora_A: expected shape \[\*, \*, 65\]"),
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
def test_lora_delta_backward(case):
    arguments = case.make(seed=6)
    torch.manual_seed(7)
    grad = torch.randn(case.tokens, case.out_features + 2).to(case.x_dtype)[:, 1:-1]
    arguments.pop("y")
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    got = torch.ops.t2l_engine.lora_delta_backward(grad, *arguments.values())
    exact = reference.lora_delta_backward(grad.double(), **wide)
    for name, value, expected in zip(("x", "lora_A", "lora_B"), got, exact, strict=True):
        operand = arguments[name]
        assert value.shape == operand.shape and value.dtype == operand.dtype
        bound = numerics.gradient_bound(expected, operand.dtype)
        assert ((value.double() - expected).abs() <= bound).all(), name
    assert (got[2].stride(1) == 1) == (arguments["lora_B"].stride(1) == 1), "stored unlike lora_B"


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("b_layout", ["r_out", "out_r"])
@pytest.mark.parametrize("rank, in_features, out_features", [(8, 111, 77), (8, 4500, 1100), (12, 2100, 600)])
def test_lora_rows_do_not_depend_on_neighbours(dtype, b_layout, rank, in_features, out_features):
    """Bitwise: run twice, alone or in a batch, at any position, with any number of threads."""
    needs_native("torch's own products do not promise it")
    kinds = {"x_dtype": dtype, "w_dtype": dtype, "b_layout": b_layout}
    case = LoraCase("rows", ((37, 0), (1, 1), (20, 0)), in_features, out_features, rank, **kinds)
    arguments = case.make()
    arguments.pop("y")
    grad = torch.randn(case.tokens, out_features).to(dtype)
    backward = torch.ops.t2l_engine.lora_delta_backward
    whole, grads = ops.lora_delta(**arguments), backward(grad, *arguments.values())
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
        ordered = [alone[k] for k in arguments]
        if is_native("lora_delta_backward"):
            assert torch.equal(backward(grad[token : token + 1], *ordered)[0][0], grads[0][token])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, ops.lora_delta(**arguments))
        if is_native("lora_delta_backward"):
            assert all(map(torch.equal, grads, backward(grad, *arguments.values())))
    finally:
        torch.set_num_threads(threads)


@kernel_case
def test_lora_nan_stays_in_its_row():
    arguments = LoraCase("nan", ((1, 0), (1, 0), (1, 1))).make()
    arguments["x"][1, 5] = float("nan")
    y, *_ = exact(arguments)
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
    before, (y, delta, _) = arguments["y"].clone(), exact(arguments)
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
    ],
)
def test_lora_errors(change, message):
    needs_native("the native kernels check their arguments")
    arguments = SMALL.make()
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.lora_add_(**(arguments | change))
    assert torch.equal(arguments["y"], kept)


# --- hypernetwork ----------------------------------------------------------------------------------------------------


@kernel_case
@hyper_cases
def test_hypernet_trunk(case):
    arguments = case.make_trunk(seed=3)
    got = ops.hypernet_trunk(**arguments)
    plain = reference.hypernet_trunk(**arguments)
    oracle = reference.hypernet_trunk(**case.make_trunk(seed=3, dtype=F64))
    assert got.shape == oracle.shape and got.dtype == case.dtype and got.is_contiguous()
    if case.tasks:
        assert numerics.relative_frobenius(got, oracle) <= numerics.trunk_bound(oracle, plain, case.dtype)


def absolute(value):
    if isinstance(value, list):
        return [absolute(entry) for entry in value]
    return value.abs() if isinstance(value, torch.Tensor) else value


def slot(shape: torch.Size, module: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of ``shape`` inside a frame of NaN, with its dimensions stored in an order that differs by ``module``."""
    order = ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0))[module % 4]
    frame = torch.full([shape[d] + 2 + module % 3 for d in order], float("nan"))
    inner = frame[tuple(slice(1, 1 + shape[d]) for d in order)]
    return inner.permute(*(order.index(d) for d in range(4))), frame


def heads_oracle(case: HyperCase, seed: int) -> tuple[dict, list, list]:
    """Arguments of the heads; A and B of every module in float64, and what their errors are relative to."""
    wide = case.make_heads(seed, dtype=F64)
    magnitude = reference.hypernet_heads(**{k: absolute(v) for k, v in wide.items()})
    return case.make_heads(seed), reference.hypernet_heads(**wide), magnitude


@kernel_case
@hyper_cases
def test_hypernet_heads(case):
    arguments, oracle, magnitude = heads_oracle(case, seed=4)
    lora_A, lora_B = ops.hypernet_heads(**arguments)
    assert len(lora_A) == len(lora_B) == case.modules and len(oracle) == 2 * case.modules
    for i, (expected, size) in enumerate(zip(oracle, magnitude, strict=True)):
        got = (lora_A, lora_B)[i % 2][i // 2]
        assert got.shape == expected.shape and got.dtype == case.dtype
        assert ((got.double() - expected).abs() <= numerics.head_bound(size, expected, case.head_in, case.dtype)).all(), i
        assert (got.mT if i % 2 else got).is_contiguous()


@kernel_case
@hyper_cases
def test_hypernet_heads_out(case):
    """Slots of other strides for every module, in float32; nothing beside them is written."""
    arguments, oracle, magnitude = heads_oracle(case, seed=6)
    made = [slot(expected.shape, i // 2) for i, expected in enumerate(oracle)]
    slots = [inner for inner, _ in made]
    ops.hypernet_heads_out_(slots[::2], slots[1::2], **arguments, scale_B=2.0)
    for i, ((got, frame), expected, size) in enumerate(zip(made, oracle, magnitude, strict=True)):
        scale = 2.0 if i % 2 else 1.0
        bound = numerics.head_bound(size * scale, expected * scale, case.head_in, torch.float32)
        assert ((got.double() - expected * scale).abs() <= bound).all(), i
        assert frame.isnan().sum() == frame.numel() - got.numel(), "wrote outside its storage"


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_hypernet_rows_do_not_depend_on_the_batch(dtype):
    """Nor a module on the others."""
    needs_native("torch's own products do not promise it")
    case = HyperCase("batch", tasks=21, layers=7, dtype=dtype)
    trunk, heads = case.make_trunk(), case.make_heads()
    latent, lists = ops.hypernet_trunk(**trunk), ops.hypernet_heads(**heads)
    for task in (0, 13, 20):
        row = slice(task, task + 1)
        assert torch.equal(ops.hypernet_trunk(**(trunk | {"z": trunk["z"][row]})), latent[row])
        alone = ops.hypernet_heads(**(heads | {"latent": heads["latent"][row]}))
        for side, whole in zip(alone, lists, strict=True):
            assert all(torch.equal(a, w[row]) for a, w in zip(side, whole, strict=True))
    for i in range(case.modules):
        one = slice(i, i + 1)
        rest = {k: v[one] for k, v in heads.items() if isinstance(v, list)}
        alone = ops.hypernet_heads(**(heads | rest | {"latent": heads["latent"][:, one]}))
        assert torch.equal(alone[0][0], lists[0][i]) and torch.equal(alone[1][0], lists[1][i])


def test_hypernet_errors():
    needs_native("the native kernels check their arguments")
    trunk, heads = HYPER_CASES[0].make_trunk(), HYPER_CASES[0].make_heads()
    wrong = [*trunk["weights"]]
    wrong[6] = wrong[6].to(BF16)
    with pytest.raises(RuntimeError, match=r"weights\[6\]: expected float32, got bfloat16"):
        ops.hypernet_trunk(**(trunk | {"weights": wrong}))
    first, second, third = heads["weight"]
    with pytest.raises(RuntimeError, match=r"weight\[1\]: expected shape \[492, 40\], got \[491, 40\]"):
        ops.hypernet_heads(**(heads | {"weight": [first, second[:-1], third]}))
    with pytest.raises(RuntimeError, match="latent: expected float32, got bfloat16"):
        ops.hypernet_heads(**(heads | {"latent": heads["latent"].to(BF16)}))


def test_hypernet_lists():
    """Of the wrappers, whatever runs the op."""
    trunk, heads = HYPER_CASES[0].make_trunk(), HYPER_CASES[0].make_heads()
    with pytest.raises(RuntimeError, match="t2l_engine::hypernet_trunk: weights: expected 22 tensors, got 21"):
        ops.hypernet_trunk(**(trunk | {"weights": trunk["weights"][:-1]}))
    with pytest.raises(RuntimeError, match=r"latent: expected shape \[\*, \*, \*, \*, \*, \*\], got \[3, 1, 1, 5, 40\]"):
        ops.hypernet_heads(**(heads | {"latent": heads["latent"][:, 0]}))
    wrong = r"expected one entry for each module of latent \(dimension 1\), at least one, got"
    slots = [[slot(t.shape, 0)[0] for t in side] for side in ops.hypernet_heads(**heads)]
    for op in (ops.hypernet_heads, lambda **arguments: ops.hypernet_heads_out_(*slots, **arguments)):
        for name in (k for k, v in heads.items() if isinstance(v, list)):
            with pytest.raises(RuntimeError, match=rf"t2l_engine::hypernet_heads\w*: {name}: {wrong} 2 for 3 modules"):
                op(**(heads | {name: heads[name][:-1]}))
        with pytest.raises(RuntimeError, match=rf"weight: {wrong} 3 for 0 modules"):
            op(**(heads | {"latent": heads["latent"][:, :0]}))
    for i, name in enumerate(("lora_A", "lora_B")):
        fewer = [side[: None if i != j else -1] for j, side in enumerate(slots)]
        with pytest.raises(RuntimeError, match=rf"t2l_engine::hypernet_heads_out_: {name}: {wrong} 2 for 3 modules"):
            ops.hypernet_heads_out_(*fewer, **heads)
    assert all(t.isnan().all() for side in slots for t in side)


def test_absent_lists_of_the_heads():
    """None for a list is None for every module."""
    heads = HyperCase("absent", bias=False).make_heads()
    assert heads["bias"] is None and heads["mul_A"] == [None] * 3
    needed = {k: v for k, v in heads.items() if k[:4] not in ("mul_", "add_")}
    for some, all_of_them in zip(ops.hypernet_heads(**needed), ops.hypernet_heads(**heads), strict=True):
        assert all(map(torch.equal, some, all_of_them))


@pytest.mark.parametrize("op", [ops.hypernet_heads_out_, reference.hypernet_heads_out_], ids=["op", "reference"])
@pytest.mark.parametrize(
    "side, change, message",
    [
        (0, lambda t: t.int(), r"lora_A\[0\]: expected float32, bfloat16, float16 or float64, got int32"),
        (
            0,
            lambda t: t[:, :1].expand_as(t),
            r"lora_A\[0\]: expected strides that do not overlap, got stride 0 at dimension 1",
        ),
        (1, lambda t: t[..., :1].expand_as(t), r"lora_B\[0\]: expected strides .* got stride 0 at dimension 3"),
    ],
    ids=["int32", "A_expanded", "B_expanded"],
)
def test_outputs_of_the_heads(op, side, change, message):
    heads = HYPER_CASES[0].make_heads()
    slots = [[torch.zeros(t.shape) for t in tensors] for tensors in ops.hypernet_heads(**heads)]
    slots[side] = list(map(change, slots[side]))
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads_out_: {message}"):
        op(*slots, **heads, scale_B=1.0)
    assert not any(t.any() for tensors in slots for t in tensors)


# --- gradients and registration --------------------------------------------------------------------------------------


def grad_inputs(arguments: dict, names: tuple[str, ...]) -> dict:
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    return wide | {k: wide[k].detach().clone().requires_grad_() for k in names if wide[k] is not None}


def test_lora_delta_gradcheck():
    arguments = SMALL.make()
    arguments.pop("y")
    arguments["ranks"] = torch.tensor([2, 1], dtype=torch.int32)
    wide = grad_inputs(arguments, ("x", "lora_A", "lora_B")) | {"scaling": arguments["scaling"]}
    run = lambda x, a, b: ops.lora_delta(**(wide | {"x": x, "lora_A": a, "lora_B": b}))  # noqa: E731
    assert torch.autograd.gradcheck(run, (wide["x"], wide["lora_A"], wide["lora_B"]))


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


def saved_bytes(function) -> int:
    """The most that autograd kept for a backward at one time while ``function`` ran."""
    now = most = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, now = tensor, now + tensor.nbytes
            most = max(most, now)

        def __del__(self):
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        function()
    assert now == 0
    return most


def test_heads_are_recomputed_one_by_one():
    """The backward of many modules keeps what that of the largest does."""
    case = HyperCase("backward", modules=5)
    order = ("latent", "weight", "bias", "mul_A", "mul_B", "rank", "in_features", "out_features")
    heads = case.make_heads()
    grads = [torch.ones_like(t) for pair in zip(*ops.hypernet_heads(**heads), strict=True) for t in pair]

    def peak(first: int, end: int) -> int:
        some = {k: v[first:end] if isinstance(v, list) else v for k, v in heads.items()}
        some["latent"] = heads["latent"][:, first:end]
        arguments = [some[k] for k in order]
        return saved_bytes(lambda: reference.hypernet_heads_backward(grads[2 * first : 2 * end], *arguments))

    assert peak(0, case.modules) == max(peak(i, i + 1) for i in range(case.modules)) > 0


OPCHECK_LORA = [c for c in LORA_CASES if c.name in ("mixed_rows", "bf16_mixed_ranks", "out_r_layout", "fp64_by_reference")]


@pytest.mark.parametrize("case", OPCHECK_LORA, **by_name)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_lora(case, grad):
    case = dataclasses.replace(case, ranks=None)
    arguments = list(case.make().values())
    y, rest = arguments[0], arguments[1:]
    if grad:
        rest[:3] = [t.detach().clone().requires_grad_() for t in rest[:3]]
    torch.library.opcheck(torch.ops.t2l_engine.lora_delta.default, tuple(rest))
    if not grad:
        torch.library.opcheck(torch.ops.t2l_engine.lora_add_.default, (y, *rest))
        delta = ops.lora_delta(*rest)
        torch.library.opcheck(torch.ops.t2l_engine.lora_delta_backward.default, (delta, *rest))


@pytest.mark.parametrize("name", ["q_and_v", "bf16", "fp16"])
def test_opcheck_lora_group(name):
    arguments = next(c for c in GROUP_CASES if c.name == name).make()
    arguments["ranks"] = [
        torch.full_like(r, b.shape[2]) for r, b in zip(arguments["ranks"], arguments["lora_B"], strict=True)
    ]
    for tensor in (*arguments["lora_A"], *arguments["lora_B"]):
        tensor.nan_to_num_()
    torch.library.opcheck(torch.ops.t2l_engine.lora_add_group_.default, (), arguments)


OPCHECK_HYPER = [c for c in HYPER_CASES if c.name in ("L", "M_affine_out_wider", "S_learnable", "S_rotary_bf16")]


@pytest.mark.parametrize("case", OPCHECK_HYPER, **by_name)
def test_opcheck_hypernet(case):
    trunk = list(case.make_trunk().values())
    trunk[0].requires_grad_()
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_trunk.default, tuple(trunk))
    order = ("latent", "weight", "bias", "mul_A", "add_A", "mul_B", "add_B", "rank", "in_features", "out_features")
    heads = dataclasses.replace(case, modules=2).make_heads()
    heads["bias"] = heads["bias"] or []
    if case.affine:  # lists without None, which autograd counts otherwise
        sizes = list(zip(heads["in_features"], heads["out_features"], strict=True))
        for k in order[3:7]:
            heads[k] = [
                torch.rand((case.layers, case.rank, n_in) if k[-1] == "A" else (case.layers, n_out, case.rank))
                for n_in, n_out in sizes
            ]
    for tensor in (heads["latent"], *heads["weight"], *heads["bias"]):
        tensor.requires_grad_()
    arguments = [heads[k] for k in order]
    out = torch.ops.t2l_engine.hypernet_heads(*arguments)
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_heads.default, tuple(arguments))
    for tensor in (heads["latent"], *heads["weight"], *heads["bias"]):
        tensor.requires_grad_(False)
    stored = [torch.empty(t.shape) for t in out]
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_heads_out_.default, (stored[::2], stored[1::2], *arguments, 1.0))


def passed(output: str) -> int:
    """How many tests a run of pytest says that passed."""
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


def test_instruction_sets(backend):
    """The op cases under every other instruction set of this CPU; a name it lacks is an error."""
    needs_native("instruction sets are the native library's")
    if backend != "cpu":
        pytest.skip("instruction sets are the CPU kernels'")
    from t2l_engine import _core

    if os.environ.get("T2L_ISA"):
        pytest.skip("an instruction set was asked for")
    for isa in set(_core.available_isas()) - {_core.chosen_isa()}:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel_case", __file__]
        run = subprocess.run(command, env=os.environ | {"T2L_ISA": isa}, capture_output=True, text=True)
        assert run.returncode == 0, f"{isa}: {run.stdout[-2000:]}"
        assert passed(run.stdout) >= KERNEL_CASES, f"{isa}: {run.stdout[-2000:]}"
    probe = "from t2l_engine import ops; from t2l_engine.testing.cases import LORA_CASES as c; ops.lora_add_(**c[4].make())"
    run = subprocess.run([sys.executable, "-c", probe], env=os.environ | {"T2L_ISA": "mmx"}, capture_output=True, text=True)
    assert run.returncode != 0 and "T2L_ISA: expected generic, avx2, avx512 or avx512_bf16" in run.stderr
