"""Gradients of the ops against finite differences, and what torch asks of a registered op."""

import dataclasses

import pytest
import torch

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing.cases import F64, GROUP_CASES, HYPER_CASES, LORA_CASES, HyperCase
from t2l_engine.testing.oracle import in_float64
from tests.ops.kernel_cases import SMALL, by_name

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


def grad_inputs(arguments: dict, names: tuple[str, ...]) -> dict:
    wide = in_float64(arguments)
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


def differentiable(dtype):
    """By op a call, and the inputs that it is differentiable in."""
    lora = SMALL.make()
    lora.pop("y")
    lora |= {name: lora[name].to(dtype).requires_grad_() for name in ("x", "lora_A", "lora_B")}
    trunk, heads = (make(dtype=dtype) for make in (TINY_HYPERS[0].make_trunk, TINY_HYPERS[0].make_heads))
    latent = heads["latent"].clone().requires_grad_()
    z = trunk["z"].requires_grad_()
    return {
        "lora_delta": (lambda: ops.lora_delta(**lora), [lora[name] for name in ("x", "lora_A", "lora_B")]),
        "hypernet_trunk": (lambda: ops.hypernet_trunk(**trunk), [z]),
        "hypernet_heads": (
            lambda: torch.cat([t.flatten() for t in ops.hypernet_heads(**heads | {"latent": latent})[0]]),
            [latent],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("op", ["lora_delta", "hypernet_trunk", "hypernet_heads"])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_second_derivatives_are_an_error(op, dtype, loss):
    """Not zero, and not a part; the first are those without a graph."""
    call, inputs = differentiable(dtype)[op]
    expected = torch.autograd.grad(loss(call()), inputs)
    grads = torch.autograd.grad(loss(call()), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    with pytest.raises(RuntimeError, match=f"t2l_engine::{op}: expected first derivatives alone, got a derivative of its"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_in_place_ops_do_not_lose_gradients(name):
    arguments, group = SMALL.make(), GROUP_CASES[0].make()
    for op, given in ((ops.lora_add_, arguments), (ops.lora_add_group_, group)):
        before = given["y"].clone()
        learnt = given[name] if isinstance(given[name], torch.Tensor) else given[name][-1]
        learnt.requires_grad_()
        with pytest.raises(RuntimeError, match=f"{op.__name__}: {name}: expected no gradients to record .*lora_delta"):
            op(**given)
        assert torch.equal(given["y"], before)
        with torch.no_grad():
            op(**given)


@pytest.mark.parametrize("name", ["latent", "weight", "bias"])
def test_preallocated_heads_do_not_lose_gradients(name):
    case = TINY_HYPERS[0]
    heads = case.make_heads()
    sides = [[torch.zeros_like(t) for t in of] for of in ops.hypernet_heads(**heads)]
    heads["latent"] = heads["latent"].clone()
    (heads[name] if name == "latent" else heads[name][0]).requires_grad_()
    with pytest.raises(RuntimeError, match=f"hypernet_heads_out_: {name}: expected no gradients to record .*hypernet_heads"):
        ops.hypernet_heads_out_(*sides, **heads)
    with torch.no_grad():
        ops.hypernet_heads_out_(*sides, **heads)


def test_autocast_changes_no_op():
    """Neither a reference, nor a backward."""
    half = SMALL.make()
    half.pop("y")
    half |= {name: half[name].half() for name in ("x", "lora_A", "lora_B")}
    case = TINY_HYPERS[0]
    torch.manual_seed(1)
    task_emb, encoder = torch.randn(2, 7), [torch.randn(4, 7), torch.randn(4), torch.ones(4), torch.zeros(4)]

    def calls():
        yield ops.lora_delta(**half)
        yield ops.hypernet_trunk(**case.make_trunk() | {"z": task_emb, "encoder": encoder})
        for call, inputs in differentiable(torch.float32).values():
            yield from torch.autograd.grad(call().square().sum(), inputs)

    outside = list(calls())
    with torch.autocast("cpu", torch.bfloat16):
        inside = list(calls())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


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


def test_heads_backward_keeps_nothing():
    """It is no recording of the forward op, whose results would all be in memory."""
    case = HyperCase("backward", modules=5)
    order = ("latent", "weight", "bias", "mul_A", "mul_B", "rank", "in_features", "out_features")
    heads = case.make_heads()
    grads = [torch.ones_like(t) for pair in zip(*ops.hypernet_heads(**heads), strict=True) for t in pair]
    assert saved_bytes(lambda: reference.hypernet_heads_backward(grads, *(heads[k] for k in order))) == 0


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
        bad_ids = torch.zeros(1, dtype=torch.int32)
        torch.library.opcheck(torch.ops.t2l_engine.lora_add_.default, (y, *rest, bad_ids))
        delta, grad_x = ops.lora_delta(*rest), torch.ones_like(rest[0], memory_format=torch.contiguous_format)
        torch.library.opcheck(torch.ops.t2l_engine.lora_backward_.default, (grad_x, delta, *rest))


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
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_trunk.default, (*trunk, []))
    torch.manual_seed(2)
    task_emb, encoder = torch.randn(case.tasks, 24), [torch.randn(case.task_width, 24), *torch.randn(3, case.task_width)]
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_trunk.default, (task_emb, *trunk[1:], encoder))
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


def test_changes_in_place_are_seen_by_autograd():
    """A backward pass that needs what an op wrote over is refused, not wrong."""
    arguments = SMALL.make()
    y = arguments["y"].requires_grad_().sigmoid()  # whose gradient needs y
    ops.lora_add_(**(arguments | {"y": y}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    group = GROUP_CASES[0].make()
    made = HyperCase("L", **TINY).make_heads()
    lora_A, lora_B = ops.hypernet_heads(**made)
    before = [tensor._version for tensor in (group["y"], *lora_A, *lora_B)]
    ops.lora_add_group_(**group)
    ops.hypernet_heads_out_(lora_A, lora_B, **made)
    assert all(tensor._version > old for tensor, old in zip((group["y"], *lora_A, *lora_B), before, strict=True))
