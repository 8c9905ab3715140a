"""The life of a handle: attach, put, merge, detach; and what is refused on the way."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from t2l_engine import AdapterStack, HyperNetwork, HyperNetworkConfig, LoRALinear, attach
from t2l_engine.lora import handle as handles
from t2l_engine.lora.slots import Slots
from t2l_engine.testing.numerics import LOGITS_ATOL
from tests.hypernetwork.test_doc_to_lora import NAMES as DOCUMENTS
from tests.hypernetwork.test_doc_to_lora import Golden, adapters_of
from tests.lora.tiny_llama import NAMES, assert_untouched, logits, snapshot


@pytest.mark.parametrize("fault", [MemoryError, KeyboardInterrupt])
def test_what_fails_leaves_the_model_as_it_was(model, stack, tokens, monkeypatch, fault):
    """Memory ends at the second module, or while the adapters are copied; the model can be attached to after that."""
    before, made = snapshot(model), []

    class Few(handles.Slots):
        def __init__(self, *arguments):
            made.append(self)
            if len(made) == 2:
                raise fault
            super().__init__(*arguments)

        def write(self, *arguments):
            raise fault

    monkeypatch.setattr(handles, "Slots", Few)
    with pytest.raises(fault):
        attach(model, stack)
    assert_untouched(model, before)
    handle = attach(model)  # without slots yet
    made.clear()
    with pytest.raises(fault):
        handle.put(0, stack[0])
    assert_untouched(model, before)
    handle.detach()
    made[:] = [None, None]  # enough memory for the slots
    with pytest.raises(fault):
        attach(model, stack)
    assert_untouched(model, before)
    monkeypatch.undo()
    attach(model, stack).detach()


def test_attach_and_detach(model, stack, tokens):
    before, base = snapshot(model), logits(model, tokens)
    weight = model.model.layers[0].self_attn.q_proj.weight
    handle = attach(model, stack)
    wrapped = model.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped, LoRALinear) and wrapped.weight is weight and wrapped.bias is None
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2 * len(NAMES)
    handle.set([0, 1, 2, -1])
    assert not torch.equal(logits(model, tokens), base)
    handle.detach()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), base)
    for call in (handle.detach, lambda: handle.set(0), lambda: handle.put(0, stack[0]), lambda: handle.merge(0)):
        with pytest.raises(RuntimeError, match="detached"):
            call()
    attach(model, stack).detach()
    assert_untouched(model, before)


def test_two_handles_are_refused(model, handle, make_stack):
    for target in (model, model.model, model.model.layers[0]):
        with pytest.raises(ValueError, match="attached already"):
            attach(target, make_stack({"up_proj": (64, 96)}))


def test_stack_is_copied_and_never_changed(model, stack, tokens):
    handle = attach(model, stack)
    original = copy.deepcopy(stack)
    before = logits(model, tokens, handle, 0)
    handle.put(0, stack[1])
    for name in NAMES:
        assert torch.equal(stack.lora_A[name], original.lora_A[name])
        assert torch.equal(stack.lora_B[name], original.lora_B[name])
    handle.put(0, stack[0])
    for tensor in (*stack.lora_A.values(), *stack.lora_B.values(), stack.scaling):
        tensor.zero_()
    assert torch.equal(logits(model, tokens, handle, 0), before)


def test_attach_arguments(tiny_model, model, stack):
    before = snapshot(model)
    for kwargs, message in (
        ({"slots": 0}, "slots"),
        ({"slots": True}, "slots"),
        ({"slots": 2}, "slots: expected room for the 3 adapters"),
        ({"max_rank": 0}, "max_rank"),
        ({"max_rank": 4.0}, "max_rank"),
        ({"max_rank": 2}, "q_proj: rank 4 exceeds the slots' rank 2"),
        ({"stack": {"q_proj": 1}}, "stack: expected an AdapterStack, got dict"),
        ({"model": "llama"}, "model: expected a torch module"),
        ({"model": tiny_model("Llama", head_dim=32).to("meta")}, "meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(**{"model": model, "stack": stack} | kwargs)
        assert_untouched(model, before)


def test_bad_slots(model, handle, stack):
    for slot in (-1, 4, True, 1.0, None):
        with pytest.raises(IndexError, match="slot"):
            handle.put(slot, stack[1])
    with pytest.raises(ValueError, match="adapter: expected a stack of one adapter, got 3"):
        handle.put(0, stack)


CALLS = {
    "put": lambda handle, stack: handle.put(0, stack),
    "borrow_slots": lambda handle, stack: handle.borrow_slots(0, stack).__enter__(),
    "differentiable": lambda handle, stack: handle.differentiable(stack, 0).__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_stacks_that_are_refused_change_nothing(model, handle, stack_for, make_stack, tokens, call):
    refused = [
        ("q_proj", "expected an AdapterStack, got str; read a folder"),
        ([0], "expected an AdapterStack, got list"),
        (make_stack({"q_proj": (64, 64)}, num_adapters=1), "q_proj: .* 64/64, the model has 64/128"),
        (make_stack({"k_proj": (64, 64), "q_proj": (64, 128)}, num_adapters=1, num_layers=3), "3 layers"),
        (make_stack({"k_proj": (64, 64), "qkv_proj": (64, 64)}, num_adapters=1), "qkv_proj"),
    ]
    if call != "differentiable":  # which does not use the slots
        refused.append((stack_for(model, NAMES, num_adapters=1, rank=5), "rank 5 exceeds the slots' rank 4"))
    before, kept = snapshot(model), logits(model, tokens, handle, [0, 1, 2, -1])
    for other, message in refused:
        with pytest.raises(ValueError, match=message):
            CALLS[call](handle, other)
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens, handle, [0, 1, 2, -1]), kept)


def test_put(tiny_model, model, stack, stack_for, tokens):
    other = tiny_model("Llama", head_dim=32)
    reference = attach(other, stack)
    alone = [logits(other, tokens, reference, i) for i in range(3)]
    wider = stack_for(model, ("q_proj",), num_adapters=1, rank=8, seed=5)
    handle = attach(model, slots=2, max_rank=8)
    assert handle.num_slots == 2
    base = logits(model, tokens)
    for i in (0, 1, 2):
        handle.put(i % 2, stack[i])
    assert torch.equal(logits(model, tokens, handle, 0), alone[2])
    assert torch.equal(logits(model, tokens, handle, 1), alone[1])
    handle.put(1, wider)  # and fewer modules
    wide = logits(model, tokens, handle, 1)
    reference.detach()
    assert torch.equal(wide, logits(other, tokens, attach(other, wider), 0)) and not torch.equal(wide, base)
    assert torch.equal(logits(model, tokens, handle, 0), alone[2])
    handle.put(1, stack[1])  # narrower again: nothing of the wide one is left
    assert torch.equal(logits(model, tokens, handle, 1), alone[1])


def test_adapters_of_documents_and_descriptions_in_one_batch():
    """Of other ranks, scalings and modules; from one stack, and put into slots that hold the largest rank."""
    golden = Golden(DOCUMENTS[0])
    of_descriptions = HyperNetworkConfig(
        variant="L", modules=("q_proj", "down_proj"), in_features=(48, 80), out_features=(48, 48), num_layers=4, rank=3,
        embed_dim=8, latent_size=8, head_in_size=8, lora_alpha=6.0,
    )  # fmt: skip
    torch.manual_seed(0)
    described = HyperNetwork(of_descriptions).generate(torch.randn(2, 8))
    stack = AdapterStack.cat([described, adapters_of(golden.engine, golden.contexts)])
    assert stack.ranks["down_proj"][:, 0].tolist() == [3, 3, 12, 8]
    model = AutoModelForCausalLM.from_pretrained(golden.folder / "base")
    tokens = torch.randint(3, 90, (5, 7))

    def rows(handle, ids):
        with handle.use(ids):
            found = logits(model, tokens)
        handle.detach()
        return found

    base = logits(model, tokens)
    alone = torch.stack([*(rows(attach(model, one), 0)[i] for i, one in enumerate(stack)), base[4]])
    assert all((alone[i] - base[i]).abs().max() > 10 * LOGITS_ATOL for i in range(4))
    assert (rows(attach(model, stack), [0, 1, 2, 3, -1]) - alone).abs().max() <= LOGITS_ATOL
    slots = attach(model, slots=4, max_rank=12)
    for i in range(4):
        slots.put(3 - i, stack[i])
    assert (rows(slots, [3, 2, 1, 0, -1]) - alone).abs().max() <= LOGITS_ATOL


def test_put_that_fails_midway_leaves_an_empty_slot(model, stack, tokens, monkeypatch):
    handle = attach(model, stack)
    monkeypatch.setattr(Slots, "write", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        handle.put(1, stack[0])
    with pytest.raises(IndexError, match="slots that hold an adapter, got .1"):
        handle.set([0, 1, 2])


def test_put_reaches_modules_no_adapter_had_before(model, stack, stack_for, tokens):
    other = stack_for(model, ("up_proj",), num_adapters=1)
    handle = attach(model, stack)
    kept = logits(model, tokens, handle, 1)
    handle.put(0, other)
    assert isinstance(model.model.layers[1].mlp.up_proj, LoRALinear)
    assert torch.equal(logits(model, tokens, handle, 1), kept)
    assert not torch.equal(logits(model, tokens, handle, 0), logits(model, tokens))
    handle.detach()
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


# --- merge ---------------------------------------------------------------------------------------------------------


def test_merge_and_unmerge(model, stack, tokens):
    handle = attach(model, stack)
    before, base = snapshot(model), logits(model, tokens)
    applied = logits(model, tokens, handle, 1)
    handle.merge(1)
    merged = logits(model, tokens)
    assert (merged - applied).abs().max() <= LOGITS_ATOL
    assert (merged - base).abs().max() > 1000 * LOGITS_ATOL
    for call in (lambda: handle.merge(0), lambda: handle.set(0), lambda: handle.put(0, stack[1])):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    handle.unmerge()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens, handle, 1), applied)
    handle.merge(0)
    handle.detach()
    assert torch.equal(logits(model, tokens), base)


def test_merge_refusals(model, stack, tokens):
    handle = attach(model, stack[0], slots=2)
    before = snapshot(model)
    for index in (1, -1, 2, 0.0, None, True):
        with pytest.raises(IndexError, match="index"):
            handle.merge(index)
    with pytest.raises(RuntimeError, match="unmerge"):
        handle.unmerge()
    handle.merge(0)
    for adapters in (handle.use(0), handle.differentiable(stack, 0)):
        with pytest.raises(RuntimeError, match="merged"), adapters:
            pass
    handle.unmerge()
    assert_untouched(model, before)


def test_a_merge_that_fails_midway_is_undone(model, stack, tokens, monkeypatch):
    handle, merged_weight, calls = attach(model, stack), handles.merged_weight, []
    before, applied = snapshot(model), logits(model, tokens, handle, 0)

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return merged_weight(*arguments)

    monkeypatch.setattr(handles, "merged_weight", second_fails)
    with pytest.raises(MemoryError):
        handle.merge(0)
    assert len(calls) == 2
    assert_untouched(model, before)
    model.load_state_dict(model.state_dict())  # refused where an adapter is merged
    handle.merge(0)
    assert (logits(model, tokens) - applied).abs().max() <= LOGITS_ATOL
    handle.unmerge()
    assert_untouched(model, before)


def test_merge_inside_use_is_not_applied_twice(model, stack, tokens):
    handle = attach(model, stack)
    applied = logits(model, tokens, handle, 0)
    handle.set(1)
    with handle.use(2):
        handle.merge(0)
    assert (logits(model, tokens) - applied).abs().max() <= LOGITS_ATOL


@pytest.mark.parametrize(("made", "merged"), [(True, False), (True, True), (False, True)])
def test_merge_and_inference_mode(tiny_model, stack_for, tokens, made, merged):
    with torch.inference_mode(made):
        model = tiny_model("Llama")
    base, handle = logits(model, tokens), attach(model, stack_for(model, NAMES))
    with handle.use(1):
        applied = logits(model, tokens)
    with torch.inference_mode(merged):
        handle.merge(1)
    assert (logits(model, tokens) - applied).abs().max() <= LOGITS_ATOL
    handle.unmerge()
    assert torch.equal(logits(model, tokens), base)


def test_loading_while_merged_is_refused(model, handle, tokens):
    base = logits(model, tokens)
    handle.merge(0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
            model.load_state_dict(state, assign=assign)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
        model.load_state_dict(zeros)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())  # not even the first ones
    with pytest.raises(RuntimeError, match=r"merged into the weight; call unmerge\(\)"):
        model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(64, 64))
    handle.unmerge()
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens), base)
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    layer.bias = None
    assert torch.equal(logits(model, tokens), base)


def test_unmerge_after_parameters_were_replaced(model, handle, tokens):
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    handle.merge(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
    handle.unmerge()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
