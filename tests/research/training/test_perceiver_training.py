"""Training a perceiver, which reads the tokens of descriptions, end to end through the base model."""

import pytest
import torch
from torch.func import functional_call

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import sft
from tests.research.training import plain_torch, small_runs

FORMS = {"perceiver-flat": {"llm_layers": [1]}, "perceiver-layers": {}}


def reading(base_model, form, **changes):
    sizes = {
        "llm_queries": 3, "llm_blocks": 2, "latent_size": 8, "tasks_per_batch": 4, "head_in_size": 256, "rank": 2,
        "scaling": 4.0,
    }  # fmt: skip
    return small_runs.sft(base_model, variant=form, encoder="llm", **FORMS[form] | sizes | {"tasks_per_batch": 4} | changes)


@pytest.mark.parametrize("form", FORMS)
def test_trains_and_the_checkpoint_reads_documents(base_model, tasks, tmp_path, form):
    """The loss falls, and validation is of what the checkpoint generates from the held-out descriptions."""
    settings = reading(base_model, form, steps=24, validate_every=24, held_out_descriptions=1)
    out = sft.train(settings, tasks, tmp_path / "out")
    small_runs.assert_learns(out)

    engine = t2l.TextToLoRA.from_pretrained(out)
    assert isinstance(engine, t2l.DocToLoRA) and engine.hypernetwork.config.variant == form
    plain_torch.assert_validated(settings, tasks, out, lambda task, i: engine.generate([task.descriptions[-1]]))

    sft.train(reading(base_model, form, steps=1, initial=str(out)), tasks, tmp_path / "further")
    message = r"^initial: expected a checkpoint with the hypernetwork .'num_latents': 4. .* got"
    with pytest.raises(ConfigError, match=message):
        sft.train(reading(base_model, form, steps=1, llm_queries=4, initial=str(out)), tasks, tmp_path / "other")


@pytest.mark.parametrize("per_layer_mlps", [True, False])
def test_gradients_are_those_of_differences(per_layer_mlps):
    """Of every kind of parameter, in float64."""
    config = t2l.PerceiverConfig(
        variant="perceiver-layers", modules=("q_proj", "v_proj"), in_features=(6, 6), out_features=(6, 4), num_layers=2,
        rank=2, lora_alpha=4, feature_size=5, latent_size=4, num_latents=3, num_blocks=3, num_self_attention=1,
        shared_blocks=True, num_mlps=1, per_layer_mlps=per_layer_mlps,
    )  # fmt: skip
    torch.manual_seed(0)
    net = t2l.PerceiverHyperNetwork(config).double()
    batches = [([1, 0], torch.randn(2, 2, 7, 5).double(), torch.arange(7) < torch.tensor([[7], [4]]))]
    names = [name for name, _ in net.named_parameters()]

    def run(*parameters):
        stack = functional_call(net, dict(zip(names, parameters, strict=True)), (batches,))
        return (*stack.lora_A.values(), *stack.lora_B.values())

    assert torch.autograd.gradcheck(run, tuple(net.parameters()), fast_mode=True)
