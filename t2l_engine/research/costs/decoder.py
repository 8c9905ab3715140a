"""The geometry of a decoder-only language model, from its transformers configuration alone: no weights, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from t2l_engine.files.errors import MAX_LAYERS, MAX_SIZE, ConfigError, short_repr
from t2l_engine.files.text import read_json

FULL, SLIDING = "full_attention", "sliding_attention"  # of ``layer_types``
Windows = tuple["int | None", ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture in place of an MLP: of ``count`` gated MLPs every token goes through ``per_token`` (arXiv 2401.04088).

    ``shared``: width of an MLP that every token goes through beside them, with a gate of its own (Qwen2-MoE); 0: none.
    """

    count: int
    per_token: int
    intermediate: int
    shared: int = 0

    def hit(self, tokens: int) -> float:
        """Experts that ``tokens`` tokens need on average, if each token draws its own evenly."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder with gated MLPs and grouped-query attention.

    ``windows``: of every layer how many keys a query sees at most, None where all before it.  ``experts``: the mixture of
    the layers that ``sparse`` marks.  ``biases``, ``norms``: parameters of a layer that no product reads (counted as bytes).
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
            ConfigError: the model type is none of :data:`FAMILIES`, or a field is missing or of another kind; named.

        >>> Decoder.from_config({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}).module_shapes["v_proj"]
        (64, 32)
        """
        values, where = config_values(config)
        text = values.get("text_config")
        # Of a model that reads images too.  A list, since what a file says may be nothing that a dict can look up.
        if isinstance(text, dict) and text.get("model_type") in list(FAMILIES):
            tied = values.get("tie_word_embeddings")  # of the whole model: goes before that of its text part
            values, where = text if tied is None else {**text, "tie_word_embeddings": tied}, f"{where}: text_config"
        return family_of(FAMILIES, values, where).read(Fields(values, where))

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the linears that adapters can be put on in every layer."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        if not any(self.sparse):
            up = d, self.intermediate
            shapes |= {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}
        return shapes

    @property
    def attention_weights(self) -> int:
        """Entries of the q, k, v and o matrices of a layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def parameters(self) -> dict[str, int]:
        """Values by part; ``logits`` is the output matrix where it is not the embedding itself."""
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
    """The values of what ``from_config`` takes, and what to call them in an error."""
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
    """The family of a configuration; ConfigError for a ``model_type`` that is none of them."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise ConfigError(f"{where}: model_type: expected one of {', '.join(families)}, got {short_repr(kind)}")
    return families[kind]


class Fields:
    """Checked reading of a configuration's values; a field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A positive integer; required where there is no ``default``."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(f"{self.where}: {name}: expected an integer from {least} to {most}, got {short_repr(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}: expected true or false, got {short_repr(value)}")
        return value

    def kinds(self, layers: int) -> list[str] | None:
        """``layer_types``: full or sliding attention by layer."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or not all(kind in (FULL, SLIDING) for kind in value):
            raise ConfigError(
                f"{self.where}: layer_types: expected a list of {layers}, each {FULL} or {SLIDING}, got {short_repr(value)}"
            )
        return value


# --- families --------------------------------------------------------------------------------------------------------

#: The windows of so many layers.
Rule = Callable[[Fields, int], Windows]


def _full(fields: Fields, layers: int) -> Windows:
    return (None,) * layers


def _uniform(default: int | None = 4096) -> Rule:
    """One window for all layers; of an absent field ``default``, and null says that there is none."""

    def windows(fields: Fields, layers: int) -> Windows:
        if fields.values.get("sliding_window", default) is None:
            return _full(fields, layers)
        return (fields.size("sliding_window", default),) * layers

    return windows


def _listed(otherwise: Callable[[Fields, int], list[str]]) -> Rule:
    """The layers that ``layer_types`` names, or those that a file without it means."""

    def windows(fields: Fields, layers: int) -> Windows:
        kinds = fields.kinds(layers) or otherwise(fields, layers)
        (window, *_) = _uniform()(fields, 1)
        return tuple(window if kind == SLIDING else None for kind in kinds)

    return windows


def _all_sliding(fields: Fields, layers: int) -> list[str]:
    return [SLIDING] * layers


def _all_but_every(pattern: int) -> Callable[[Fields, int], list[str]]:
    """Gemma: every ``pattern``-th layer sees everything."""

    def kinds(fields: Fields, layers: int) -> list[str]:
        step = fields.size("sliding_window_pattern", pattern)
        return [SLIDING if (i + 1) % step else FULL for i in range(layers)]

    return kinds


def _upper(fields: Fields, layers: int) -> list[str]:
    """Qwen: layers from ``max_window_layers`` on."""
    first = fields.size("max_window_layers", 28, least=0)
    return [SLIDING if i >= first else FULL for i in range(layers)]


def _not_said(fields: Fields, layers: int) -> list[str]:
    raise ConfigError(f"{fields.where}: layer_types: expected a list, since use_sliding_window is true, got none")


def _if_on(rule: Rule) -> Rule:
    """``rule``, where ``use_sliding_window`` says that there are windows at all."""
    return lambda fields, layers: (rule if fields.flag("use_sliding_window", False) else _full)(fields, layers)


def _mixtral(fields: Fields) -> Experts:
    return Experts(
        fields.size("num_local_experts", 8), fields.size("num_experts_per_tok", 2), fields.size("intermediate_size")
    )


