"""Wrong arguments of the ops: the message names the argument, and nothing is written."""

import pytest
import torch
from torch.torch_version import TorchVersion

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing.cases import BF16, F64, GROUP_CASES, HYPER_CASES, LORA_CASES, HyperCase, LoraCase
from t2l_engine.testing.checks import strided_slot
from tests.ops.kernel_cases import SMALL, needs_native, without_y

INT32 = {"dtype": torch.int32}


def refused(message, op, arguments):
    """The call raises with ``message``, and writes nothing."""
    kept = arguments["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        op(**arguments)
    assert torch.equal(arguments["y"], kept)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
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
    ({"bad_ids": torch.zeros(2, **INT32)}, r"bad_ids: expected shape \[1\], got \[2\]"),
    ({"bad_ids": torch.zeros(1)}, "bad_ids: expected int32, got float32"),
])  # fmt: skip
def test_lora_add(change, message):
    needs_native("the native kernels check their arguments")
    refused(message, ops.lora_add_, SMALL.make() | change)


@pytest.mark.parametrize("op", [ops.lora_add_, reference.lora_add_], ids=["op", "reference"])
@pytest.mark.parametrize("change, message", [
    ({"seg_adapters": torch.tensor([0, 2, 1], **INT32)}, r"seg_adapters: expected ids in \[-1, 2\), got 2 at segment 1"),
    ({"seg_adapters": torch.tensor([0, -2, 1], **INT32)}, r"seg_adapters: expected ids in \[-1, 2\), got -2"),
    ({"seg_indptr": torch.tensor([1, 2, 3, 6], **INT32)}, "seg_indptr: expected 0 first, got 1"),
    ({"seg_indptr": torch.tensor([0, 2, 5, 7], **INT32)}, "expected the number of tokens 6 last, got 7"),
    ({"seg_indptr": torch.tensor([0, 3, 2, 6], **INT32)}, "0 to max_seg_len = 3 tokens, got -1 at segment 1"),
    ({"seg_indptr": torch.tensor([0, 6], **INT32)}, r"seg_indptr: expected shape \[4\], got \[2\]"),
    ({"seg_indptr": torch.tensor([], **INT32)}, r"seg_indptr: expected shape \[4\], got \[0\]"),
    ({"max_seg_len": 2}, "segments of 0 to max_seg_len = 2 tokens, got 3"),
    ({"ranks": torch.tensor([1, 3], **INT32)}, r"ranks: expected values in \[0, 2\], got 3 at adapter 1"),
    ({"ranks": torch.tensor([1], **INT32)}, r"ranks: expected shape \[2\], got \[1\]"),
])  # fmt: skip
def test_segments(op, change, message, backend):
    if backend != "cpu" and op is ops.lora_add_ and "shape" not in message:
        pytest.skip("only the device sees the values")
    refused(message, op, SMALL.make() | change)


@pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
def test_nothing_is_written_before_all_is_checked(module, backend):
    """Neither y nor the count of bad ids, where the last problem's argument is wrong."""
    if backend != "cpu" and module is ops:
        pytest.skip("only the device sees the values")
    single, group, bad_ids = SMALL.make(), GROUP_CASES[0].make(), torch.zeros(1, **INT32)
    single["seg_indptr"][-1] += 1
    group["ranks"][-1] = torch.full_like(group["ranks"][-1], 10_000)
    for op, arguments in ((module.lora_add_, single), (module.lora_add_group_, group)):
        arguments["seg_adapters"][0] = 2**31 - 1
        refused("seg_indptr: |ranks", op, {"ranks": None} | arguments | {"bad_ids": bad_ids})
        assert bad_ids.tolist() == [0]


def test_tokens_without_segments():
    arguments = SMALL.make() | {"seg_indptr": torch.zeros(1, **INT32), "seg_adapters": torch.zeros(0, **INT32)}
    for op, given in ((ops.lora_add_, arguments), (ops.lora_delta, without_y(arguments))):
        with pytest.raises(RuntimeError, match=r"seg_(adapters|indptr): expected"):
            op(**given)


def test_a_negative_max_seg_len():
    """Without segments, which would be longer than that."""
    needs_native("the native kernels check their arguments")
    arguments, group = (next(c for c in cases if c.name == "no_tokens").make() for cases in (LORA_CASES, GROUP_CASES))
    for op, given in ((ops.lora_add_, arguments), (ops.lora_delta, without_y(arguments)), (ops.lora_add_group_, group)):
        with pytest.raises(RuntimeError, match=f"t2l_engine::{op.__name__}: max_seg_len: expected >= 0, got -1"):
            op(**given | {"max_seg_len": -1})


