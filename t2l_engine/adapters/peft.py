"""Reads PEFT LoRA folders, checking every field and tensor; :mod:`t2l_engine.adapters.peft_write` writes them.

Folders are untrusted: anything unusable raises an :class:`AdapterError` that names the file and the field or key, and no
path, pattern or number in a file can take more than a bounded amount of memory and time.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.adapters.paths import LAYER, layer_list, path_error, path_template
from t2l_engine.files.errors import MAX_LAYERS, MAX_MODULES, ConfigError, positive_int, positive_number, short_repr
from t2l_engine.files.patterns import Patterns
from t2l_engine.files.text import read_json
from t2l_engine.files.weights import max_abs, read_safetensors

WEIGHTS_NAME, CONFIG_NAME, PICKLE_NAME = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
#: Bounds on the stack's values: times those in the file (one layer of a 128-layer model, the others padding), and plus.
MAX_PADDING, MAX_PADDED = 128, 1 << 30

PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight", re.DOTALL)

#: Fields that change what an adapter computes or which modules it adapts -> the values that mean plain LoRA.
_PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # Others (pissa, olora, corda, loftq, lora_ga) change the base weights: A and B alone are not the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "use_rslora": (None, False, True),
    "fan_in_fan_out": (None, False, True),  # how the base weight is stored; A and B are the same either way
}
#: Fields that are read below, or that matter only for training, initialisation or bookkeeping.
_OTHER = frozenset(
    "r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern "
    "task_type base_model_name_or_path revision auto_mapping peft_version inference_mode lora_dropout megatron_core "
    "qalora_group_size loftq_config eva_config corda_config lora_ga_config velora_config ensure_weight_tying "
    "runtime_config".split()
)
#: Patterns of unsupported keys, and the reason to report.
_REFUSED_KEYS = (
    (r"\.lora_[AB]\.[^.]+\.weight$", "the adapter's name is part of the key; save the adapter with PEFT's save_pretrained"),
    (r"\.lora_embedding_[AB]", "LoRA of an embedding is not supported"),
    (r"\.lora_magnitude_vector", "DoRA is not supported"),
    (r"\.bias$", "trained biases are not supported"),
    (r"^(?!.*\.lora_)", "a whole weight; where it is the base model's, save with PEFT's save_embedding_layers=False"),
)
#: VeLoRA compresses activations in training; its forward pass is plain LoRA.
_TRAINING_KEY = re.compile(r".*\.lora_velora_embed")


class AdapterError(ValueError):
    """An adapter file or folder cannot be used; the message names file and field.

    >>> import t2l_engine as t2l
    >>> issubclass(t2l.AdapterError, ValueError)
    True
    """


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter as stored in a PEFT folder; keys of the dictionaries are paths with ``{layer}``.

    ``lora_A`` ``[1, n, r, in]``, ``lora_B`` ``[1, n, out, r]``, ``ranks`` ``[1, n]`` int32, ``scaling`` ``[1]`` float32;
    ``partial``: whether it may end before the last layer of its model.
    """

    lora_A: dict[str, Tensor]
    lora_B: dict[str, Tensor]
    ranks: dict[str, Tensor]
    scaling: Tensor
    partial: bool


def read(directory: Path, dtype: torch.dtype | None) -> PeftAdapter:
    """One PEFT LoRA folder, read as :meth:`.stack.AdapterStack.from_peft` says."""
    try:
        return _read(directory, dtype)
    except ConfigError as error:
        raise AdapterError(str(error)) from None


def _read(directory: Path, dtype: torch.dtype | None) -> PeftAdapter:
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    pickle = directory / PICKLE_NAME
    if pickle.exists() and not weights_path.exists():
        raise AdapterError(
            f"{pickle}: a pickle, which can run code when read; load the adapter in PEFT where you trust it "
            f"and write it again with save_pretrained(..., safe_serialization=True)"
        )
    for path in (config_path, weights_path):
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found; expected a PEFT folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
        if not path.is_file():
            raise AdapterError(f"{path}: expected a regular file")
    config = read_json(config_path)
    partial = _check_config(config, config_path)
    pairs = _read_pairs(weights_path)
    layers = _by_module(pairs, weights_path)  # first: it bounds the paths that patterns are matched with
    _check_chosen(config, config_path, pairs, weights_path)
    scalings = _scalings(config, config_path, pairs, weights_path)
    own = Counter(scalings.values()).most_common(1)[0][0]
    factors = {path: scaling / own for path, scaling in scalings.items()}

    sizes = _sizes(layers, weights_path)
    kind = dtype or reduce(torch.promote_types, (t.dtype for pair in pairs.values() for t in pair.values()))
    _check_range(pairs, factors, kind, weights_path)
    lora_A, lora_B, ranks = {}, {}, {}
    for module, found in layers.items():
        n, r, n_in, n_out = sizes[module]
        lora_A[module] = torch.zeros(1, n, r, n_in, dtype=kind)
        lora_B[module] = torch.zeros(1, n, r, n_out, dtype=kind).mT
        ranks[module] = torch.zeros(1, n, dtype=torch.int32)
        for layer, pair in found.items():
            path = module.replace(LAYER, str(layer))
            rank = ranks[module][0, layer] = pair["A"].shape[0]
            lora_A[module][0, layer, :rank] = pair["A"]
            lora_B[module][0, layer, :, :rank] = folded(pair["B"], factors[path])
    return PeftAdapter(lora_A, lora_B, ranks, torch.tensor([own], dtype=torch.float32), partial)


