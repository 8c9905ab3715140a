"""``t2l cost``: FLOPs, memory traffic and memory of in-context learning and of generated adapters, from configurations."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from operator import mul
from typing import Any

import typer
from rich.table import Table

from t2l_engine.cli.common import Checkpoint, Json, choices, console, print_json, printable, split_names
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.config import PerceiverConfig
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.hypernetwork.network import num_parameters
from t2l_engine.research import costs
from t2l_engine.text.config import DocumentEncoderConfig, EncoderConfig

MODELS, ENCODERS = (", ".join(costs.KNOWN[kind]) for kind in ("model", "encoder"))
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1, "int4": 0.5}
ValueType = choices("ValueType", ITEMSIZES)


def _option(default: Any, text: str, **limits: float) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclasses.dataclass(frozen=True)
class Options:
    """What is counted; sizes of a hypernetwork are by default those of the checkpoint or the known model."""

    model: str = _option(
        "", f"Language model: {MODELS}, or a local transformers folder or its config.json; default: the checkpoint's base "
        "model, else mistral-7b.",
    )  # fmt: skip
    checkpoint: Checkpoint = ""
    encoder: str = _option(
        "", f"Text encoder: {ENCODERS}, a local folder or its config.json, or '{costs.LANGUAGE_MODEL}' (the language "
        "model's last token); default: the checkpoint's or the known model's, else gte-large.",
    )  # fmt: skip
    variant: str = _option("", "Variant of the hypernetwork: L, M, S-learnable ...; default: the checkpoint's, else L.")
    modules: str = _option("", "Adapted linears; default: the checkpoint's, else q_proj,v_proj.")
    rank: int | None = _option(None, "Rank of the adapters; default: the checkpoint's, else 8.", min=1)
    latent_size: int | None = _option(None, "Latent size; default: the checkpoint's or the known model's, else 128.", min=1)
    head_in_size: int | None = _option(None, "Width before the heads, if there is one; default: the same, else 512.", min=1)
    questions: int = _option(100, "Questions of one task.", min=1, max=10**12)
    users: int = _option(1, "Concurrent sequences, for memory and decode step.", min=1, max=1 << 16)
    tasks: int = _option(1, "Different tasks among the users.", min=1, max=1 << 16)
    dtype: ValueType | None = _option(None, "Dtype of the weights, int4 without scales; default: the config's or bfloat16.")
    cache_dtype: ValueType | None = _option(None, "Dtype of keys and values; default: the weights', of at least 16 bits.")
    tflops: float = _option(0.0, "TFLOP/s of your device; adds roofline times.", min=0, max=1e9)
    gbps: float = _option(0.0, "Memory bandwidth of your device in GB/s; adds roofline times.", min=0, max=1e9)
    as_json: Json = False


def cost(options: Options, load: costs.Workload) -> None:
    """The cost of a question by in-context learning (ICL) and by a generated adapter (T2L), for your workload.

    FLOPs, memory traffic and memory of six ways to serve a task, with break-even points.  Computed from configurations: no
    weights of a model are read, nothing is downloaded or measured, and answer quality is not considered.
    """
    if bool(options.tflops) != bool(options.gbps) or not math.isfinite(options.tflops + options.gbps):
        raise typer.BadParameter("expected both --tflops and --gbps, finite, or neither")
    if options.tasks > options.users:
        raise typer.BadParameter(f"--tasks: expected at most as many as --users, {options.users}, got {options.tasks}")
    about, setup = _setup(options)
    about |= {"workload": dataclasses.asdict(load)} | document(setup, load, options)
    if options.as_json:
        print_json(about)
    else:
        render(about)


def _setup(options: Options) -> tuple[dict[str, Any], costs.Setup]:
    """What the options name, as JSON values and as a setup."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # keeps stderr for our own messages
    model, encoder = options.model or "mistral-7b", options.encoder
    sizes = {name: getattr(options, name) for name in costs.SIZES} | {"modules": tuple(split_names(options.modules))}
    sizes, read = {name: value for name, value in sizes.items() if value}, ()
    if options.checkpoint:
        contents = checkpoint.read(resolve_checkpoint(options.checkpoint))
        if isinstance(contents.config, PerceiverConfig):
            raise ConfigError(f"--checkpoint: {options.checkpoint}: it reads documents, whose cost is not counted")
        model = options.model or contents.blocks.get("base_model")
        if not model:
            raise ValueError("--model: the checkpoint does not name one; give it here")
        encoder, read = (encoder, ()) if encoder else _encoder_of(contents)
        sizes = vars(contents.config) | sizes
    encoder = encoder or costs.find("model", model)["encoder"]
    setup = costs.known_setup(model, encoder, read, **sizes)
    dtype = options.dtype.value if options.dtype else setup.model.dtype or "bfloat16"
    if dtype not in list(ITEMSIZES):
        raise ConfigError(f"{model}: dtype: expected one of {', '.join(ITEMSIZES)}, got {short_repr(dtype)}; give --dtype")
    cache = options.cache_dtype.value if options.cache_dtype else dtype if ITEMSIZES[dtype] >= 2 else "bfloat16"
    setup = dataclasses.replace(setup, itemsize=ITEMSIZES[dtype], cache_itemsize=ITEMSIZES[cache])
    return {
        "model": {"name": model, "parameters": setup.model.parameters, "dtype": dtype},
        "cache": {"dtype": cache, "bytes_per_token": setup.kv(1)},
        "encoder": {"name": encoder, "parameters": setup.encoder.parameters},
        "hypernetwork": to_json(setup.hypernet) | {"parameters": num_parameters(setup.hypernet)},
        "adapter_bytes": setup.adapter_bytes,
        "generator_bytes": setup.generator_bytes,
    }, setup


