"""Sizes of a decoder-only language model, from its transformers configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from t2l_engine.files.errors import MAX_LAYERS, MAX_SHOWN, MAX_SIZE, ConfigError, short_repr
from t2l_engine.files.text import read_json

FULL, SLIDING = "full_attention", "sliding_attention"  # of ``layer_types``
Windows = tuple["int | None", ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP: each token uses ``per_token`` of ``count`` gated MLPs (arXiv 2401.04088).

    ``shared``: width of the shared expert, an additional gated MLP for every token (Qwen2-MoE); 0: none.
    """

    count: int
    per_token: int
    intermediate: int
    shared: int = 0

    def hit(self, tokens: int) -> float:
        """Expected number of experts that ``tokens`` tokens use, if each token draws uniformly."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder with gated MLPs and grouped-query attention.

    ``windows``: per layer, the size of its sliding window; None: full attention.  ``experts``: the mixture in the layers
    marked by ``sparse``.  ``biases``, ``norms``: number of such parameters per layer (they count as bytes, not as FLOPs).
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    windows: Windows
    sparse: tuple[bool, ...]
    experts: Experts | None = None
    biases: int = 0
    norms: int = 0

    @classmethod
    def from_config(cls, config: Any) -> Decoder:
        """``config``: a transformers configuration, its values as a dict, or the path of a ``config.json`` or its folder.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: the model type is not in :data:`FAMILIES`, or a field (named) is missing or invalid.

        >>> Decoder.from_config({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}).module_shapes["v_proj"]
        (64, 32)
        """
        values, where = config_values(config)
        text = values.get("text_config")
        # Of a multimodal model.  In a list of keys, since the untrusted value may not be hashable.
        if isinstance(text, dict) and text.get("model_type") in list(FAMILIES):
            tied = values.get("tie_word_embeddings")  # the whole model's takes precedence
            values, where = text if tied is None else {**text, "tie_word_embeddings": tied}, f"{where}: text_config"
        return family_of(FAMILIES, values, where).read(Fields(values, where))

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the linears that exist in every layer and can be adapted."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        if not any(self.sparse):
            up = d, self.intermediate
            shapes |= {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}
        return shapes

    @property
    def attention_weights(self) -> int:
        """Number of entries of the q, k, v and o matrices of a layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by part; ``logits``: the output matrix unless it is tied to the embedding."""
        moe, dense = sum(self.sparse), self.layers - sum(self.sparse)
        e, d = self.experts, self.hidden
        return {
            "embeddings": self.vocabulary * d,
            "attention": self.layers * self.attention_weights,
            "MLP": dense * 3 * d * self.intermediate,
            "experts": moe * e.count * 3 * d * e.intermediate if e else 0,
            "shared expert": moe * (3 * d * e.shared + d) if e and e.shared else 0,
            "router": moe * d * e.count if e else 0,
            "biases, norms": self.layers * (self.biases + self.norms) + d,
            "logits": 0 if self.tied else self.vocabulary * d,
        }

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


# --- configurations --------------------------------------------------------------------------------------------------


def config_values(config: Any) -> tuple[dict[str, Any], str]:
    """(values, name for error messages) of any ``config`` that ``from_config`` accepts."""
    if isinstance(config, (str, Path)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such configuration; expected a config.json or a folder with one")
        values, where = read_json(path), str(path)
    elif isinstance(config, Mapping):
        values, where = dict(config), "config"
    elif hasattr(config, "to_dict"):
        values, where = config.to_dict(), type(config).__name__
    else:
        raise ConfigError(f"config: expected a transformers configuration, a dict or a path, got {type(config).__name__}")
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(values).__name__}")
    return values, where


def family_of(families: Mapping[str, T], values: Mapping[str, Any], where: str) -> T:
    """The family of a configuration; ConfigError if its ``model_type`` is not in ``families``."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise ConfigError(f"{where}: model_type: expected one of {', '.join(families)}, got {short_repr(kind)}")
    return families[kind]


class Fields:
    """Checked access to a configuration's values; null is treated as missing."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def size(self, name: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer in [low, high]; required without ``default``."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{self.where}: {name}: expected an integer from {low} to {high}, got {short_repr(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}: expected true or false, got {short_repr(value)}")
        return value

    def kinds(self, layers: int) -> list[str] | None:
        """``layer_types``: full or sliding attention, per layer."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or not all(kind in (FULL, SLIDING) for kind in value):
            raise ConfigError(
                f"{self.where}: layer_types: expected a list of {layers}, each {FULL} or {SLIDING}, got {short_repr(value)}"
            )
        return value


