"""What is generated, merged and embedded does not depend on the caller's autocast, default dtype or inference mode."""

import copy
import dataclasses

import pytest
import torch

from t2l_engine import AdapterBatch, attach
from tests.networks import HyperShape

#: Of the tiny Llama: hidden 64, 4 heads of 32, 2 for keys and values, 2 layers.
SHAPE = HyperShape("tiny", 2, 64, 128, 64, embed_dim=24, latent_size=16, head_in_size=24)
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def same(left, right):
    return left.allclose(right, rtol=0, atol=0)


@pytest.fixture
def task_emb():
    return torch.randn(2, SHAPE.embed_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", ["L", "S-learnable"])
def test_autocast_changes_no_adapter(task_emb, variant):
    """Also not those after it, for which what does not depend on the task is kept."""
    net = dataclasses.replace(SHAPE, variant=variant).make()
    right = copy.deepcopy(net).generate(task_emb)
    with AUTOCAST:
        inside = net.generate(task_emb)
        again = net.generate(task_emb, out=copy.deepcopy(net).generate(task_emb))
    assert same(inside, right) and same(again, right) and same(net.generate(task_emb), right)


def test_autocast_changes_no_merged_weight(tiny_model, stack_for):
    def merged(model, context):
        with context:
            attach(model, stack_for(model, ("q_proj",))).merge(1)
        return model.model.layers[1].self_attn.q_proj.weight

    right = merged(tiny_model("Llama"), torch.autocast("cpu", enabled=False))
    assert torch.equal(merged(tiny_model("Llama"), AUTOCAST), right)


def test_another_default_dtype(tiny_model, stack_for):
    model, net = tiny_model("Llama"), SHAPE.make()
    stack = stack_for(model, ("q_proj",))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert net.meta_stack(2).scaling.dtype == torch.float32
        handle = attach(model, stack)
        assert all(scaling.dtype == torch.float32 for scaling in handle._scalings.values())
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_do_not_say_when_they_are_written(task_emb):
    """Tensors made in inference mode have no version."""
    with torch.inference_mode():
        net = copy.deepcopy(SHAPE.make())
        before = net.generate(task_emb)
        net.mixer.linear1.weight.mul_(0.5)
        after = net.generate(task_emb)
    assert not same(before, after) and same(after, copy.deepcopy(net).generate(task_emb))


def test_bias_hyperinit_in_another_dtype(task_emb):
    net = dataclasses.replace(SHAPE, variant="M").make().set_dtype(torch.float64)
    net.bias_hyperinit(torch.Generator().manual_seed(0))
    assert net.generate(task_emb.double()).dtype == torch.float64


@pytest.mark.parametrize("length", [2.5, True, "2"])
def test_lengths_that_are_no_integers(length):
    with pytest.raises(ValueError, match="seq_len: expected an int"):
        AdapterBatch.from_rows([0], length)
