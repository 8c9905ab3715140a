"""Values of the ops against their float64 oracles, and what their bits do not depend on."""

import functools

import pytest
import torch

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import checks, numerics, oracle
from t2l_engine.testing.cases import BF16, F64, GROUP_CASES, HYPER_CASES, LORA_CASES, GroupCase, HyperCase, LoraCase
from tests.ops.kernel_cases import EMBED_DIMS, ENCODED, VALUES, by_name, kernel_case, needs_native, with_threads, without_y

INT32 = {"dtype": torch.int32}
ROWS = ((1, 0), (1, 1), (1, -1), (1, 2), (1, 0))  # a decode step
RUNS = ((2, 0), (20, 1), (1, -1), (3, 2))
lora_backward = functools.partial(oracle.gradients, torch.ops.t2l_engine.lora_backward_)


@kernel_case
@pytest.mark.parametrize(("op", "case"), VALUES, ids=lambda value: getattr(value, "name", value))
def test_values(op, case):
    check, _ = checks.CHECKS[op]
    assert check(case) <= 1


@kernel_case
@pytest.mark.parametrize("embed_dim", EMBED_DIMS)
@pytest.mark.parametrize("case", ENCODED, **by_name)
def test_trunk_with_its_encoder(case, embed_dim, backend):
    g = torch.Generator().manual_seed(4)
    t, dtype = case.task_width, case.make_trunk()["z"].dtype
    shapes = ((t, embed_dim), (t,), (t,), (t,), (case.tasks, embed_dim))
    *encoder, task_emb = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    arguments = case.make_trunk(seed=3) | {"z": task_emb, "encoder": encoder}
    exact = case.make_trunk(seed=3, dtype=F64) | {"z": task_emb.double(), "encoder": [t.double() for t in encoder]}
    assert checks.trunk_error(case, arguments, exact) <= 1
    if case.tasks and backend != "cpu" and case.dtype != F64:  # else torch encodes, which does not promise it
        alone = ops.hypernet_trunk(**arguments | {"z": task_emb[-1:]})
        assert torch.equal(alone[0], ops.hypernet_trunk(**arguments)[-1])  # whatever tasks it shares a tile with


# --- LoRA ------------------------------------------------------------------------------------------------------------


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_lora_backward_adds_to_grad_x_and_rounds_once(dtype):
    """Tokens of adapter -1 keep their bits; the others are the rounded sum, not the sum of two rounded ones."""
    case = LoraCase("adds", ((3, 0), (2, -1), (20, 1)), in_features=70, x_dtype=dtype, w_dtype=dtype)
    arguments = without_y(case.make())
    torch.manual_seed(8)
    grad, before = (torch.randn(case.tokens, n).to(dtype) for n in (case.out_features, case.in_features))
    exact, *_ = oracle.gradients(reference.lora_backward_, grad.double(), oracle.in_float64(arguments))
    grad_x = before.clone()
    torch.ops.t2l_engine.lora_backward_(grad_x, grad, *arguments.values())
    assert torch.equal(grad_x[3:5], before[3:5]) and not torch.equal(grad_x[:3], before[:3])
    bound = numerics.u(dtype) * (before.double() + exact).abs() + numerics.gradient_bound(exact, torch.float32)
    assert ((grad_x.double() - before.double() - exact).abs() <= bound).all()