def _encoder_of(contents: Any) -> tuple[str, tuple[int, ...]]:
    """The ``--encoder`` that a checkpoint states, MiniLM if it states none, and its layers that a pointer network reads."""
    config = contents.encoder_config()
    if config is None:
        return "minilm", ()
    if not isinstance(config, (EncoderConfig, DocumentEncoderConfig)):
        raise ConfigError(f"{contents.path.parent}: encoder: one-hot is not counted; give --encoder")
    name = costs.LANGUAGE_MODEL if config.name == contents.blocks.get("base_model") else config.name
    return name, getattr(config, "layers", None) or ()


def document(setup: costs.Setup, load: costs.Workload, options: Options) -> dict[str, Any]:
    """The results as JSON values.  ``questions_won``, ``tasks_to_win``: for how many "t2l-task" costs less than the way."""
    ways, rates = costs.ways(setup, load), (options.tflops * 1e12, options.gbps * 1e9)
    best, times = ways["t2l-task"], (options.users, options.tasks, 1)

    def sums(way: costs.Way, of: Any) -> dict[str, float]:
        total = of(way.first) + (options.questions - 1) * of(way.later)
        return {"to_first_token": of(way.first, first_token=True), "later_question": of(way.later), "questions": total}

    return {
        "questions": options.questions,
        "users": options.users,
        "tasks": options.tasks,
        "ways": {
            name: {
                "flops": sums(way, costs.Request.flops),
                "seconds": sums(way, lambda request, **of: request.seconds(*rates, **of)) if all(rates) else None,
                "decode_step_bytes": setup.weights(options.users) + sum(map(mul, way.step, times)),
                "memory_bytes": sum(map(mul, way.held, times)),
                "questions_won": costs.questions_won(best, way),
                "tasks_to_win": costs.tasks_to_win(best, way, Fraction(options.users, options.tasks)),
            }
            for name, way in ways.items()
        },
    }


def render(about: dict[str, Any]) -> None:
    """Print the setup and tables of the ways."""
    number, screen = "{:,.4g}".format, console()
    model, net, encoder = (about[name] for name in ("model", "hypernetwork", "encoder"))
    for name, fact in {
        "language model": f"{printable(model['name'])}, {number(model['parameters'] / 1e6)} M parameters, {model['dtype']}",
        "keys and values": f"{about['cache']['dtype']}, {number(about['cache']['bytes_per_token'] / 1e3)} kB a token",
        "text encoder": f"{printable(encoder['name'])}, {number(encoder['parameters'] / 1e6)} M parameters",
        "hypernetwork": f"{net['variant']}, {number(net['parameters'] / 1e6)} M parameters",
        "adapter": f"rank {net['rank']} on {', '.join(net['modules'])}, {number(about['adapter_bytes'] / 1e6)} MB",
        "tokens": ", ".join(f"{name} {length:,}" for name, length in about["workload"].items() if length),
    }.items():
        screen.print(f"{name:16} {fact}")
    heads = "to the\nfirst token", "later\nquestion", f"{about['questions']:,}\nquestions"
    flops = Table("TFLOP", *heads, "T2L per task takes\nfewer, questions")
    held = Table("GB", "decode\nstep reads", "memory beside\nthe weights", "T2L per task\nholds less, tasks")
    times = Table("seconds, roofline", *heads)
    for name, way in about["ways"].items():
        label, (first, last) = costs.LABELS[name], way["questions_won"] or (None, None)
        won = "never" if first is None else f"{first:,} to {last:,}" if last else f"from {first:,}"
        flops.add_row(label, *(number(of / 1e12) for of in way["flops"].values()), won)
        least = f"from {way['tasks_to_win']:,}" if way["tasks_to_win"] else "never"
        held.add_row(label, number(way["decode_step_bytes"] / 1e9), number(way["memory_bytes"] / 1e9), least)
        times.add_row(label, *map(number, (way["seconds"] or {}).values()))
    screen.print(flops, held, *[times] * bool(way["seconds"]))
    screen.print(
        "First token: of a task's first question; filling a warm cache before it is not counted.  GB: at "
        f"{about['users']:,} users with {about['tasks']:,} tasks.\nAll is computed, nothing measured."
    )
