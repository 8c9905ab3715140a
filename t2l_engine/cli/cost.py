"""``t2l cost``: FLOPs, memory traffic and memory of in-context learning and of generated adapters, from configurations."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import Json, console, print_json, split_names
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.folder import CONFIG_NAME, format_of, native_blocks, resolve_checkpoint, stated_encoder
from t2l_engine.research import costs
from t2l_engine.research.costs.known import SIZES
from t2l_engine.text.config import LLMEncoderConfig, OneHotConfig

DEFAULT_MODEL, DEFAULT_ENCODER, LANGUAGE_MODEL = "mistral-7b", "gte-large", "model"
ENCODERS, MODELS = (", ".join(costs.known_entries(kind)) for kind in ("encoders", "models"))
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1, "int4": 0.5}
ADAPTER, ENCODER = 2, 2  # bytes per value
MAX_TOKENS, MAX_USERS, MAX_QUESTIONS, MAX_SHOTS = 1 << 20, 1 << 16, 10**12, 1024
RIVALS = ("icl", "icl-cold", "icl-warm")
#: Pairs (way, rival) with a stated break-even number of questions.
PAIRS = (
    *(("t2l-task", rival) for rival in RIVALS),
    *(("t2l-request", rival) for rival in ("icl", "icl-warm")),
    ("t2l-merged", "t2l-task"),
)
ValueType = enum.Enum("ValueType", {name: name for name in ITEMSIZES}, type=str)


def _tokens(text: str, low: int = 0) -> Any:
    return Annotated[int, typer.Option(min=low, max=MAX_TOKENS, help=text)]


def _size(text: str, field: str) -> Any:
    default = f"the known model's, else {SIZES[field]}" if field.endswith("size") else SIZES[field]
    return Annotated[int | None, typer.Option(min=1, help=f"{text}, without --checkpoint; default: {default}.")]


def _rate(text: str) -> Any:
    return Annotated[float | None, typer.Option(min=1e-9, max=1e9, help=f"{text}; adds roofline times at these rates.")]


def _number(text: str, high: int) -> Any:
    return Annotated[int, typer.Option(min=1, max=high, help=text)]


def _text(text: str, *names: str) -> Any:
    return Annotated[str, typer.Option(*names, help=text)]


def _dtype(text: str) -> Any:
    return Annotated[ValueType | None, typer.Option(help=text)]


def cost(
    model: _text(
        f"Language model: {MODELS}, a local transformers folder or its config.json; default: the checkpoint's base model, "
        f"else {DEFAULT_MODEL}."
    ) = "",
    checkpoint: _text("Bundled checkpoint name or folder, for hypernetwork and encoder.", "--checkpoint", "-c") = "",
    encoder: _text(
        f"Text encoder: {ENCODERS}, a local folder, its config.json, or '{LANGUAGE_MODEL}' (the language model's last "
        f"token); default: the checkpoint's or the known model's, else {DEFAULT_ENCODER}."
    ) = "",
    variant: _text(f"Hypernetwork variant, without --checkpoint: L, M, S-learnable ...; default: {SIZES['variant']}.") = "",
    rank: _size("Rank of the adapters", "rank") = None,
    modules: _text(f"Adapted linears, without --checkpoint; default: {','.join(SIZES['modules'])}.") = "",
    latent_size: _size("Latent size", "latent_size") = None,
    head_in_size: _size("Width before the heads", "head_in_size") = None,
    questions: _number("Questions of one task.", MAX_QUESTIONS) = 100,
    shots: _tokens("Few-shot examples in the prompt of in-context learning.") = 3,
    shot: _tokens("Tokens of one few-shot example.") = 80,
    question: _tokens("Tokens of a question with its chat template.", 1) = 59,
    answer: _tokens("Tokens of an answer.", 1) = 16,
    description: _tokens("Tokens of the task's description, in the text encoder's tokenizer.", 1) = 35,
    instruction: _tokens("Tokens of a description in the prompt of in-context learning.") = 0,
    system: _tokens("Tokens of a system prompt, the same for all tasks.") = 0,
    users: _number("Concurrent sequences, for memory and decode step.", MAX_USERS) = 1,
    tasks: _number("Different tasks among the users.", MAX_USERS) = 1,
    dtype: _dtype("Dtype of the model's weights; int4: without scales; default: the config's, else bfloat16.") = None,
    cache_dtype: _dtype("Dtype of keys and values; default: that of the weights, at least 16 bits.") = None,
    tflops: _rate("TFLOP/s of your device") = None,
    gbps: _rate("Memory bandwidth of your device in GB/s") = None,
    as_json: Json = False,
) -> None:
    """The cost of a question by in-context learning (ICL) and by a generated adapter (T2L), for your workload.

    FLOPs, memory traffic and memory of six ways to serve a task, with break-even points.  Computed from configurations: no
    weights are read, nothing is downloaded or measured, and answer quality is not considered.
    """
    if (tflops is None) != (gbps is None) or not math.isfinite((tflops or 0) + (gbps or 0)):
        raise typer.BadParameter("expected both --tflops and --gbps, finite, or neither")
    if tasks > users:
        raise typer.BadParameter(f"--tasks: expected at most as many as --users, {users}, got {tasks}")
    names = tuple(split_names(modules))
    sizes = dict(zip(SIZES, (variant, names, rank, latent_size, head_in_size), strict=True))
    sizes = {name: value for name, value in sizes.items() if value}
    if checkpoint and sizes:
        raise typer.BadParameter(f"--{next(iter(sizes)).replace('_', '-')}: --checkpoint gives the hypernetwork")
    load = costs.Workload(question, answer, shots, shot, description, instruction, system)
    setup, about = _setup(model, checkpoint, encoder, sizes, dtype and dtype.value, cache_dtype and cache_dtype.value)
    rates = None if tflops is None or gbps is None else (tflops * 1e12, gbps * 1e9)
    result = about | document(setup, load, questions, users, tasks, rates)
    if as_json:
        print_json(result)
    else:
        render(result)


# --- models and checkpoints by option --------------------------------------------------------------------------------


def _setup(
    model: str, checkpoint: str, encoder: str, sizes: Mapping[str, Any], dtype: str | None, cache_dtype: str | None
) -> tuple[costs.Setup, dict[str, Any]]:
    """(setup, JSON description of its parts) for the options."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # keeps stderr for our own messages
    blocks, path = {}, Path(CONFIG_NAME)
    if checkpoint:
        folder = resolve_checkpoint(checkpoint)
        if format_of(folder) != "native":
            raise ConfigError(f"{folder}: a checkpoint in Sakana format; convert it to the native one with 't2l convert'")
        path, blocks = folder / CONFIG_NAME, native_blocks(folder)
    model = model or blocks.get("base_model") or ("" if checkpoint else DEFAULT_MODEL)
    if not model:
        raise ValueError("--model: the checkpoint does not name one; give it here")
    name, path_of_model = _known("models", "--model", model, MODELS)
    entry = {} if path_of_model else costs.known_entries("models")[name]
    counted = costs.count(path_of_model) if path_of_model else costs.known_model(name)
    dtype = dtype or (path_of_model and _stated_dtype(path_of_model)) or "bfloat16"
    cache_dtype = cache_dtype or (dtype if ITEMSIZES[dtype] >= 2 else "bfloat16")
    encoder = encoder or (_encoder_of(path, blocks) if checkpoint else entry.get("encoder", DEFAULT_ENCODER))
    itself = encoder == LANGUAGE_MODEL
    texts = counted if itself else _encoder(encoder)
    if checkpoint:
        hypernet = from_json(HyperNetworkConfig, blocks["hypernetwork"], f"{path}: hypernetwork")
        _check(hypernet, counted, texts, f"{path}: hypernetwork")
    else:
        hypernet = costs.hypernetwork_for(counted, texts, **(entry.get("hypernetwork", {}) | sizes))
    itemsizes = ITEMSIZES[dtype], ITEMSIZES[cache_dtype], ADAPTER, 0 if itself else ENCODER
    setup = costs.Setup(counted, texts, hypernet, *itemsizes)
    about = {
        "model": {
            "name": name, "type": counted.model_type, "parameters": counted.parameters, "dtype": dtype,
            "bytes": round(counted.parameters * setup.itemsize), "cache_dtype": cache_dtype,
            "cache_bytes_per_token": setup.kv(1),
            "window": min((layer.window for layer in counted.attention if layer.window), default=None),
        },
        "hypernetwork": to_json(hypernet) | {"checkpoint": checkpoint or None, "parameters": hypernet.num_parameters},
        "encoder": {
            "name": encoder, "type": texts.model_type, "parameters": texts.parameters,
            "bytes_per_value": setup.encoder_itemsize,
        },
        "adapter": {
            "values": costs.adapter_values(hypernet), "bytes": setup.adapter_bytes, "bytes_per_value": ADAPTER,
        },
        "generator_bytes": setup.generator_bytes,
    }  # fmt: skip
    return setup, about


