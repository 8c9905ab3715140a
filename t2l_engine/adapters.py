"""A stack of LoRA adapters: in memory, and as PEFT folders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine._files import read_safetensors, write_folder
from t2l_engine.config import ConfigError, read_json

#: Where a module lives inside a decoder layer, for adapters that were not read from a file that says so.
DEFAULT_PATHS = {
    name: f"model.layers.{{layer}}.{block}.{name}"
    for block, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    }.items()
    for name in names
}

_PEFT_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")
_PREFIX = "base_model.model."
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


class AdapterError(ValueError):
    """An adapter file or folder cannot be used; the message names file and field."""


class AdapterStack:
    """``len(stack)`` LoRA adapters for the same modules.

    Attributes:
        lora_A: per module name ``[num_adapters, num_layers, r, in_features]``.
        lora_B: per module name ``[num_adapters, num_layers, out_features, r]`` (may be a transposed view).
        scaling: ``[num_adapters]`` float32; delta W = scaling * B @ A.
        ranks: per module name ``[num_adapters, num_layers]`` int32, the true rank; 0 where an adapter lacks the module
            or the layer.  Entries of A and B beyond the rank mean nothing.
        paths: per module name its path in the base model with ``{layer}`` for the layer index.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; the message names the module.
    """

    def __init__(
        self,
        lora_A: dict[str, Tensor],
        lora_B: dict[str, Tensor],
        scaling: Tensor,
        ranks: dict[str, Tensor] | None = None,
        paths: dict[str, str] | None = None,
    ):
        if not lora_A or lora_A.keys() != lora_B.keys():
            raise ValueError(f"lora_A, lora_B: expected the same module names, got {sorted(lora_A)} and {sorted(lora_B)}")
        self.lora_A, self.lora_B, self.scaling = dict(lora_A), dict(lora_B), scaling
        if scaling.dim() != 1 or scaling.dtype != torch.float32:
            raise ValueError(f"scaling: expected float32 [num_adapters], got {scaling.dtype} {tuple(scaling.shape)}")
        for name, a in self.lora_A.items():
            b = self.lora_B[name]
            if a.dim() != 4 or b.dim() != 4 or a.shape[:2] != b.shape[:2] or a.shape[2] != b.shape[3]:
                raise ValueError(
                    f"{name}: expected lora_A [N, n, r, in] and lora_B [N, n, out, r], "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            if len(a) != len(scaling):
                raise ValueError(f"{name}: expected {len(scaling)} adapters as in scaling, got {len(a)}")
            if a.dtype != b.dtype or not a.is_floating_point() or not a.device == b.device == scaling.device:
                raise ValueError(
                    f"{name}: expected one floating-point dtype and one device, got lora_A {a.dtype} on {a.device}, "
                    f"lora_B {b.dtype} on {b.device}, scaling on {scaling.device}"
                )
        given = ranks is not None
        if ranks is None:
            ranks = {
                name: torch.full(a.shape[:2], a.shape[2], dtype=torch.int32, device=a.device)
                for name, a in self.lora_A.items()
            }
        self.ranks = dict(ranks)
        for name, a in self.lora_A.items():
            rank = self.ranks.get(name)
            if rank is None or rank.shape != a.shape[:2] or rank.dtype != torch.int32:
                raise ValueError(f"ranks: expected int32 {tuple(a.shape[:2])} for {name}, got {rank}")
            # Read on the host where that costs no device synchronisation.
            if given and rank.device.type == "cpu" and bool(((rank < 0) | (rank > a.shape[2])).any()):
                raise ValueError(f"ranks: expected values in [0, {a.shape[2]}] for {name}, got {rank}")
        self.paths = {}
        for name in self.lora_A:
            path = (paths or {}).get(name, DEFAULT_PATHS.get(name))
            if path is None or "{layer}" not in path:
                raise ValueError(f"paths: expected a path with '{{layer}}' for module {name!r}, got {path!r}")
            self.paths[name] = path

    def __len__(self) -> int:
        return len(self.scaling)

    def __repr__(self) -> str:
        modules = ", ".join(
            f"{name} {tuple(a.shape[1:])}/{tuple(self.lora_B[name].shape[2:])}" for name, a in self.lora_A.items()
        )
        dtype = next(iter(self.lora_A.values())).dtype
        return f"AdapterStack({len(self)} adapters, {dtype}, modules (n, r, in)/(out, r): {modules})"

    def __getitem__(self, index: int) -> AdapterStack:
        """The stack of one adapter; negative indices count from the end.  Raises IndexError out of range."""
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"index: expected an int, got {type(index).__name__}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected within [{-len(self)}, {len(self)}), got {index}")
        i = index % len(self)
        return self._map(lambda tensor: tensor[i : i + 1])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def _map(self, fn) -> AdapterStack:
        apply = lambda tensors: {name: fn(t) for name, t in tensors.items()}  # noqa: E731
        return AdapterStack(apply(self.lora_A), apply(self.lora_B), fn(self.scaling), apply(self.ranks), self.paths)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of A and B."""
        return next(iter(self.lora_A.values())).dtype

    @property
    def num_parameters(self) -> int:
        """Values of one adapter at full rank."""
        return sum(t[0].numel() for side in (self.lora_A, self.lora_B) for t in side.values())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> AdapterStack:
        """A stack on ``device`` with A and B in ``dtype`` (scaling stays float32)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device or tensor.device, dtype=dtype or tensor.dtype)

        cast = lambda tensors: {name: move(t) for name, t in tensors.items()}  # noqa: E731
        ranks = {name: t.to(device or t.device) for name, t in self.ranks.items()}
        scaling = self.scaling.to(device or self.scaling.device)
        return AdapterStack(cast(self.lora_A), cast(self.lora_B), scaling, ranks, self.paths)

    @staticmethod
    def cat(stacks: Sequence[AdapterStack]) -> AdapterStack:
        """One stack of all adapters.  Ranks and module sets may differ: narrower ranks are padded, missing modules get
        rank 0.  Raises ValueError when sizes of a module, dtypes or devices differ."""
        stacks = list(stacks)
        if not stacks:
            raise ValueError("stacks: expected at least one AdapterStack, got none")
        names = list(dict.fromkeys(name for s in stacks for name in s.lora_A))
        lora_A, lora_B, ranks, paths = {}, {}, {}, {}
        for name in names:
            holders = [s for s in stacks if name in s.lora_A]
            first = holders[0]
            a0, b0 = first.lora_A[name], first.lora_B[name]
            num_layers = max(s.lora_A[name].shape[1] for s in holders)
            r = max(s.lora_A[name].shape[2] for s in holders)
            paths[name] = first.paths[name]
            total = sum(len(s) for s in stacks)
            lora_A[name] = a0.new_zeros(total, num_layers, r, a0.shape[3])
            lora_B[name] = b0.new_zeros(total, num_layers, r, b0.shape[2]).mT
            ranks[name] = torch.zeros(total, num_layers, dtype=torch.int32, device=a0.device)
            at = 0
            for s in stacks:
                if name in s.lora_A:
                    a, b = s.lora_A[name], s.lora_B[name]
                    if a.shape[3] != a0.shape[3] or b.shape[2] != b0.shape[2] or s.paths[name] != paths[name]:
                        raise ValueError(
                            f"{name}: expected in/out features {a0.shape[3]}/{b0.shape[2]} at {paths[name]}, "
                            f"got {a.shape[3]}/{b.shape[2]} at {s.paths[name]}"
                        )
                    if a.dtype != a0.dtype or a.device != a0.device:
                        raise ValueError(f"{name}: expected {a0.dtype} on {a0.device}, got {a.dtype} on {a.device}")
                    rows, n = slice(at, at + len(s)), a.shape[1]
                    lora_A[name][rows, :n, : a.shape[2]] = a
                    lora_B[name][rows, :n, :, : a.shape[2]] = b
                    ranks[name][rows, :n] = s.ranks[name]
                at += len(s)
        return AdapterStack(lora_A, lora_B, torch.cat([s.scaling for s in stacks]), ranks, paths)

    # --- PEFT folders ----------------------------------------------------------------------------------------------

    def state_dict_peft(self, index: int) -> dict[str, Tensor]:
        """Adapter ``index`` under PEFT's tensor names, float32, each at its true rank."""
        one = self[index]
        state = {}
        for name, a in one.lora_A.items():
            for layer, rank in enumerate(one.ranks[name][0].tolist()):
                if rank:
                    key = f"{_PREFIX}{self.paths[name].format(layer=layer)}"
                    state[f"{key}.lora_A.weight"] = a[0, layer, :rank].detach().float().cpu().contiguous()
                    b = one.lora_B[name][0, layer, :, :rank]
                    state[f"{key}.lora_B.weight"] = b.detach().float().cpu().contiguous()
        return state

    def save_pretrained(self, directory: str | Path, adapter: int = 0, base_model_name_or_path: str | None = None) -> None:
        """Write adapter ``adapter`` as a PEFT folder with the scaling baked in (``lora_alpha = scaling * r``).

        An adapter already in ``directory`` is replaced only when the new files are complete.
        Raises OSError when the folder cannot be written, IndexError for an adapter out of range.
        """
        state = self.state_dict_peft(adapter)
        scaling = float(self.scaling[adapter])
        rank_of = {
            key.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): tensor.shape[0]
            for key, tensor in state.items()
            if key.endswith(".lora_A.weight")
        }
        if not rank_of:
            raise ValueError(f"adapter {adapter} adapts no module: all its ranks are 0")
        if not math.isfinite(scaling) or scaling <= 0:
            raise ValueError(f"scaling: expected a positive number for adapter {adapter}, got {scaling}")
        r = max(rank_of.values())
        layers = {name: sorted(_layers_of(self.paths[name], rank_of)) for name in self.lora_A}
        covered = {tuple(v) for v in layers.values() if v}
        num_layers = max(a.shape[1] for a in self.lora_A.values())
        complete = covered == {tuple(range(num_layers))}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name_or_path,
            "r": r,
            "lora_alpha": scaling * r,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            # A full path for every module where some layers lack one: PEFT would otherwise create what is not there.
            "target_modules": sorted(n for n, v in layers.items() if v) if complete else sorted(rank_of),
            "rank_pattern": {path: rank for path, rank in sorted(rank_of.items()) if rank != r},
            "alpha_pattern": {path: scaling * rank for path, rank in sorted(rank_of.items()) if rank != r},
        }
        write_folder(Path(directory), WEIGHTS_NAME, state, CONFIG_NAME, dict(sorted(config.items())))

    @staticmethod
    def from_peft(directories: Sequence[str | Path], dtype: torch.dtype | None = None) -> AdapterStack:
        """Read PEFT LoRA folders (safetensors) into one stack; ranks, modules and scalings may differ between folders.

        ``dtype``: of A and B, None = as stored.  Raises FileNotFoundError for a missing folder or file and AdapterError for
        what is no plain LoRA (DoRA, trained biases, ``modules_to_save``, other PEFT types), naming file and field.
        """
        if isinstance(directories, (str, Path)):
            directories = [directories]
        return AdapterStack.cat([_read_peft(Path(d), dtype) for d in directories])


