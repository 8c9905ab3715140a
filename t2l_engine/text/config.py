"""Configurations of encoders, read from a checkpoint's "encoder" block or a sentence-transformers folder.

Only plain JSON values are read; nothing is executed.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, boolean, non_empty_text, one_of, positive_int, short_repr, whole_number
from t2l_engine.files.text import from_json, read_json

SAKANA_MAX_LENGTH = 8192  # tokens; SakanaAI's code truncates descriptions there
ENCODER_POOLINGS, ENCODER_DTYPES = ("cls", "mean", "last"), ("float32", "bfloat16", "float16")
#: Hidden states that a document encoder reads, and the most layers that it names.
READ_STATES, MAX_READ_LAYERS = ("all", "last", "embeddings", "layers"), 16
#: sentence-transformers' pooling -> ours.
_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """How a description becomes ``task_emb`` (paper section 3; ``embs_generator`` in SakanaAI's code).

    ``name``: ``"minilm"`` (the packaged all-MiniLM-L6-v2), ``"smollm2-135m"`` (the packaged language model), a local folder,
    or a hub name.
    ``pooling``: ``"cls"``, ``"mean"`` or ``"last"`` (last real token).
    ``max_length``: in tokens, including special ones, to which texts are truncated; at most the model's positions.
    ``full_stop``: append "." to a description that ends in a letter.
    ``template``: text with ``{text}`` that replaces the full-stop rule, or None.
    ``dtype``: "float32", "bfloat16" or "float16", of the encoder's weights; embeddings are always float32.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.

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
        non_empty_text("encoder.name", self.name)
        one_of("encoder.pooling", self.pooling, ENCODER_POOLINGS)
        one_of("encoder.dtype", self.dtype, ENCODER_DTYPES)
        positive_int("encoder.max_length", self.max_length)
        boolean("encoder.full_stop", self.full_stop)
        if self.template is not None and not (isinstance(self.template, str) and "{text}" in self.template):
            raise ConfigError(f"encoder.template: expected a string containing '{{text}}', got {short_repr(self.template)}")

    @classmethod
    def from_sentence_transformers(cls, folder: str | Path) -> EncoderConfig:
        """Pooling, length and default prompt (as ``template``) of a local sentence-transformers folder.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ConfigError: it has modules or a pooling that :class:`EncoderConfig` cannot express; the message names them.
        """
        folder = Path(folder)
        transformer, pooling = _modules(folder)
        pooling_path = pooling / "config.json"
        pooling_values = _read(pooling_path)
        template = _default_template(folder)
        if template is not None and pooling_values.get("include_prompt", True) is not True:
            raise ConfigError(f"{pooling_path}: include_prompt: a pooling that leaves the prompt out is not supported")
        values = {
            "name": str(transformer),
            "pooling": _pooling(pooling_values, pooling_path),
            "max_length": _max_length(transformer),
            "template": template,
        }
        return from_json(EncoderConfig, values, str(folder))


@dataclasses.dataclass(frozen=True)
class OneHotConfig:
    """One-hot task embeddings: ``tasks`` are the names of the training tasks, in the order of the unit vectors.

    Source: ``use_one_hot_task_emb`` of SakanaAI's code.

    Raises:
        ConfigError: ``tasks`` is not a list of distinct non-empty strings.

    >>> OneHotConfig(("antonyms", "sentiment")).tasks.index("sentiment")  # the position of the 1
    1
    """

    tasks: tuple[str, ...]
    name: str = "one-hot"

    def __post_init__(self) -> None:
        if self.name != "one-hot":
            raise ConfigError(f"encoder.name: expected 'one-hot', got {short_repr(self.name)}")
        if not isinstance(self.tasks, (list, tuple)) or not self.tasks:
            raise ConfigError(f"encoder.tasks: expected a non-empty list of task names, got {short_repr(self.tasks)}")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for task in self.tasks:
            if not isinstance(task, str) or not task:
                raise ConfigError(f"encoder.tasks: expected non-empty strings, got {short_repr(task)}")
        name, count = collections.Counter(self.tasks).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"encoder.tasks: expected distinct names, got {short_repr(name)} {count} times")


@dataclasses.dataclass(frozen=True)
class DocumentEncoderConfig:
    """How a text becomes hidden states (``ctx_encoder`` in SakanaAI's doc-to-lora).

    ``name``: of the language model that reads: ``"smollm2-135m"`` (packaged), a local folder, or a hub name.
    ``states``: ``"all"``: of the embeddings and of every layer that runs; ``"last"``: of the last layer that runs, after the
    final norm; ``"embeddings"``; ``"layers"``: those of ``layers`` side by side, each divided by its RMS.
    ``num_layers``: how many layers run; None: all but the last.  Without effect for embeddings and ``layers``.
    ``layers``: of states "layers": 0 the token embeddings, i the output of the i-th layer.
    ``max_chunk_tokens``: a longer text is cut into chunks of equal length, at most this; None: it is not cut.
    ``prefix``, ``suffix``: what surrounds every chunk; None: the model's chat template with an empty system message.
    ``dtype``: "float32", "bfloat16" or "float16", of the language model's weights.
    ``max_examples``: most worked examples beside a text; 0: it was trained on texts alone.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.

    >>> DocumentEncoderConfig("gemma-2-2b-it", states="all", max_chunk_tokens=1024).dtype
    'float32'
    """

    name: str
    states: str
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    max_chunk_tokens: int | None = None
    prefix: str | None = None
    suffix: str | None = None
    dtype: str = "float32"
    max_examples: int = 0

    def __post_init__(self) -> None:
        non_empty_text("encoder.name", self.name)
        one_of("encoder.states", self.states, READ_STATES)
        if self.states == "layers":
            of: Any = self.layers
            known = isinstance(of, (list, tuple)) and all(type(i) is int and i >= 0 for i in of)
            if not known or not 0 < len(of) <= MAX_READ_LAYERS or sorted(set(of)) != list(of):
                expected = f"1 to {MAX_READ_LAYERS} increasing numbers from 0"
                raise ConfigError(f"encoder.layers: expected {expected}, got {short_repr(of)}")
            object.__setattr__(self, "layers", tuple(of))
        elif self.layers is not None:
            raise ConfigError(f"encoder.layers: expected null with states {self.states!r}, got {short_repr(self.layers)}")
        whole_number("encoder.max_examples", self.max_examples)
        one_of("encoder.dtype", self.dtype, ENCODER_DTYPES)
        for name in ("num_layers", "max_chunk_tokens"):
            if getattr(self, name) is not None:
                positive_int(f"encoder.{name}", getattr(self, name))
        for name in ("prefix", "suffix"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"encoder.{name}: expected a string or null, got {short_repr(getattr(self, name))}")
        if (self.prefix is None) != (self.suffix is None):
            raise ConfigError("encoder.prefix, encoder.suffix: expected both or neither")