def _known(kind: str, option: str, name: str, choices: str) -> tuple[str, Path | None]:
    """(name, path of its configuration); of what is known, by its name or its name on the Hub: (name, None)."""
    path, entries = Path(name), costs.known_entries(kind)
    by_hub = {entry["from"]: known for known, entry in entries.items()}
    if name in entries:
        return name, None
    if path.exists():
        return name, path
    if name in by_hub:
        return by_hub[name], None
    raise FileNotFoundError(
        f"{option}: {short_repr(name)}: no such folder or file, and nothing is downloaded; expected a local folder with a "
        f"config.json, the config.json, or one of {choices}"
    )


def _encoder(name: str) -> costs.Model:
    known, path = _known("encoders", "--encoder", name, f"{ENCODERS}, {LANGUAGE_MODEL}")
    return costs.count(path, head=False) if path else costs.known_encoder(known)


def _stated_dtype(config: Path) -> str | None:
    """ConfigError if the configuration states a dtype that is not one of :data:`ITEMSIZES`, or is of quantized weights."""
    values, where = costs.config_values(config)
    if values.get("quantization_config") is not None:
        raise ConfigError(f"{where}: quantization_config: its weights may be of any size; give --dtype")
    stated = values.get("dtype") or values.get("torch_dtype")
    names = [name for name, size in ITEMSIZES.items() if size >= 2]
    if stated is not None and stated not in names:
        raise ConfigError(f"{where}: dtype: expected one of {', '.join(names)}, got {short_repr(stated)}; give --dtype")
    return stated


