"""Our ops in torch's FLOP counter: formulas against the products that the references form, and counted once."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from t2l_engine import ops
from t2l_engine.ops import flops, reference
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES, LoraCase

by_name = {"ids": lambda case: case.name}
HEADS = ("latent", "weight", "bias", "mul_A", "add_A", "mul_B", "add_B", "rank", "in_features", "out_features")
SMALL = [case for case in LORA_CASES if case.tokens * case.in_features < 1 << 20]  # products as useful as larger ones
SMALL_HYPER = [case for case in HYPER_CASES if not case.name.startswith("smollm2")]


def by_op(function) -> dict[str, int]:
    """What torch's counter takes ``function`` for, with nothing told to it here."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts().get("Global", {}).items() if count}


def total(function) -> int:
    return sum(by_op(function).values())


def test_every_op_has_a_formula():
    assert all(getattr(torch.ops.t2l_engine, name) in flop_registry for name in ops.SCHEMAS)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_lora(case):
    """Ids of -1, true ranks, dtypes of a kernel and of the reference: the products that the reference forms, no more."""
    added = case.make()
    delta = {name: value for name, value in added.items() if name != "y"}
    inside = total(lambda: reference.lora_delta(**delta))
    ranks = case.ranks or [case.rank] * case.adapters
    assert inside == 2 * sum(n * ranks[a] for n, a in case.segments if a >= 0) * (case.in_features + case.out_features)
    assert by_op(lambda: ops.lora_delta(**delta)) == ({"lora_delta": inside} if inside else {})
    assert by_op(lambda: ops.lora_add_(**added)) == ({"lora_add_": inside} if inside else {})
    grad = torch.ones(case.tokens, case.out_features, dtype=case.x_dtype)
    inside = total(lambda: oracle.gradients(reference.lora_backward_, grad, delta))
    assert total(lambda: oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, delta)) == inside


@pytest.mark.parametrize("case", [case for case in GROUP_CASES if not case.name.startswith("serve")], **by_name)
def test_lora_group(case):
    inside = total(lambda: reference.lora_add_group_(**case.make()))
    assert by_op(lambda: ops.lora_add_group_(**case.make())) == ({"lora_add_group_": inside} if inside else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_counts_the_backward(dtype):
    """Also of float64, which no kernel takes: autograd, op and reference count once."""
    case = LoraCase("training", ((3, 0), (2, -1), (4, 1)), x_dtype=dtype, w_dtype=dtype)
    arguments = {name: value for name, value in case.make().items() if name != "y"}
    arguments |= {name: arguments[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    work = 2 * 7 * case.rank
    assert by_op(lambda: ops.lora_delta(**arguments).sum().backward()) == {
        "lora_delta": work * (case.in_features + case.out_features),
        "lora_backward_": work * (3 * case.in_features + 2 * case.out_features),
    }


@pytest.mark.parametrize("case", SMALL_HYPER, **by_name)
def test_hypernetwork(case):
    """The formulas of both directions against the products of the references, called as plain functions."""
    trunk, heads = case.make_trunk(), case.make_heads()
    heads["bias"] = heads["bias"] or []
    lora_A, lora_B = ops.hypernet_heads(**heads)
    assert total(lambda: ops.hypernet_trunk(**trunk)) == total(lambda: reference.hypernet_trunk(**trunk))
    inside = total(lambda: reference.hypernet_heads(*(heads[name] for name in HEADS)))
    assert total(lambda: ops.hypernet_heads(**heads)) == inside
    assert total(lambda: ops.hypernet_heads_out_(lora_A, lora_B, **heads)) == inside
    grad = torch.ones_like(reference.hypernet_trunk(**trunk))
    operands = grad, *trunk.values()
    inside = total(lambda: reference.hypernet_trunk_backward(*operands))
    assert flops.hypernet_trunk_backward(*operands, out_val=None) == inside
    grads = [torch.ones_like(t) for pair in zip(lora_A, lora_B, strict=True) for t in pair]
    operands = grads, *(heads[name] for name in HEADS if not name.startswith("add"))
    inside = total(lambda: reference.hypernet_heads_backward(*operands))
    assert flops.hypernet_heads_backward(*operands, out_val=None) == inside


@pytest.mark.parametrize("case", SMALL_HYPER, **by_name)
def test_training_a_hypernetwork(case):
    """Through autograd; the references of the backwards record below the counter too."""
    trunk, heads = case.make_trunk(), case.make_heads()
    heads["bias"] = heads["bias"] or []
    trained = [t for t in (trunk["z"], *trunk["weights"], trunk["side_emb"], trunk["pos_emb"]) if t is not None]
    for tensor in (*trained, heads["latent"], *heads["weight"], *heads["bias"]):
        tensor.requires_grad_()

    def run():
        lora_A, lora_B = ops.hypernet_heads(**heads)
        sum(t.sum() for t in (ops.hypernet_trunk(**trunk), *lora_A, *lora_B)).backward()

    got = by_op(run)
    for name, times in (("hypernet_trunk", 3), ("hypernet_heads", 2)):  # the trunk is recomputed
        assert got.pop(f"{name}_backward", 0) == times * got.pop(name, 0)
    assert not got


def test_fake_tensors_count_every_token():
    case = LoraCase("fake", ((3, 0), (2, -1), (4, 1)), ranks=(1, 2, 3, 4))
    arguments = {name: value for name, value in case.make().items() if name != "y"}
    everything = 2 * case.tokens * case.rank * (case.in_features + case.out_features)
    assert total(lambda: ops.lora_delta(**arguments)) < everything
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert total(lambda: ops.lora_delta(**fake)) == everything
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert total(lambda: ops.lora_delta(**meta)) == everything


def test_without_the_native_library():
    """Where the reference is the op: not its products beside the formula."""
    code = (
        "from torch.utils.flop_counter import FlopCounterMode as Counter; from t2l_engine import ops; "
        "from t2l_engine.testing.cases import LoraCase; case = LoraCase('one', ((3, 0), (2, -1)))\n"
        "assert not ops.NATIVE\n"
        "with Counter(display=False) as counter: ops.lora_add_(**case.make())\n"
        "print(counter.get_total_flops() == 2 * 3 * case.rank * (case.in_features + case.out_features))"
    )
    environment = {**os.environ, "T2L_DISABLE_NATIVE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