AnyEncoderConfig = EncoderConfig | OneHotConfig | DocumentEncoderConfig


def encoder_config_from_json(block: Any, where: str) -> AnyEncoderConfig:
    """The configuration in the "encoder" block of a checkpoint.

    A OneHotConfig if its name is "one-hot", a DocumentEncoderConfig if it has states, else an EncoderConfig.

    ``where`` names the source in errors.  Raises ConfigError for a block that is none of them.
    """
    kind = EncoderConfig
    if isinstance(block, dict) and block.get("name") == OneHotConfig.name:
        kind = OneHotConfig
    elif isinstance(block, dict) and "states" in block:
        kind = DocumentEncoderConfig
    return from_json(kind, block, where)


def _read(path: Path, kind: type = dict) -> Any:
    """The JSON object (or, by ``kind``, list) in ``path``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    values = read_json(path)
    if not isinstance(values, kind):
        raise ConfigError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got {type(values).__name__}")
    return values


def _modules(folder: Path) -> tuple[Path, Path]:
    """Folders of the Transformer and the Pooling module; modules other than these and Normalize are refused."""
    path = folder / "modules.json"
    found: list[tuple[str, Path]] = []
    for entry in _read(path, list):
        kind, where = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(where, str) or not where.isprintable():
            raise ConfigError(f"{path}: expected objects with strings 'type' and 'path', got {short_repr(entry)}")
        package, _, name = kind.partition(".")
        name = name.rpartition(".")[2]
        if package != "sentence_transformers" or name not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(f"{path}: module {short_repr(kind)}: expected Transformer, Pooling and perhaps Normalize")
        target = folder / where
        try:
            inside = target.resolve().is_relative_to(folder.resolve())
            target.stat()
        except FileNotFoundError:
            pass  # reported when the folder is read
        except (OSError, RuntimeError):  # a name that is too long, or a loop of links
            inside = False
        if not inside:
            raise ConfigError(f"{path}: path {short_repr(where)}: expected a folder inside {folder}")
        found.append((name, target))
    names = [name for name, _ in found]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ConfigError(
            f"{path}: expected Transformer, Pooling and perhaps Normalize, in this order, got {short_repr(names)}"
        )
    return found[0][1], found[1][1]


def _pooling(values: dict[str, Any], path: Path) -> str:
    if "pooling_mode" in values:
        mode = values["pooling_mode"]
        modes = [mode] if isinstance(mode, str) else mode
    else:  # older files have flags such as pooling_mode_cls_token and pooling_mode_mean_tokens
        flags = [key.removeprefix("pooling_mode_") for key, on in values.items() if key.startswith("pooling_mode_") and on]
        modes = [flag.removesuffix("s").removesuffix("_token") for flag in flags]
    if not isinstance(modes, list) or len(modes) != 1 or not isinstance(modes[0], str):
        raise ConfigError(f"{path}: expected one pooling mode, got {short_repr(modes)}")
    if modes[0] not in _POOLINGS:
        raise ConfigError(f"{path}: pooling {short_repr(modes[0])} is not supported; expected one of {sorted(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _max_length(folder: Path) -> Any:
    """``max_seq_length``; if unset, as in sentence-transformers, the smaller limit of model and tokenizer."""
    # Old folders name the file after the model, such as sentence_roberta_config.json.
    for path in sorted(folder.glob("sentence_*_config.json")):
        values = _read(path)
        if values.get("do_lower_case"):
            raise ConfigError(f"{path}: do_lower_case: expected false; lower-casing before the tokenizer is not supported")
        if values.get("max_seq_length") is not None:
            return values["max_seq_length"]
    limits = [_read(folder / "config.json").get("max_position_embeddings")]
    if (folder / "tokenizer_config.json").is_file():
        limits.append(_read(folder / "tokenizer_config.json").get("model_max_length"))
    limits = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool)]
    if not limits:
        raise ConfigError(f"{folder}: neither max_seq_length nor a limit of the model or tokenizer is stated")
    return min(limits)


def _default_template(folder: Path) -> str | None:
    """The folder's default prompt as a template, None if it has none."""
    path = folder / "config_sentence_transformers.json"
    values = _read(path) if path.is_file() else {}
    name = values.get("default_prompt_name")
    if name is None:
        return None
    prompts = values.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str) or "{text}" in prompt:
        raise ConfigError(
            f"{path}: default_prompt_name: expected the name of a prompt, got {short_repr(name)}: {short_repr(prompt)}"
        )
    return prompt + "{text}" if prompt else None
