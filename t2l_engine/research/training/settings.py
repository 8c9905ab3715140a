"""Settings of training runs: checked fields, read from YAML files and overrides; ``t2l train <kind> --fields`` lists them.

Defaults suit a small model on a CPU; those of the paper are in ``docs/training.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from t2l_engine.files.errors import MAX_NUMBER, MAX_RANK, MAX_SIZE, MIN_NUMBER, ConfigError, expect, short_repr
from t2l_engine.files.text import is_unicode
from t2l_engine.files.yaml import parse_yaml, read_yaml
from t2l_engine.hypernetwork.config import PERCEIVERS, POINTER, VARIANTS, resolve_scaling
from t2l_engine.text.prompts import PROMPT_FORMS


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("expected Unicode text")
    return text


def field(default: Any, description: str) -> Any:
    return Field(default, description=description)


Text = Annotated[str, AfterValidator(_unicode)]
Positive = Annotated[int, Field(gt=0, lt=MAX_SIZE)]
Count = Annotated[int, Field(ge=0, lt=MAX_SIZE)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

#: Settings by name, for ``--config``: ``mini-*`` take minutes on a CPU.
PACKAGED = Path(__file__).parent / "presets"
#: The ``encoder`` that is the frozen base model itself: its last token's hidden state, or those of all tokens.
BASE_MODEL, LLM = "base-model", "llm"
ADAMW, MUON = "adamw", "muon"
#: Fields that only variants with encoder llm have a use for; of each such variant, the fields that it has none for.
OF_TOKENS = (
    "llm_layers", "llm_queries", "llm_heads", "llm_blocks", "llm_mlps", "copied", "first_layer", "example_share",
    "max_examples",
)  # fmt: skip
_NO_PERCEIVER = "head_in_size", "llm_heads", "copied", "first_layer", "example_share", "max_examples"
UNUSED = {
    "perceiver-layers": (*_NO_PERCEIVER, "llm_layers"), "perceiver-flat": _NO_PERCEIVER,
    POINTER: ("head_in_size", "llm_queries", "llm_mlps"),
}  # fmt: skip


class Settings(BaseModel):
    """Settings of every kind of run: optimiser, learning-rate schedule, intervals of saving and validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    steps: Positive = field(1000, "optimiser steps")
    learning_rate: Rate = field(1e-3, "reached after the warm-up")
    warmup_steps: Count = field(50, "steps of linear rise from zero")
    schedule: Literal["linear", "constant"] = field("linear", "after the warm-up: linear decay to zero, or none")
    decay_steps: Count = field(0, "last steps of schedule constant, with linear decay to zero")
    weight_decay: NotNegative = field(0.01, "decoupled, on every trained parameter")
    grad_clip: NotNegative = field(1.0, "largest L2 norm of a step's gradient; 0: no clipping")
    tasks_per_batch: Positive = field(8, "tasks in a batch through the model")
    accumulation: Positive = field(1, "batches whose gradients are summed to one step")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = field(0, "of initial parameters, samples, descriptions and noise")
    save_every: Positive = field(100, "steps between saved states")
    validate_every: Count = field(100, "steps between validations; 0: none")
    patience: Count = field(0, "stop after so many validations without improvement, counted from the start; 0: never")
    min_delta: NotNegative = field(0.0, "least decrease of the lowest validation loss that counts as an improvement")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a number or text")  # pydantic would convert it to 1
        return value

    @model_validator(mode="after")
    def _validated(self):
        expect(self.validate_every or not self.patience, "patience", "0 with validate_every 0", self.patience)
        most = max(0, self.steps - self.warmup_steps) if self.schedule == "constant" else 0
        expect(self.decay_steps <= most, "decay_steps", f"at most {most} with schedule {self.schedule}", self.decay_steps)
        return self

    @property
    def tasks_per_step(self) -> int:
        """Groups (a task with its samples) per optimiser step."""
        return self.tasks_per_batch * self.accumulation


class _Model(BaseModel):
    """Settings of training through the frozen base model, and of its adapters."""

    rank: Annotated[int, Field(gt=0, le=MAX_RANK)] = field(8, "of the adapters")
    lora_alpha: Annotated[float, Field(ge=MIN_NUMBER, le=MAX_NUMBER)] = field(16.0, "LoRA alpha")
    scaling: Literal["plain", "rslora"] | Rate = field("plain", "plain: alpha/rank; rslora: alpha/sqrt(rank)")
    base_model: Text = field(..., '"smollm2-135m" (packaged) or a local transformers folder')
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] = field(..., "names of the adapted linears")
    dtype: Literal["float32", "bfloat16"] = field(
        "bfloat16", "of the base model; what is trained is float32; t2l train: float32 where the CPU multiplies that faster"
    )
    prompt: Literal["input", "description"] = field("input", "the input alone, or the task description and the input")
    prompt_form: Literal[PROMPT_FORMS] = field(
        "chat", 'chat: a user turn of the tokenizer\'s template; raw: plain text, "Input: ...", "Output:"'
    )
    samples_per_task: Positive = field(1, "examples of a task in a batch")
    max_tokens: Positive = field(192, "longest prompt and answer; longer examples are left out and counted")
    bucket_steps: Positive = field(8, "steps over which tasks are bucketed by length; 1: no bucketing")
    weighting: Literal["sample", "token"] = field("sample", "mean of the loss over samples, or over answer tokens")
    label_smoothing: Share = field(0.0, "of the training loss")
    neftune_alpha: NotNegative = field(0.0, "NEFTune: noise of alpha/sqrt(tokens * width) on input embeddings")
    lora_dropout: Share = field(0.0, "dropout on the input of A")
    validation_samples: Positive = field(8, 'at most this many examples of split "val" per task')

    @model_validator(mode="after")
    def _adapters(self):
        resolve_scaling(self.scaling, self.lora_alpha, self.rank)
        modules = list(self.target_modules)
        expect(len(set(modules)) == len(modules), "target_modules", "distinct names", modules)
        return self


