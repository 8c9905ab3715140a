"""Setups by name: base models of released and bundled T2L checkpoints, their text encoders and hypernetworks."""

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
#: Adapted modules, rank and variant of released checkpoints (arXiv 2506.06105, appendix).
MODULES, RANK, VARIANT = ("q_proj", "v_proj"), 8, "L"
LATENT_SIZE, HEAD_IN_SIZE = 128, 512
#: Lengths implied by the paper's appendix I: a question 59, with three shots 299, a description 35 tokens.
PAPER = Workload(question=59, answer=1, shots=3, shot=80, description=35)


@functools.cache
def _file() -> dict[str, Any]:
    return read_json(FILE)


def known_entries(kind: str) -> dict[str, Any]:
    """Name -> entry of the file; ``kind``: "models" or "encoders"."""
    return _file()[kind]


def known_setups() -> list[str]:
    """The names of :func:`known_setup`."""
    return list(known_entries("models"))


def known_encoders() -> list[str]:
    """The names of :func:`encoder_named`."""
    return list(known_entries("encoders"))


def encoder_named(name: str) -> Encoder:
    """The text encoder ``name`` of :func:`known_encoders`; ConfigError for another name."""
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
    """A hypernetwork that adapts ``modules`` in every layer of ``decoder``; sizes default to those for Mistral-7B.

    Raises ConfigError for a module that is missing in a layer of the model.
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
    """Language model ``name`` with its text encoder and hypernetwork, all with two bytes per value.

    Raises ConfigError for a name not in :func:`known_setups`.

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
