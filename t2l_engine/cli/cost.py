"""``t2l cost``: FLOPs, memory traffic and memory of in-context learning and of generated adapters, from configurations."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import Json, print_json, split_names
from t2l_engine.cli.cost_tables import document, render
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.folder import CONFIG_NAME, format_of, native_blocks, resolve_checkpoint, stated_encoder
from t2l_engine.research import costs
from t2l_engine.research.costs import decoder as decoders
from t2l_engine.research.costs import encoder as encoders
from t2l_engine.research.costs import known
from t2l_engine.text.config import LLMEncoderConfig, OneHotConfig

DEFAULT_MODEL, DEFAULT_ENCODER, LANGUAGE_MODEL = "mistral-7b", "gte-large", "model"
ADAPTER, ENCODER = 2, 2  # bytes per value
MAX_TOKENS, MAX_USERS, MAX_QUESTIONS = 1 << 20, 1 << 16, 10**12


class ValueType(str, enum.Enum):
    """Storage types of weights, keys and values; int4 without its scales."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8 = "float8"
    int4 = "int4"

    @property
    def itemsize(self) -> float:
        return {"float32": 4, "float8": 1, "int4": 0.5}.get(self.value, 2)


def _tokens(text: str, low: int = 0) -> Any:
    return Annotated[int, typer.Option(min=low, max=MAX_TOKENS, help=text)]


def _size(text: str, default: str) -> Any:
    return Annotated[int | None, typer.Option(min=1, help=f"{text}, without --checkpoint; default: {default}.")]


def _rate(text: str) -> Any:
    return Annotated[float | None, typer.Option(min=1e-9, max=1e9, help=f"{text}; adds roofline times at these rates.")]


def cost(
    model: Annotated[
        str,
        typer.Option(
            help=f"Language model: {', '.join(known.known_setups())}, a local transformers folder or its config.json; "
            f"default: the checkpoint's base model, else {DEFAULT_MODEL}."
        ),
    ] = "",
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", "-c", help="Bundled checkpoint name or native folder, for hypernetwork and encoder."),
    ] = "",
    encoder: Annotated[
        str,
        typer.Option(
            help=f"Text encoder: {', '.join(known.known_encoders())}, a local folder, its config.json, or "
            f"'{LANGUAGE_MODEL}' (the language model's last token); default: the checkpoint's or the known model's, "
            f"else {DEFAULT_ENCODER}."
        ),
    ] = "",
    variant: Annotated[
        str,
        typer.Option(help=f"Hypernetwork variant, without --checkpoint: L, M, S-learnable ...; default: {known.VARIANT}."),
    ] = "",
    rank: _size("Rank of the adapters", str(known.RANK)) = None,
    modules: Annotated[
        str, typer.Option(help=f"Adapted linears, without --checkpoint; default: {','.join(known.MODULES)}.")
    ] = "",
    latent_size: _size("Latent size", f"the known model's, else {known.LATENT_SIZE}") = None,
    head_in_size: _size("Width before the heads", f"the known model's, else {known.HEAD_IN_SIZE}") = None,
    questions: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions of one task.")] = 100,
    shots: _tokens("Few-shot examples in the prompt of in-context learning.") = 3,
    shot: _tokens("Tokens of one few-shot example.") = 80,
    question: _tokens("Tokens of a question with its chat template.", 1) = 59,
    answer: _tokens("Tokens of an answer.", 1) = 16,
    description: _tokens("Tokens of the task's description, in the text encoder's tokenizer.", 1) = 35,
    instruction: _tokens("Tokens of a description in the prompt of in-context learning.") = 0,
    system: _tokens("Tokens of a system prompt, the same for all tasks.") = 0,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Concurrent sequences, for memory and decode step.")] = 1,
    tasks: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Different tasks among the users.")] = 1,
    dtype: Annotated[
        ValueType | None,
        typer.Option(help="Dtype of the model's weights; int4: without scales; default: the config's, else bfloat16."),
    ] = None,
    cache_dtype: Annotated[
        ValueType | None, typer.Option(help="Dtype of keys and values; default: that of the weights, at least 16 bits.")
    ] = None,
    tflops: _rate("TFLOP/s of your device") = None,
    gbps: _rate("Memory bandwidth of your device in GB/s") = None,
    as_json: Json = False,
) -> None:
    """The cost of a question by in-context learning (ICL) and by a generated adapter (T2L), for your workload.

    FLOPs, memory traffic and memory of six ways to serve a task, with break-even points.  Computed from configurations: no
    weights are read, nothing is downloaded or measured, and answer quality is not considered.
    """
    if (tflops is None) != (gbps is None):
        raise typer.BadParameter("expected both --tflops and --gbps, or neither")
    if not all(math.isfinite(rate) for rate in (tflops or 0, gbps or 0)):
        raise typer.BadParameter("expected finite --tflops and --gbps")
    if tasks > users:
        raise typer.BadParameter(f"--tasks: expected at most as many as --users, {users}, got {tasks}")
    sizes = {
        "variant": variant, "rank": rank, "modules": tuple(split_names(modules)), "latent_size": latent_size,
        "head_in_size": head_in_size,
    }  # fmt: skip
    given = {name: value for name, value in sizes.items() if value}
    if checkpoint and given:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')}: --checkpoint gives the hypernetwork")
    load = costs.Workload(
        question=question, answer=answer, shots=shots, shot=shot, description=description, instruction=instruction,
        system=system,
    )  # fmt: skip
    setup, about = _setup(model, checkpoint, encoder, given, dtype, cache_dtype)
    rates = None if tflops is None or gbps is None else (tflops * 1e12, gbps * 1e9)
    result = about | document(setup, load, questions, users, tasks, rates)
    if as_json:
        print_json(result)
    else:
        render(result)


