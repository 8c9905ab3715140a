"""Setups known by name: the models of released T2L checkpoints and of the bundled one, their encoders and hypernetworks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.research.costs.decoder import Decoder
from t2l_engine.research.costs.encoder import Encoder
from t2l_engine.research.costs.serving import Setup, Workload

FILE = Path(__file__).with_name("known.json")
#: What released checkpoints adapt, at which rank, with which hypernetwork (arXiv 2506.06105, appendix).
MODULES, RANK, VARIANT = ("q_proj", "v_proj"), 8, "L"
LATENT_SIZE, HEAD_IN_SIZE = 128, 512
#: Lengths that the figures of the paper's appendix I imply: 59 for a question, 299 with three shots, 35 to describe a task.
PAPER = Workload(question=59, answer=1, shots=3, shot=80, description=35)


@functools.cache
def _file() -> dict[str, Any]:
    return read_json(FILE)


def known_entries(kind: str) -> dict[str, Any]:
    """Name -> what the file says of each; ``kind`` "models" or "encoders"."""
    return _file()[kind]


def known_setups() -> list[str]:
    """Names that :func:`known_setup` takes."""
    return list(known_entries("models"))


def known_encoders() -> list[str]:
    """Names that :func:`encoder_named` takes."""
    return list(known_entries("encoders"))


def encoder_named(name: str) -> Encoder:
    """A text encoder of :func:`known_encoders`; ConfigError for another name."""
    return Encoder.from_config(_entry("encoders", name)["config"])


def hypernetwork_for(
    decoder: Decoder,
    encoder: Encoder | Decoder,
    *,
    modules: tuple[str, ...] = MODULES,
    rank: int = RANK,
    variant: str = VARIANT,
    latent_size: int = LATENT_SIZE,
    head_in_size: int = HEAD_IN_SIZE,
) -> HyperNetworkConfig:
    """A hypernetwork that adapts ``modules`` in every layer of ``decoder``; sizes default to those of Mistral-7B.

    Raises ConfigError for a module that the model has not, or not in every layer.
    """
    shapes = decoder.module_shapes
    for name in modules:
        if name not in shapes:
            raise ConfigError(
                f"modules: expected some of {', '.join(shapes)} for {decoder.model_type}, got {short_repr(name)}"
            )
    return HyperNetworkConfig(
        variant=variant,
        modules=modules,
        in_features=tuple(shapes[name][0] for name in modules),
        out_features=tuple(shapes[name][1] for name in modules),
        num_layers=decoder.layers,
        rank=rank,
        embed_dim=encoder.hidden,
        latent_size=latent_size,
        head_in_size=head_in_size,
        lora_alpha=2.0 * rank,
    )


def known_setup(name: str) -> Setup:
    """Language model ``name`` with its text encoder and hypernetwork, all in two bytes a value.

    Raises ConfigError for a name that is none of :func:`known_setups`.

    >>> known_setup("mistral-7b").hypernet.num_parameters
    55424000
    """
    entry = _entry("models", name)
    decoder, encoder = Decoder.from_config(entry["config"]), encoder_named(entry["encoder"])
    return Setup(decoder, encoder, hypernetwork_for(decoder, encoder, **entry["hypernetwork"]))


def _entry(kind: str, name: str) -> dict[str, Any]:
    known = known_entries(kind)
    if name not in known:
        raise ConfigError(f"{kind.removesuffix('s')}: expected one of {', '.join(known)}, got {short_repr(name)}")
    return known[name]
