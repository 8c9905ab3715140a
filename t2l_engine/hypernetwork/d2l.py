"""Reads and writes checkpoints in the format of SakanaAI/doc-to-lora: ``pytorch_model.bin``, a state_dict with records.

The records (``hypernet_config``, ``ctx_encoder_args``) are objects of classes of that code and of PEFT.  They are read as
data; nothing of the classes is imported.  A native checkpoint keeps them as JSON, see :func:`_encoded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.files.errors import MAX_LAYERS, ConfigError, boolean, non_empty_text, one_of, positive_int, short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.files.torch_file import Record, read_torch_file, stand_in, write_torch_file
from t2l_engine.files.weights import replacing
from t2l_engine.hypernetwork.config import PERCEIVERS, PerceiverConfig
from t2l_engine.hypernetwork.folder import D2L_NAME, CheckpointError, Contents, expect_keys, expect_shape
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork
from t2l_engine.text.config import DocumentEncoderConfig

#: All classes whose objects a checkpoint has.
KINDS = (
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.modeling.aggregator.AGGREGATOR_TYPE",
    "ctx_to_lora.pooling.POOL_FN",
    "ctx_to_lora.configs.CtxEncoderArguments",
    "ctx_to_lora.modeling.ctx_encoder.CTX_ENCODER_TYPE",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
    "peft.utils.peft_types.PeftType",
    "peft.utils.peft_types.TaskType",
)
#: Class in JSON -> what makes an object of its content.
MAKERS = {"builtins.list": list, "builtins.tuple": tuple, "builtins.set": set, "torch.tensor": torch.tensor}
MAKERS |= {kind: stand_in(kind) for kind in KINDS}
BASE, CONFIG, ENCODER = "base_model_name_or_path", "hypernet_config", "ctx_encoder_args"
LORA, READS = f"{CONFIG}.lora_config", f"{CONFIG}.aggregator_config"
MODULES, SIZES, LAYERS = f"{LORA}.target_modules", f"{CONFIG}.feature_sizes", f"{CONFIG}.layer_indices"
PER_LAYER = f"{READS}.layer_to_layer_ctx_encoder"
#: Field of a PerceiverConfig -> theirs.
FIELDS = {
    "rank": f"{LORA}.r",
    "lora_alpha": f"{LORA}.lora_alpha",
    "scaling": f"{LORA}.lora_alpha",  # alpha itself: its code divides by no rank
    "feature_size": f"{READS}.feature_size",
    "latent_size": f"{CONFIG}.latent_size",
    "num_latents": f"{READS}.n_latent_queries",
    "num_blocks": f"{READS}.num_blocks",
    "num_self_attention": f"{READS}.num_self_attn_per_block",
    "shared_blocks": f"{READS}.shared_weights",
    "num_mlps": f"{CONFIG}.num_pre_head_layers",
    "per_layer_mlps": f"{CONFIG}.per_layer_processing",
    "bias": f"{CONFIG}.use_bias",
}
#: Fields of what is not supported: False, None, 0 or empty, or not there.
OFF = [
    f"{record}.{name}"
    for record, names in {
        CONFIG: "use_light_weight_lora use_per_rank_bias use_token_mixing extra_modules",
        LORA: "use_dora rank_pattern alpha_pattern layers_to_transform lora_bias",
        READS: "num_extra_modules",
    }.items()
    for name in names.split()
]
#: Fields that checkpoints before them lack.
DEFAULTS = {f"{CONFIG}.num_pre_head_layers": 4, f"{CONFIG}.use_bias": True, f"{ENCODER}.ctx_encoder_last_layer": None}
STATES = {"per_layer_activations": "all", "early_exit": "last", "embed_only": "embeddings"}
#: Prefix and suffix of a text in the templates that doc-to-lora has for its reading models.
AFFIXES = {
    "google/gemma-2-2b-it": ("<bos><start_of_turn>user\n\n\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "mistralai/Mistral-7B-Instruct-v0.2": ("<s> [INST] \n\n", " [/INST] "),
    "Qwen/Qwen3-4B-Instruct-2507": (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip
#: Prefix of a parameter's key -> theirs; the rest of the key and the shape are the same.
PREFIXES = {
    "projection.": "aggregator.perceiver.modality_projection.",
    "encoder.": "aggregator.perceiver.encoder.",
    "decoder.": "aggregator.perceiver.decoder.",
    "mlps.": "layers.",
    "scale_": "scaler_",
    "head": "head.weight",
}
#: Most values in the records, each of which may be in them many times.
MAX_VALUES = 1 << 14


def read(folder: Path) -> Contents:
    """The checked contents of a folder with ``pytorch_model.bin``; CheckpointError names file and key or field."""
    path = folder / D2L_NAME
    found, records = read_torch_file(path, CheckpointError, KINDS)
    tensors = {key.removeprefix("_orig_mod."): tensor for key, tensor in found.items()}
    try:
        kept = _encoded(records, iter(range(MAX_VALUES)))
        base, config, encoder = _configs(kept)
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    layout = _layout(config)
    expect_keys(path, tensors if len(tensors) == len(found) else found, layout)  # a key may be there with and without prefix
    state: dict[str, Tensor] = {}
    for key, (ours, shape) in layout.items():
        expect_shape(path, key, tensors[key], shape)
        first = state.setdefault(ours, tensors[key])
        if first.dtype != tensors[key].dtype or not torch.equal(first, tensors[key]):
            raise CheckpointError(f"{path}: {key}: expected the values of {_key(ours)}, the layer that it shares")
    blocks = {"base_model": base, "encoder": to_json(encoder), "reference": {"doc_to_lora": kept}}
    return Contents(config, state, {}, blocks, path, path, _key)


def write(folder: Path, contents: Contents) -> None:
    """Write ``pytorch_model.bin`` of a checkpoint that was read from this format, with its own records.

    Raises CheckpointError for another checkpoint, and for one that its records do not describe, since it was changed.
    """
    config, blocks, where = contents.config, contents.blocks, contents.source
    kept = (blocks.get("reference") or {}).get("doc_to_lora")
    if not isinstance(config, PerceiverConfig) or kept is None:
        raise CheckpointError(f"{contents.path}: expected a checkpoint that was converted from Doc-to-LoRA's format")
    try:
        base, stated, encoder = _configs(kept)
        records = _decoded(kept, lambda kind, content: MAKERS[kind](content))
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{where}: reference.doc_to_lora: {type(error).__name__}: {error}") from None
    theirs, ours = (base, stated, to_json(encoder)), (blocks.get("base_model"), config, blocks.get("encoder"))
    for name, value, now in zip(("base_model", "hypernetwork", "encoder"), theirs, ours, strict=True):
        if value != now:
            expected = f"expected {short_repr(value)}, as reference.doc_to_lora states, got {short_repr(now)}"
            raise CheckpointError(f"{where}: {name}: {expected}")
    state = {key: contents.state[ours] for key, (ours, _) in _layout(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder, D2L_NAME) as temporary:
        write_torch_file(temporary / D2L_NAME, state | records)


# --- records ---------------------------------------------------------------------------------------------------------


def _encoded(value: Any, left: Iterator[int]) -> Any:
    """Records as JSON values: a value that is no text, number, dict or None as ``[class, content]``.

    ``left``: as many numbers as there may be values.
    """
    if next(left, None) is None:
        raise ConfigError(f"expected records of at most {MAX_VALUES} values")
    kind = f"{type(value).__module__}.{type(value).__name__}"
    match value:
        case Record():
            return [kind, _encoded(value.content, left)]
        case dict():
            return {key: _encoded(item, left) for key, item in value.items()}
        case Tensor():
            if value.dim() != 1 or value.dtype != torch.int64 or len(value) > MAX_LAYERS:
                raise ConfigError(f"expected records with lists of integers as tensors, got {value.dtype} {value.shape}")
            return ["torch.tensor", value.tolist()]
        case list() | tuple() | set() if kind.startswith("builtins."):
            return [kind, [_encoded(item, left) for item in (sorted(value) if isinstance(value, set) else value)]]
        case str() | int() | float() | None:
            return value
    raise ConfigError(f"expected records of plain values, got {kind}")


def _decoded(value: Any, make: Callable[[str, Any], Any]) -> Any:
    """``value`` of :func:`_encoded`, with ``make(class, content)`` for what has a class."""
    match value:
        case dict():
            return {key: _decoded(item, make) for key, item in value.items()}
        case [str(kind), content]:
            inner = [_decoded(i, make) for i in content] if isinstance(content, list) else _decoded(content, make)
            return make(kind, inner)
        case list():
            raise ConfigError(f"expected [class, content], got {short_repr(value)}")
    return value


def _configs(kept: Any) -> tuple[str, PerceiverConfig, DocumentEncoderConfig]:
    """Base model, and configurations of hypernetwork and encoder, of records as :func:`_encoded` gives them."""
    records = _decoded(kept, lambda kind, content: content)
    if not isinstance(records, dict) or records.keys() != {BASE, CONFIG, ENCODER}:
        raise ConfigError(f"expected the entries {[BASE, CONFIG, ENCODER]}, got {short_repr(records)}")
    non_empty_text(BASE, records[BASE])

    def field(path: str) -> Any:
        value = records
        for name in path.split("."):
            if isinstance(value, dict) and name in value:
                value = value[name]
            elif path in DEFAULTS or path in OFF:
                return DEFAULTS.get(path)
            else:
                raise ConfigError(f"{path}: missing")
        return value

    for path in OFF:
        if field(path):
            raise ConfigError(f"{path}: expected none, as others are not supported, got {short_repr(field(path))}")
    for path, supported in ((f"{CONFIG}.per_rank_gen", True), (f"{READS}.aggregator_type", "perceiver")):
        one_of(path, field(path), (supported,))
    modules, sizes, layers = map(field, (MODULES, SIZES, LAYERS))
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ConfigError(f"{MODULES}: expected names, got {short_repr(modules)}")
    modules = sorted(modules)
    match sizes:
        case [dict(n_in), dict(n_out)] if n_in.keys() == n_out.keys() == set(modules):
            pass
        case _:
            raise ConfigError(f"{SIZES}: expected two dicts of the modules {modules}, got {short_repr(sizes)}")
    if not isinstance(layers, list) or layers != list(range(len(layers))):
        raise ConfigError(f"{LAYERS}: expected all layers from 0, got {short_repr(layers)}")
    per_layer = boolean(PER_LAYER, field(PER_LAYER))
    values = {name: field(path) for name, path in FIELDS.items()} | {
        "variant": PERCEIVERS[0] if per_layer else PERCEIVERS[1],
        "modules": modules,
        "in_features": [n_in[name] for name in modules],
        "out_features": [n_out[name] for name in modules],
        "num_layers": len(layers),
    }
    return records[BASE], from_json(PerceiverConfig, values, CONFIG), _encoder_config(field, records[BASE], per_layer)


def _encoder_config(field: Callable[[str], Any], base: str, per_layer: bool) -> DocumentEncoderConfig:
    kind, first, last = (f"{ENCODER}.{name}" for name in ("ctx_encoder_type", "layer_idx", "ctx_encoder_last_layer"))
    one_of(kind, field(kind), tuple(name for name, states in STATES.items() if (states == "all") == per_layer))
    states, count = STATES[field(kind)], None
    if states == "all" and (count := field(last)) is not None:
        positive_int(last, count)
        count -= 1
    elif states == "last":
        positive_int(first, count := field(first))
    name = field(f"{ENCODER}.ctx_encoder_model_name_or_path") or base
    prefix, suffix = AFFIXES.get(str(name), (None, None))
    values = {"name": name, "states": states, "num_layers": count, "prefix": prefix, "suffix": suffix}
    return from_json(DocumentEncoderConfig, values, ENCODER)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _layout(config: PerceiverConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key in the file -> our key and the shape; layers that are shared have several keys there and one of ours."""
    with torch.device("meta"):
        net = PerceiverHyperNetwork(config)
    ours: dict[int, str] = {}
    parameters = net.named_parameters(remove_duplicate=False)
    return {_key(key): (ours.setdefault(id(of), key), tuple(of.shape)) for key, of in parameters}


def _key(ours: str) -> str:
    """Our key -> that in the file, of the first of layers that are shared."""
    prefix = next((prefix for prefix in PREFIXES if ours.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + ours.removeprefix(prefix)