def _qwen_moe(shared: bool) -> Callable[[Fields], Experts]:
    def experts(fields: Fields) -> Experts:
        name = "num_experts" if "num_experts" in fields.values else "num_local_experts"
        width = fields.size("shared_expert_intermediate_size") if shared else 0
        return Experts(fields.size(name), fields.size("num_experts_per_tok"), fields.size("moe_intermediate_size"), width)

    return experts


@dataclasses.dataclass(frozen=True)
class Family:
    """What the configurations of one ``model_type`` leave unsaid; defaults are those of its class in transformers.

    ``kv_heads``: where the field is absent, 0 for as many as heads.  ``head_dim``: likewise, 0 for hidden / heads.
    ``vocabulary``, ``heads``: likewise, None where the file must say.  ``norms``: RMSNorms of width hidden in a layer;
    ``qk_norm``: further ones of queries and keys.  ``qkv_bias``: q, k and v have biases (Qwen2).  ``switches``: fields that
    turn biases on and off; others of their kind a family does not read.
    """

    windows: Rule = _full
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    switches: tuple[str, ...] = ()
    experts: Callable[[Fields], Experts] | None = None
    vocabulary: int | None = None
    heads: int | None = None

    def read(self, fields: Fields) -> Decoder:
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads", self.heads)
        layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
        kv_heads = fields.size("num_key_value_heads", self.kv_heads or heads)
        if "num_key_value_heads" in fields.values and fields.values["num_key_value_heads"] is None:
            kv_heads = heads
        if not self.head_dim and fields.values.get("head_dim") is None and hidden % heads:
            raise ConfigError(
                f"{fields.where}: num_attention_heads: expected a divisor of hidden_size {hidden}, as head_dim is absent, "
                f"got {heads}"
            )
        head_dim = fields.size("head_dim", self.head_dim or hidden // heads)
        if fields.flag("use_bidirectional_attention", False):
            raise ConfigError(
                f"{fields.where}: use_bidirectional_attention: expected false, since causal masks are counted, got True"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"{fields.where}: num_key_value_heads: expected a divisor of {heads} attention heads, got {kv_heads}"
            )
        experts = self.experts(fields) if self.experts else None
        sparse = (False,) * layers
        if experts is not None:
            if experts.per_token > experts.count:
                raise ConfigError(
                    f"{fields.where}: num_experts_per_tok: expected at most {experts.count}, got {experts.per_token}"
                )
            step, dense = fields.size("decoder_sparse_step", 1), fields.values.get("mlp_only_layers") or []
            if not isinstance(dense, list):
                raise ConfigError(f"{fields.where}: mlp_only_layers: expected a list, got {short_repr(dense)}")
            sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
        return Decoder(
            model_type=fields.values["model_type"],
            hidden=hidden,
            intermediate=fields.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=fields.size("vocab_size", self.vocabulary),
            tied=fields.flag("tie_word_embeddings", self.tied),
            windows=self.windows(fields, layers),
            sparse=sparse,
            experts=experts,
            biases=self._biases(fields, hidden, heads * head_dim, kv_heads * head_dim),
            norms=self.norms * hidden + self.qk_norm * 2 * head_dim,
        )

    def _biases(self, fields: Fields, hidden: int, query: int, kv: int) -> int:
        def on(name: str, default: bool = False) -> bool:
            return fields.flag(name, default) if name in self.switches else default

        qkv = query + 2 * kv
        mlp = 2 * fields.size("intermediate_size") + hidden if on("mlp_bias") else 0
        return qkv * on("qkv_bias", self.qkv_bias) + (qkv + hidden) * on("attention_bias") + mlp


_ATTENTION, _BOTH = ("attention_bias",), ("attention_bias", "mlp_bias")
#: By ``model_type``.  Sliding windows: arXiv 2310.06825; grouped-query attention: arXiv 2305.13245.
FAMILIES = {
    "llama": Family(switches=_BOTH),
    "smollm3": Family(_if_on(_listed(_not_said)), kv_heads=4, tied=True, switches=_BOTH),
    "mistral": Family(_uniform(), kv_heads=8),
    "ministral": Family(_listed(_all_sliding), kv_heads=8),
    "ministral3": Family(_uniform(None), kv_heads=8, head_dim=128),
    "mixtral": Family(_uniform(None), kv_heads=8, experts=_mixtral),
    "qwen2": Family(_if_on(_listed(_upper)), kv_heads=32, qkv_bias=True),
    "qwen3": Family(_if_on(_listed(_upper)), kv_heads=32, head_dim=128, qk_norm=True, switches=_ATTENTION),
    "qwen2_moe": Family(
        _if_on(_listed(_not_said)), kv_heads=16, qkv_bias=True, switches=("qkv_bias",), experts=_qwen_moe(shared=True)
    ),
    "qwen3_moe": Family(_if_on(_uniform()), kv_heads=4, qk_norm=True, switches=_ATTENTION, experts=_qwen_moe(shared=False)),
    "gemma": Family(kv_heads=16, head_dim=256, tied=True, switches=_ATTENTION),
    "gemma2": Family(_listed(_all_but_every(2)), kv_heads=4, head_dim=256, tied=True, norms=4, switches=_ATTENTION),
    "gemma3_text": Family(  # files of models that read images too leave out what the class says
        _listed(_all_but_every(6)),
        kv_heads=4,
        head_dim=256,
        tied=True,
        norms=4,
        qk_norm=True,
        switches=_ATTENTION,
        vocabulary=262208,
        heads=8,
    ),
}
