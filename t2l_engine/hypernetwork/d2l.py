"""Reads and writes checkpoints in the format of SakanaAI/doc-to-lora: ``pytorch_model.bin``, a state_dict with records.

The records (``hypernet_config``, ``ctx_encoder_args``) are objects of classes of that code and of PEFT.  They are read as
data; nothing of the classes is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.files.torch_file import Items, Record, read_torch_records, write_torch_records
from t2l_engine.files.weights import replacing
from t2l_engine.hypernetwork.config import PERCEIVERS, PerceiverConfig
from t2l_engine.hypernetwork.folder import D2L_NAME, CheckpointError, Contents, expect_shape
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork
from t2l_engine.text.config import DocumentEncoderConfig

BASE, CONFIG, ENCODER = "base_model_name_or_path", "hypernet_config", "ctx_encoder_args"
_CODE, _PEFT = "ctx_to_lora", "peft"
#: All classes whose objects a checkpoint has.
KINDS = (
    f"{_CODE}.modeling.hypernet.HypernetConfig",
    f"{_CODE}.modeling.aggregator.AggregatorConfig",
    f"{_CODE}.modeling.aggregator.AGGREGATOR_TYPE",
    f"{_CODE}.pooling.POOL_FN",
    f"{_CODE}.configs.CtxEncoderArguments",
    f"{_CODE}.modeling.ctx_encoder.CTX_ENCODER_TYPE",
    f"{_PEFT}.tuners.lora.config.LoraConfig",
    f"{_PEFT}.tuners.lora.config.LoraRuntimeConfig",
    f"{_PEFT}.utils.peft_types.PeftType",
    f"{_PEFT}.utils.peft_types.TaskType",
)
STATES = {"per_layer_activations": "all", "early_exit": "last", "embed_only": "embeddings"}
#: Fields that checkpoints before them lack.
DEFAULTS = {"num_pre_head_layers": 4, "use_per_rank_bias": False, "use_bias": True}
#: Fields of which one value is supported.
FIXED = {"use_light_weight_lora": False, "use_per_rank_bias": False, "per_rank_gen": True, "use_token_mixing": False}
FIXED_LORA = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "lora_bias": False}
#: Prefix and suffix of a text in the templates that doc-to-lora has for its reading models.
AFFIXES = {
    "google/gemma-2-2b-it": ("<bos><start_of_turn>user\n\n\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "mistralai/Mistral-7B-Instruct-v0.2": ("<s> [INST] \n\n", " [/INST] "),
    "Qwen/Qwen3-4B-Instruct-2507": (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip
#: Prefix of our keys -> theirs.
_PREFIXES = {
    "projection.": "aggregator.perceiver.modality_projection.",
    "encoder.": "aggregator.perceiver.encoder.",
    "decoder.": "aggregator.perceiver.decoder.",
    "scale_": "scaler_",
    "bias_": "bias_",
    "head": "head.weight",
}
#: Name of the list of a residual MLP, and indices of its norms and linears there: of shared weights, and of every layer's.
_MLP_PARTS = {
    False: ("mlp", {"norm1": 0, "1": 2, "2": 5, "norm2": 6}),
    True: ("layers", {"norm1": 0, "1": 1, "2": 3, "norm2": 4}),
}


def read(folder: Path) -> Contents:
    """The checked contents of a folder with ``pytorch_model.bin``; CheckpointError names file and key or field."""
    path = folder / D2L_NAME
    tensors, records = read_torch_records(path, CheckpointError, KINDS)
    tensors = {key.removeprefix("_orig_mod."): tensor for key, tensor in tensors.items()}
    try:
        config, encoder = _configs(path, records)
    except (TypeError, AttributeError) as error:  # of values of other types than the classes have
        raise CheckpointError(f"{path}: {CONFIG}, {ENCODER}: {error}") from None
    layout = _layout(config)
    missing, extra = sorted(layout.keys() - tensors.keys()), sorted(tensors.keys() - layout.keys())
    if missing or extra:
        raise CheckpointError(f"{path}: missing keys {short_repr(missing)}, unexpected keys {short_repr(extra)}")
    state: dict[str, Tensor] = {}
    for key, place in layout.items():
        expect_shape(path, key, tensors[key], place.shape)
        tensor = place.ours(tensors[key])
        if not torch.equal(state.setdefault(place.key, tensor), tensor):
            raise CheckpointError(f"{path}: {key}: expected the values of {place.key}, the layer that it shares")
    blocks = {
        "base_model": records[BASE],
        "encoder": to_json(encoder),
        "reference": {"doc_to_lora": _as_json(dict(records))},
    }
    names = {place.key: key for key, place in reversed(layout.items())}
    return Contents(config, state, {}, blocks, path, path, lambda key: names.get(key, key))


# --- records ---------------------------------------------------------------------------------------------------------


def _configs(path: Path, records: Mapping[str, Any]) -> tuple[PerceiverConfig, DocumentEncoderConfig]:
    if records.keys() != {BASE, CONFIG, ENCODER}:
        raise CheckpointError(f"{path}: expected the entries {[BASE, CONFIG, ENCODER]}, got {short_repr(sorted(records))}")
    if not isinstance(records[BASE], str):
        raise CheckpointError(f"{path}: {BASE}: expected a string, got {short_repr(records[BASE])}")
    own = _Fields(path, CONFIG, records[CONFIG], DEFAULTS)
    lora = _Fields(path, f"{CONFIG}.lora_config", own["lora_config"])
    reads = _Fields(path, f"{CONFIG}.aggregator_config", own["aggregator_config"])
    encoder = _Fields(path, ENCODER, records[ENCODER], {"ctx_encoder_last_layer": None})
    own.expect(FIXED)
    lora.expect({name: value for name, value in FIXED_LORA.items() if name in lora.values})
    reads.expect({"aggregator_type": "perceiver", "num_extra_modules": 0})
    if own["extra_modules"]:
        got = short_repr(own["extra_modules"])
        raise CheckpointError(
            f"{path}: {CONFIG}.extra_modules: expected none (LayerNorm weights are not supported), got {got}"
        )
    modules = lora["target_modules"]
    modules = modules.items if isinstance(modules, Items) else modules
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise CheckpointError(f"{path}: {CONFIG}.lora_config.target_modules: expected names, got {short_repr(modules)}")
    modules = sorted(modules)
    sizes = own["feature_sizes"]
    if not isinstance(sizes, tuple) or len(sizes) != 2 or any(set(side) != set(modules) for side in sizes):
        raise CheckpointError(
            f"{path}: {CONFIG}.feature_sizes: expected two dicts of the modules {modules}, got {short_repr(sizes)}"
        )
    layers = own["layer_indices"]
    layers = layers.tolist() if isinstance(layers, Tensor) else layers
    if not isinstance(layers, list) or layers != list(range(len(layers))):
        raise CheckpointError(f"{path}: {CONFIG}.layer_indices: expected all layers from 0, got {short_repr(layers)}")
    per_layer = reads["layer_to_layer_ctx_encoder"]
    values = {
        "variant": PERCEIVERS[0] if per_layer else PERCEIVERS[1],
        "modules": modules,
        "in_features": [sizes[0][name] for name in modules],
        "out_features": [sizes[1][name] for name in modules],
        "num_layers": len(layers),
        "rank": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "scaling": lora["lora_alpha"],  # alpha itself: its code divides by no rank
        "feature_size": reads["feature_size"],
        "latent_size": own["latent_size"],
        "num_latents": reads["n_latent_queries"],
        "num_blocks": reads["num_blocks"],
        "num_self_attention": reads["num_self_attn_per_block"],
        "shared_blocks": reads["shared_weights"],
        "num_mlps": own["num_pre_head_layers"],
        "per_layer_mlps": own["per_layer_processing"],
        "bias": own["use_bias"],
    }
    return from_json(PerceiverConfig, values, str(path)), _encoder_config(path, encoder, records[BASE], per_layer)


def _encoder_config(path: Path, fields: _Fields, base: str, per_layer: bool) -> DocumentEncoderConfig:
    kind: Any = fields["ctx_encoder_type"]
    kind = kind.args[0] if isinstance(kind, Record) and kind.args else kind
    if kind not in STATES or (STATES[kind] == "all") != per_layer:
        expected = [name for name, states in STATES.items() if (states == "all") == per_layer]
        raise CheckpointError(f"{path}: {ENCODER}.ctx_encoder_type: expected one of {expected}, got {short_repr(kind)}")
    last = fields["ctx_encoder_last_layer"]
    count = {"all": last if last is None else last - 1, "last": fields["layer_idx"], "embeddings": None}[STATES[kind]]
    name = fields["ctx_encoder_model_name_or_path"] or base
    prefix, suffix = AFFIXES.get(name, (None, None))
    values = {"name": name, "states": STATES[kind], "num_layers": count, "prefix": prefix, "suffix": suffix}
    return from_json(DocumentEncoderConfig, values, f"{path}: {ENCODER}")


class _Fields:
    """Fields of a record, by name; CheckpointError names file and field."""

    def __init__(self, path: Path, name: str, record: object, defaults: Mapping[str, Any] | None = None):
        if not isinstance(record, Record):
            raise CheckpointError(f"{path}: {name}: expected an object of its class, got {short_repr(record)}")
        self.where, self.values = f"{path}: {name}", {**(defaults or {}), **record.fields}

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.where}.{name}: missing")
        return self.values[name]

    def expect(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            got = self[name]
            got = got.args[0] if isinstance(got, Record) and got.args else got
            if got != value:
                raise CheckpointError(
                    f"{self.where}.{name}: expected {value!r}, others are not supported, got {short_repr(got)}"
                )


def _as_json(value: Any) -> Any:
    """Records as JSON values, from which :func:`_from_json` makes them again."""
    if isinstance(value, Record):
        return {"class": value.kind, "args": list(value.args), "fields": _as_json(dict(value.fields))}
    if isinstance(value, Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, Items):
        return {"set": sorted(value.items)}
    if isinstance(value, tuple):
        return {"tuple": [_as_json(item) for item in value]}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return value


def _from_json(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_from_json(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"class": str(kind), "args": list(args), "fields": dict(fields), **rest} if not rest and kind in KINDS:
            record = Record.of(kind)(*args)
            record.fields = _from_json(fields, where)
            return record
        case {"class": kind, "args": _, "fields": _}:
            raise CheckpointError(f"{where}: expected one of the classes {KINDS}, got {short_repr(kind)}")
        case {"set": list(items), **rest} if not rest:
            return Items(items)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_from_json(item, where) for item in items)
        case {"tensor": list(items), **rest} if not rest:
            return torch.tensor(items)
    return {key: _from_json(item, where) for key, item in value.items()}


def write(folder: Path, contents: Contents) -> None:
    """Write ``pytorch_model.bin`` of a checkpoint that was read from this format, with its own records.

    Raises CheckpointError for another checkpoint, or a reference block that has other classes.
    """
    config, kept = contents.config, (contents.blocks.get("reference") or {}).get("doc_to_lora")
    if not isinstance(config, PerceiverConfig) or not isinstance(kept, dict):
        raise CheckpointError(f"{contents.path}: expected a checkpoint that was converted from Doc-to-LoRA's format")
    records = _from_json(kept, f"{contents.path.parent}: reference.doc_to_lora")
    state = {key: place.theirs(contents.state[place.key]) for key, place in _layout(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder, D2L_NAME) as temporary:
        write_torch_records(temporary / D2L_NAME, state | records)


# --- tensors ---------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor of the file is in our state: its key there, its shape in both, and whether it is transposed."""

    key: str
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    transposed: bool

    def ours(self, tensor: Tensor) -> Tensor:
        return (tensor.T.contiguous() if self.transposed else tensor).reshape(self.our_shape)

    def theirs(self, tensor: Tensor) -> Tensor:
        return tensor[0].T.contiguous() if self.transposed else tensor.reshape(self.shape)


