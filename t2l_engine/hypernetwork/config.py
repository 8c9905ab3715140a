"""HyperNetworkConfig: the structure of a hypernetwork as a frozen dataclass with checked fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import nn

from t2l_engine.adapters.paths import DEFAULT_PATHS, LAYER, path_error
from t2l_engine.files.errors import (
    MAX_FEATURES,
    MAX_LAYERS,
    MAX_MODULES,
    MAX_NAME,
    MAX_NUMBER,
    MAX_RANK,
    MIN_NUMBER,
    ConfigError,
    boolean,
    expect,
    one_of,
    positive_int,
    positive_number,
    short_repr,
    whole_number,
)
from t2l_engine.files.text import from_json

#: L: a head gives A and B in one row.  M: a head shared by A and B, one row each.  S: one row per side (A, B) and rank.
#: autoregressive: unshared heads, one row per rank.  "learnable" and "rotary": position embedding of the rank.
VARIANTS = ("L", "M", "S-learnable", "S-rotary", "autoregressive-learnable", "autoregressive-rotary")
TASK_ENCODERS = ("linear", "vq", "softmax", "discrete")
#: Codes of the vq and softmax encoders; classes and hidden width of the discrete one (constants in SakanaAI's code).
NUM_CODES, NUM_CLASSES, DISCRETE_HIDDEN = 32, 64, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What every hypernetwork makes adapters for.

    ``modules``: adapted modules in row order of the module embedding; ``in_features``/``out_features`` are parallel to it.
    ``lora_alpha`` with ``scaling`` gives the LoRA scaling: ``"rslora"`` = alpha/sqrt(rank), ``"plain"`` = alpha/rank, or a
    positive number.
    ``paths``: of each module in the base model, with ``{layer}`` for the layer index; None: those of Llama (``q_proj`` at
    ``model.layers.{layer}.self_attn.q_proj``), if its modules have the names.  Generated adapters name their modules after
    the end of the path, as adapters read from files.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.
    """

    modules: tuple[str, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]
    num_layers: int
    rank: int
    lora_alpha: float
    scaling: str | float = "rslora"
    paths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("modules", "in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_MODULES:
                raise ConfigError(f"{name}: expected a list of 1 to {MAX_MODULES} entries, got {short_repr(value)}")
            object.__setattr__(self, name, tuple(value))
        for name in self.modules:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > MAX_NAME:
                raise ConfigError(f"modules: expected plain module names such as 'q_proj', got {short_repr(name)}")
        expect(len(set(self.modules)) == len(self.modules), "modules", "distinct names", list(self.modules))
        if taken := [name for name in self.modules if hasattr(nn.ParameterDict(), name)]:
            raise ConfigError(f"modules: expected names of linears, got {taken}, which torch's ParameterDict does not allow")
        self._check_paths()
        for name in ("in_features", "out_features"):
            values = getattr(self, name)
            expect(len(values) == len(self.modules), name, f"{len(self.modules)} values, one a module", len(values))
            for value in values:
                positive_int(name, value, MAX_FEATURES)
        positive_int("num_layers", self.num_layers, MAX_LAYERS)
        positive_int("rank", self.rank, MAX_RANK)
        positive_number("lora_alpha", self.lora_alpha)
        resolve_scaling(self.scaling, self.lora_alpha, self.rank)

    def _check_paths(self) -> None:
        if self.paths is None:
            unknown = [name for name in self.modules if name not in DEFAULT_PATHS]
            if unknown:
                raise ConfigError(
                    f"paths: expected where the modules live in the base model, since {short_repr(unknown)} are none of "
                    f"{sorted(DEFAULT_PATHS)}"
                )
            return
        if not isinstance(self.paths, (list, tuple)) or not all(isinstance(path, str) for path in self.paths):
            raise ConfigError(f"paths: expected a list of strings or null, got {short_repr(self.paths)}")
        object.__setattr__(self, "paths", tuple(self.paths))
        one_each = len(self.modules) == len(self.paths) == len(set(self.paths))
        expect(one_each, "paths", f"{len(self.modules)} different ones, one a module", self.paths)
        for path in self.paths:
            error = path_error(path)
            if error is None and LAYER not in path and self.num_layers != 1:
                error = f"expected {LAYER} in it"
            if error is not None:
                raise ConfigError(f"paths: {short_repr(path)}: {error}")

    @property
    def module_paths(self) -> dict[str, str]:
        """Module -> its path in the base model."""
        return dict(zip(self.modules, self.paths or [DEFAULT_PATHS[name] for name in self.modules], strict=True))

    @property
    def num_adapted(self) -> int:
        """Number of layers that get an adapter."""
        return self.num_layers

    @property
    def adapter_values(self) -> int:
        """Number of entries of A and B of one adapter; applying it to a token takes two FLOPs each."""
        return self.num_adapted * self.rank * sum(self.in_features + self.out_features)

    @property
    def scaling_value(self) -> float:
        """The LoRA scaling as a number."""
        return resolve_scaling(self.scaling, self.lora_alpha, self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperNetworkConfig(TargetConfig):
    """The structure of a hypernetwork.

    ``latent_size`` (the trunk width m is ``latent_size//2 + 2*(latent_size//4)``) and ``head_in_size`` as in the paper's
    appendix; ``embed_dim`` is the width of ``task_emb``.
    ``head_bias``: whether the heads have a bias.  ``output_scale`` multiplies every generated A and B (1/sqrt(10000) for
    checkpoints that reconstruct weight differences).  ``task_encoder``: "linear", "vq", "softmax" or "discrete"; discrete
    needs ``latent_size // 2 == 64`` and has one-hot depth and module inputs, so m = 64 + layers + modules.

    Source: paper section 3 and its appendix; arguments of SakanaAI's code.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.

    >>> config = HyperNetworkConfig(variant="L", modules=("q_proj", "v_proj"), in_features=(4096, 4096),
    ...     out_features=(4096, 1024), num_layers=32, rank=8, embed_dim=1024, latent_size=128, head_in_size=512,
    ...     lora_alpha=16)
    >>> config.width, config.head_rows(1)
    (128, 40960)
    """

    variant: str
    embed_dim: int
    latent_size: int
    head_in_size: int
    head_bias: bool = True
    output_scale: float = 1.0
    task_encoder: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, VARIANTS)
        one_of("task_encoder", self.task_encoder, TASK_ENCODERS)
        for name in ("embed_dim", "latent_size", "head_in_size"):
            positive_int(name, getattr(self, name), MAX_FEATURES)
        expect(self.latent_size >= 4, "latent_size", "at least 4", self.latent_size)
        fits = self.task_encoder != "discrete" or self.task_width == NUM_CLASSES
        expect(fits, "latent_size", "128 or 129 with the discrete task encoder", self.latent_size)
        if self.variant.endswith("rotary") and self.width % 2:
            raise ConfigError(f"latent_size: expected an even trunk width for {self.variant}, got width {self.width}")
        positive_number("output_scale", self.output_scale)
        boolean("head_bias", self.head_bias)

    @property
    def task_width(self) -> int:
        """Width of the encoded task, ``latent_size // 2``."""
        return self.latent_size // 2

    @property
    def depth_width(self) -> int:
        """Width of the depth input: ``latent_size // 4``, or one-hot over the layers."""
        return self.num_layers if self.task_encoder == "discrete" else self.latent_size // 4

    @property
    def module_width(self) -> int:
        """Width of the module input: ``latent_size // 4``, or one-hot over the modules."""
        return len(self.modules) if self.task_encoder == "discrete" else self.latent_size // 4

    @property
    def width(self) -> int:
        """Trunk width m."""
        return self.task_width + self.depth_width + self.module_width

    @property
    def num_sides(self) -> int:
        """Latent rows per layer and module for the sides A and B: 2 with a shared head (M, S), else 1."""
        return 2 if self.variant.startswith(("M", "S")) else 1

    @property
    def num_ranks(self) -> int:
        """Latent rows per side: one per rank in S and the autoregressive variants, else 1."""
        return 1 if self.variant in ("L", "M") else self.rank

    @property
    def rotary(self) -> bool:
        """Whether the positions of ranks are rotary (else learned, if the variant has any)."""
        return self.variant.endswith("rotary")

    def head_rows(self, module_index: int) -> int:
        """Output features of the head of module ``module_index``."""
        n_in, n_out = self.in_features[module_index], self.out_features[module_index]
        per_latent = self.rank // self.num_ranks
        return per_latent * (max(n_in, n_out) if self.num_sides == 2 else n_in + n_out)


#: Attention of every width has these (constants of Idefics2's perceiver, which Doc-to-LoRA takes over).
HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 16, 4, 128
MAX_BLOCKS = 256
#: "perceiver-layers": the same perceiver runs on the states of every layer and makes that layer's adapters (layer-to-layer
#: form); "perceiver-flat": it runs once, with a query for every layer, module and rank.
PERCEIVERS = ("perceiver-layers", "perceiver-flat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceiverConfig(TargetConfig):
    """The structure of a hypernetwork that reads tokens.

    ``variant``: one of ``PERCEIVERS``.
    ``feature_size`` f: hidden size of the language model that reads.  ``latent_size`` d; ``num_latents``: learned queries of
    the perceiver's encoder, of ``num_blocks`` blocks with one cross-attention and ``num_self_attention`` self-attention
    layers each; with ``shared_blocks`` the blocks from the second on share their layers (self-attention: all blocks).
    ``num_mlps`` residual MLPs follow, with weights of their own for every layer if ``per_layer_mlps``.
    ``bias``: every text's adapter ends with ``rank`` learned ranks that do not depend on the text.

    Source: arXiv 2602.15902; arguments of SakanaAI's doc-to-lora.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.

    >>> config = PerceiverConfig(variant="perceiver-layers", modules=("down_proj",), in_features=(9216,),
    ...     out_features=(2304,), num_layers=26, rank=8, lora_alpha=45.25, scaling=45.25, feature_size=2304,
    ...     latent_size=512, num_latents=8, num_blocks=9, num_mlps=1, per_layer_mlps=True)
    >>> config.total_rank(chunks=2)
    24
    """

    variant: str
    first_layer: ClassVar[int] = 0  # the first layer that gets an adapter
    feature_size: int
    latent_size: int
    num_latents: int
    num_blocks: int
    num_self_attention: int = 0
    shared_blocks: bool = False
    num_mlps: int = 4
    per_layer_mlps: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, PERCEIVERS)
        for name in ("feature_size", "latent_size", "num_latents", "num_blocks"):
            positive_int(name, getattr(self, name), MAX_FEATURES)
        whole_number("num_self_attention", self.num_self_attention, MAX_BLOCKS)
        whole_number("num_mlps", self.num_mlps, MAX_BLOCKS)
        layers = self.num_blocks * (1 + self.num_self_attention)
        expect(layers <= MAX_BLOCKS, "num_blocks, num_self_attention", f"at most {MAX_BLOCKS} layers", layers)
        for name in ("shared_blocks", "per_layer_mlps", "bias"):
            boolean(name, getattr(self, name))

    @property
    def per_layer(self) -> bool:
        """Whether it reads the states of every layer."""
        return self.variant == PERCEIVERS[0]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of the latents of a chunk, ``[layers, modules, rank, d]``."""
        return self.num_layers, len(self.modules), self.rank, self.latent_size

    def total_rank(self, chunks: int) -> int:
        """Rank of the adapter of a text of ``chunks`` chunks."""
        return (chunks + self.bias) * self.rank


POINTER = "pointer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointerConfig(TargetConfig):
    """The structure of a hypernetwork that reads tokens and copies some of them into B.

    ``variant``: "pointer".
    ``feature_size`` f: width of the hidden states of a token, which begin with its embedding.
    ``latent_size`` d: of the latents, one for every adapted layer and rank, in ``num_blocks`` blocks of cross-attention with
    ``num_heads`` heads.
    ``copied``: modules that write into the residual stream, each of whose columns of B gets token embeddings.
    ``first_layer``: layers below it have no adapter.

    Source: the attention to tokens of a perceiver (arXiv 2103.03206), copies of pointer-generators (arXiv 1704.04368).

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.

    >>> config = PointerConfig(variant="pointer", modules=("q_proj", "down_proj"), in_features=(576, 1536),
    ...     out_features=(576, 576), num_layers=30, rank=8, lora_alpha=16, feature_size=1728, latent_size=192,
    ...     copied=("down_proj",), first_layer=16)
    >>> config.latent_shape
    (14, 8, 768)
    """

    variant: str
    bias: ClassVar[bool] = False  # no ranks that do not depend on the text: they are in the sums A and B
    per_layer: ClassVar[bool] = False  # it does not read the states of every layer apart
    feature_size: int
    latent_size: int
    num_blocks: int = 2
    num_heads: int = 4
    copied: tuple[str, ...] = ()
    first_layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, (POINTER,))
        for name in ("feature_size", "latent_size", "num_heads"):
            positive_int(name, getattr(self, name), MAX_FEATURES)
        positive_int("num_blocks", self.num_blocks, MAX_BLOCKS)
        divides = self.latent_size % self.num_heads == 0
        expect(divides, "latent_size", f"a multiple of the {self.num_heads} heads", self.latent_size)
        whole_number("first_layer", self.first_layer)
        expect(self.first_layer < self.num_layers, "first_layer", f"below the {self.num_layers} layers", self.first_layer)
        known = isinstance(self.copied, (list, tuple)) and [name for name in self.modules if name in self.copied]
        expect(known == list(self.copied), "copied", f"some of the modules {self.modules}, in their order", self.copied)
        object.__setattr__(self, "copied", tuple(self.copied))
        sizes = {self.out_features[self.modules.index(name)] for name in self.copied}
        expect(len(sizes) < 2, "copied", "modules with out_features of one size, that of an embedding", sorted(sizes))
        expect(self.copied_size <= self.feature_size, "feature_size", f"at least {self.copied_size}", self.feature_size)

    @property
    def copied_size(self) -> int:
        """Width of a token embedding; 0 if none is copied."""
        return self.out_features[self.modules.index(self.copied[0])] if self.copied else 0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of the latents of a chunk, ``[adapted layers, rank, d + copied modules * copied_size]``."""
        width = self.latent_size + len(self.copied) * self.copied_size
        return self.num_adapted, self.rank, width

    @property
    def num_adapted(self) -> int:
        """Number of layers that get an adapter."""
        return self.num_layers - self.first_layer

    def total_rank(self, chunks: int) -> int:
        """Rank of the adapter of a text of ``chunks`` chunks."""
        return chunks * self.rank


#: Of hypernetworks that read the tokens of a text.
TokenConfig = PerceiverConfig | PointerConfig
AnyConfig = HyperNetworkConfig | TokenConfig


def config_from_json(values: Any, where: str) -> AnyConfig:
    """The configuration that ``variant`` names; ``where`` names the source in errors."""
    variant = values.get("variant") if isinstance(values, dict) else None
    kind = PointerConfig if variant == POINTER else PerceiverConfig if variant in PERCEIVERS else HyperNetworkConfig
    return from_json(kind, values, where)


def same_scaling(a: float, b: float) -> bool:
    """Whether two LoRA scalings are equal within float32 rounding."""
    return math.isclose(a, b, rel_tol=1e-6)


def resolve_scaling(scaling: str | float, lora_alpha: float, rank: int) -> float:
    """LoRA scaling as a number: "rslora" = alpha/sqrt(rank), "plain" = alpha/rank, or the given positive number."""
    if scaling == "rslora":
        return lora_alpha / math.sqrt(rank)
    if scaling == "plain":
        return lora_alpha / rank
    try:
        return positive_number("scaling", scaling)
    except ConfigError:
        expected = f"'rslora', 'plain' or a positive number in [{MIN_NUMBER}, {MAX_NUMBER}]"
        raise ConfigError(f"scaling: expected {expected}, got {short_repr(scaling)}") from None
