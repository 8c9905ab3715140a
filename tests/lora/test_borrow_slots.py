"""Adapters generated straight into borrowed slots of a handle, against the same adapters generated and put there."""

import dataclasses

import pytest
import torch

from t2l_engine import AdapterStack, LoRALinear, OneHotConfig, OneHotEncoder, TextToLoRA, attach
from tests.lora.tiny_llama import logits
from tests.networks import HyperShape

#: Of the tiny Llama: hidden 64, 4 heads of 32, 2 for keys and values, 2 layers.
SHAPE = HyperShape("tiny", 2, 64, 128, 64, embed_dim=24, latent_size=16, head_in_size=24)
SLOTS = 5


@pytest.fixture
def net():
    """Rank 8 on q_proj and v_proj."""
    return SHAPE.make()


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (SLOTS + 1, 7), generator=torch.Generator().manual_seed(1))


def task_emb(count, seed=0):
    return torch.randn(count, SHAPE.embed_dim, generator=torch.Generator().manual_seed(seed))


def contents(handle):
    """Everything that a model reads of the slots."""
    modules = [m for _, layer in handle._wrapped for m in layer.adapted_modules]
    return [t.clone() for m in modules for t in (m.lora_A, m.lora_B, m.scaling, m.ranks)]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- equality with put -------------------------------------------------------------------------------------------------


FAMILIES = {"Llama": (SHAPE, {"head_dim": 32}), "Phi3": (dataclasses.replace(SHAPE, query=64, value=32), {})}


@pytest.mark.parametrize(
    ("family", "model_dtype", "max_rank"),
    [("Llama", torch.float32, 11), ("Llama", torch.bfloat16, None), ("Phi3", torch.float32, None)],
)
def test_the_bits_of_put(tiny_model, tokens, family, model_dtype, max_rank):
    """Also where the slots are wider, where they are rounded, where other adapters lay in them, and in columns of a packed
    projection: Phi-3 computes q, k and v in one linear; k has no adapter."""
    (shape, sizes), handles = FAMILIES[family], []
    net = shape.make()
    for in_place in (True, False):
        model = tiny_model(family, dtype=model_dtype, **sizes)
        handle = attach(model, slots=SLOTS, max_rank=max_rank)
        for slot, count, seed in ((1, 3, 0), (4, 1, 1), (2, 2, 2)):
            emb = task_emb(count, seed)
            if in_place:
                like = net.meta_stack(count) if count > 1 else net.generate(emb)  # an earlier result is as good
                with handle.borrow_slots(slot, like) as out:
                    assert net.generate(emb, out=out) is out
            else:
                for i, adapter in enumerate(net.generate(emb)):
                    handle.put(slot + i, adapter)
        handle.set([1, 2, 3, 4, -1, -1])
        handles.append((handle, logits(model, tokens)))
    (filled, got), (put, expected) = handles
    assert same(contents(filled), contents(put))
    assert torch.equal(got, expected) and not torch.equal(got, logits(tiny_model(family, model_dtype, **sizes), tokens))
    for handle, _ in handles:
        with pytest.raises(IndexError, match=r"slots that hold an adapter, got \[0\]"):
            handle.set(0)


def test_wider_slots_are_rounded_once(model, net):
    """A bfloat16 hypernetwork in a float32 model: nothing is rounded to bfloat16 on the way, as put would."""
    net.set_dtype(torch.bfloat16)
    handle, emb = attach(model, slots=1), task_emb(1)
    with handle.borrow_slots(0, net.meta_stack(1)) as out:
        assert out.dtype == torch.float32
        net.generate(emb, out=out)
    rounded = net.generate(emb)
    for name, a in rounded.lora_A.items():
        assert torch.equal(out.lora_A[name].bfloat16(), a) and not torch.equal(out.lora_A[name], a.float())


def test_modules_that_are_not_written_have_rank_0(model, net, stack_for, tokens):
    """What another adapter had in the slot is gone."""
    handle = attach(model, stack_for(model, ("up_proj", "q_proj"), rank=9), slots=SLOTS)
    with handle.borrow_slots(1, net.meta_stack(1)) as out:
        net.generate(task_emb(1), out=out)
    handle.put(4, net.generate(task_emb(1))[0])
    assert isinstance(model.model.layers[1].self_attn.v_proj, LoRALinear)  # which no adapter had before
    handle.set(1)
    got = logits(model, tokens)
    handle.set(4)
    assert torch.equal(got, logits(model, tokens))


def test_in_inference_mode(model, net, tokens):
    handle = attach(model, slots=2)
    for mode, slot in ((True, 0), (False, 0), (True, 1)):
        with torch.inference_mode(mode), handle.borrow_slots(slot, net.meta_stack(1)) as out:
            net.generate(task_emb(1), out=out)
    handle.set([0, 1] * 3)
    got = logits(model, tokens[:1].expand(6, -1))
    assert (got[0] - got[1]).abs().max() == 0 and got.requires_grad is False


