"""What torch asks of a registered op: opcheck, whole graphs, changes in place that autograd sees."""

import dataclasses

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES
from tests.ops.kernel_cases import SMALL, TINY_HYPERS, by_name, without_y

#: Of torch's checks all but the compiled one, which takes seconds.
UNCOMPILED = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}


@pytest.mark.parametrize(("name", "grad"), [("mixed_rows", True), ("bf16_mixed_ranks", False), ("out_r_layout", False)])
def test_opcheck_lora(name, grad):
    case = next(case for case in LORA_CASES if case.name == name)
    arguments = list(dataclasses.replace(case, ranks=None).make().values())
    y, rest = arguments[0], arguments[1:]
    if grad:
        rest[:3] = [t.detach().clone().requires_grad_() for t in rest[:3]]
    torch.library.opcheck(torch.ops.t2l_engine.lora_delta.default, tuple(rest))
    if not grad:
        torch.library.opcheck(torch.ops.t2l_engine.lora_add_.default, (y, *rest))
        bad_ids = torch.zeros(1, dtype=torch.int32)
        torch.library.opcheck(torch.ops.t2l_engine.lora_add_.default, (y, *rest, bad_ids), **UNCOMPILED)
        delta, grad_x = ops.lora_delta(*rest), torch.ones_like(rest[0], memory_format=torch.contiguous_format)
        torch.library.opcheck(torch.ops.t2l_engine.lora_backward_.default, (grad_x, delta, *rest))


@pytest.mark.parametrize("name", ["q_and_v", "bf16"])
def test_opcheck_lora_group(name):
    arguments = next(c for c in GROUP_CASES if c.name == name).make()
    arguments["ranks"] = [
        torch.full_like(r, b.shape[2]) for r, b in zip(arguments["ranks"], arguments["lora_B"], strict=True)
    ]
    for tensor in (*arguments["lora_A"], *arguments["lora_B"]):
        tensor.nan_to_num_()
    torch.library.opcheck(torch.ops.t2l_engine.lora_add_group_.default, (), arguments)


OPCHECK_HYPER = [c for c in HYPER_CASES if c.name in ("M_affine_out_wider", "S_learnable", "S_rotary_bf16")]


@pytest.mark.parametrize("case", OPCHECK_HYPER, **by_name)
def test_opcheck_hypernet(case):
    trunk = list(case.make_trunk().values())
    trunk[0].requires_grad_()
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_trunk.default, (*trunk, []))
    torch.manual_seed(2)
    task_emb, encoder = torch.randn(case.tasks, 24), [torch.randn(case.task_width, 24), *torch.randn(3, case.task_width)]
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_trunk.default, (task_emb, *trunk[1:], encoder), **UNCOMPILED)
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
    outputs = stored[::2], stored[1::2]
    torch.library.opcheck(torch.ops.t2l_engine.hypernet_heads_out_.default, (*outputs, *arguments, 1.0), **UNCOMPILED)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_ops_compile_whole():
    """Results and gradients."""
    lora = without_y(SMALL.make())
    names = ("x", "lora_A", "lora_B")

    def gradients(op):
        leaves = [lora[name].detach().clone().requires_grad_() for name in names]
        y = op(**lora | dict(zip(names, leaves, strict=True)))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(map(torch.allclose, gradients(compiled(ops.lora_delta)), gradients(ops.lora_delta)))
    case = next(case for case in HYPER_CASES if case.name == "M")
    trunk, heads = case.make_trunk(), case.make_heads()
    assert torch.equal(compiled(ops.hypernet_trunk)(**trunk), ops.hypernet_trunk(**trunk))
    for side, whole in zip(compiled(ops.hypernet_heads)(**heads), ops.hypernet_heads(**heads), strict=True):
        for got, expected in zip(side, whole, strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "latent", "weight", "bias"])
def test_in_place_ops_do_not_lose_gradients(name):
    heads = TINY_HYPERS[0].make_heads() | {"latent": TINY_HYPERS[0].make_heads()["latent"].clone()}
    outputs = [[torch.zeros_like(t) for t in side] for side in ops.hypernet_heads(**heads)]
    calls = [(ops.lora_add_, SMALL.make()), (ops.lora_add_group_, GROUP_CASES[0].make())]
    if name not in calls[0][1]:
        calls = [(ops.hypernet_heads_out_, heads | dict(zip(("lora_A", "lora_B"), outputs, strict=True)))]
    for op, arguments in calls:
        trained = arguments[name] if isinstance(arguments[name], torch.Tensor) else arguments[name][-1]
        trained.requires_grad_()
        with pytest.raises(RuntimeError, match=f"{op.__name__}: {name}: expected no gradients to record "):
            op(**arguments)
        with torch.no_grad():
            op(**arguments)


def test_changes_in_place_are_seen_by_autograd():
    """A backward pass that needs what an op wrote over is refused, not wrong."""
    arguments = SMALL.make()
    y = arguments["y"].requires_grad_().sigmoid()  # whose gradient needs y
    ops.lora_add_(**(arguments | {"y": y}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    group = GROUP_CASES[0].make()
    made = TINY_HYPERS[0].make_heads()
    lora_A, lora_B = ops.hypernet_heads(**made)
    before = [tensor._version for tensor in (group["y"], *lora_A, *lora_B)]
    ops.lora_add_group_(**group)
    ops.hypernet_heads_out_(lora_A, lora_B, **made)
    assert all(tensor._version > old for tensor, old in zip((group["y"], *lora_A, *lora_B), before, strict=True))