class HyperNetworkSettings(Settings):
    """Settings of the hypernetwork and its task embeddings."""

    variant: Literal[VARIANTS] = field("L", "of the hypernetwork")
    latent_size: Annotated[int, Field(ge=4, lt=MAX_SIZE)] = field(128, "width of the trunk, or of a perceiver's latents")
    head_in_size: Positive = field(256, "width of the heads' input")
    encoder: Text = field(
        "minilm",
        '"minilm", a sentence-transformers folder, "one-hot": tasks by name, "base-model" (sft): its last token\'s hidden '
        'state, or "llm" (sft): the hidden states of all tokens, which perceiver-layers, perceiver-flat and pointer read',
    )
    held_out_descriptions: Count = field(0, "last descriptions of a task, held out for validation")
    optimizer: Literal[ADAMW, MUON] = field(
        ADAMW, "adamw; muon: Muon for the weights of linears (orthogonalised updates), AdamW for the rest"
    )

    @model_validator(mode="after")
    def _encoder(self):
        if self.encoder == "one-hot":
            self._expect(held_out_descriptions=0)
        return self

    def _expect(self, when: str = "", **only: Any) -> None:
        """ValueError unless the settings have the values ``only``; ``when``: what asks for them, default: the encoder."""
        for name, value in only.items():
            got = getattr(self, name)
            expect(got == value, name, f"{value!r} {when or f'with encoder {self.encoder!r}'}", got)


class SFTSettings(_Model, HyperNetworkSettings):
    """``t2l train sft``: a hypernetwork, end to end through the frozen base model (paper section 3.2)."""

    variant: Literal[(*VARIANTS, *PERCEIVERS, POINTER)] = field(
        "L", "of the hypernetwork; with encoder llm: perceiver-layers, perceiver-flat (Doc-to-LoRA) or pointer"
    )
    llm_layers: Annotated[tuple[Count, ...], Field(min_length=1)] = field(
        (0, 10, 20), "pointer: hidden states that it reads: 0 token embeddings, i output of layer i; perceiver-flat: one"
    )
    llm_queries: Positive = field(8, "latents of the perceiver")
    llm_heads: Positive = field(4, "attention heads of variant pointer")
    llm_blocks: Positive = field(1, "attention blocks of the perceiver or of variant pointer")
    llm_mlps: Count = field(1, "residual MLPs after the perceiver")
    copied: tuple[Text, ...] = field((), "pointer: target modules whose columns of B get token embeddings, in their order")
    first_layer: Count = field(0, "pointer: layers below have no adapter")
    condition: Literal["description", "input"] = field(
        "description",
        "what the adapter is generated from: the task's description, or each example's own input "
        "(Hyperdecoders, arXiv 2203.08304)",
    )
    generated_l2: NotNegative = field(0.0, "weight of sum over modules of mean(A^2) + mean(B^2)")
    initial: Text = field("", "checkpoint folder to start from; empty: random parameters")
    example_share: Annotated[float, Field(ge=0, le=1)] = field(
        0.0, "pointer: share of the groups whose adapter is generated from worked examples, with or without a description"
    )
    max_examples: Positive = field(6, "pointer: most worked examples of an adapter")

    @model_validator(mode="after")
    def _tokens(self):
        variant, layers, when = self.variant, list(self.llm_layers), ""
        if self.encoder == LLM:
            expect(variant in UNUSED, "variant", f"one of {', '.join(UNUSED)} with encoder {LLM!r}", variant)
            self._expect(condition="description")
            when = f"with {variant}"
        expect(when or variant in VARIANTS, "encoder", f"{LLM!r} with variant {variant}", self.encoder)
        unused = UNUSED[variant] if when else OF_TOKENS
        self._expect(when, **{name: type(self).model_fields[name].default for name in unused})
        expect(layers == sorted(set(layers)), "llm_layers", "increasing numbers", layers)
        expect(variant != "perceiver-flat" or len(layers) == 1, "llm_layers", "one number with perceiver-flat", layers)
        expect(not self.copied or layers[0] == 0, "llm_layers", "0 first, what is copied", layers)
        return self

    @model_validator(mode="after")
    def _condition(self):
        if self.encoder == "one-hot":
            self._expect(prompt="input")
        if self.condition == "input":
            expect(self.encoder != "one-hot", "encoder", "one that reads text with condition input", self.encoder)
            self._expect("with condition 'input'", samples_per_task=1, held_out_descriptions=0)
        return self