# --- models and checkpoints by option ------------------------------------------------------------------------------------


def _setup(
    model: str,
    checkpoint: str,
    encoder: str,
    given: Mapping[str, Any],
    dtype: ValueType | None,
    cache_dtype: ValueType | None,
) -> tuple[costs.Setup, dict[str, Any]]:
    """(setup, JSON description of its parts) for the options."""
    path, blocks = _native(checkpoint) if checkpoint else (None, {})
    model = model or blocks.get("base_model") or ("" if checkpoint else DEFAULT_MODEL)
    if not model:
        raise ValueError("--model: the checkpoint does not name one; give it here")
    name = _known("models", model)
    if name:
        decoder, stated = costs.known_setup(name).decoder, None
    else:
        decoder, stated = _decoder(model, dtype)
    weights = dtype or stated or ValueType.bfloat16
    cache = cache_dtype or (weights if weights.itemsize >= 2 else ValueType.bfloat16)
    entry = known.known_entries("models").get(name, {})
    encoder = encoder or (_encoder_of(path, blocks) if checkpoint else entry.get("encoder", DEFAULT_ENCODER))
    texts = decoder if encoder == LANGUAGE_MODEL else _encoder(encoder)
    if checkpoint:
        hypernet = from_json(HyperNetworkConfig, blocks["hypernetwork"], f"{path}: hypernetwork")
        _check(hypernet, decoder, texts, f"{path}: hypernetwork")
    else:
        hypernet = known.hypernetwork_for(decoder, texts, **(entry.get("hypernetwork", {}) | given))
    setup = costs.Setup(
        decoder, texts, hypernet, itemsize=weights.itemsize, cache_itemsize=cache.itemsize, adapter_itemsize=ADAPTER,
        encoder_itemsize=0 if encoder == LANGUAGE_MODEL else ENCODER,
    )  # fmt: skip
    about = {
        "model": {
            "name": name or model, "type": decoder.model_type, "parameters": decoder.num_parameters, "dtype": weights.value,
            "bytes": round(decoder.num_parameters * weights.itemsize), "cache_dtype": cache.value,
            "cache_bytes_per_token": setup.kv(1), "window": min(filter(None, decoder.windows), default=None),
        },
        "hypernetwork": to_json(hypernet) | {"checkpoint": checkpoint or None, "parameters": hypernet.num_parameters},
        "encoder": {
            "name": encoder, "type": texts.model_type, "parameters": texts.num_parameters,
            "bytes_per_value": setup.encoder_itemsize,
        },
        "adapter": {"values": costs.adapter_values(hypernet), "bytes": setup.adapter_bytes, "bytes_per_value": ADAPTER},
        "generator_bytes": setup.generator_bytes,
    }  # fmt: skip
    return setup, about


