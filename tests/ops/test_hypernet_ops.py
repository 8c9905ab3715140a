"""The ops of the hypernetwork against their float64 references: values, bitwise promises, errors."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing import oracle as oracles
from t2l_engine.testing.cases import BF16, F64, HYPER_CASES, HyperCase
from tests.ops.kernel_cases import EMBED_DIMS, ENCODED
from tests.ops.native import by_name, kernel_case, needs_native, with_threads

hyper_cases = pytest.mark.parametrize("case", HYPER_CASES, **by_name)


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


@kernel_case
@pytest.mark.parametrize("embed_dim", EMBED_DIMS)
@pytest.mark.parametrize("case", ENCODED, **by_name)
def test_hypernet_trunk_with_its_encoder(case, embed_dim, backend):
    arguments, exact = case.make_trunk(seed=3), case.make_trunk(seed=3, dtype=F64)
    g = torch.Generator().manual_seed(4)
    t, dtype = case.task_width, arguments["z"].dtype
    shapes = ((t, embed_dim), (t,), (t,), (t,), (case.tasks, embed_dim))
    *encoder, task_emb = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    got = ops.hypernet_trunk(**arguments | {"z": task_emb}, encoder=encoder)
    plain = reference.hypernet_trunk(**arguments | {"z": reference.encode_task(task_emb, encoder)})
    wide = [t.double() for t in encoder]
    oracle = reference.hypernet_trunk(**exact | {"z": task_emb.double()}, encoder=wide)
    assert got.shape == oracle.shape and got.dtype == case.dtype
    if case.tasks:
        assert numerics.relative_frobenius(got, oracle) <= numerics.trunk_bound(oracle, plain, case.dtype)
        alone = ops.hypernet_trunk(**arguments | {"z": task_emb[-1:]}, encoder=encoder)
        if backend != "cpu" and case.dtype != F64:  # else torch encodes, which does not promise it
            assert torch.equal(alone[0], got[-1])  # whatever tasks it shares a tile with


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda encoder: [encoder[0][:, 1:], *encoder[1:]], r"encoder\[0\]: expected shape \[\*, 24\], got \[16, 23\]"),
        (lambda encoder: [encoder[0], encoder[1][1:], *encoder[2:]], r"encoder\[1\]: expected shape \[16\], got \[15\]"),
        (lambda encoder: [t.to(BF16) for t in encoder], r"encoder\[0\]: expected float32, got bfloat16"),
        (lambda encoder: [t[:8] for t in encoder], r"weights\[0\]: expected shape \[128, 8\], got \[128, 16\]"),
    ],
)
def test_encoder_errors(change, message):
    needs_native("the native kernels check their arguments")
    arguments = HYPER_CASES[0].make_trunk() | {"z": torch.zeros(3, 24)}
    encoder = [torch.zeros(16, 24), *torch.zeros(3, 16)]
    ops.hypernet_trunk(**arguments, encoder=encoder)
    with pytest.raises(RuntimeError, match=f"hypernet_trunk: {message}"):
        ops.hypernet_trunk(**arguments, encoder=change(encoder))
    for z, said in ((arguments["z"].to(BF16), "float32, got bfloat16"), (torch.zeros(24, 3).mT, "a contiguous tensor")):
        with pytest.raises(RuntimeError, match=f"z: expected {said}"):
            ops.hypernet_trunk(**arguments | {"z": z}, encoder=encoder)


def test_length_of_the_encoder():
    """Of the wrapper, whatever runs the op."""
    with pytest.raises(RuntimeError, match="hypernet_trunk: encoder: expected none or 4 tensors, got 3"):
        ops.hypernet_trunk(**HYPER_CASES[0].make_trunk(), encoder=[torch.zeros(16)] * 3)


def test_an_encoder_is_for_inference():
    arguments = HYPER_CASES[0].make_trunk() | {"z": torch.zeros(3, 24, requires_grad=True)}
    encoder = [torch.zeros(16, 24), *torch.zeros(3, 16)]
    with pytest.raises(RuntimeError, match="encoder: expected none where gradients are recorded, got 4 tensors"):
        ops.hypernet_trunk(**arguments, encoder=encoder)


def slot(shape: torch.Size, module: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of ``shape`` inside a frame of NaN, with its dimensions stored in an order that differs by ``module``."""
    order = ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0))[module % 4]
    frame = torch.full([shape[d] + 2 + module % 3 for d in order], float("nan"))
    inner = frame[tuple(slice(1, 1 + shape[d]) for d in order)]
    return inner.permute(*(order.index(d) for d in range(4))), frame


@kernel_case
@hyper_cases
def test_hypernet_heads(case):
    arguments, oracle, magnitude = oracles.heads(case, seed=4)
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
    arguments, oracle, magnitude = oracles.heads(case, seed=6)
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


COVERED = [case for case in HYPER_CASES if case.dtype in (torch.float32, BF16)]
MANY = HyperCase("many_rows", tasks=64, layers=16, modules=2, dtype=BF16)  # matrix tiles take operands in the other order


