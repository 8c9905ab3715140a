"""Training a perceiver, which reads the tokens of descriptions, end to end through the base model."""

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import sft
from t2l_engine.research.training.context import TrainingContext
from t2l_engine.testing.numerics import LOSS_ATOL
from t2l_engine.text import base_model as base_model_loader
from tests.research.training import plain_torch, small_runs

FORMS = {"perceiver-flat": {"llm_layers": [1]}, "perceiver-layers": {}}


def reading(base_model, form, **changes):
    sizes = {
        "llm_queries": 3,
        "llm_blocks": 2,
        "latent_size": 8,
        "tasks_per_batch": 4,
        "head_in_size": 256,
        "rank": 2,
        "scaling": 4.0,
    }
    return small_runs.sft(base_model, variant=form, encoder="llm", **FORMS[form] | sizes | {"tasks_per_batch": 4} | changes)


@pytest.mark.parametrize("form", FORMS)
def test_trains_and_the_checkpoint_reads_documents(base_model, tasks, tmp_path, form):
    """The loss falls, and validation is of what the checkpoint generates from the held-out descriptions."""
    settings = reading(base_model, form, steps=24, validate_every=24, held_out_descriptions=1)
    out = sft.train(settings, tasks, tmp_path / "out")
    curve = [row["loss"] for row in small_runs.rows(out) if "loss" in row]
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])

    engine = t2l.TextToLoRA.from_pretrained(out)
    assert isinstance(engine, t2l.DocToLoRA) and engine.hypernetwork.config.variant == form
    model, _ = base_model_loader.load(str(base_model), torch.float32)
    fit = TrainingContext(settings, tasks, torch.device("cpu"))
    stack = engine.generate([task.descriptions[-1] for task in fit.tasks])
    (found,) = (row["tasks"] for row in small_runs.rows(out) if "tasks" in row)
    for number, task in enumerate(fit.tasks):
        expected = plain_torch.validation_loss(model, fit.validation, number, lambda i, of=stack[number]: of)
        assert abs(found[task.name] - expected) <= LOSS_ATOL, task.name

    sft.train(reading(base_model, form, steps=1, initial=str(out)), tasks, tmp_path / "further")
    with pytest.raises(
        ConfigError, match=r"^initial: expected a checkpoint with the hypernetwork .'num_latents': 4. .* got"
    ):
        sft.train(reading(base_model, form, steps=1, llm_queries=4, initial=str(out)), tasks, tmp_path / "other")


def test_gradients_are_those_of_differences():
    """Of every kind of parameter, along a random direction, in float64."""
    config = t2l.PerceiverConfig(
        variant="perceiver-layers", modules=("q_proj", "v_proj"), in_features=(6, 6), out_features=(6, 4), num_layers=2,
        rank=2, lora_alpha=4, feature_size=5, latent_size=4, num_latents=3, num_blocks=3, num_self_attention=1,
        shared_blocks=True, num_mlps=1, per_layer_mlps=True,
    )  # fmt: skip
    torch.manual_seed(0)
    net = t2l.PerceiverHyperNetwork(config).double()
    batches = [([1, 0], torch.randn(2, 2, 7, 5).double(), torch.arange(7) < torch.tensor([[7], [4]]))]
    weights = [torch.randn_like(values) for values in sides(net(batches))]

    def loss():
        return sum((w * values.sin()).sum() for w, values in zip(weights, sides(net(batches)), strict=True))

    loss().backward()
    for name, parameter in net.named_parameters():
        direction, at = torch.randn_like(parameter), parameter.detach().clone()
        with torch.no_grad():
            ends = [loss() for sign in (1, -1) if parameter.copy_(at + sign * 1e-6 * direction) is not None]
            parameter.copy_(at)
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-7, msg=name)


def sides(stack):
    return [*stack.lora_A.values(), *stack.lora_B.values()]