def _layout(config: PerceiverConfig) -> dict[str, _Place]:
    """Key in the file -> place of its tensor in our state; layers that are shared have several keys and one place."""
    with torch.device("meta"):
        net = PerceiverHyperNetwork(config)
    first: dict[int, str] = {}
    layout, (kind, indices) = {}, _MLP_PARTS[config.per_layer_mlps]
    for key, parameter in net.named_parameters(remove_duplicate=False):
        shape = our_shape = tuple(parameter.shape)
        name, transposed = key.split(".")[-1], False
        if key.startswith("mlps."):
            _, number, part, *rest = key.split(".")
            if not rest:  # weight1, bias1, weight2 or bias2
                part, name = part[-1], part[:-1]
                if config.per_layer_mlps:
                    shape = shape if name == "weight" else (1, shape[0], 1, 1, shape[1])
                else:
                    shape, transposed = tuple(reversed(shape[1:])), name == "weight"
            theirs = f"layers.{number}.{kind}.{indices[part]}.{name}"
        else:
            prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
            theirs = _PREFIXES[prefix] + key[len(prefix) :]
            if prefix == "scale_":
                shape = (1, *shape, 1)
            elif prefix == "head" and shape[1] == 1:
                shape = (shape[0], *shape[2:])
        layout[theirs] = _Place(first.setdefault(id(parameter), key), shape, our_shape, transposed)
    return layout
