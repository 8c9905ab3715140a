"""Setups known by name, the modules that a hypernetwork can adapt, and the examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from t2l_engine import ConfigError, TextToLoRA
from t2l_engine.research import costs
from t2l_engine.research.costs import Decoder, known_setup, known_setups
from t2l_engine.research.costs.known import hypernetwork_for
from t2l_engine.testing.models import SHAPES
from tests.research.costs import tiny_decoders

KNOWN = {  # parameters of the language model, and of its hypernetwork
    "mistral-7b": (7_241_732_096, 55_424_000),
    "llama-3.1-8b": (8_030_261_248, 230_027_264),
    "gemma-2-2b": (2_614_341_888, 137_706_752),
    "smollm2-135m": (134_515_008, 2_281_008),
}


def test_known_setups():
    assert known_setups() == list(KNOWN)
    for name, counts in KNOWN.items():
        setup, shape = known_setup(name), SHAPES[name].config()
        assert (setup.decoder.num_parameters, setup.hypernet.num_parameters) == counts, name
        assert setup.hypernet == shape, name  # as the benchmarks have it
    with pytest.raises(ConfigError, match="model: expected one of mistral-7b, .*, got 'gpt-2'"):
        known_setup("gpt-2")


def test_the_bundled_checkpoint_is_known():
    """All that sizes depend on; alpha and scaling are numbers."""
    ours, config = known_setup("smollm2-135m").hypernet, TextToLoRA.from_pretrained("smollm2-135m").hypernetwork.config
    for field in ("variant", "modules", "in_features", "out_features", "num_layers", "rank", "embed_dim", "latent_size",
                  "head_in_size", "head_bias", "task_encoder", "num_parameters"):  # fmt: skip
        assert getattr(ours, field) == getattr(config, field), field


def test_modules_that_hypernetworks_can_adapt():
    """Shapes of the linears of a real model, by name; a mixture has no MLP in every layer."""
    for family in ("llama", "gemma2", "qwen3_moe"):
        model = tiny_decoders.model(family)
        shapes = Decoder.from_config(model.config).module_shapes
        found = {name.split(".")[-1]: (m.in_features, m.out_features) for name, m in model.model.named_modules()
                 if isinstance(m, torch.nn.Linear)}  # fmt: skip
        assert shapes.items() <= found.items() and len(shapes) == (4 if family == "qwen3_moe" else 7)
    setup = known_setup("mistral-7b")
    assert hypernetwork_for(setup.decoder, setup.encoder, modules=("up_proj",)).out_features == (14336,)
    with pytest.raises(ConfigError, match="modules: expected some of q_proj, .* for mistral, got 'c_attn'"):
        hypernetwork_for(setup.decoder, setup.encoder, modules=("c_attn",))


@pytest.mark.parametrize(
    "name",
    [f"t2l_engine.research.costs.{module.name}" for module in pkgutil.iter_modules(costs.__path__)]
    + ["t2l_engine.ops.flops", "t2l_engine.testing.counter"],
)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
