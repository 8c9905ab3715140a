"""Sizes of a text encoder, from its transformers configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from t2l_engine.files.errors import MAX_LAYERS, ConfigError
from t2l_engine.research.costs.decoder import Fields, config_values, family_of


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Sizes of a bidirectional encoder; ``gated``: its MLP is gated, with three matrices (arXiv 2002.05202).

    ``embeddings``: total rows of its embedding tables (words, positions, token types).  Poolers and language-model heads are
    not included.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    gated: bool
    embeddings: int

    @classmethod
    def from_config(cls, config: Any) -> Encoder:
        """``config``: as :meth:`Decoder.from_config` takes it; ``model_type`` one of :data:`FAMILIES`.

        >>> Encoder.from_config({"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "vocab_size": 30522,
        ...     "num_hidden_layers": 6, "num_attention_heads": 12}).num_parameters
        22565376
        """
        values, where = config_values(config)
        fields, family = Fields(values, where), family_of(FAMILIES, values, where)
        positions = fields.size("max_position_embeddings", 512) if family.positions else 0
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        if hidden % heads:
            raise ConfigError(f"{where}: num_attention_heads: expected a divisor of hidden_size {hidden}, got {heads}")
        return cls(
            model_type=values["model_type"],
            hidden=hidden,
            intermediate=fields.size("intermediate_size"),
            layers=fields.size("num_hidden_layers", high=MAX_LAYERS),
            heads=heads,
            gated=family.gated,
            embeddings=fields.size("vocab_size") + positions + fields.size("type_vocab_size", family.types, low=0),
        )

    @property
    def num_parameters(self) -> int:
        d, i = self.hidden, self.intermediate
        # A gated MLP has a bias in its last matrix only; every layer has two LayerNorms, the embeddings one.
        attention, biases = 4 * d * (d + 1), d if self.gated else i + d
        layer = attention + (3 if self.gated else 2) * d * i + biases + 4 * d
        return self.embeddings * d + 2 * d + self.layers * layer


@dataclasses.dataclass(frozen=True)
class Family:
    """``positions``: learned position embeddings instead of rotary ones; ``types``: default number of token types."""

    gated: bool = False
    positions: bool = True
    types: int = 2


#: By ``model_type``; "new" is that of gte's remote code.
FAMILIES = {
    "bert": Family(),
    "roberta": Family(),
    "xlm-roberta": Family(),
    "gte": Family(gated=True, positions=False, types=1),
    "new": Family(gated=True, positions=False, types=1),
}