# --- families --------------------------------------------------------------------------------------------------------


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MIXTURE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
#: Further fields that sizes depend on; their defaults are those of the configuration class in transformers.
_OTHERS = (
    "num_key_value_heads head_dim sliding_window max_window_layers num_experts num_experts_per_tok "
    "moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step mlp_only_layers layer_types "
    "tie_word_embeddings attention_bias mlp_bias qkv_bias use_sliding_window use_bidirectional_attention"
).split()


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties of the models of one ``model_type`` that their configurations do not state.

    ``norms``: number of RMSNorms of width hidden per layer; ``qk_norm``: whether queries and keys are normed too;
    ``qkv_bias``: default of the field of that name, biases of q, k and v; ``required``: fields that a file must have.
    """

    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    required: tuple[str, ...] = _REQUIRED

    def read(self, given: Fields) -> Decoder:
        fields = self._complete(given)
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        layers, intermediate = fields.size("num_hidden_layers"), fields.size("intermediate_size")
        kv_heads, head_dim = fields.size("num_key_value_heads"), fields.size("head_dim", hidden // heads)
        if fields.values["head_dim"] is None and hidden % heads:
            raise ConfigError(
                f"{fields.where}: num_attention_heads: expected a divisor of hidden_size {hidden}, as head_dim is absent, "
                f"got {heads}"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"{fields.where}: num_key_value_heads: expected a divisor of {heads} attention heads, got {kv_heads}"
            )
        if any(source.flag("use_bidirectional_attention", False) for source in (given, fields)):
            raise ConfigError(
                f"{fields.where}: use_bidirectional_attention: expected false, since causal masks are counted, got True"
            )
        experts, sparse = _experts(fields, layers)
        qkv = (heads + 2 * kv_heads) * head_dim
        return Decoder(
            model_type=given.values["model_type"],
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=fields.size("vocab_size"),
            tied=fields.flag("tie_word_embeddings", False),
            windows=_windows(fields, layers),
            sparse=sparse,
            experts=experts,
            biases=qkv * fields.flag("qkv_bias", self.qkv_bias)
            + (qkv + hidden) * fields.flag("attention_bias", False)
            + (2 * intermediate + hidden) * fields.flag("mlp_bias", False),
            norms=self.norms * hidden + self.qk_norm * 2 * head_dim,
        )

    def _complete(self, fields: Fields) -> Fields:
        """``fields`` completed by the defaults of the transformers class, without fields that are unknown to it."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        kind, values = CONFIG_MAPPING[fields.values["model_type"]], dict(fields.values)
        if "num_local_experts" in values:  # an alias in transformers
            values["num_experts"] = values.pop("num_local_experts")
        fields = Fields(values, fields.where)
        for name in self.required:  # bounds the number of layers before the class allocates per layer
            fields.size(name, high=MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE)
        # Every model uses head_dim, even if its class does not list it.
        known = {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys() | {"head_dim"}
        read = [name for name in (*_REQUIRED, *_OTHERS) if name in known]
        given = {name: values[name] for name in read if values.get(name) is not None}
        if "sliding_window" in known and "sliding_window" in values:
            given["sliding_window"] = values["sliding_window"]  # null means no window, not the default
        if "num_key_value_heads" in values:
            given.setdefault("num_key_value_heads", values["num_attention_heads"])  # null
        if "sliding_window_pattern" in values:  # older files
            given["sliding_window_pattern"] = fields.size("sliding_window_pattern")
        try:
            complete = kind(**given)
        except (StrictDataclassError, ValueError, TypeError) as error:
            message = " ".join(str(error).split())  # may repeat the value
            raise ConfigError(f"{fields.where}: {message[:MAX_SHOWN]}{'...' * (len(message) > MAX_SHOWN)}") from None
        values = {name: getattr(complete, name, None) for name in read}
        if not values.get("use_sliding_window", True):
            values["sliding_window"] = None  # some classes have 0
        return Fields(values, fields.where)


def _windows(fields: Fields, layers: int) -> Windows:
    """Sliding windows (arXiv 2310.06825): of the layers given by ``layer_types``, or of all without that field."""
    kinds = fields.kinds(layers) or [SLIDING] * layers
    window = None if fields.values.get("sliding_window") is None else fields.size("sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _experts(fields: Fields, layers: int) -> tuple[Experts | None, tuple[bool, ...]]:
    """(the mixture of experts, per layer whether it has one)."""
    if "num_experts_per_tok" not in fields.values:
        return None, (False,) * layers
    experts = Experts(
        fields.size("num_experts"),
        fields.size("num_experts_per_tok"),
        fields.size("moe_intermediate_size", fields.size("intermediate_size")),
        fields.size("shared_expert_intermediate_size", 0, low=0),
    )
    if experts.per_token > experts.count:
        raise ConfigError(f"{fields.where}: num_experts_per_tok: expected at most {experts.count}, got {experts.per_token}")
    step, dense = fields.size("decoder_sparse_step", 1), fields.values.get("mlp_only_layers") or []
    return experts, tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


#: By ``model_type``.  Grouped-query attention: arXiv 2305.13245.
FAMILIES = {
    "llama": Family(),
    "smollm3": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mixtral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen2_moe": Family(qkv_bias=True, required=(*_REQUIRED, *_MIXTURE, "shared_expert_intermediate_size")),
    "qwen3_moe": Family(qk_norm=True, required=_REQUIRED + _MIXTURE),
    "gemma": Family(),
    "gemma2": Family(norms=4),
    # Files of multimodal models omit fields with default values.
    "gemma3_text": Family(norms=4, qk_norm=True, required=("hidden_size", "intermediate_size", "num_hidden_layers")),
}
