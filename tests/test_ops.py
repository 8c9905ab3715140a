"""Every op against its float64 reference: values, bitwise promises, gradients, registration, errors."""

import dataclasses
import os
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
        ({"offsets": [0, 48]}, "offsets: expected one entry a member, .* got 2 for 3 entries"),
        ({"lora_A": []}, "lora_B: expected one entry a member, as many as lora_A and at least one, got 3 for 0"),
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


def test_lora_nan_stays_in_its_row():
    arguments = LoraCase("nan", ((1, 0), (1, 0), (1, 1))).make()
    arguments["x"][1, 5] = float("nan")
    y, *_ = exact(arguments)
    got = ops.lora_add_(**arguments)
    assert torch.equal(got.isnan(), y.isnan()) and got[1].isnan().all() and not got[0].isnan().any()


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


@hyper_cases
def test_hypernet_trunk(case):
    arguments = case.make_trunk(seed=3)
    got = ops.hypernet_trunk(**arguments)
    plain = reference.hypernet_trunk(**arguments)
    oracle = reference.hypernet_trunk(**case.make_trunk(seed=3, dtype=F64))
    assert got.shape == oracle.shape and got.dtype == case.dtype and got.is_contiguous()
    if case.tasks:
        assert numerics.relative_frobenius(got, oracle) <= numerics.trunk_bound(oracle, plain, case.dtype)


@hyper_cases
def test_hypernet_head(case):
    arguments = case.make_head(seed=4)
    wide = case.make_head(seed=4, dtype=F64)
    oracle = reference.hypernet_head(**wide)
    magnitude = reference.hypernet_head(**{k: v.abs() if isinstance(v, torch.Tensor) else v for k, v in wide.items()})
    stored = [torch.full((*t.shape[:-1], t.shape[-1] + 2), float("nan"))[..., 1:-1] for t in oracle]
    ops.hypernet_head_out_(*stored, **arguments, scale_B=2.0)
    for side, (got, expected, size) in enumerate(zip(ops.hypernet_head(**arguments), oracle, magnitude, strict=True)):
        bound = numerics.head_bound(size, expected, case.head_in, case.dtype)
        assert got.dtype == case.dtype
        assert ((got.double() - expected).abs() <= bound).all()
        assert (got.mT if side else got).is_contiguous()
        scale = 2.0 if side else 1.0
        into = numerics.head_bound(size * scale, expected * scale, case.head_in, torch.float32)
        assert ((stored[side].double() - expected * scale).abs() <= into).all()
        assert stored[side]._base[..., [0, -1]].isnan().all(), "wrote outside its storage"


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_hypernet_rows_do_not_depend_on_the_batch(dtype):
    needs_native("torch's own products do not promise it")
    case = HyperCase("batch", tasks=21, layers=7, dtype=dtype)
    trunk, head = case.make_trunk(), case.make_head()
    latent, (lora_A, lora_B) = ops.hypernet_trunk(**trunk), ops.hypernet_head(**head)
    for task in (0, 13, 20):
        row = slice(task, task + 1)
        assert torch.equal(ops.hypernet_trunk(**(trunk | {"z": trunk["z"][row]})), latent[row])
        alone = ops.hypernet_head(**(head | {"latent": head["latent"][row]}))
        assert torch.equal(alone[0], lora_A[row]) and torch.equal(alone[1], lora_B[row])


def test_hypernet_errors():
    needs_native("the native kernels check their arguments")
    trunk, head = HYPER_CASES[0].make_trunk(), HYPER_CASES[0].make_head()
    with pytest.raises(RuntimeError, match="weights: expected 22 tensors, got 21"):
        ops.hypernet_trunk(**(trunk | {"weights": trunk["weights"][:-1]}))
    wrong = [*trunk["weights"]]
    wrong[6] = wrong[6].to(BF16)
    with pytest.raises(RuntimeError, match=r"weights\[6\]: expected float32, got bfloat16"):
        ops.hypernet_trunk(**(trunk | {"weights": wrong}))
    with pytest.raises(RuntimeError, match=r"weight\[0\]: expected shape \[448, 40\], got \[447, 40\]"):
        ops.hypernet_head(**(head | {"weight": head["weight"][:-1]}))
    with pytest.raises(RuntimeError, match="latent: expected float32, got bfloat16"):
        ops.hypernet_head(**(head | {"latent": head["latent"].to(BF16)}))


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
    head = case.make_head(dtype=F64)
    tensors = [head[k].requires_grad_() for k in ("weight", "bias") if head[k] is not None]
    head["latent"] = head["latent"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: ops.hypernet_head(**head), [head["latent"], *tensors], fast_mode=True)


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
    head = case.make_head()
    order = ("latent", "weight", "bias", "mul_A", "add_A", "mul_B", "add_B", "rank", "in_features", "out_features")
    # Two modules, the second without offsets.
    latent = torch.stack((head["latent"], head["latent"] + 1), 1).requires_grad_()
    biases = [] if head["bias"] is None else [head["bias"]] * 2
    offsets = [[head[k], None] for k in order[3:7]]
    arguments = [latent, [head["weight"]] * 2, biases, *offsets, head["rank"], *([head[k]] * 2 for k in order[8:])]
    out = torch.ops.t2l_engine.hypernet_heads(*arguments)
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_heads.default, tuple(arguments))
    arguments[0] = arguments[0].detach()
    stored = [torch.empty(t.shape) for t in out]
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_heads_out_.default, (stored[::2], stored[1::2], *arguments, 1.0))


def test_instruction_sets(backend):
    """The op cases under every instruction set of this CPU; a name it lacks is an error."""
    needs_native("instruction sets are the native library's")
    if backend != "cpu":
        pytest.skip("instruction sets are the CPU kernels'")
    from t2l_engine import _core

    if os.environ.get("T2L_ISA"):
        pytest.skip("an instruction set was asked for")
    selection = (
        "(test_lora_add and not errors) or test_lora_delta or test_hypernet_trunk or test_hypernet_head or do_not_depend"
    )
    for isa in _core.available_isas():
        command = [sys.executable, "-m", "pytest", "-q", "-k", f"({selection}) and not gradcheck", __file__]
        run = subprocess.run(command, env=os.environ | {"T2L_ISA": isa}, capture_output=True, text=True)
        assert run.returncode == 0, f"{isa}: {run.stdout[-2000:]}"
    probe = "from t2l_engine import ops; from t2l_engine.testing.cases import LORA_CASES as c; ops.lora_add_(**c[4].make())"
    run = subprocess.run([sys.executable, "-c", probe], env=os.environ | {"T2L_ISA": "mmx"}, capture_output=True, text=True)
    assert run.returncode != 0 and "T2L_ISA: expected generic, avx2, avx512 or avx512_bf16" in run.stderr
