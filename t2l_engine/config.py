"""Frozen configuration records with a strict JSON form.

Every record is a frozen dataclass.  ``to_json`` gives plain JSON values; ``from_json`` accepts exactly the fields of the
record: an unknown or a missing field is a ``ConfigError`` that names it.  Nothing in a file is ever executed.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from t2l_engine.module_paths import DEFAULT_PATHS, LAYER, path_fault

T = TypeVar("T")

#: L: one head output holds A and B.  M: a shared head, a row for each side.  S: a row for each side and rank.
#: autoregressive: unshared heads, a row for each rank.  "learnable" and "rotary" say how a rank enters.
VARIANTS = ("L", "M", "S-learnable", "S-rotary", "autoregressive-learnable", "autoregressive-rotary")
TASK_ENCODERS = ("linear", "vq", "softmax", "discrete")
ENCODER_POOLINGS, ENCODER_DTYPES = ("cls", "mean", "last"), ("float32", "bfloat16", "float16")
#: Codes of the vq and softmax encoders; classes and hidden width of the discrete one (fixed in the reference).
NUM_CODES, NUM_CLASSES, DISCRETE_HIDDEN = 32, 64, 256
#: Bounds on what a file may ask for, so that refusing it costs little.
MAX_CONFIG_BYTES, MAX_MODULES, MAX_NAME, MAX_SIZE, MAX_RANK, MAX_LAYERS = 1 << 20, 64, 64, 1 << 31, 1 << 16, 4096
#: Bounds of scalings and what they are made of: float32 holds them, their ratios and their products.
MIN_NUMBER, MAX_NUMBER = 1e-9, 1e9


class ConfigError(ValueError):
    """A configuration or checkpoint file says something that cannot be used; the message names the field.

    >>> EncoderConfig(name="minilm", pooling="max")
    Traceback (most recent call last):
    t2l_engine.config.ConfigError: encoder.pooling: expected one of ('cls', 'mean', 'last'), got 'max'
    """


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 16
_repr.maxlevel, MAX_SHOWN = 3, 400  # 16 texts, and 16 of those, are too long for a message


def shown(value: Any) -> str:
    """``repr`` of a value out of a file, cut to MAX_SHOWN characters."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"<{type(value).__name__} too large to print>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


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
            raise ConfigError(f"{where}: unknown field {shown(key)}; expected some of {sorted(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: missing field {name!r}")
    try:
        return cls(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def read_start(path: Path, count: int, error: type[ValueError]) -> bytes:
    """At most the first ``count`` bytes of ``path``; ``error`` names a file that cannot be read.

    Raises FileNotFoundError where there is none.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None


def read_text(path: Path, most: int = MAX_CONFIG_BYTES) -> str:
    """The UTF-8 text of a file of up to ``most`` bytes; a ``ConfigError`` names one that is larger, no text or unreadable.

    Raises FileNotFoundError where there is none.
    """
    content = read_start(path, most + 1, ConfigError)  # not the size it states: some files have none
    if len(content) > most:
        raise ConfigError(f"{path}: expected a configuration of at most {most} bytes, got more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of JSON that refuses doubled keys: which one counts would be a guess."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def read_json(path: Path) -> Any:
    """Parse the JSON file ``path``; a ``ConfigError`` names the file when it is no JSON, or is too large or too deep."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """As :func:`read_json`, of the text of ``path``."""
    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float; ConfigError names it unless it is a number from MIN_NUMBER to MAX_NUMBER."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not MIN_NUMBER <= value <= MAX_NUMBER:
        raise ConfigError(f"{name}: expected a positive number in [{MIN_NUMBER}, {MAX_NUMBER}], got {shown(value)}")
    return float(value)


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
        raise ConfigError(f"{name}: expected a positive integer below 2^31, got {shown(value)}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """How a description becomes ``task_emb`` (paper section 3; the reference's ``embs_generator``).

    ``name``: ``"minilm"`` (the packaged all-MiniLM-L6-v2), ``"smollm2-135m"`` (the packaged language model), a local folder,
    or a hub name.
    ``pooling``: ``"cls"``, ``"mean"`` or ``"last"`` (last real token).
    ``max_length``: tokens, special ones included, beyond which a text's end is cut; the model's positions, where fewer.
    ``full_stop``: append "." to a description that ends in a letter.
    ``template``: text with ``{text}`` that replaces the full-stop rule, or None.
    ``dtype``: "float32", "bfloat16" or "float16", of the encoder's weights; embeddings are float32 always.

    Raises:
        ConfigError: a field is of another kind or out of range; the message names it.

    >>> EncoderConfig(name="Alibaba-NLP/gte-large-en-v1.5", pooling="cls", max_length=8192).dtype
    'float32'
    """

    name: str
    pooling: str
    max_length: int = 512
    full_stop: bool = True
    template: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"encoder.name: expected a non-empty string, got {shown(self.name)}")
        for name, allowed in (("pooling", ENCODER_POOLINGS), ("dtype", ENCODER_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"encoder.{name}: expected one of {allowed}, got {shown(getattr(self, name))}")
        _positive_int("encoder.max_length", self.max_length)
        if not isinstance(self.full_stop, bool):
            raise ConfigError(f"encoder.full_stop: expected true or false, got {shown(self.full_stop)}")
        if self.template is not None and not (isinstance(self.template, str) and "{text}" in self.template):
            raise ConfigError(f"encoder.template: expected a string containing '{{text}}', got {shown(self.template)}")

    @classmethod
    def from_sentence_transformers(cls, folder: str | Path) -> EncoderConfig:
        """What a local sentence-transformers folder says: its pooling, length and default prompt (as ``template``).

        Raises:
            FileNotFoundError: the folder lacks a file.
            ConfigError: it holds other modules or another pooling than an :class:`EncoderConfig` can say; named.
        """
        from t2l_engine.encoder_config import read_sentence_transformers

        return read_sentence_transformers(Path(folder))


@dataclasses.dataclass(frozen=True)
class OneHotConfig:
    """Task embeddings that are unit vectors, one a training task: ``tasks`` in the order of the vectors.

    Source: ``use_one_hot_task_emb`` of the reference implementation.

    Raises:
        ConfigError: ``tasks`` is no list of distinct non-empty strings.

    >>> OneHotConfig(("antonyms", "sentiment")).tasks.index("sentiment")  # the position of the 1
    1
    """

    tasks: tuple[str, ...]
    name: str = "one-hot"

    def __post_init__(self) -> None:
        if self.name != "one-hot":
            raise ConfigError(f"encoder.name: expected 'one-hot', got {shown(self.name)}")
        if not isinstance(self.tasks, (list, tuple)) or not self.tasks:
            raise ConfigError(f"encoder.tasks: expected a non-empty list of task names, got {shown(self.tasks)}")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for task in self.tasks:
            if not isinstance(task, str) or not task:
                raise ConfigError(f"encoder.tasks: expected non-empty strings, got {shown(task)}")
        name, count = collections.Counter(self.tasks).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"encoder.tasks: expected distinct names, got {shown(name)} {count} times")


@dataclasses.dataclass(frozen=True)
class HyperNetworkConfig:
    """Everything structural about a hypernetwork.

    ``modules``: adapted modules in row order of the module embedding; ``in_features``/``out_features`` are parallel to it.
    ``latent_size`` (the trunk width m is ``latent_size//2 + 2*(latent_size//4)``) and ``head_in_size`` as in the paper's
    appendix; ``embed_dim`` is the width of ``task_emb``.  ``lora_alpha`` with ``scaling`` gives the LoRA scaling:
    ``"rslora"`` = alpha/sqrt(rank), ``"plain"`` = alpha/rank, or a positive number.
    ``head_bias``: whether the heads have one.  ``output_scale`` multiplies every generated A and B (1/sqrt(10000) for
    checkpoints that reconstruct weight differences).  ``task_encoder``: "linear", "vq", "softmax" or "discrete"; discrete
    needs ``latent_size // 2 == 64`` and has one-hot depth and module inputs, so m = 64 + layers + modules.
    ``paths``: where each module lives in the base model, ``{layer}`` standing for the layer index; None: where Llama and
    its kin keep it (``q_proj`` at ``model.layers.{layer}.self_attn.q_proj``), for which the name must be one of theirs.
    Generated adapters call a module with a path of its own after the end of that path, as those read from files.

    Source: paper section 3 and its appendix; arguments of the reference implementation.

    Raises:
        ConfigError: a field is of another kind or out of range; the message names it.

    >>> config = HyperNetworkConfig(variant="L", modules=("q_proj", "v_proj"), in_features=(4096, 4096),
    ...     out_features=(4096, 1024), num_layers=32, rank=8, embed_dim=1024, latent_size=128, head_in_size=512,
    ...     lora_alpha=16)
    >>> config.width, config.head_rows(1), config.num_parameters
    (128, 40960, 55424000)
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
    task_encoder: str = "linear"
    paths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("modules", "in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_MODULES:
                raise ConfigError(f"{name}: expected a list of 1 to {MAX_MODULES} entries, got {shown(value)}")
            object.__setattr__(self, name, tuple(value))
        for name, allowed in (("variant", VARIANTS), ("task_encoder", TASK_ENCODERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: expected one of {allowed}, got {shown(getattr(self, name))}")
        for name in self.modules:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > MAX_NAME:
                raise ConfigError(f"modules: expected plain module names such as 'q_proj', got {shown(name)}")
        if len(set(self.modules)) != len(self.modules):
            raise ConfigError(f"modules: expected distinct names, got {shown(list(self.modules))}")
        self._check_paths()
        for name in ("in_features", "out_features"):
            if len(getattr(self, name)) != len(self.modules):
                raise ConfigError(
                    f"{name}: expected {len(self.modules)} values, one a module, got {len(getattr(self, name))}"
                )
            for value in getattr(self, name):
                _positive_int(name, value)
        for name in ("num_layers", "rank", "embed_dim", "latent_size", "head_in_size"):
            _positive_int(name, getattr(self, name))
        for name, most in (("rank", MAX_RANK), ("num_layers", MAX_LAYERS)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name}: expected at most {most}, got {shown(getattr(self, name))}")
        if self.latent_size < 4:
            raise ConfigError(f"latent_size: expected at least 4, got {self.latent_size}")
        if self.task_encoder == "discrete" and self.task_width != NUM_CLASSES:
            raise ConfigError(f"latent_size: expected 128 or 129 with the discrete task encoder, got {self.latent_size}")
        if self.variant.endswith("rotary") and self.width % 2:
            raise ConfigError(f"latent_size: expected an even trunk width for {self.variant}, got width {self.width}")
        for name in ("lora_alpha", "output_scale"):
            positive_number(name, getattr(self, name))
        if not isinstance(self.head_bias, bool):
            raise ConfigError(f"head_bias: expected true or false, got {shown(self.head_bias)}")
        resolve_scaling(self.scaling, self.lora_alpha, self.rank)

    def _check_paths(self) -> None:
        if self.paths is None:
            unknown = [name for name in self.modules if name not in DEFAULT_PATHS]
            if unknown:
                raise ConfigError(
                    f"paths: expected where the modules live in the base model, since {shown(unknown)} are none of "
                    f"{sorted(DEFAULT_PATHS)}"
                )
            return
        if not isinstance(self.paths, (list, tuple)) or not all(isinstance(path, str) for path in self.paths):
            raise ConfigError(f"paths: expected a list of strings or null, got {shown(self.paths)}")
        object.__setattr__(self, "paths", tuple(self.paths))
        if len(self.paths) != len(self.modules) or len(set(self.paths)) != len(self.paths):
            raise ConfigError(f"paths: expected {len(self.modules)} different ones, one a module, got {shown(self.paths)}")
        for path in self.paths:
            fault = path_fault(path)
            if fault is None and (LAYER not in path and self.num_layers != 1):
                fault = f"expected {LAYER} in it"
            if fault is not None:
                raise ConfigError(f"paths: {shown(path)}: {fault}")

    @property
    def module_paths(self) -> dict[str, str]:
        """Module -> where it lives in the base model."""
        return dict(zip(self.modules, self.paths or map(DEFAULT_PATHS.get, self.modules), strict=True))

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
        """Latent rows a layer and module for the two sides A and B: 2 with a shared head (M, S), else 1."""
        return 2 if self.variant.startswith(("M", "S")) else 1

    @property
    def num_ranks(self) -> int:
        """Latent rows a side: one for every rank in S and in the autoregressive variants, else 1."""
        return 1 if self.variant in ("L", "M") else self.rank

    @property
    def rotary(self) -> bool:
        """Whether a rank enters by rotation (else by a learned embedding, where it enters at all)."""
        return self.variant.endswith("rotary")

    def head_rows(self, module_index: int) -> int:
        """Rows of the head of module ``module_index``."""
        n_in, n_out = self.in_features[module_index], self.out_features[module_index]
        per_latent = self.rank // self.num_ranks
        return per_latent * (max(n_in, n_out) if self.num_sides == 2 else n_in + n_out)

    @property
    def num_parameters(self) -> int:
        """Values of a hypernetwork of this configuration, offsets of the last step not counted."""
        e, t, m, h = self.embed_dim, self.task_width, self.width, self.head_in_size
        k = len(self.modules)
        encoder = {
            "linear": (e + 1) * t + 2 * t,
            "vq": (e + 1) * 4 * t + (4 * t + 1) * t + (2 * t + 1) * NUM_CODES + 2 * t,
            "softmax": (e + 1) * 4 * t + (4 * t + 1) * NUM_CODES + NUM_CODES * t + 2 * t,
            "discrete": (e + 1) * DISCRETE_HIDDEN + (DISCRETE_HIDDEN + 1) * NUM_CLASSES,
        }[self.task_encoder]
        embeddings = 0
        if self.task_encoder != "discrete":
            embeddings = (self.num_layers + 2) * self.depth_width + (k + 2) * self.module_width
        if self.num_sides == 2:
            embeddings += (2 * k + 2) * m
        if self.variant.endswith("learnable"):
            embeddings += (self.rank + 2) * m
        hidden = (m + 1) * 4 * m
        trunk = 3 * (hidden + (4 * m + 1) * m) + hidden + (4 * m + 1) * h + 6 * m
        heads = sum(self.head_rows(i) for i in range(k)) * (h + self.head_bias)
        return encoder + embeddings + trunk + heads


def resolve_scaling(scaling: str | float, lora_alpha: float, rank: int) -> float:
    """LoRA scaling as a number: "rslora" = alpha/sqrt(rank), "plain" = alpha/rank, or a positive number as it is."""
    if scaling == "rslora":
        return lora_alpha / math.sqrt(rank)
    if scaling == "plain":
        return lora_alpha / rank
    try:
        return positive_number("scaling", scaling)
    except ConfigError:
        expected = f"'rslora', 'plain' or a positive number in [{MIN_NUMBER}, {MAX_NUMBER}]"
        raise ConfigError(f"scaling: expected {expected}, got {shown(scaling)}") from None