@kernel_case
@pytest.mark.parametrize("leading", [(2, 4), (8, 1), (1, 8), (2, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_tokens_in_any_leading_dimensions(leading, dtype):
    """The same bits as rows, in slices of wider tensors too; gradients have the shape of x."""
    segments = ((1, 0), (2, -1), (3, 3), (1, 1), (1, 0))
    case = LoraCase("leading", segments, in_features=23, out_features=19, x_dtype=dtype, w_dtype=dtype)
    flat, arguments = case.make(), case.make()
    around = arguments["y"]._base
    arguments |= {name: arguments[name].unflatten(0, leading) for name in ("y", "x")}
    delta = ops.lora_delta(**without_y(arguments))
    grad = torch.randn(case.tokens, case.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, expected = lora_backward(grad.unflatten(0, leading), without_y(arguments)), lora_backward(grad, without_y(flat))
    assert grads[0].shape == arguments["x"].shape and torch.equal(grads[0].flatten(0, -2), expected[0])
    assert torch.equal(grads[1], expected[1]) and torch.equal(grads[2], expected[2])
    expected = ops.lora_delta(**without_y(flat))
    assert delta.shape == (*leading, case.out_features) and torch.equal(delta.flatten(0, -2), expected)
    group = {k: [v] if k in ("lora_A", "lora_B") else v for k, v in arguments.items()}
    group |= {"y": group["y"].clone(), "ranks": [torch.full((case.adapters,), case.rank, **INT32)], "offsets": [0]}
    ops.lora_add_(**arguments)
    ops.lora_add_(**flat)
    assert torch.equal(around, flat["y"]._base)
    assert torch.equal(ops.lora_add_group_(**group).flatten(0, -2), flat["y"])


def test_one_token_without_leading_dimensions():
    arguments, row = (LoraCase("one", ((1, 2),)).make() for _ in range(2))
    arguments |= {name: arguments[name][0] for name in ("y", "x")}
    assert torch.equal(ops.lora_delta(**without_y(arguments))[None], ops.lora_delta(**without_y(row)))
    assert torch.equal(ops.lora_add_(**arguments)[None], ops.lora_add_(**row))


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    "rank, in_features, out_features, b_layout",
    [(8, 111, 77, "r_out"), (8, 111, 77, "out_r"), (8, 4500, 1100, "r_out"), (12, 2100, 600, "out_r")],
)
def test_lora_rows_do_not_depend_on_neighbours(dtype, rank, in_features, out_features, b_layout, backend):
    """Bitwise: run twice, alone or in a batch, at any position, with any number of threads."""
    needs_native("torch's own products do not promise it")
    kinds = {"x_dtype": dtype, "w_dtype": dtype, "b_layout": b_layout}
    case = LoraCase("rows", ((37, 0), (1, 1), (20, 0)), in_features, out_features, rank, **kinds)
    group = GroupCase("rows", case, ((0, out_features, rank), (out_features, 16, 4)), out_features + 16)
    arguments = without_y(case.make())
    torch.manual_seed(9)
    grad = torch.randn(case.tokens, out_features).to(dtype)

    def results():
        made = [ops.lora_delta(**arguments), *lora_backward(grad, arguments)]
        if backend == "cpu":
            made += ops.lora_add_(**case.make()), ops.lora_add_group_(**group.make())
        return made

    whole, grad_x, *_ = expected = with_threads(3, results)
    for token, adapter in ((0, 0), (36, 0), (37, 1), (50, 0)):
        one = slice(token, token + 1)
        segment = {"seg_indptr": torch.tensor([0, 1], **INT32), "seg_adapters": torch.tensor([adapter], **INT32)}
        alone = arguments | {"x": arguments["x"][one], "max_seg_len": 1} | segment
        assert torch.equal(ops.lora_delta(**alone)[0], whole[token])
        assert torch.equal(lora_backward(grad[one], alone)[0][0], grad_x[token])
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
    delta = ops.lora_delta(**without_y(arguments))  # the kernels of decode steps do not run it
    arguments["y"].zero_()
    assert delta.any() and torch.equal(ops.lora_add_(**arguments), delta)


@kernel_case
@pytest.mark.parametrize("segments", [ROWS, RUNS])
@pytest.mark.parametrize("rank, dtype", [(3, torch.float32), (3, BF16), (8, torch.float32), (8, BF16)])
def test_infinite_inputs(rank, dtype, segments):
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
    got_delta, got = ops.lora_delta(**without_y(arguments)), ops.lora_add_(**arguments)
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
    arguments = without_y(case.make())
    near = ops.lora_delta(**arguments)
    a.copy_(arguments["lora_A"])
    assert torch.equal(near, ops.lora_delta(**arguments | {"lora_A": a}))


@kernel_case
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
@pytest.mark.parametrize("segments", [ROWS, RUNS])
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
@pytest.mark.parametrize("name", ["qkv", "nine_problems", "bf16"])
def test_bad_ids_of_a_group_are_counted_once(name):
    case = next(case for case in GROUP_CASES if case.name == name)
    arguments, right = case.make(), case.make()
    arguments["seg_adapters"][0], right["seg_adapters"][0] = 2**31 - 1, -1
    bad_ids = torch.zeros(1, **INT32)
    got = ops.lora_add_group_(**arguments, bad_ids=bad_ids)
    assert torch.equal(got._base, ops.lora_add_group_(**right)._base) and bad_ids.tolist() == [1]


# --- hypernetwork ----------------------------------------------------------------------------------------------------


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


MANY = HyperCase("many_rows", tasks=64, layers=16, modules=2, dtype=BF16)  # matrix tiles take operands in the other order
THREADED = ("L_no_bias_affine", "many_tasks", "odd_sizes", "odd_sizes_bf16", "S_rotary_bf16", "deep_shared_heads_bf16")


@kernel_case
@pytest.mark.parametrize("case", [*(case for case in HYPER_CASES if case.name in THREADED), MANY], **by_name)
def test_hypernet_bits_do_not_depend_on_threads(case, backend):
    needs_native("torch's own products do not promise it")
    if backend != "cpu":
        pytest.skip("other backends have no threads of torch")
    trunk, heads = case.make_trunk(), case.make_heads()

    def results():
        made = ops.hypernet_heads(**heads)
        slots = [[checks.strided_slot(t.shape, i) for i, t in enumerate(side)] for side in made]
        ops.hypernet_heads_out_(*slots, **heads, scale_B=2.0)
        return [ops.hypernet_trunk(**trunk), *(t for side in (*made, *slots) for t in side)]

    expected = with_threads(3, results)
    for count in (1, 2):
        assert all(map(torch.equal, with_threads(count, results), expected))


def test_absent_lists_of_the_heads():
    """None for a list is None for every module."""
    heads = HyperCase("absent", bias=False).make_heads()
    assert heads["bias"] is None and heads["mul_A"] == [None] * 3
    needed = {k: v for k, v in heads.items() if k[:4] not in ("mul_", "add_")}
    for some, all_of_them in zip(ops.hypernet_heads(**needed), ops.hypernet_heads(**heads), strict=True):
        assert all(map(torch.equal, some, all_of_them))


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
