"""Training of hypernetworks that read the tokens of descriptions, end to end through the base model."""

import pytest
import torch
from torch.func import functional_call

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.training import sft
from t2l_engine.research.training.hypernetwork import Documents
from t2l_engine.research.training.sampling import Group, Sample
from tests.research.training import plain_torch, small_runs

_LATENTS = {"llm_queries": 3}
FORMS = {
    "perceiver-flat": _LATENTS | {"llm_layers": [1]},
    "perceiver-layers": _LATENTS,
    "pointer": {
        "llm_layers": [0, 1], "llm_heads": 2, "first_layer": 1, "target_modules": ["o_proj", "down_proj"],
        "copied": ["down_proj"], "example_share": 0.5, "max_examples": 2,
    },
}  # fmt: skip


def reading(base_model, form, **changes):
    sizes = {"llm_blocks": 2, "latent_size": 8, "tasks_per_batch": 4, "head_in_size": 256, "rank": 2, "scaling": 4.0}
    return small_runs.sft(base_model, variant=form, encoder="llm", **FORMS[form] | sizes | changes)


@pytest.mark.parametrize("form", FORMS)
def test_trains_and_the_checkpoint_reads_documents(save_model, tasks, tmp_path, form):
    """The loss falls, and validation is of what the checkpoint generates from the held-out descriptions."""
    base_model = save_model("Llama", tie_word_embeddings=True)
    settings = reading(base_model, form, steps=24, validate_every=24, held_out_descriptions=1)
    out = sft.train(settings, tasks, tmp_path / "out")
    small_runs.assert_learns(out)

    engine = t2l.TextToLoRA.from_pretrained(out)
    assert isinstance(engine, t2l.DocToLoRA) and engine.hypernetwork.config.variant == form
    plain_torch.assert_validated(settings, tasks, out, lambda task, i: engine.generate([task.descriptions[-1]]))

    fewer = {"max_examples": 1} if form == "pointer" else {}
    sft.train(reading(base_model, form, steps=1, initial=str(out), **fewer), tasks, tmp_path / "further")
    message = r"^initial: expected a checkpoint with the hypernetwork .'num_blocks': 1. .* got"
    with pytest.raises(ConfigError, match=message):
        sft.train(reading(base_model, form, steps=1, llm_blocks=1, initial=str(out)), tasks, tmp_path / "other")


def test_tokens_of_a_model_that_does_not_tie_its_embeddings_are_not_copied(base_model, tasks, tmp_path):
    with pytest.raises(ConfigError, match="^copied: expected none, since .* does not tie its embeddings, got"):
        sft.train(reading(base_model, "pointer"), tasks, tmp_path / "out")


@pytest.fixture
def documents(save_model, tasks):
    """Conditions of pointer networks."""
    base_model = str(save_model("Llama", tie_word_embeddings=True))

    def make(**changes):
        return Documents(reading(base_model, "pointer", **changes), load_tasks(tasks, None), torch.device("cpu"))

    return make


def test_example_sets_are_drawn_anew_and_never_hold_what_is_learnt(documents):
    reads = documents(example_share=1.0)
    task, found = reads._tasks[0], []
    reads._encoder.chunks = lambda texts, examples: found.append((texts[0], *examples[0])) or [[[0]]]
    for visit in range(64):
        learnt = task.examples[visit % 20]
        reads._drawn(Group(0, 0, (Sample((1, 2), 1, learnt.input),), f"key{visit}"))
        about, *shots = found[-1]
        assert about in ("", task.descriptions[0]) and 1 <= len(shots) <= 2
        assert learnt.input not in dict(shots) and set(shots) <= {(e.input, e.outputs[0]) for e in task.examples}
    assert len(set(found)) > 50 and 0 < sum(about == "" for about, *_ in found) < 24
    plain = documents(example_share=0.0)
    assert plain._drawn(Group(0, 1, (), "key")) == plain._ids[0][1] and plain.encoder_config.max_examples == 0


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