def _sizes(layers: dict[str, dict[int, dict[str, Tensor]]], weights_path: Path) -> dict[str, tuple[int, int, int, int]]:
    """(layers, rank, in features, out features) of every module in the stack."""
    depths: dict[str | None, int] = {}
    for module, found in layers.items():
        depths[layer_list(module)] = max(depths.get(layer_list(module), 0), 1 + max(found))
    sizes, stored = {}, 0
    for module, found in layers.items():
        widths = {(pair["A"].shape[1], pair["B"].shape[0]) for pair in found.values()}
        if len(widths) != 1:
            raise AdapterError(f"{weights_path}: {module}: in/out features differ between layers: {sorted(widths)[:4]}")
        n_in, n_out = widths.pop()
        ranks = [pair["A"].shape[0] for pair in found.values()]
        sizes[module] = (depths[layer_list(module)], max(ranks), n_in, n_out)
        stored += sum(ranks) * (n_in + n_out)
    padded = sum(n * r * (n_in + n_out) for n, r, n_in, n_out in sizes.values())
    _check_share(stored, padded, str(weights_path))
    if padded > stored + MAX_PADDED:
        raise AdapterError(
            f"{weights_path}: expected layers and ranks that leave at most {MAX_PADDED} values of the stack empty, "
            f"got {stored} values for {padded}"
        )
    return sizes


def check_padding(adapters: Sequence[PeftAdapter], where: str) -> None:
    """AdapterError where ranks and layers of one adapter would make a stack of all much larger than what they hold."""
    held, widest = 0, {}
    for adapter in adapters:
        for path, a in adapter.lora_A.items():
            (_, n, r, n_in), n_out = a.shape, adapter.lora_B[path].shape[2]
            held += n * r * (n_in + n_out)
            most = widest.get(path, (0, 0, 0))
            widest[path] = max(most[0], n), max(most[1], r), n_in + n_out
    _check_share(held, len(adapters) * sum(n * r * width for n, r, width in widest.values()), where)


def _check_share(held: int, padded: int, where: str) -> None:
    if padded > MAX_PADDING * held:
        raise AdapterError(
            f"{where}: expected ranks and layers that fill at least 1/{MAX_PADDING} of the stack, got {held} values for "
            f"{padded}"
        )


def folded(B: Tensor, factor: float) -> Tensor:
    """``factor * B`` in float32 or ``B``'s wider dtype, so that the caller rounds once; ``B`` itself for a factor of 1."""
    return B if factor == 1 else B.to(torch.promote_types(B.dtype, torch.float32)) * factor


def _check_range(
    pairs: dict[str, dict[str, Tensor]], factors: dict[str, float], kind: torch.dtype, weights_path: Path
) -> None:
    # Even for a float64 file the limit is float32: adapters are written and served in narrower dtypes.
    narrowest = min(kind, torch.float32, key=lambda dtype: torch.finfo(dtype).max)
    for path, pair in pairs.items():
        for side, factor in (("A", 1.0), ("B", factors[path])):
            if not max_abs(pair[side]) * factor <= torch.finfo(narrowest).max:
                raise AdapterError(f"{weights_path}: {path}: values exceed the range of {narrowest}")


def _check_chosen(
    config: dict[str, Any], config_path: Path, pairs: dict[str, dict[str, Tensor]], weights_path: Path
) -> None:
    """Refuse matrices of modules that the configuration excludes: PEFT would not apply them."""
    layers = _layers_to_transform(config)
    targets, excluded = (config.get(field) for field in ("target_modules", "exclude_modules"))
    targets, excluded = (set(v) if isinstance(v, list) else None for v in (targets, excluded))
    for path in pairs:
        parts = path.split(".")
        ends = {".".join(parts[i:]) for i in range(len(parts))}
        number = next((int(part) for part in parts if part.isdecimal()), None)
        for field, contradicts in (
            ("target_modules", targets is not None and not ends & targets),
            ("exclude_modules", excluded is not None and bool(ends & excluded)),
            # PEFT takes a full path in target_modules whatever layers_to_transform says.
            ("layers_to_transform", bool(layers) and number not in layers and path not in (targets or ())),
        ):
            if contradicts:
                raise AdapterError(
                    f"{weights_path}: {short_repr(path)}: expected no matrices for it, since {field} in {config_path.name} "
                    f"leaves it out: {short_repr(config[field])}"
                )


