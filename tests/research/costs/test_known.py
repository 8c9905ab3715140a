"""Setups known by name, counts of hypernetworks and adapters, and the cells of the paper's table."""

import doctest
import importlib

import pytest
import torch

from t2l_engine import ConfigError, HyperNetwork, HyperNetworkConfig
from t2l_engine.hypernetwork.config import TASK_ENCODERS, VARIANTS
from t2l_engine.research.costs import (
    PAPER,
    adapter_values,
    hypernet_flops,
    hypernetwork_for,
    known_encoder,
    known_entries,
    known_setup,
    ways,
)
from tests.hypernetwork.plain_network import MODULES
from tests.networks import SHAPES
from tests.research.costs.flop_counter import counted

KNOWN = {  # parameters of the language model, and of its hypernetwork
    "mistral-7b": (7_241_732_096, 55_424_000),
    "llama-3.1-8b": (8_030_261_248, 230_027_264),
    "gemma-2-2b": (2_614_341_888, 137_706_752),
    "smollm2-135m": (134_515_008, 2_281_008),
}


def test_known_setups():
    assert list(known_entries("models")) == list(KNOWN)
    for name, counts in KNOWN.items():
        setup = known_setup(name)
        assert (setup.model.parameters, setup.hypernet.num_parameters) == counts, name
        assert setup.hypernet == SHAPES[name].config(), name  # as the benchmarks have it
    assert (known_encoder("gte-large").parameters, known_encoder("minilm").parameters) == (434_139_136, 22_565_376)
    with pytest.raises(ConfigError, match="model: expected one of mistral-7b, .*, got 'gpt-2'"):
        known_setup("gpt-2")
    with pytest.raises(ConfigError, match="encoder: expected one of gte-large, minilm, got 'e5'"):
        known_encoder("e5")
    setup = known_setup("mistral-7b")
    assert hypernetwork_for(setup.model, setup.encoder, modules=("up_proj",)).out_features == (14336,)
    with pytest.raises(ConfigError, match="modules: expected some of q_proj, .* for mistral, got 'c_attn'"):
        hypernetwork_for(setup.model, setup.encoder, modules=("c_attn",))


def test_the_papers_cells():
    """TFLOP of the first question on Mistral-7B (arXiv 2506.06105, appendix I): 0.856 by an adapter, 4.177 by examples."""
    made = ways(known_setup("mistral-7b"), PAPER)
    for way, tflop in (("t2l-task", 0.856), ("icl", 4.177)):
        assert made[way].first.flops(first_token=True) / 1e12 == pytest.approx(tflop, rel=0.005)


@pytest.mark.parametrize("encoder", TASK_ENCODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hypernetworks(variant, encoder):
    """Of every variant and task encoder, as ``generate`` runs on the CPU, in new memory and in memory used before."""
    config = HyperNetworkConfig(
        variant=variant, task_encoder=encoder, modules=tuple(MODULES), in_features=(24, 24, 41), out_features=(41, 24, 19),
        num_layers=3, rank=4, embed_dim=14, latent_size=128 if encoder == "discrete" else 20, head_in_size=18,
        lora_alpha=8.0,
    )  # fmt: skip
    net, task_emb = HyperNetwork(config), torch.randn(5, 14)
    stack = net.generate(task_emb)  # folds what does not depend on the task
    one = sum(hypernet_flops(config).values())
    assert counted(lambda: net.generate(task_emb)) == counted(lambda: net.generate(task_emb, out=stack)) == 5 * one
    assert hypernet_flops(config)["heads"] == 2 * 18 * adapter_values(config)


@pytest.mark.parametrize("name", ["research.costs.model", "research.costs.known", "cli.cost", "ops.flops"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"t2l_engine.{name}")).failed == 0