def test_slots_are_empty_until_the_block_ends(model, net, tokens):
    """And after it where it ends in an error."""
    handle = attach(model, net.generate(task_emb(2)), slots=3)
    base = logits(model, tokens)
    handle.set([0] * 3 + [1] * 3)
    other = logits(model, tokens)[3:]
    with pytest.raises(ZeroDivisionError), handle.borrow_slots(0, net.meta_stack(1)) as out:
        for ids in (0, [1, 0]):
            with pytest.raises(IndexError, match="slots that hold an adapter"):
                handle.set(ids)
        net.generate(task_emb(1, seed=5), out=out)
        raise ZeroDivisionError
    got = logits(model, tokens)
    assert torch.equal(got[:3], base[:3]) and torch.equal(got[3:], other)  # slot 0 has rank 0, slot 1 is as it was
    with pytest.raises(IndexError, match=r"slots that hold an adapter, got \[0\]"):
        handle.set(0)
    handle.put(0, net.generate(task_emb(1)))
    handle.set(0)


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_errors_change_nothing(model, net, tokens):
    handle = attach(model, net.generate(task_emb(2)), slots=3)
    handle.set([0, 1] * 3)
    kept, before = contents(handle), logits(model, tokens)

    def refused(error, match, slot, like):
        with pytest.raises(error, match=match), handle.borrow_slots(slot, like):
            pytest.fail("the block was entered")

    for slot in (-1, 2, 3, True, 1.0, None, "0"):
        refused(IndexError, r"slot: expected an int in \[0, 1\], for 2 of 3 slots, got ", slot, net.meta_stack(2))
    refused(IndexError, "slot: expected at most 3 adapters, as many as there are slots, got 4", 0, net.meta_stack(4))
    assert same(contents(handle), kept) and torch.equal(logits(model, tokens), before)
    handle.merge(0)
    refused(RuntimeError, "borrow_slots: an adapter is merged", 0, net.meta_stack(1))
    handle.detach()
    refused(RuntimeError, "this handle is detached", 0, net.meta_stack(1))


def test_a_refused_loan_reserves_nothing(model, net, stack_for):
    """What was refused decides neither rank nor memory of the slots."""
    handle = attach(model, slots=3)
    with (
        pytest.raises(ValueError, match="expected layers on meta, got cpu"),
        handle.borrow_slots(0, net.meta_stack(1), device="meta"),
    ):
        pytest.fail("the block was entered")
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    handle.put(0, stack_for(model, ("q_proj",), num_adapters=1, rank=16))  # more than that of the first
    with handle.borrow_slots(1, stack_for(model, ("q_proj",), num_adapters=1, rank=16), device="cpu"):
        pass


def test_slots_of_two_dtypes(model, net):
    """One stack cannot hold both; put can fill them."""
    for layer in model.model.layers:
        layer.self_attn.v_proj.to(torch.bfloat16)
    handle = attach(model, slots=1)
    with (
        pytest.raises(ValueError, match="like: .* one dtype, got .*bfloat16.*use put"),
        handle.borrow_slots(0, net.meta_stack(1)),
    ):
        pass
    handle.put(0, net.generate(task_emb(1)))


def test_features_that_a_linear_does_not_state():
    """What fits the model as far as it says is held to its slots."""

    class Bare(torch.nn.Module):
        def forward(self, x):
            return x

    model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": Bare()})])
    of = lambda n: AdapterStack({"q_proj": torch.ones(1, 1, 2, n)}, {"q_proj": torch.ones(1, 1, n, 2)}, torch.ones(1))  # noqa: E731
    handle = attach(model, of(8))
    for call in (lambda: handle.put(0, of(9)), lambda: handle.borrow_slots(0, of(9)).__enter__()):
        with pytest.raises(ValueError, match=r"q_proj: the adapter has in/out features \(9, 9\), its slots have \(8, 8\)"):
            call()
    handle.set(0)


# --- the engine ------------------------------------------------------------------------------------------------------------


def test_generate_into(model, net, tokens):
    names = [f"task{i}" for i in range(SHAPE.embed_dim)]
    engine = TextToLoRA(OneHotEncoder(OneHotConfig(tuple(names))), net)
    handle = attach(model, slots=SLOTS)
    engine.generate_into(handle, 1, names[:2])
    for i, adapter in enumerate(engine.generate(names[:2])):
        handle.put(3 + i, adapter)
    handle.set([1, 2, -1] * 2)
    got = logits(model, tokens)
    handle.set([3, 4, -1] * 2)
    assert torch.equal(got, logits(model, tokens))
    kept = contents(handle)
    for slot, texts, error in ((1, ["no such task"], ValueError), (1, [], ValueError), (4, names[:2], IndexError)):
        with pytest.raises(error):
            engine.generate_into(handle, slot, texts)
    net.to(torch.bfloat16)  # casts biases, too
    with pytest.raises(ValueError, match="HyperNetwork: expected biases in torch.float32 beside matrices in torch.bfloat16"):
        engine.generate_into(handle, 1, names[:2])
    assert same(contents(handle), kept) and torch.equal(logits(model, tokens), got)


def test_meta_stack_has_the_shapes_of_a_result(net):
    for dtype in (torch.float32, torch.bfloat16):
        made, like = net.set_dtype(dtype).generate(task_emb(3)), net.meta_stack(3)
        assert like.paths == made.paths and like.dtype == made.dtype == dtype and len(like) == 3
        for name in made.lora_A:
            assert like.lora_A[name].is_meta and like.lora_A[name].shape == made.lora_A[name].shape
            assert like.lora_B[name].is_meta and like.lora_B[name].shape == made.lora_B[name].shape
            assert torch.equal(like.ranks[name], made.ranks[name])
