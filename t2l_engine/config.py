"""Frozen configuration records with a strict JSON form.

Every record is a frozen dataclass.  ``to_json`` gives plain JSON values; ``from_json`` accepts exactly the fields of the
record: an unknown or a missing field is a ``ConfigError`` that names it.  Nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

VARIANTS = ("L", "M", "S-learnable", "S-rotary")


class ConfigError(ValueError):
    """A configuration or checkpoint file says something that cannot be used; the message names the field."""


def to_json(config: Any) -> dict[str, Any]:
    """``config`` (a dataclass instance) as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[T], values: Any, where: str) -> T:
    """Build ``cls`` from JSON ``values``; ``where`` names the source in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object for {cls.__name__}, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown field {key!r}; expected some of {sorted(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: missing field {name!r}")
    try:
        return cls(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def read_json(path: Path) -> Any:
    """Parse the JSON file ``path``; a ``ConfigError`` names the file when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: expected a positive integer, got {value!r}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """How a description becomes ``task_emb`` (paper section 3; the reference's ``embs_generator``).

    ``name``: ``"minilm"`` (the packaged all-MiniLM-L6-v2), a local folder, or a hub name.
    ``pooling``: ``"cls"``, ``"mean"`` or ``"last"`` (last real token).
    ``full_stop``: append "." to a description that ends in a letter.
    ``template``: text with ``{text}`` that replaces the full-stop rule, or None.
    """

    name: str
    pooling: str
    max_length: int = 512
    full_stop: bool = True
    template: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"encoder.name: expected a non-empty string, got {self.name!r}")
        if self.pooling not in ("cls", "mean", "last"):
            raise ConfigError(f"encoder.pooling: expected 'cls', 'mean' or 'last', got {self.pooling!r}")
        _positive_int("encoder.max_length", self.max_length)
        if not isinstance(self.full_stop, bool):
            raise ConfigError(f"encoder.full_stop: expected true or false, got {self.full_stop!r}")
        if self.template is not None and not (isinstance(self.template, str) and "{text}" in self.template):
            raise ConfigError(f"encoder.template: expected a string containing '{{text}}', got {self.template!r}")


@dataclasses.dataclass(frozen=True)
class HyperNetworkConfig:
    """Everything structural about a hypernetwork.

    ``modules``: adapted modules in row order of the module embedding; ``in_features``/``out_features`` are parallel to it.
    ``latent_size`` (the trunk width m is ``latent_size//2 + 2*(latent_size//4)``) and ``head_in_size`` as in the paper's
    appendix; ``embed_dim`` is the width of ``task_emb``.  ``lora_alpha`` with ``scaling`` gives the LoRA scaling:
    ``"rslora"`` = alpha/sqrt(rank), ``"plain"`` = alpha/rank, or a positive number.
    ``head_bias``: whether the heads have one.  ``output_scale`` multiplies every generated A and B (1/sqrt(10000) for
    checkpoints that reconstruct weight differences).
    """

    variant: str
    modules: tuple[str, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]
    num_layers: int
    rank: int
    embed_dim: int
    latent_size: int
    head_in_size: int
    lora_alpha: float
    scaling: str | float = "rslora"
    head_bias: bool = True
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("modules", "in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise ConfigError(f"{name}: expected a non-empty list, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant: expected one of {VARIANTS}, got {self.variant!r}")
        for name in self.modules:
            if not isinstance(name, str) or not name.isidentifier():
                raise ConfigError(f"modules: expected plain module names such as 'q_proj', got {name!r}")
        if len(set(self.modules)) != len(self.modules):
            raise ConfigError(f"modules: expected distinct names, got {list(self.modules)}")
        for name in ("in_features", "out_features"):
            if len(getattr(self, name)) != len(self.modules):
                raise ConfigError(
                    f"{name}: expected {len(self.modules)} values, one a module, got {len(getattr(self, name))}"
                )
            for value in getattr(self, name):
                _positive_int(name, value)
        for name in ("num_layers", "rank", "embed_dim", "latent_size", "head_in_size"):
            _positive_int(name, getattr(self, name))
        if self.latent_size < 4:
            raise ConfigError(f"latent_size: expected at least 4, got {self.latent_size}")
        if self.variant == "S-rotary" and self.width % 2:
            raise ConfigError(f"latent_size: expected an even trunk width for S-rotary, got width {self.width}")
        for name in ("lora_alpha", "output_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name}: expected a positive number, got {value!r}")
        if not isinstance(self.head_bias, bool):
            raise ConfigError(f"head_bias: expected true or false, got {self.head_bias!r}")
        resolve_scaling(self.scaling, self.lora_alpha, self.rank)

    @property
    def task_width(self) -> int:
        """Width of the encoded task, ``latent_size // 2``."""
        return self.latent_size // 2

    @property
    def embedding_width(self) -> int:
        """Width of the depth and of the module embedding, ``latent_size // 4``."""
        return self.latent_size // 4

    @property
    def width(self) -> int:
        """Trunk width m."""
        return self.task_width + 2 * self.embedding_width

    @property
    def num_sides(self) -> int:
        """Latent rows a layer and module for the two sides A and B: 2 with a shared head (M, S), else 1."""
        return 1 if self.variant == "L" else 2

    @property
    def num_ranks(self) -> int:
        """Latent rows a side, one for every rank in S, else 1."""
        return self.rank if self.variant.startswith("S") else 1

    def head_rows(self, module_index: int) -> int:
        """Rows of the head of module ``module_index`` (format note: table of variants)."""
        n_in, n_out = self.in_features[module_index], self.out_features[module_index]
        per_latent = self.rank // self.num_ranks
        return per_latent * (max(n_in, n_out) if self.num_sides == 2 else n_in + n_out)


def resolve_scaling(scaling: str | float, lora_alpha: float, rank: int) -> float:
    """LoRA scaling as a number: "rslora" = alpha/sqrt(rank), "plain" = alpha/rank, or a positive number as it is."""
    if scaling == "rslora":
        return lora_alpha / math.sqrt(rank)
    if scaling == "plain":
        return lora_alpha / rank
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling) or scaling <= 0:
        raise ConfigError(f"scaling: expected 'rslora', 'plain' or a positive number, got {scaling!r}")
    return float(scaling)