class LoRASettings(_Model, Settings):
    """``t2l train lora``: adapters without a hypernetwork, one per task or one for all."""

    mode: Literal["per-task", "multi-task"] = field(
        "per-task", "per-task: an adapter per task, tasks_per_batch * accumulation at a time; multi-task: one for all"
    )
    initial: Text = field("", "PEFT folder to start from, or a folder of PEFT folders named as the tasks; empty: none")
    held_out_descriptions: Count = field(0, "last descriptions of a task, left out of prompts")


class ReconstructionSettings(HyperNetworkSettings):
    """``t2l train reconstruction``: a hypernetwork that reproduces a library of adapters."""

    target: Literal["z-score", "raw", "delta-w"] = field(
        "z-score", "what the L1 loss compares: z-scores of A and B, A and B themselves, or B @ A"
    )

    @model_validator(mode="after")
    def _no_base_model(self):
        no_model = "no base model, since reconstruction loads none"
        expect(self.encoder not in (BASE_MODEL, LLM), "encoder", no_model, self.encoder)
        return self


MAX_LISTED = 8  # faults in an error
S = TypeVar("S", bound=Settings)


def read(kind: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Settings from a YAML file, or packaged ones by name (``"mini-sft"``), and ``name=value`` overrides (values in YAML).

    Raises FileNotFoundError listing the packaged ones, ConfigError naming file, field, expected and given value.
    """
    values: Any = {}
    if path is not None:
        packaged = {file.stem: file for file in PACKAGED.glob("*.yaml")}
        path = path if path.is_file() else packaged.get(str(path), path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; packaged settings: {sorted(packaged)}")
        values = read_yaml(path)
        expect(isinstance(values, dict), str(path), "a mapping of fields", values)
    changes = parse_overrides(overrides)
    origins = dict.fromkeys(values, str(path)) | dict.fromkeys(changes, "--set")
    return build(kind, values | changes, origins, str(path) if path else "settings")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of ``name=value`` texts, values in YAML; ConfigError names one that is none."""
    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        expect(equals, "--set", "name=value", text)
        try:
            values[name.strip()] = parse_yaml(value, "--set")
        except ConfigError:
            raise ConfigError(f"--set {name}: expected a YAML value, got {short_repr(value)}") from None
    return values


def build(kind: type[S], values: dict[str, Any], origins: dict[str, str] | None = None, source: str = "settings") -> S:
    """``kind`` from plain values; ConfigError lists the faults, each with its field's origin (default: ``source``)."""
    origins = origins or {}
    try:
        return kind(**values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        faults = [*dict.fromkeys(_told(kind, fault, origins, source) for fault in found)]
        more = f"; {len(faults) - MAX_LISTED} further faults" if len(faults) > MAX_LISTED else ""
        if any(fault["type"] == "extra_forbidden" for fault in found):
            more += f"; expected some of {sorted(kind.model_fields)}"
        raise ConfigError("; ".join(faults[:MAX_LISTED]) + more) from None
    except TypeError as error:  # keys that are not strings
        raise ConfigError(f"{source}: expected field names, got {error}") from None


def _told(kind: type[Settings], fault: Mapping[str, Any], origins: Mapping[str, str], source: str) -> str:
    """A fault that pydantic found, with its place."""
    name, message = "".join(map(str, fault["loc"][:1])), fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{source}: missing field {name!r}: {kind.model_fields[name].description}"
    if not fault["loc"]:  # a check over several fields, whose message names them
        return f"{source}: {message}"
    if fault["type"] == "extra_forbidden":
        return f"{origins.get(name, source)}: unknown field {short_repr(name)}"
    return f"{origins.get(name, source)}: {name}: {message}, got {short_repr(fault['input'])}"


def fields(kind: type[Settings]) -> list[tuple[str, str, str]]:
    """(field, default, description) of every field of ``kind``."""
    plain = lambda value: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)  # noqa: E731
    known = kind.model_fields.items()
    return [(n, "required" if of.is_required() else plain(of.default), of.description or "") for n, of in known]


def to_yaml(settings: Settings) -> str:
    """All fields as YAML that :func:`read` accepts."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def differences(ours: Settings, theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which ``ours`` differs from settings as they were written, as text.

    A field that is not among those written is newer than they are: the run had its default.
    """
    defaults = {name: field.default for name, field in type(ours).model_fields.items() if not field.is_required()}
    mine, other = ours.model_dump(mode="json"), json.loads(json.dumps(defaults)) | dict(theirs)
    return [
        f"{name}: {short_repr(other.get(name))} then, {short_repr(mine.get(name))} now"
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]