@kernel_case
@pytest.mark.parametrize("case", [*COVERED, MANY], **by_name)
def test_hypernet_bits_do_not_depend_on_threads(case, backend):
    needs_native("torch's own products do not promise it")
    if backend != "cpu":
        pytest.skip("other backends have no threads of torch")
    trunk, heads = case.make_trunk(), case.make_heads()

    def results():
        made = ops.hypernet_heads(**heads)
        slots = [[slot(t.shape, i)[0] for i, t in enumerate(side)] for side in made]
        ops.hypernet_heads_out_(*slots, **heads, scale_B=2.0)
        return [ops.hypernet_trunk(**trunk), *(t for side in (*made, *slots) for t in side)]

    expected = with_threads(3, results)
    for count in (1, 2):
        assert all(map(torch.equal, with_threads(count, results), expected))


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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotary_ranks": -1}, "rotary_ranks: expected >= 0, got -1"),
        ({"rotary_ranks": 4, "pos_emb": torch.zeros(4, 32)}, "pos_emb: expected None with rotary_ranks, got a tensor"),
        (
            {"rotary_ranks": 4, "weights": HyperCase("odd", width=33).make_trunk()["weights"]},
            r"weights\[2\]: expected an even trunk width with rotary_ranks, got \[33, 132\]",
        ),
        ({"side_emb": torch.zeros(2, 2, 32)}, r"side_emb: expected shape \[3, \*, 32\], got \[2, 2, 32\]"),
        ({"side_emb": torch.zeros(3, 2, 32, dtype=BF16)}, "side_emb: expected float32, got bfloat16"),
        ({"pos_emb": torch.zeros(4, 31)}, r"pos_emb: expected shape \[\*, 32\], got \[4, 31\]"),
        ({"pos_emb": torch.zeros(32, 4).mT}, "pos_emb: expected a contiguous tensor, got strides of another layout"),
    ],
)
def test_trunk_errors(change, message):
    needs_native("the native kernels check their arguments")
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_trunk: {message}"):
        ops.hypernet_trunk(**HYPER_CASES[0].make_trunk() | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank, in_features, out_features: expected positive sizes, got 0, 64, 48"),
        ({"in_features": [64, 0, 80]}, "rank, in_features, out_features: expected positive sizes, got 4, 0, 72"),
        ({"out_features": [48, 72, -1]}, "rank, in_features, out_features: expected positive sizes, got 4, 80, -1"),
        ({"latent": torch.zeros(3, 3, 0, 1, 5, 40)}, r"latent: expected 1 or 2 sides \(dimension 2\), got \[3, 3, 0, 1,"),
        ({"latent": torch.zeros(3, 3, 3, 1, 5, 40)}, r"latent: expected 1 or 2 sides \(dimension 2\), got \[3, 3, 3, 1,"),
        ({"latent": torch.zeros(3, 3, 1, 2, 5, 40)}, r"latent: expected 1 or rank = 4 ranks .*, got \[3, 3, 1, 2, 5"),
    ],
)
def test_heads_errors(change, message):
    needs_native("the native kernels check their arguments")
    heads = HYPER_CASES[0].make_heads()
    slots = [[slot(t.shape, 0)[0] for t in side] for side in ops.hypernet_heads(**heads)]
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads: {message}"):
        ops.hypernet_heads(**heads | change)
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads_out_: {message}"):
        ops.hypernet_heads_out_(*slots, **heads | change)
    assert all(t.isnan().all() for side in slots for t in side)


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
        (
            0,
            lambda t: t.as_strided(t.shape, (1, *t.stride()[1:])),
            r"lora_A\[0\]: expected strides that do not overlap, got stride 1 at dimension 3, where smaller ones span \d",
        ),
    ],
    ids=["int32", "A_expanded", "B_expanded", "A_folded"],
)
def test_outputs_of_the_heads(op, side, change, message):
    heads = HYPER_CASES[0].make_heads()
    slots = [[torch.zeros(t.shape) for t in tensors] for tensors in ops.hypernet_heads(**heads)]
    slots[side] = list(map(change, slots[side]))
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads_out_: {message}"):
        op(*slots, **heads, scale_B=1.0)
    assert not any(t.any() for tensors in slots for t in tensors)


@pytest.mark.parametrize("side, module", [(0, 1), (1, 0)])
def test_outputs_of_two_dtypes(side, module):
    needs_native("the reference rounds to each")
    heads = HYPER_CASES[0].make_heads()
    slots = [[torch.zeros(t.shape) for t in tensors] for tensors in ops.hypernet_heads(**heads)]
    slots[side][module] = slots[side][module].to(BF16)
    with pytest.raises(RuntimeError, match=rf"_out_: lora_{'AB'[side]}\[{module}\]: expected float32, got bfloat16"):
        ops.hypernet_heads_out_(*slots, **heads)
    assert not any(t.any() for tensors in slots for t in tensors)


def test_heads_without_depth():
    """A latent of no features leaves the bias."""
    latent, weight = torch.zeros(2, 2, 1, 1, 3, 0), [torch.zeros(4 * (8 + 6), 0)] * 2
    torch.manual_seed(5)
    bias = [torch.randn(4 * (8 + 6)) for _ in weight]
    lora_A, lora_B = ops.hypernet_heads(latent, weight, bias, 4, [8, 8], [6, 6])
    for i, b in enumerate(bias):
        a, out = b.split([4 * 8, 4 * 6])
        assert torch.equal(lora_A[i], a.view(4, 8).expand(2, 3, -1, -1))
        assert torch.equal(lora_B[i], out.view(4, 6).mT.expand(2, 3, -1, -1))
