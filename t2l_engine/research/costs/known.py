"""Base models of released and bundled T2L checkpoints by name, with their text encoders and hypernetworks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.research.costs.model import Model, count
from t2l_engine.research.costs.serving import Setup, Workload

#: Sizes of released checkpoints for Mistral-7B (arXiv 2506.06105, appendix).
SIZES = {"variant": "L", "modules": ("q_proj", "v_proj"), "rank": 8, "latent_size": 128, "head_in_size": 512}
#: Lengths implied by the paper's appendix I: a question 59, with three shots 299, a description 35 tokens.
PAPER = Workload(question=59, answer=1, shots=3, shot=80, description=35)


@functools.cache
def _file() -> dict[str, Any]:
    return read_json(Path(__file__).with_name("known.json"))


def known_entries(kind: str) -> dict[str, Any]:
    """Name -> entry of the file; ``kind``: "models" or "encoders"."""
    return _file()[kind]


def _entry(kind: str, name: str) -> dict[str, Any]:
    known = known_entries(kind)
    if name not in known:
        raise ConfigError(f"{kind.removesuffix('s')}: expected one of {', '.join(known)}, got {short_repr(name)}")
    return known[name]


@functools.cache
def known_encoder(name: str) -> Model:
    return count(_entry("encoders", name)["config"], head=False)


@functools.cache
def known_model(name: str) -> Model:
    return count(_entry("models", name)["config"])


def hypernetwork_for(model: Model, encoder: Model, **sizes: Any) -> HyperNetworkConfig:
    """A hypernetwork for every layer of ``model``; ``sizes``: of :data:`SIZES`, whose values are the defaults.

    Raises ConfigError for a module that is missing in a layer of the model.
    """
    sizes = SIZES | sizes
    for name in sizes["modules"]:
        if name not in model.linears:
            found = ", ".join(model.linears)
            raise ConfigError(f"modules: expected some of {found} for {model.model_type}, got {short_repr(name)}")
    features = zip(*(model.linears[name] for name in sizes["modules"]), strict=True)
    return HyperNetworkConfig(
        **sizes,
        **dict(zip(("in_features", "out_features"), features, strict=True)),
        num_layers=model.layers,
        embed_dim=encoder.hidden,
        lora_alpha=2.0 * sizes["rank"],
    )


@functools.cache
def known_setup(name: str) -> Setup:
    """Language model ``name`` with its text encoder and hypernetwork, all with two bytes per value; ConfigError otherwise.

    >>> known_setup("mistral-7b").hypernet.num_parameters
    55424000
    """
    entry = _entry("models", name)
    model, encoder = known_model(name), known_encoder(entry["encoder"])
    return Setup(model, encoder, hypernetwork_for(model, encoder, **entry["hypernetwork"]))