def _encoder_of(path: Path, blocks: dict[str, Any]) -> str:
    """The ``--encoder`` that a checkpoint states; MiniLM, the package's default, if it states none."""
    config = stated_encoder(blocks, path)
    if config is None:
        return "minilm"
    if isinstance(config, OneHotConfig):
        raise ConfigError(f"{path}: encoder: it knows tasks by their names (one-hot), no description is read")
    if isinstance(config, LLMEncoderConfig):
        raise ConfigError(f"{path}: encoder: an LLM encoder with attention pooling is not counted; give --encoder")
    itself = config.pooling == "last" and config.name == (blocks.get("base_model") or "").rstrip("/")
    return LANGUAGE_MODEL if itself else config.name


def _check(hypernet: HyperNetworkConfig, model: costs.Model, encoder: costs.Model, where: str) -> None:
    """ConfigError if ``hypernet`` does not fit model or encoder."""
    for module, *shape in zip(hypernet.modules, hypernet.in_features, hypernet.out_features, strict=True):
        found = model.linears.get(module)
        if found != tuple(shape):
            of_model = f"{found[0]} to {found[1]}" if found else "no such linear in every layer"
            raise ConfigError(
                f"{where}: {module}: the model has {of_model}, the hypernetwork is for {shape[0]} to {shape[1]}"
            )
    for field, expected, of in (("num_layers", model.layers, "model"), ("embed_dim", encoder.hidden, "encoder")):
        if getattr(hypernet, field) != expected:
            got = getattr(hypernet, field)
            raise ConfigError(f"{where}: {field}: expected {expected} as the {of} has, got {got}")


