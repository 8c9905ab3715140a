"""An adapted layer in torch: inference mode, gradient checkpointing, threads, saving and copying."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from t2l_engine import AdapterStack, attach
from t2l_engine.testing.numerics import GRADIENT_RTOL, ROW_ATOL
from tests.lora.blocks import leaves
from tests.lora.tiny_llama import NAMES, logits

# --- modes of torch --------------------------------------------------------------------------------------------------


def test_inference_mode(model, stack_for, tokens):
    """What was made in inference mode is used, changed and differentiated outside, and the other way round."""
    stack = stack_for(model, NAMES, num_adapters=4)
    with torch.inference_mode():
        handle = attach(model, stack[[0, 1]], slots=4)
        handle.set([0, 1, 0, -1])
        inside = model(tokens, use_cache=False).logits
    assert torch.equal(inside, logits(model, tokens))
    handle.put(2, stack[2])
    handle.set([1, 0, 2, -1])
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits.clone()
        handle.put(3, stack[3])
    got = model(tokens, use_cache=False).logits
    got.sum().backward()
    assert (got.detach() - expected).abs().max() <= ROW_ATOL
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    with torch.inference_mode(), handle.use([3, 3, 3, -1]):
        model(tokens)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, stack_for, tokens, reentrant):
    ids = [2, -1, 0, 2]

    def gradients(checkpointing, where="inside", outer=None, between=None, dropout=0.0):
        model = tiny_model("Llama").train().requires_grad_(False)
        stack = stack_for(model, NAMES)
        handle = attach(model, stack)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        own, tensors = leaves(stack)
        if outer is not None:
            handle.set(outer)
        with handle.differentiable(own, ids, dropout=dropout):
            loss = model(tokens, use_cache=False).logits.square().mean()
            if where == "inside":
                if between is not None:
                    between(model, handle)
                loss.backward()
        if where == "outside":
            loss.backward()
        return [leaf.grad for leaf in tensors]

    def evaluate(model, handle):
        model.eval()
        with handle.use(1):
            logits(model, tokens)
        model.train()

    def train(model, handle):
        with handle.use(1):
            model(tokens, use_cache=False)

    if reentrant:  # its first pass records no gradients, and so would drop nothing where the recomputation does
        with pytest.raises(RuntimeError, match="dropout: expected gradients to be recorded .* use_reentrant=False"):
            gradients(True, dropout=0.5)
    else:
        gradients(True, dropout=0.5)

    def same(got):
        return all((a - b).abs().max() <= GRADIENT_RTOL * b.abs().max() for a, b in zip(got, expected, strict=True))

    expected = gradients(False)
    assert all(grad.abs().max() > 0 for grad in expected)
    assert same(gradients(False, "outside"))  # nothing is recomputed
    assert same(gradients(True)) and same(gradients(True, between=evaluate))
    # Recomputed with the base model, or with other adapters, gradients would be wrong without a sign of it.
    for kwargs in ({"where": "outside"}, {"where": "outside", "outer": [1, 1, 1, 1]}, {"between": train}):
        with pytest.raises(RuntimeError, match=r"recomputes the forward pass .*call backward\(\) inside the with-block"):
            gradients(True, **kwargs)


@pytest.mark.parametrize("change", ["put", "put inside use", "borrow_slots"])
def test_slots_that_change_between_forward_and_recomputation(model, handle, stack_for, tokens, change):
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    other = stack_for(model, NAMES, num_adapters=1, seed=7)
    with handle.use([2, 0, -1, 3]):
        loss = model(tokens, use_cache=False).logits.sum()
        if change == "put":
            handle.put(0, other)
        elif change == "borrow_slots":
            with handle.borrow_slots(0, other):
                pass
        else:
            with handle.use(1):
                handle.put(0, other)
        with pytest.raises(RuntimeError, match="recomputes the forward pass"):
            loss.backward()


def test_threads(tiny_model, stack_for, tokens):
    """One model and one handle a thread."""
    orders = ([0, 1, 2, -1], [3, 3, 0, 1], [-1, 2, 1, 0])

    models = [tiny_model("Llama") for _ in orders]
    handles = [attach(model, stack_for(model, NAMES, num_adapters=4)) for model in models]

    def work(start):
        return [logits(models[start], tokens, handles[start], orders[(start + step) % 3]) for step in range(6)]

    serial = list(map(work, range(3)))
    with ThreadPoolExecutor(3) as pool:
        for a, b in zip(serial, pool.map(work, range(3)), strict=True):
            assert all((x - y).abs().max() <= ROW_ATOL for x, y in zip(a, b, strict=True))


def test_forward_mode_is_refused(model, handle, tokens):
    x = torch.randn(4, 7, 64)
    layer = model.model.layers[0].self_attn.q_proj
    torch.func.jvp(layer, (x,), (x,))
    with handle.use([2, 0, -1, 3]), pytest.raises(NotImplementedError, match="adapters have no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))


# --- copies and files ------------------------------------------------------------------------------------------------


def test_copies_are_refused(model, handle):
    for call in (
        copy.deepcopy,
        lambda m: copy.copy(m.model.layers[0].self_attn.q_proj),
        pickle.dumps,
        lambda m: torch.save(m, io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match="adapters attached; detach them before"):
            call(model)
    handle.detach()
    assert pickle.loads(pickle.dumps(model)).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(tiny_model, handle, model, tokens, assign):
    base = tiny_model("Llama", head_dim=32)
    handle.set([2, 0, -1, 3])
    state, expected = model.state_dict(), base.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)

    changed = {key: tensor + 0.1 for key, tensor in expected.items()}
    before = logits(model, tokens)
    assert str(model.load_state_dict(changed, strict=True, assign=assign)) == "<All keys matched successfully>"
    base.load_state_dict(changed)
    assert torch.equal(logits(model, tokens)[2], logits(base, tokens)[2]) and not torch.equal(logits(model, tokens), before)
    assert list(changed) == list(expected)

    key = "model.layers.0.self_attn.q_proj"
    changed[f"{key}.extra"] = changed.pop(f"{key}.weight")
    result = model.load_state_dict(changed, strict=False)
    assert result.missing_keys == [f"{key}.weight"] and result.unexpected_keys == [f"{key}.extra"]


@pytest.mark.parametrize("tied", [False, True])
def test_tying_and_resizing(tiny_model, make_stack, tokens, tied):
    model = tiny_model("Llama", tie_word_embeddings=tied)
    stack = make_stack({"lm_head": (64, 97)}, num_layers=1, paths={"lm_head": "lm_head"})
    handle = attach(model, stack)
    with handle.use([0, 1, 2, -1]):
        before = logits(model, tokens)
        model.tie_weights()
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert torch.equal(logits(model, tokens), before)
    with pytest.raises((RuntimeError, TypeError), match="detach the adapters before resizing" if tied else "LoRALinear"):
        model.resize_token_embeddings(101)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained(tiny_model, make_stack, tmp_path, tied):
    from safetensors.torch import load_file

    model = tiny_model("Llama", tie_word_embeddings=tied)
    head = make_stack({"lm_head": (64, 97)}, num_adapters=1, num_layers=1, paths={"lm_head": "lm_head"})
    model.save_pretrained(tmp_path / "base")
    handle = attach(model, AdapterStack.cat([head, make_stack({"q_proj": (64, 64)}, num_adapters=1)]))
    handle.set(0)
    model.save_pretrained(tmp_path / "attached")
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "attached"))
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("base", "attached")]
    assert configs[0] == configs[1]
