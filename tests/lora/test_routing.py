"""Which adapter each row of a batch gets: rows, -1, segments, and the ids themselves."""

import pytest
import torch
from torch import nn

from t2l_engine import AdapterBatch, attach
from t2l_engine.lora import routing
from t2l_engine.testing.numerics import ROW_ATOL, relative_frobenius, u
from tests.lora.blocks import Blocks, by_hand
from tests.lora.tiny_llama import NAMES


@pytest.fixture
def handle(model, stack_for):
    """Eight adapters on ``model``."""
    return attach(model, stack_for(model, NAMES, num_adapters=8))


@pytest.fixture
def prompts():
    """Eight prompts of different lengths, left padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (8, 9), generator=generator)
    mask = (torch.arange(9) >= torch.arange(8)[:, None] // 2).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model, prompts):
    return model(**prompts).logits


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_rows_are_bitwise_the_base_model(tiny_model, stack_for, prompts, dtype, grad):
    model = tiny_model("Llama", dtype=dtype)
    with torch.set_grad_enabled(grad):
        base = model(**prompts).logits
        handle = attach(model, stack_for(model, NAMES, num_adapters=8))
        idle = model(**prompts).logits
        with handle.use([3, -1, 0, -1, -1, 7, 1, -1]):
            mixed = model(**prompts).logits
        with handle.use(-1):
            none = model(**prompts).logits
    assert torch.equal(idle, base) and torch.equal(none, base)
    for row, adapted in enumerate([True, False, True, False, False, True, True, False]):
        assert torch.equal(mixed[row], base[row]) != adapted


def test_ids_of_any_integer_form(model, handle, prompts):
    with handle.use([2] * 8):
        expected = logits(model, prompts)
    for ids in (2, (2,) * 8, torch.full((8,), 2), torch.full((8,), 2, dtype=torch.int32), [2], [2, 2]):
        with handle.use(ids):
            assert (logits(model, prompts) - expected).abs().max() <= ROW_ATOL


def test_one_id_for_any_number_of_rows(model, handle, prompts):
    """Also after ids for another number of rows: beams, a last batch that is smaller."""
    with handle.use(2):
        expected = logits(model, prompts)
    for before in ([0, 1, 3], [0] * 16, 3):
        handle.set(before)
        handle.set(2)
        for rows in (8, 5, 1, 8):
            got = logits(model, {key: value[:rows] for key, value in prompts.items()})
            assert (got - expected[:rows]).abs().max() <= ROW_ATOL


def batch(bounds, adapters, longest):
    return AdapterBatch(*(torch.tensor(values, dtype=torch.int32) for values in (bounds, adapters)), longest)


OUT_OF_RANGE = (
    8, -2, [0, 8], [0, -2], [2**40], torch.tensor([9]), AdapterBatch.from_rows([0, 8], 4), AdapterBatch.from_rows([-2], 4),
)  # fmt: skip
NO_IDS = (
    [], 1.0, [0.0, 1.0], True, [True, False], torch.tensor(1), torch.tensor([[0, 1]]), "01", None, [None],
    batch([1, 4], [0], 4), batch([0, 3, 2, 4], [0, 0, 0], 4), batch([0, 4], [0], 3), batch([0, 4], [0], 4.0),
    batch([0, 4], [0, 0], 4), batch([], [], 4), AdapterBatch([0, 4], [0], 4),
    AdapterBatch(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0]), 4),
    AdapterBatch(torch.tensor([0.0, 4.0]), torch.tensor([0], dtype=torch.int32), 4),
)  # fmt: skip


@pytest.mark.parametrize(("ids", "error"), [
    *((ids, IndexError) for ids in OUT_OF_RANGE),
    *((ids, ValueError) for ids in NO_IDS),
    (2**70, (IndexError, ValueError)),
], ids=str)  # fmt: skip
def test_bad_ids_change_nothing(model, handle, prompts, ids, error):
    handle.set(3)
    before = logits(model, prompts)
    with pytest.raises(error, match="ids"):
        handle.set(ids)
    with pytest.raises(error, match="ids"), handle.use(ids):
        pass
    assert torch.equal(logits(model, prompts), before)


def test_wrong_number_of_ids(model, handle, prompts):
    for count in (3, 9, 16):
        with handle.use([0] * count), pytest.raises(ValueError, match=f"8 rows.*got {count} ids"):
            model(**prompts)
    for bounds in ([0, 4], [0, 4, 6]):
        message = f"ids: expected segments of all 5 tokens, got segments of {bounds[-1]}"
        with handle.use(batch(bounds, [0] * (len(bounds) - 1), 4)), pytest.raises(ValueError, match=message):
            model.model.layers[0].self_attn.q_proj(torch.randn(5, 64))


def test_use_returns_to_what_was_before(model, handle, prompts):
    base = logits(model, prompts)
    alone = {}
    for adapter in range(3):
        with handle.use(adapter):
            alone[adapter] = logits(model, prompts)
    assert torch.equal(logits(model, prompts), base)
    assert not torch.equal(alone[0], alone[1])
    handle.set(0)
    with handle.use(1):
        with handle.use([2] * 8):
            assert (logits(model, prompts) - alone[2]).abs().max() <= ROW_ATOL
        assert torch.equal(logits(model, prompts), alone[1])
        with pytest.raises(ZeroDivisionError), handle.use(2):
            raise ZeroDivisionError
        assert torch.equal(logits(model, prompts), alone[1])
        handle.set(2)
    assert torch.equal(logits(model, prompts), alone[0])
    handle.set(-1)
    assert torch.equal(logits(model, prompts), base)


def test_ids_given_as_tensor_are_copied(model, handle, prompts):
    ids = torch.zeros(8, dtype=torch.int32)
    handle.set(ids)
    before = logits(model, prompts)
    ids.fill_(1)
    assert torch.equal(logits(model, prompts), before)
    handle.set([2] * 8)
    assert ids.tolist() == [1] * 8


# --- segments on a custom stack ------------------------------------------------------------------------------------


def test_segments_over_flattened_tokens(make_stack):
    model, x = Blocks(), torch.randn(11, 16, generator=torch.Generator().manual_seed(1))
    stack = make_stack({"q_proj": (16, 16)})
    bounds, adapters = [0, 3, 3, 4, 9, 11], [2, 1, 0, -1, 2]
    expected = by_hand(model, stack, x, [a for a, n in zip(adapters, (3, 0, 1, 5, 2), strict=True) for _ in range(n)])
    handle = attach(model, stack)
    ragged = batch(bounds, adapters, 5)
    assert ragged.num_tokens == 11
    with torch.no_grad(), handle.use(ragged):
        for tensor in (ragged.seg_indptr, ragged.seg_adapters):
            tensor.fill_(7)  # the caller's own
        got = model(x)
    assert (got - expected).abs().max() <= ROW_ATOL


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_that_a_linear_takes(make_stack, grad):
    stack, x = make_stack({"q_proj": (16, 16)}), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    model = Blocks()
    handle = attach(model, stack)
    with torch.set_grad_enabled(grad), handle.use(1):
        expected = model(x.mT.contiguous())
        assert (model(x.mT) - expected).abs().max() <= ROW_ATOL  # last stride is not 1
        assert (model(x.mT.unflatten(0, (2, 1, 3))).flatten(0, 2) - expected).abs().max() <= ROW_ATOL
        assert (model(x[:, 2]) - expected[2]).abs().max() <= ROW_ATOL
        assert model(torch.ones(0, 16)).shape == (0, 16)


class Flattening(nn.Linear):
    """Its output has no dimension of rows."""

    def forward(self, x):
        return super().forward(x).flatten(0, 1)


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_of_other_leading_dimensions(make_stack, grad):
    torch.manual_seed(0)
    model, x = nn.ModuleList([nn.ModuleDict({"q_proj": Flattening(16, 16)})]), torch.randn(3, 2, 16)
    stack = make_stack({"q_proj": (16, 16)}, num_layers=1)
    A, B = stack.lora_A["q_proj"][:, 0], stack.lora_B["q_proj"][:, 0]
    deltas = [stack.scaling[i] * (row @ A[i].mT) @ B[i].mT for row, i in zip(x, (0, 2), strict=False)]
    expected = model[0]["q_proj"](x).detach() + torch.cat((*deltas, torch.zeros(2, 16)))
    with torch.set_grad_enabled(grad), attach(model, stack).use([0, 2, -1]):
        assert (model[0]["q_proj"](x) - expected).abs().max() <= ROW_ATOL


def test_a_graph_reads_no_stale_ids(model, handle, prompts, monkeypatch):
    """A CUDA graph goes on reading the tensor that it was captured with, whatever ids are set when it is replayed."""
    monkeypatch.setattr(routing, "is_capturing", lambda ids: True)
    with handle.use(list(range(8))):
        logits(model, prompts)
        monkeypatch.undo()
        (of,) = handle._routings.values()
        captured = of.ids
        assert captured is not None and captured.tolist() == list(range(8))
        with handle.use([5, 4]):
            assert captured.tolist() == [-1] * 8, "ids of other rows: the base model"
        assert captured.tolist() == list(range(8))
        with handle.use(batch([0, 4], [0], 4)):
            assert captured.tolist() == [-1] * 8
    assert captured.tolist() == [-1] * 8
    with handle.use(3):  # of one row
        assert captured.tolist() == [3] * 8
    handle.set([7] * 8)
    assert captured.tolist() == [7] * 8 and captured is of.ids


def test_a_graph_keeps_the_segments_that_it_reads(model, handle, prompts, monkeypatch):
    """Those of the pass before, which it then does not make in every layer, or those of an AdapterBatch."""
    handle.set(list(range(8)))
    logits(model, prompts)
    (of,) = handle._routings.values()
    known = of._segments[1]
    with monkeypatch.context() as patch:
        patch.setattr(routing, "is_capturing", lambda ids: True)
        patch.setattr(of, "_make_segments", lambda shape: pytest.fail("made in the graph"))
        logits(model, prompts)
        tokens = prompts["input_ids"].numel()
        with handle.use(batch([0, tokens], [3], tokens)):
            logits(model, prompts)
            captured = of.batch
    handle.set([7] * 8)
    assert list(of._captured_batches.values()) == [known, captured]
    assert known.seg_adapters.tolist() == [7] * 8 and captured.seg_adapters.tolist() == [3]


def test_segments_are_made_once_a_step(model, handle, prompts, monkeypatch):
    """For all linears together, and again where ids or the number of tokens change."""
    made, make = [], AdapterBatch.from_rows
    monkeypatch.setattr(AdapterBatch, "from_rows", lambda *of: made.append(of) or make(*of))
    shorter = {key: value[:, :4] for key, value in prompts.items()}
    for ids, batch, count in ((0, prompts, 1), (None, prompts, 1), (None, shorter, 2), (1, shorter, 3)):
        if ids is not None:
            handle.set([ids] * 8)
        logits(model, batch)
        assert len(made) == count


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(make_stack, grad):
    stack, x = make_stack({"q_proj": (16, 16)}), torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    model = Blocks()
    handle = attach(model, stack)
    with torch.set_grad_enabled(grad), handle.use(1):
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x)
    assert got.dtype == torch.bfloat16
    # Two layers of a few roundings each.
    assert relative_frobenius(got.detach(), expected.detach()) <= 16 * u(torch.bfloat16)