def _check_config(config: Any, path: Path) -> bool:
    """Refuse anything but plain LoRA; returns whether the adapter may end before the last layer."""
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(config).__name__}")
    for field, allowed in _PLAIN.items():
        if config.get(field) not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise AdapterError(f"{path}: {field}: expected {expected} (plain LoRA), got {short_repr(config.get(field))}")
    unknown = [field for field, value in config.items() if field not in _PLAIN and field not in _OTHER and value]
    if unknown:  # as PEFT does: a later version may add fields that do not matter here
        warnings.warn(f"{path}: unknown fields are ignored: {short_repr(unknown)}", stacklevel=5)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, type(None))):
        raise AdapterError(f"{path}: base_model_name_or_path: expected a string or null, got {short_repr(base)}")
    positive_int(f"{path}: r", config.get("r"))
    positive_number(f"{path}: lora_alpha", config.get("lora_alpha"))
    numbers = _layers_to_transform(config)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_LAYERS for n in numbers):
        got = short_repr(config["layers_to_transform"])
        raise AdapterError(f"{path}: layers_to_transform: expected layers below {MAX_LAYERS}, got {got}")
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    for field, value in (("target_modules", targets), ("exclude_modules", excluded)):
        names = value if isinstance(value, list) else []
        if not isinstance(value, (str, list, type(None))) or not all(isinstance(name, str) for name in names):
            raise AdapterError(f"{path}: {field}: expected a string or a list of strings, got {short_repr(value)}")
    # A regular expression, an exclusion and full paths can each leave out layers.
    if isinstance(targets, list):
        chosen = any(LAYER in path_template(target) for target in targets)
    else:
        chosen = targets not in (None, "all-linear")
    return bool(numbers or excluded or chosen)


def _layers_to_transform(config: dict[str, Any]) -> list[Any]:
    layers = config.get("layers_to_transform")
    return layers if isinstance(layers, list) else [] if layers is None else [layers]


def _read_pairs(path: Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> ``{"A": [r, in], "B": [out, r]}``, sorted by path."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(read_safetensors(path, AdapterError).items()):
        if _TRAINING_KEY.fullmatch(key):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            reason = next((text for pattern, text in _REFUSED_KEYS if re.search(pattern, key, re.DOTALL)), None)
            reason = reason or f"expected a LoRA matrix '{PREFIX}*.lora_A|B.weight'"
            raise AdapterError(f"{path}: {short_repr(key)}: {reason}")
        if tensor.dim() != 2 or not tensor.numel():
            raise AdapterError(f"{path}: {short_repr(key)}: expected a matrix, got shape {short_repr(tuple(tensor.shape))}")
        pairs.setdefault(match["path"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterError(f"{path}: no LoRA matrices")
    for module, pair in pairs.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            got = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
            raise AdapterError(f"{path}: {short_repr(module)}: expected A [r, in] and B [out, r] of one rank, got {got}")
    return pairs


def _by_module(pairs: dict[str, dict[str, Tensor]], weights_path: Path) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Path with ``{layer}`` -> layer index -> matrices; a module outside the layers is layer 0."""
    layers: dict[str, dict[int, dict[str, Tensor]]] = {}
    for path, pair in pairs.items():
        module = path_template(path)
        error = "expected no braces" if "{" in path else path_error(module)
        number = next((part for part in path.split(".") if part.isdecimal()), "0")
        # Without leading zeros: "7" and "07" would both be layer 7.
        if error is None and (len(number) > 4 or str(int(number)) != number or int(number) >= MAX_LAYERS):
            error = f"expected a layer index below {MAX_LAYERS}"
        if error is not None:
            raise AdapterError(f"{weights_path}: {short_repr(path)}: {error}")
        layers.setdefault(module, {})[int(number)] = pair
    if len(layers) > MAX_MODULES:
        raise AdapterError(f"{weights_path}: expected at most {MAX_MODULES} modules a layer, got {len(layers)}")
    return layers


def _scalings(
    config: dict[str, Any], config_path: Path, pairs: dict[str, dict[str, Tensor]], weights_path: Path
) -> dict[str, float]:
    """Module path -> scaling by PEFT's rules; a rank other than the configuration's is an error."""
    patterns = {}
    for field, check in (("rank_pattern", positive_int), ("alpha_pattern", positive_number)):
        values = config.get(field)
        if not isinstance(values, (dict, type(None))):
            raise AdapterError(f"{config_path}: {field}: expected an object, got {short_repr(values)}")
        for pattern, value in (values or {}).items():
            check(f"{config_path}: {field}: {short_repr(pattern)}", value)
        try:
            patterns[field] = Patterns(values or {}, pairs)
        except ValueError as error:
            raise AdapterError(f"{config_path}: {field}: {error}") from None
    scalings = {}
    for path, pair in pairs.items():
        rank, stated = pair["A"].shape[0], patterns["rank_pattern"].find(path, config["r"])
        if rank != stated:  # PEFT would not load it, and others might divide by either rank
            raise AdapterError(
                f"{weights_path}: {short_repr(path)}: expected rank {short_repr(stated)} as r or rank_pattern in "
                f"{CONFIG_NAME} say, got {rank}"
            )
        alpha = patterns["alpha_pattern"].find(path, config["lora_alpha"])
        scalings[path] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scalings