def _layers_of(path: str, rank_of: dict[str, int]) -> list[int]:
    before, after = path.split("{layer}")
    found = (re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), p) for p in rank_of)
    return [int(m.group(1)) for m in found if m]


def _pattern_value(patterns: dict, path: str, default: float) -> float:
    """PEFT's rule: a pattern names a module when it equals the path or ends it after a dot (regular expressions)."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _check_patterns(patterns: Any, config_path: Path) -> None:
    try:
        good = all(not isinstance(v, bool) and v > 0 and re.compile(p) for p, v in patterns.items())
    except (AttributeError, TypeError, re.error):
        good = False
    if not good:
        raise AdapterError(f"{config_path}: alpha_pattern: expected positive numbers by module pattern, got {patterns!r}")


def _read_peft(directory: Path, dtype: torch.dtype | None) -> AdapterStack:
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; expected a PEFT folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        config = read_json(config_path)
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{config_path}: expected a JSON object, got {type(config).__name__}")
    plain = {
        "peft_type": ("LORA",),
        "use_dora": (None, False),
        "bias": (None, "none"),
        "modules_to_save": (None, []),
        "fan_in_fan_out": (None, False),
        "trainable_token_indices": (None, []),
        "lora_bias": (None, False),
        "layer_replication": (None, []),
        "alora_invocation_tokens": (None, []),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise AdapterError(f"{config_path}: {field}: expected {allowed[-1]!r} (plain LoRA), got {config.get(field)!r}")
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise AdapterError(f"{config_path}: {field}: expected a positive number, got {value!r}")
    # These change the base weights too: the stored A and B alone are not the adapter.
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(f"{config_path}: init_lora_weights: expected plain LoRA, got {config['init_lora_weights']!r}")
    alphas = config.get("alpha_pattern") or {}
    _check_patterns(alphas, config_path)
    state = read_safetensors(weights_path, AdapterError)

    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _PEFT_KEY.match(key)
        if match is None or tensor.dim() != 2:
            raise AdapterError(f"{weights_path}: {key}: expected a LoRA matrix 'base_model.model.*.lora_A|B.weight'")
        pairs.setdefault(match["path"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterError(f"{weights_path}: no LoRA matrices")

    entries: dict[str, dict[int, tuple[Tensor, Tensor, float]]] = {}
    paths: dict[str, str] = {}
    for path, pair in sorted(pairs.items()):
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            got = {side: tuple(t.shape) for side, t in pair.items()}
            raise AdapterError(f"{weights_path}: {path}: expected A [r, in] and B [out, r] of one rank, got {got}")
        parts = path.split(".")
        indices = [i for i, part in enumerate(parts) if part.isdigit()]
        if len(indices) != 1:
            raise AdapterError(f"{weights_path}: {path}: expected exactly one layer index in the module path")
        name, layer = parts[-1], int(parts[indices[0]])
        generic = ".".join("{layer}" if i == indices[0] else p for i, p in enumerate(parts))
        if paths.setdefault(name, generic) != generic:
            raise AdapterError(f"{weights_path}: {name}: expected one path a module, got {paths[name]} and {generic}")
        rank = pair["A"].shape[0]
        alpha = _pattern_value(alphas, path, config["lora_alpha"])
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        entries.setdefault(name, {})[layer] = (pair["A"], pair["B"], scaling)

    scalings = [s for layers in entries.values() for _, _, s in layers.values()]
    own = max(set(scalings), key=scalings.count)
    num_layers = 1 + max(layer for layers in entries.values() for layer in layers)
    lora_A, lora_B, ranks = {}, {}, {}
    for name, layers in entries.items():
        a0, b0, _ = next(iter(layers.values()))
        r = max(a.shape[0] for a, _, _ in layers.values())
        kind = dtype or a0.dtype
        lora_A[name] = torch.zeros(1, num_layers, r, a0.shape[1], dtype=kind)
        lora_B[name] = torch.zeros(1, num_layers, r, b0.shape[0], dtype=kind).mT
        ranks[name] = torch.zeros(1, num_layers, dtype=torch.int32)
        for layer, (a, b, scaling) in layers.items():
            if a.shape[1] != a0.shape[1] or b.shape[0] != b0.shape[0]:
                raise AdapterError(f"{weights_path}: {name} layer {layer}: features differ from those of other layers")
            rank = a.shape[0]
            lora_A[name][0, layer, :rank] = a
            lora_B[name][0, layer, :, :rank] = b if scaling == own else b * (scaling / own)
            ranks[name][0, layer] = rank
    return AdapterStack(lora_A, lora_B, torch.tensor([own], dtype=torch.float32), ranks, paths)