# --- the result ------------------------------------------------------------------------------------------------------


def document(
    setup: costs.Setup, load: costs.Workload, questions: int, users: int, tasks: int, rates: tuple[float, float] | None
) -> dict[str, Any]:
    """All results as JSON values; ``rates``: FLOP/s and bytes/s; None: no times."""
    made = costs.ways(setup, load)
    kept = made["t2l-task"]

    def seconds(request: costs.Request) -> float:
        return request.seconds(*rates)

    def won(measure: Callable[[costs.Request], float]) -> list[dict[str, Any]]:
        pairs = {(a, b): costs.questions_won(made[a], made[b], measure) for a, b in PAIRS}
        return [{"way": a, "rival": b, "questions": found and list(found)} for (a, b), found in pairs.items()]

    def way(w: costs.Way) -> dict[str, Any]:
        times = rates and {
            "first_token": w.first.seconds(*rates, first_token=True), "first_question": seconds(w.first),
            "later_question": seconds(w.later), "questions": w.total(questions, seconds),
        }  # fmt: skip
        return {
            "what": costs.WAYS[w.name],
            "flop_to_first_token": w.first.flops(first_token=True),
            "flop_first_question": w.first.flops(),
            "flop_later_question": w.later.flops(),
            "flop_questions": w.total(questions),
            "ratio": w.total(questions) / kept.total(questions),
            "decode_step_bytes": w.step_bytes(setup, users, tasks),
            "memory_bytes": w.memory(users, tasks),
            "least_seconds": times,
            "first": [dataclasses.asdict(phase) for phase in w.first.phases],
            "later": [dataclasses.asdict(phase) for phase in w.later.phases],
        }

    shots = {r: costs.shots_to_win(setup, load, "t2l-task", r, questions=questions, limit=MAX_SHOTS) for r in RIVALS}
    return {
        "workload": dataclasses.asdict(load), "questions": questions, "users": users, "tasks": tasks,
        "rates": rates and {"flops_per_second": rates[0], "bytes_per_second": rates[1]},
        "ways": {name: way(w) for name, w in made.items()},
        "questions_won": won(costs.Request.flops),
        "questions_won_in_least_time": rates and won(seconds),
        "shots_to_win": shots,
        "tasks_to_win": {r: costs.tasks_to_win(kept, made[r], Fraction(users, tasks)) for r in RIVALS},
        "tokens_of_adapter": costs.tokens_of_adapter(setup),
    }  # fmt: skip


def amount(value: float, unit: str) -> str:
    """``value`` with three significant digits and a prefix of its unit.

    >>> amount(6815744, "B"), amount(999.9e6, "B"), amount(0.0457, "s"), amount(12, "B")
    ('6.82 MB', '1.00 GB', '45.7 ms', '12.0 B')
    """
    exponent = min(6, max(-3, math.floor(math.log10(float(f"{value:.3g}")) / 3))) if value else 0
    digits = f"{float(f'{value / 1000**exponent:.3g}'):#.3g}".rstrip(".")
    return f"{digits} {'num kMGTPE'[exponent + 3].strip()}{unit}"


