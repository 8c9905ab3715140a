"""Checkpoint folders: the native form, and the reference's (SakanaAI/text-to-lora).

Native: ``config.json`` (a ``HyperNetworkConfig`` under "hypernetwork", with optional "encoder", "base_model" and "training"
blocks) and ``hypernet.safetensors``, whose keys are the parameter names of :class:`HyperNetwork`.
Reference: ``hypermod.pt``, ``args.yaml``, ``adapter_config.json``.  Structure comes from the tensors; the flags are compared
with them and a contradiction is an error.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import config as cfg
from t2l_engine._files import read_safetensors, write_folder
from t2l_engine.config import ConfigError, EncoderConfig, HyperNetworkConfig
from t2l_engine.hypernetwork import HyperNetwork, Offsets

CONFIG_NAME, WEIGHTS_NAME = "config.json", "hypernet.safetensors"
REFERENCE_NAMES = ("hypermod.pt", "args.yaml", "adapter_config.json")
FORMAT = "t2l_engine.hypernetwork.v1"
BLOCKS = ("encoder", "base_model", "training")
STD_EPS = 1e-10  # the reference's un-normalisation adds it to the standard deviation


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names the file and the key."""


def load(
    folder: Path,
    *,
    scaling: str | float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    module_order: list[str] | None = None,
) -> HyperNetwork:
    """See :meth:`HyperNetwork.from_pretrained`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if (folder / CONFIG_NAME).is_file():
        net = _load_native(folder)
    elif (folder / REFERENCE_NAMES[0]).is_file():
        net = _load_reference(folder, module_order)
    else:
        raise FileNotFoundError(
            f"{folder}: holds neither {CONFIG_NAME} (native form) nor {REFERENCE_NAMES[0]} (reference form)"
        )
    if module_order is not None and tuple(module_order) != net.config.modules:
        raise CheckpointError(f"module_order: expected {list(net.config.modules)} as in {folder}, got {list(module_order)}")
    if scaling is not None:
        values = cfg.to_json(net.config) | {"scaling": scaling}
        net.config = cfg.from_json(HyperNetworkConfig, values, "from_pretrained")
    if dtype is not None:
        net.set_dtype(dtype)
    return net.to(device).eval()


# --- native form ---------------------------------------------------------------------------------------------------


def _native_blocks(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    blocks = cfg.read_json(path)
    if not isinstance(blocks, dict) or blocks.get("format") != FORMAT:
        got = blocks.get("format") if isinstance(blocks, dict) else type(blocks).__name__
        raise CheckpointError(f"{path}: format: expected {FORMAT!r}, got {got!r}")
    unknown = set(blocks) - {"format", "hypernetwork", *BLOCKS}
    if unknown or "hypernetwork" not in blocks:
        raise CheckpointError(f"{path}: expected blocks 'hypernetwork' and some of {BLOCKS}, got {sorted(blocks)}")
    return blocks


def encoder_config(folder: Path) -> EncoderConfig | None:
    """The text encoder a native checkpoint was trained with, or None where the folder does not say."""
    block = describe(folder).get("encoder")
    return None if block is None else cfg.from_json(EncoderConfig, block, f"{folder / CONFIG_NAME}: encoder")


def describe(folder: Path) -> dict[str, Any]:
    """The extra blocks of a native checkpoint's ``config.json``; none for a folder in the reference's form."""
    if not (folder / CONFIG_NAME).is_file():
        return {}
    return {key: value for key, value in _native_blocks(folder).items() if key in BLOCKS}


def _load_native(folder: Path) -> HyperNetwork:
    blocks = _native_blocks(folder)
    config = cfg.from_json(HyperNetworkConfig, blocks["hypernetwork"], f"{folder / CONFIG_NAME}: hypernetwork")
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    return _build(config, read_safetensors(path, CheckpointError), path)


def save(net: HyperNetwork, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """See :meth:`HyperNetwork.save_pretrained`."""
    unknown = set(metadata or {}) - set(BLOCKS)
    if unknown:
        raise ValueError(f"metadata: expected some of {BLOCKS}, got {sorted(unknown)}")
    blocks = {"format": FORMAT, "hypernetwork": cfg.to_json(net.config), **(metadata or {})}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in net.state_dict().items()}
    write_folder(folder, WEIGHTS_NAME, state, CONFIG_NAME, blocks)


def _build(
    config: HyperNetworkConfig, state: dict[str, Tensor], path: Path, name_of: Callable[[str], str] = str
) -> HyperNetwork:
    """A hypernetwork of ``config`` that holds exactly ``state``; every difference is an error that names its keys.

    ``name_of``: a key as the file spells it.
    """
    offsets: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "offsets" and len(parts) == 3 and parts[1] in config.modules and parts[2] in Offsets.NAMES:
            offsets.setdefault(parts[1], {})[parts[2]] = tensor
    with torch.device("meta"):
        net = HyperNetwork(config)
    for name, tensors in offsets.items():
        i = config.modules.index(name)
        for key, tensor in tensors.items():
            rest = (config.rank, config.in_features[i]) if key.endswith("A") else (config.out_features[i], config.rank)
            _expect_shape(path, f"offsets.{name}.{key}", tensor, (config.num_layers, *rest))
            setattr(net.offsets[name], key, tensor)
    wanted = net.state_dict()
    missing, extra = (sorted(map(name_of, keys)) for keys in (wanted.keys() - state.keys(), state.keys() - wanted.keys()))
    if missing or extra:
        raise CheckpointError(f"{path}: missing keys {missing}, unexpected keys {extra}")
    for key, tensor in state.items():
        _expect_shape(path, name_of(key), tensor, tuple(wanted[key].shape))
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name_of(key)}: expected floating point, got {tensor.dtype}")
    net.load_state_dict(state, assign=True)
    return net


def _expect_shape(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key}: expected shape {shape}, got {tuple(tensor.shape)}")


# --- the reference's form ------------------------------------------------------------------------------------------

#: Prefix in the reference's state_dict -> parameter prefix here.
_RENAMED = {
    "task_encoder.mlp.0.": "task_encoder.linear.",
    "task_encoder.mlp.1.": "task_encoder.norm.",
    "layer_depth_encoder.0.": "depth_emb.",
    "layer_depth_encoder.1.": "depth_emb.norm.",
    "layer_type_encoder.0.": "module_emb.",
    "layer_type_encoder.1.": "module_emb.norm.",
    "mixer.1.": "mixer.linear1.",
    "mixer.4.": "mixer.linear2.",
    "mlp1.mlp.0.": "mlp1.norm.",
    "mlp1.mlp.1.": "mlp1.linear1.",
    "mlp1.mlp.4.": "mlp1.linear2.",
    "mlp2.mlp.0.": "mlp2.norm.",
    "mlp2.mlp.1.": "mlp2.linear1.",
    "mlp2.mlp.4.": "mlp2.linear2.",
    "mlp3.0.": "mlp3.norm.",
    "mlp3.1.": "mlp3.linear1.",
    "mlp3.4.": "mlp3.linear2.",
    "pos_emb.0.": "pos_emb.",
    "pos_emb.1.": "pos_emb.norm.",
    "out_emb_norm.": "side_emb.norm.",
    "heads.": "heads.",
}


def _reference_name(key: str) -> str:
    """Native ``key`` as the reference spells it."""
    prefix = max((p for p in _RENAMED.values() if key.startswith(p)), key=len, default="")
    old = next((old for old, new in _RENAMED.items() if new == prefix), "")
    return old + key[len(prefix) :]


_DICTIONARIES = ("AB_offset", "mean_recon_target", "std_recon_target")


def _load_reference(folder: Path, module_order: list[str] | None) -> HyperNetwork:
    import yaml

    weights, args_path, peft_path = (folder / name for name in REFERENCE_NAMES)
    # Intermediate checkpoints sit in checkpoints/it_<step>/, their configuration in the folder above "checkpoints".
    if not args_path.is_file() and folder.parent.name == "checkpoints":
        args_path, peft_path = (folder.parent.parent / name for name in REFERENCE_NAMES[1:])
    for path in (args_path, peft_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found")
    try:
        args = yaml.safe_load(args_path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{args_path}: not plain YAML: {error}") from None
    peft = cfg.read_json(peft_path)
    for path, value in ((args_path, args), (peft_path, peft)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: expected a mapping, got {type(value).__name__}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{weights}: not a plain tensor file: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{weights}: expected a state_dict of tensors")
    config, native = translate(state, args, peft, weights, args_path, peft_path, module_order)
    return _build(config, native, weights, _reference_name)


def _in_order(keys: list[str], prefix: str) -> list[str]:
    """Distinct module names of keys ``<prefix>.<module>...`` in file order."""
    return list(dict.fromkeys(k.split(".")[1] for k in keys if k.startswith(prefix + ".") and k.count(".") >= 2))


def translate(
    state: dict[str, Tensor],
    args: dict[str, Any],
    peft: dict[str, Any],
    weights: Path,
    args_path: Path,
    peft_path: Path,
    module_order: list[str] | None = None,
) -> tuple[HyperNetworkConfig, dict[str, Tensor]]:
    """Configuration and native state of a reference checkpoint."""
    keys = list(state)
    modules = _in_order(keys, "heads")
    if not modules:
        raise CheckpointError(f"{weights}: missing keys heads.<module>.weight")
    sides = _in_order(keys, "out_emb")
    if sides and sides != modules:
        raise CheckpointError(f"{weights}: module order of heads {modules} and of out_emb {sides} disagree")
    if module_order is not None:
        if sorted(module_order) != sorted(modules):
            raise CheckpointError(f"module_order: expected an order of {modules}, got {list(module_order)}")
        modules = list(module_order)

    def take(key: str) -> Tensor:
        if key not in state:
            raise CheckpointError(f"{weights}: missing key {key}")
        return state[key]

    if any(k.startswith("task_encoder.") for k in keys) and "task_encoder.mlp.1.weight" not in state:
        raise CheckpointError(
            f"{weights}: task_encoder: expected the linear encoder's keys (mlp.0, mlp.1), got another encoder"
        )
    offsets_A = [take(f"AB_offset.A.{name}") for name in modules]
    offsets_B = [take(f"AB_offset.B.{name}") for name in modules]
    for name, a, b in zip(modules, offsets_A, offsets_B, strict=True):
        if a.dim() != 3 or b.dim() != 3 or a.shape[:2] != (b.shape[0], b.shape[2]) or a.shape[:2] != offsets_A[0].shape[:2]:
            raise CheckpointError(
                f"{weights}: AB_offset of {name}: expected A (n, r, in) and B (n, out, r), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    num_layers, rank = offsets_A[0].shape[:2]
    in_features = [a.shape[2] for a in offsets_A]
    out_features = [b.shape[1] for b in offsets_B]
    task_linear = take("task_encoder.mlp.0.weight")
    depth = take("layer_depth_encoder.0.weight")
    mlp3 = take("mlp3.4.weight")
    variant = _variant(state, args, modules, rank, in_features, out_features, weights, args_path)
    task = args.get("training_task", "sft")
    if task not in ("sft", "recon"):
        raise CheckpointError(f"{args_path}: training_task: expected 'sft' or 'recon', got {task!r}")
    factorized, z_scores = bool(args.get("factorized", False)), bool(args.get("pred_z_score", True))
    if task == "recon" and z_scores and not factorized:
        raise CheckpointError(
            f"{args_path}: pred_z_score with factorized=false: the reference does not define generation for it"
        )
    z_scores = z_scores and task == "recon"
    bias = f"heads.{modules[0]}.bias" in state
    expected_bias = (task == "sft" and not args.get("mt_lora_path")) or (task == "recon" and not z_scores)
    if bias != expected_bias:
        raise CheckpointError(
            f"{weights}: heads.{modules[0]}.bias: expected {'present' if expected_bias else 'absent'} for training_task="
            f"{task}, mt_lora_path={args.get('mt_lora_path')!r}, pred_z_score={args.get('pred_z_score')!r}"
        )
    _check_peft(peft, modules, rank, peft_path, warn=task == "sft")
    latent_size = 2 * task_linear.shape[0]
    for field, got in (("hypernet_latent_size", latent_size), ("head_in_size", mlp3.shape[0])):
        value = args.get(field, got)
        # The tensors know half of the latent size.
        same = isinstance(value, int) and (value == got or (field == "hypernet_latent_size" and value == got + 1))
        if not same:
            raise CheckpointError(f"{args_path}: {field}: {value!r} contradicts the tensors, which say {got}")
    delta_scale = args.get("delta_w_scaling", 10000)
    lora_alpha = peft.get("lora_alpha")
    for path, field, value in ((args_path, "delta_w_scaling", delta_scale), (peft_path, "lora_alpha", lora_alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{path}: {field}: expected a positive number, got {value!r}")
    config = HyperNetworkConfig(
        variant=variant,
        modules=tuple(modules),
        in_features=tuple(in_features),
        out_features=tuple(out_features),
        num_layers=num_layers,
        rank=rank,
        embed_dim=task_linear.shape[1],
        latent_size=args.get("hypernet_latent_size", latent_size),
        head_in_size=mlp3.shape[0],
        lora_alpha=float(lora_alpha),
        scaling="rslora" if peft.get("use_rslora") else "plain",
        head_bias=bias,
        output_scale=1.0 if task == "sft" or factorized else delta_scale**-0.5,
    )
    if depth.shape[1:] != (config.embedding_width,):
        raise CheckpointError(
            f"{weights}: layer_depth_encoder.0.weight: expected width {config.embedding_width}, got {tuple(depth.shape)}"
        )
    native = _rename(state, modules, z_scores, add_offset=task == "sft" or factorized, width=config.width, weights=weights)
    return config, native


def _variant(
    state: dict[str, Tensor],
    args: dict[str, Any],
    modules: list[str],
    rank: int,
    in_features: list[int],
    out_features: list[int],
    weights: Path,
    args_path: Path,
) -> str:
    """Variant from the tensors, compared with the flags; the flags settle rank 1, where shapes agree."""
    shared = any(k.startswith("out_emb.") for k in state)
    learnable = "pos_emb.0.weight" in state
    flags = {k: bool(args.get(k, False)) for k in ("shared_AB_head", "autoreg_gen", "learnable_pos_emb")}
    rows = state.get(f"heads.{modules[0]}.weight", torch.empty(0)).shape[0]
    n_in, n_out = in_features[0], out_features[0]
    per_rank = max(n_in, n_out) if shared else n_in + n_out
    possible = {autoreg for autoreg, expected in ((False, rank * per_rank), (True, per_rank)) if rows == expected}
    if not possible:
        raise CheckpointError(
            f"{weights}: heads.{modules[0]}.weight: expected {rank * per_rank} or {per_rank} rows for rank {rank}, "
            f"in {n_in}, out {n_out}, got {rows}"
        )
    autoreg = flags["autoreg_gen"] if len(possible) == 2 else possible.pop()
    found = {"shared_AB_head": shared, "autoreg_gen": autoreg}
    if autoreg:
        found["learnable_pos_emb"] = learnable
    for name, value in found.items():
        if flags[name] != value:
            raise CheckpointError(
                f"{args_path}: {name}: {flags[name]} contradicts the tensors in {weights.name}, which say {value}"
            )
    if not shared:
        if autoreg:
            raise CheckpointError(f"{weights}: unshared autoregressive heads are not supported; supported: {cfg.VARIANTS}")
        return "L"
    return "M" if not autoreg else "S-learnable" if learnable else "S-rotary"


def _check_peft(peft: dict[str, Any], modules: list[str], rank: int, path: Path, warn: bool) -> None:
    if peft.get("r") != rank:
        raise CheckpointError(f"{path}: r: expected {rank} as in the tensors, got {peft.get('r')!r}")
    targets = peft.get("target_modules")
    if not isinstance(targets, list) or sorted(map(str, targets)) != sorted(modules):
        raise CheckpointError(f"{path}: target_modules: expected {sorted(modules)} in any order, got {targets!r}")
    if warn and targets != modules:
        warnings.warn(
            f"{path}: target_modules lists {targets}, the tensors say rows belong to {modules}; the tensors are followed",
            stacklevel=4,
        )


def _rename(
    state: dict[str, Tensor], modules: list[str], z_scores: bool, *, add_offset: bool, width: int, weights: Path
) -> dict[str, Tensor]:
    """Reference keys to native ones; missing and unknown keys and wrong shapes of what is not renamed are errors."""
    known = {f"{d}.{s}.{m}" for d in _DICTIONARIES for s in "AB" for m in modules}
    if any(k.startswith("out_emb.") for k in state):
        known |= {f"out_emb.{m}.{s}" for s in "AB" for m in modules}
    native: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        prefix = next((p for p in _RENAMED if key.startswith(p)), None)
        if prefix is not None:
            native[_RENAMED[prefix] + key[len(prefix) :]] = tensor
        elif key not in known:
            unknown.append(key)
    if unknown:
        raise CheckpointError(f"{weights}: unexpected keys {sorted(unknown)}")
    missing = sorted(known - state.keys())
    if missing:
        raise CheckpointError(f"{weights}: missing keys {missing}")
    for key in sorted(known):
        if key.startswith("out_emb."):
            shape = (width,)
        else:
            shape = tuple(state["AB_offset." + key.split(".", 1)[1]].shape)
        _expect_shape(weights, key, state[key], shape)
    if f"out_emb.{modules[0]}.A" in known:
        native["side_emb.weight"] = torch.stack(
            [torch.stack([state[f"out_emb.{m}.A"], state[f"out_emb.{m}.B"]]) for m in modules]
        )
    for name in modules:
        for side in "AB":
            offset = state[f"AB_offset.{side}.{name}"]
            add = offset if add_offset else torch.zeros_like(offset)
            if z_scores:
                native[f"offsets.{name}.mul_{side}"] = state[f"std_recon_target.{side}.{name}"] + STD_EPS
                add = state[f"mean_recon_target.{side}.{name}"] + add
            if bool(add.any()):
                native[f"offsets.{name}.add_{side}"] = add
    return native
