"""Gradients of a step of SFT, hypernetwork and model together, against float64 autograd through the formulae."""

import copy

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.research.training import context
from t2l_engine.research.training.objective import Objective, collate, generated_l2, token_weights
from t2l_engine.testing.numerics import GRADIENT_RTOL, MODEL_GRADIENT_FROBENIUS, model_gradient_bound, relative_frobenius
from tests.research.training import plain_torch, small_runs

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"qv": ("q_proj", "v_proj"), "attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP, "down": ("down_proj",)}
L2, SMOOTHING = 0.5, 0.1


def network(model, targets, variant):
    """A hypernetwork for ``model`` in the midst of training: offsets as SFT has them, heads that are no longer zero."""
    modules = context.locate(model, targets)
    config = t2l.HyperNetworkConfig(
        variant=variant, modules=modules.names, in_features=modules.in_features, out_features=modules.out_features,
        num_layers=modules.num_layers, rank=3, embed_dim=6, latent_size=16, head_in_size=10, lora_alpha=6.0,
    )  # fmt: skip
    torch.manual_seed(1)
    net = t2l.HyperNetwork(config).bias_hyperinit(torch.Generator().manual_seed(2))
    with torch.no_grad():
        for head in net.heads.values():
            head.weight.normal_(0, 0.3)
            head.bias.add_(torch.randn_like(head.bias), alpha=0.1)
    return net


def plain_loss(model, step, made, paths, scaling, ids):
    """Loss of a step, sample by sample; ``ids``: the adapter of each group."""
    rows = [(i, sample) for i, group in zip(ids, step, strict=True) for sample in group.samples]
    total = sum(L2 * side.square().mean() for sides in made.values() for side in sides)
    for i, sample in rows:
        with plain_torch.applied(model, made, paths, torch.tensor([scaling] * (max(ids) + 1)), [i]):
            total = total + plain_torch.answer_losses(model, sample, SMOOTHING).mean() / len(rows)
    return total


def own_loss(model, handle, step, stack, ids):
    batch = collate(step, 0, token_weights("sample", step, False), lambda group: ids[step.index(group)])
    losses = Objective(model, handle).losses(batch, stack, label_smoothing=SMOOTHING)
    return losses.sum() + L2 * generated_l2(stack)


def tiny_llama(make):
    """Grouped queries; ``in`` is wider than ``out`` in k_proj, v_proj, o_proj and down_proj, narrower in the others."""
    return make("Llama", hidden_size=40, intermediate_size=56, head_dim=16).requires_grad_(False)


@pytest.mark.parametrize("variant, targets, dtype", [
    *(("L", targets, torch.float32) for targets in TARGETS), ("L", "all", torch.bfloat16),
    *((variant, "all", torch.float32) for variant in ("M", "S-learnable", "S-rotary")),
])  # fmt: skip
def test_gradients_of_a_step(tiny_model, variant, targets, dtype):
    """What is trained stays float32; in bfloat16, rounding of the frozen model is no larger than with plain products."""
    model, step = tiny_llama(tiny_model).to(dtype), small_runs.groups([[(7, 2)], [(9, 1), (5, 3)], [(4, 1)]], range(3))
    net = network(model, TARGETS[targets], variant)
    task_emb = torch.randn(len(step), 6, generator=torch.Generator().manual_seed(3))
    exact, plain_model = copy.deepcopy(model).double(), copy.deepcopy(model)

    stack = net(task_emb)
    handle = t2l.attach(model, net.generate(task_emb))
    own_loss(model, handle, step, stack, [0, 1, 2]).backward()

    found = []
    for reference in (exact, plain_model):
        leaves, made = plain_torch.adapters(net, task_emb)
        plain_loss(reference, step, made, stack.paths, net.scaling, [0, 1, 2]).backward()
        found.append(leaves)
    for name, parameter in net.named_parameters():
        expected, other = (leaves[name].grad for leaves in found)
        assert parameter.grad.dtype == torch.float32 and expected.abs().max() > 0, name
        if dtype == torch.bfloat16:
            assert relative_frobenius(parameter.grad, expected) <= model_gradient_bound(expected, other, dtype), name
            continue
        assert relative_frobenius(parameter.grad, expected) <= MODEL_GRADIENT_FROBENIUS, name
        assert (parameter.grad - expected).abs().max() <= GRADIENT_RTOL * expected.abs().max(), name