def render(about: Mapping[str, Any]) -> None:
    """Print the setup, a table of the ways, and break-even points."""
    from rich.table import Table

    screen, ways, timed = console(), about["ways"].values(), bool(about["rates"])
    facts = Table.grid(padding=(0, 2))
    for fact in _facts(about):
        facts.add_row(*fact)
    number = f"{about['questions']:,}\nquestions"
    heads = ["to the\nfirst token", "later\nquestion", number, "beside T2L\nper task", "decode\nstep reads"]
    table = Table("FLOP", *heads, "memory beside\nthe weights")
    times = Table("roofline time", heads[0], "first\nquestion", heads[1], number)
    for label, way in zip(costs.LABELS.values(), ways, strict=True):
        flops = (amount(way[f"flop_{of}"], "") for of in ("to_first_token", "later_question", "questions"))
        held = (amount(way[of], "B") for of in ("decode_step_bytes", "memory_bytes"))
        table.add_row(label, *flops, f"{way['ratio']:.3g}", *held)
        times.add_row(label, *(amount(of, "s") for of in (way["least_seconds"] or {}).values()))
    for column in (*table.columns[1:], *times.columns[1:]):
        column.justify = "right"
    screen.print(facts, "", table)
    screen.print(
        "First token: of a task's first question; filling a warm cache before it is not counted.\n"
        "Later question, questions: prompts and answers.\n"
        f"Decode step and memory: at {about['users']:,} users with {about['tasks']:,} tasks.\n"
    )
    if timed:
        screen.print(times, "One question at a time, computed from the rates, not measured.\n")
    even = Table("break-even", "FLOP", *["roofline time"] * timed)
    for name, *found in _break_even(about):
        even.add_row(name, *found)
    screen.print(even)
    users, shot = about["users"] / about["tasks"], about["workload"]["shot"]
    screen.print(f"Shots of {shot:,} tokens; {users:.3g} users a task; computed, and answer quality is not considered.")


def _facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, net, encoder, load = about["model"], about["hypernetwork"], about["encoder"], about["workload"]
    window = f", windows of {model['window']:,} tokens" if model["window"] else ""
    origin = f" of {_printable(net['checkpoint'])}" if net["checkpoint"] else ""
    yield "language model", f"{_printable(model['name'])}, {amount(model['parameters'], '')} parameters, {model['dtype']}"
    yield "keys and values", f"{model['cache_dtype']}, {amount(model['cache_bytes_per_token'], 'B')} a token{window}"
    yield "hypernetwork", f"{net['variant']}{origin}, {amount(net['parameters'], '')} parameters"
    yield "adapter", f"rank {net['rank']} on {', '.join(net['modules'])}, {amount(about['adapter']['bytes'], 'B')}"
    own = encoder["bytes_per_value"]
    name = f"{_printable(encoder['name'])}, {amount(encoder['parameters'], '')} parameters"
    yield "text encoder", name if own else "the language model itself"
    yield "tokens", ", ".join(f"{name} {length:,}" for name, length in load.items() if length)


def _printable(name: str) -> str:
    """A name from an option or a file, made printable and bounded in length."""
    return name if name.isprintable() and len(name) <= 120 else short_repr(name)


def _break_even(about: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows (what, by FLOPs, by roofline time if there are rates)."""
    labels = costs.LABELS
    for found in zip(*filter(None, (about["questions_won"], about["questions_won_in_least_time"])), strict=True):
        what = f"{labels[found[0]['way']]} costs less than {labels[found[0]['rival']]}"
        yield what, *(_range(of["questions"]) for of in found)
    for rival, least in about["shots_to_win"].items():
        yield f"{labels[rival]} costs more than T2L per task", _from(least, "shots", f"never up to {MAX_SHOTS:,} shots")
    for rival, least in about["tasks_to_win"].items():
        yield f"{labels[rival]} holds more memory than T2L per task", _from(least, "tasks")
    yield "Keys and values take more memory than an adapter", _from(about["tokens_of_adapter"], "tokens")


def _from(least: int | None, what: str, never: str = "never") -> str:
    return never if least is None else f"from {least:,} {what}"


def _range(questions: tuple[int, int | None] | None) -> str:
    if questions is None:
        return "never"
    first, last = questions
    if last is not None:
        return f"up to {last:,} questions"
    return "always" if first == 1 else _from(first, "questions")