def _known(kind: str, name: str) -> str | None:
    """``name`` if it is known, or the known name of the Hub repository ``name``; None otherwise or for a local path."""
    entries = known.known_entries(kind)
    if name in entries or Path(name).exists():
        return name if name in entries else None
    return next((key for key, entry in entries.items() if entry["from"] == name), None)


def _local(option: str, name: str, others: list[str]) -> Path:
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"{option}: {short_repr(name)}: no such folder or file, and nothing is downloaded; "
            "expected a local folder with a "
            f"config.json, the config.json, or one of {', '.join(others)}"
        )
    return path


def _decoder(model: str, dtype: ValueType | None) -> tuple[costs.Decoder, ValueType | None]:
    """(model of a local configuration, its stated dtype); ConfigError if ``dtype`` is needed but None."""
    path = _local("--model", model, known.known_setups())
    decoder = costs.Decoder.from_config(path)
    values, where = decoders.config_values(path)
    text = values.get("text_config")
    blocks = [values, text] if isinstance(text, dict) else [values]
    if dtype is not None:
        return decoder, None
    if any(block.get("quantization_config") is not None for block in blocks):
        raise ConfigError(f"{where}: quantization_config: its weights may be of any size; give --dtype")
    stated = [block[key] for block in blocks for key in ("dtype", "torch_dtype") if block.get(key) is not None]
    if not stated:
        return decoder, None
    names = [item.value for item in ValueType if item.itemsize >= 2]
    if stated[0] not in names:
        raise ConfigError(f"{where}: dtype: expected one of {', '.join(names)}, got {short_repr(stated[0])}; give --dtype")
    return decoder, ValueType(stated[0])


def _encoder(name: str) -> costs.Encoder | costs.Decoder:
    found = _known("encoders", name)
    if found:
        return known.encoder_named(found)
    path = _local("--encoder", name, [*known.known_encoders(), LANGUAGE_MODEL])
    values, where = decoders.config_values(path)
    kind, kinds = values.get("model_type"), [*encoders.FAMILIES, *decoders.FAMILIES]
    if kind not in kinds:
        raise ConfigError(f"{where}: model_type: expected one of {', '.join(kinds)}, got {short_repr(kind)}")
    return (costs.Encoder if kind in encoders.FAMILIES else costs.Decoder).from_config(path)


def _native(name: str) -> tuple[Path, dict[str, Any]]:
    """Path and blocks of the ``config.json`` of a checkpoint in native format."""
    folder = resolve_checkpoint(name)
    if format_of(folder) == "sakana":
        raise ConfigError(f"{folder}: a checkpoint in Sakana format; convert it to the native one with 't2l convert'")
    return folder / CONFIG_NAME, native_blocks(folder)


def _encoder_of(path: Path, blocks: dict[str, Any]) -> str:
    """The ``--encoder`` that a checkpoint states; MiniLM, the package's default, if it states none."""
    config = stated_encoder(blocks, path)
    if config is None:
        return "minilm"
    if isinstance(config, OneHotConfig):
        raise ConfigError(f"{path}: encoder: it knows tasks by their names (one-hot), no description is read")
    if isinstance(config, LLMEncoderConfig):
        raise ConfigError(f"{path}: encoder: expected one vector a text, got a reader, which is not counted")
    if config.pooling == "last" and config.name == (blocks.get("base_model") or "").rstrip("/"):
        return LANGUAGE_MODEL
    return config.name


def _check(hypernet: HyperNetworkConfig, decoder: costs.Decoder, encoder: costs.Encoder | costs.Decoder, where: str) -> None:
    """ConfigError if ``hypernet`` does not fit model or encoder."""
    shapes, sizes = decoder.module_shapes, zip(hypernet.in_features, hypernet.out_features, strict=True)
    for module, shape in zip(hypernet.modules, sizes, strict=True):
        if shapes.get(module) != shape:
            of_model = f"{shapes[module][0]} to {shapes[module][1]}" if module in shapes else "no such linear"
            raise ConfigError(
                f"{where}: {module}: the model has {of_model}, the hypernetwork is for {shape[0]} to {shape[1]}"
            )
    if hypernet.num_layers != decoder.layers:
        raise ConfigError(f"{where}: num_layers: expected {decoder.layers} as the model has, got {hypernet.num_layers}")
    if hypernet.embed_dim != encoder.hidden:
        raise ConfigError(f"{where}: embed_dim: expected {encoder.hidden} as the encoder gives, got {hypernet.embed_dim}")