@pytest.mark.parametrize("change, message", [
    ({"offsets": [0, 40, 64]}, "offsets: expected rising columns .* not overlap, got columns 40 to 56 at problem 1"),
    ({"offsets": [0, 48, 65]}, r"offsets: expected rising columns of y \[66, 80\] .* got columns 65 to 81 at problem 2"),
    ({"offsets": [-1, 48, 64]}, "got columns -1 to 47 at problem 0"),
    ({"offsets": [2**62, 48, 64]}, "at problem 0"),
    ({"x": torch.zeros(66, 65)}, r"lora_A: expected shape \[\*, \*, 65\], got \[.*\] at problem 0"),
    ({"y": torch.zeros(80).expand(66, 80)}, "y: expected rows that do not overlap, got rows of 80 elements, 0 apart"),
    ({"bad_ids": torch.zeros(2, **INT32)}, r"bad_ids: expected shape \[1\], got \[2\]"),
    # The wrapper's check, whatever runs the op.
    ({"offsets": [0, 48]}, "offsets: expected one entry a problem, .* got 2 for 3 entries"),
    ({"ranks": []}, "ranks: expected one entry a problem, as many as lora_A and at least one, got 0 for 3 entries"),
    ({"lora_A": []}, "lora_B: expected one entry a problem, as many as lora_A and at least one, got 3 for 0"),
    ({"lora_A": [], "lora_B": []}, "lora_B: expected one entry a problem, .* at least one, got 0 for 0"),
])  # fmt: skip
def test_lora_add_group(change, message):
    if "one entry a problem" not in message:
        needs_native("the native kernels check their arguments")
    refused(message, ops.lora_add_group_, GROUP_CASES[0].make() | change)


@pytest.mark.parametrize("grad_x, message", [
    (lambda x: x.double(), "grad_x: expected float32, got float64"),
    (lambda x: x[1:], "grad_x: expected shape"),
    (lambda x: x.T.contiguous().T, "grad_x: expected a contiguous tensor"),
])  # fmt: skip
def test_lora_backward(grad_x, message):
    needs_native("the reference checks little")
    case = LoraCase("checks", ((3, 0), (2, 1)))
    given = grad_x(torch.zeros(case.tokens, case.in_features))
    grad = torch.ones(case.tokens, case.out_features)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.t2l_engine.lora_backward_(given, grad, *without_y(case.make()).values())


# --- hypernetwork ----------------------------------------------------------------------------------------------------


def changed(arguments, name, index, change):
    """``arguments`` with another tensor ``index`` of list ``name``."""
    tensors = list(arguments[name])
    tensors[index] = change(tensors[index])
    return arguments | {name: tensors}


@pytest.mark.parametrize("change, message", [
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
    (
        changed(HYPER_CASES[0].make_trunk(), "weights", 6, lambda t: t.to(BF16)),
        r"weights\[6\]: expected float32, got bfloat16",
    ),
])  # fmt: skip
def test_trunk(change, message):
    needs_native("the native kernels check their arguments")
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_trunk: {message}"):
        ops.hypernet_trunk(**HYPER_CASES[0].make_trunk() | change)


@pytest.mark.parametrize("change, message", [
    (lambda encoder: [encoder[0][:, 1:], *encoder[1:]], r"encoder\[0\]: expected shape \[\*, 24\], got \[16, 23\]"),
    (lambda encoder: [encoder[0], encoder[1][1:], *encoder[2:]], r"encoder\[1\]: expected shape \[16\], got \[15\]"),
    (lambda encoder: [t.to(BF16) for t in encoder], r"encoder\[0\]: expected float32, got bfloat16"),
    (lambda encoder: [t[:8] for t in encoder], r"weights\[0\]: expected shape \[128, 8\], got \[128, 16\]"),
])  # fmt: skip
def test_encoder(change, message):
    needs_native("the native kernels check their arguments")
    arguments = HYPER_CASES[0].make_trunk() | {"z": torch.zeros(3, 24)}
    encoder = [torch.zeros(16, 24), *torch.zeros(3, 16)]
    ops.hypernet_trunk(**arguments, encoder=encoder)
    with pytest.raises(RuntimeError, match=f"hypernet_trunk: {message}"):
        ops.hypernet_trunk(**arguments, encoder=change(encoder))
    for z, got in ((arguments["z"].to(BF16), "float32, got bfloat16"), (torch.zeros(24, 3).mT, "a contiguous tensor")):
        with pytest.raises(RuntimeError, match=f"z: expected {got}"):
            ops.hypernet_trunk(**arguments | {"z": z}, encoder=encoder)


def test_encoder_without_kernels():
    """The checks of the wrapper and of autograd, whatever runs the op."""
    arguments = HYPER_CASES[0].make_trunk() | {"z": torch.zeros(3, 24, requires_grad=True)}
    with pytest.raises(RuntimeError, match="hypernet_trunk: encoder: expected none or 4 tensors, got 3"):
        ops.hypernet_trunk(**arguments, encoder=[torch.zeros(16)] * 3)
    with pytest.raises(RuntimeError, match="encoder: expected none where gradients are recorded, got 4 tensors"):
        ops.hypernet_trunk(**arguments, encoder=[torch.zeros(16, 24), *torch.zeros(3, 16)])


def make_slots(heads):
    return [[strided_slot(t.shape, 0) for t in side] for side in ops.hypernet_heads(**heads)]


@pytest.mark.parametrize("change, message", [
    ({"rank": 0}, "rank, in_features, out_features: expected positive sizes, got 0, 64, 48"),
    ({"in_features": [64, 0, 80]}, "rank, in_features, out_features: expected positive sizes, got 4, 0, 72"),
    ({"out_features": [48, 72, -1]}, "rank, in_features, out_features: expected positive sizes, got 4, 80, -1"),
    ({"latent": torch.zeros(3, 3, 0, 1, 5, 40)}, r"latent: expected 1 or 2 sides \(dimension 2\), got \[3, 3, 0, 1,"),
    ({"latent": torch.zeros(3, 3, 3, 1, 5, 40)}, r"latent: expected 1 or 2 sides \(dimension 2\), got \[3, 3, 3, 1,"),
    ({"latent": torch.zeros(3, 3, 1, 2, 5, 40)}, r"latent: expected 1 or rank = 4 ranks .*, got \[3, 3, 1, 2, 5"),
    ({"latent": torch.zeros(3, 3, 1, 1, 5, 40, dtype=BF16)}, "latent: expected float32, got bfloat16"),
    (
        changed(HYPER_CASES[0].make_heads(), "weight", 1, lambda t: t[:-1]),
        r"weight\[1\]: expected shape \[492, 40\], got \[491, 40\]",
    ),
])  # fmt: skip
def test_heads(change, message):
    needs_native("the native kernels check their arguments")
    heads = HYPER_CASES[0].make_heads()
    slots = make_slots(heads)
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads: {message}"):
        ops.hypernet_heads(**heads | change)
    with pytest.raises(RuntimeError, match=f"t2l_engine::hypernet_heads_out_: {message}"):
        ops.hypernet_heads_out_(*slots, **heads | change)
    assert all(t.isnan().all() for side in slots for t in side)


def test_lengths_of_lists():
    """The wrappers' checks, whatever runs the op."""
    trunk, heads = HYPER_CASES[0].make_trunk(), HYPER_CASES[0].make_heads()
    with pytest.raises(RuntimeError, match="t2l_engine::hypernet_trunk: weights: expected 22 tensors, got 21"):
        ops.hypernet_trunk(**(trunk | {"weights": trunk["weights"][:-1]}))
    with pytest.raises(RuntimeError, match=r"latent: expected shape \[\*, \*, \*, \*, \*, \*\], got \[3, 1, 1, 5, 40\]"):
        ops.hypernet_heads(**(heads | {"latent": heads["latent"][:, 0]}))
    wrong = r"expected one entry for each module of latent \(dimension 1\), at least one, got"
    slots = make_slots(heads)
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


@pytest.mark.parametrize("op", [ops.hypernet_heads_out_, reference.hypernet_heads_out_], ids=["op", "reference"])
@pytest.mark.parametrize("side, change, message", [
    (0, lambda t: t.int(), r"lora_A\[0\]: expected float32, bfloat16, float16 or float64, got int32"),
    (0, lambda t: t[:, :1].expand_as(t), r"lora_A\[0\]: expected strides .* got stride 0 at dimension 1"),
    (1, lambda t: t[..., :1].expand_as(t), r"lora_B\[0\]: expected strides .* got stride 0 at dimension 3"),
    (
        0,
        lambda t: t.as_strided(t.shape, (1, *t.stride()[1:])),
        r"lora_A\[0\]: expected strides that do not overlap, got stride 1 at dimension 3, where smaller ones span \d",
    ),
], ids=["int32", "A_expanded", "B_expanded", "A_folded"])  # fmt: skip
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
    slots = make_slots(heads)
    slots[side][module] = slots[side][module].to(BF16)
    with pytest.raises(RuntimeError, match=rf"_out_: lora_{'AB'[side]}\[{module}\]: expected float32, got bfloat16"):
        ops.hypernet_heads_out_(*slots, **heads)
    assert all(t.isnan().all() for tensors in slots for t in tensors)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="this torch does not say what failed in it")
def test_errors_of_torch_keep_their_reason():
    needs_native("the reference is torch itself")
    rows = 2**20
    x, A, B = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).expand(1, 2**30, 1)
    segments = torch.tensor([0, rows], **INT32), torch.zeros(1, **INT32)
    with pytest.raises(RuntimeError, match="memory.*API call failed"):
        ops.lora_delta(x, A, B, torch.ones(1), *segments, rows)
