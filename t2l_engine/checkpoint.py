"""Checkpoint folders: the native form, and the reference's (SakanaAI/text-to-lora, see :mod:`t2l_engine.reference_format`).

Native: ``config.json`` (a ``HyperNetworkConfig`` under "hypernetwork", with optional "encoder", "base_model", "training" and
"reference" blocks) and ``hypernet.safetensors``, whose keys are the parameter names of :class:`HyperNetwork`.  Keys under
``reference.`` are tensors of a converted reference file that generation ignores; they are kept for the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import config as cfg
from t2l_engine._files import check_dtype, read_safetensors, write_folder
from t2l_engine.checkpoint_folder import (
    BLOCKS,
    CONFIG_NAME,
    FORMAT,
    WEIGHTS_NAME,
    CheckpointError,
    form,
    native_blocks,
    stated_encoder,
)
from t2l_engine.config import ConfigError, EncoderConfig, HyperNetworkConfig, OneHotConfig, shown
from t2l_engine.hypernetwork import HyperNetwork, Offsets
from t2l_engine.prompts import CHAT, checked_form

UNUSED_PREFIX = "reference."
MAX_PARAMETERS = 1 << 40  # beyond what any file here can hold, and within what torch can describe


@dataclasses.dataclass
class Contents:
    """What a folder of either form says.

    ``state``: native keys; ``unused``: tensors of a reference file that generation ignores, under the reference's keys;
    ``blocks``: the optional blocks of ``config.json``; ``name_of``: a native key as the file spells it.
    """

    config: HyperNetworkConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor]
    blocks: dict[str, Any]
    path: Path
    name_of: Callable[[str], str] = str


def read(folder: Path, module_order: list[str] | None = None) -> Contents:
    """Everything a checkpoint folder says, checked; nothing in it is executed."""
    native = form(folder) == "native"
    try:
        if native:
            return _read_native(folder, module_order)
        from t2l_engine import reference_format

        return reference_format.read(folder, module_order)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def load(
    folder: Path,
    *,
    scaling: str | float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    module_order: list[str] | None = None,
) -> HyperNetwork:
    """See :meth:`HyperNetwork.from_pretrained`."""
    contents = read(folder, module_order)
    net = build(contents)
    contents.state.clear()  # so that casting frees each tensor as it goes
    if scaling is not None:
        values = cfg.to_json(net.config) | {"scaling": scaling}
        net.config = cfg.from_json(HyperNetworkConfig, values, "from_pretrained")
    if dtype is None:
        dtypes = {layer.weight.dtype for layer in net.modules() if isinstance(layer, torch.nn.Linear)}
        if len(dtypes) > 1:
            got = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"{contents.path}: expected matrices of one dtype, got {got}; pass dtype to cast them")
        dtype = net.dtype
    check_dtype(dtype)
    try:
        net.set_dtype(dtype)
    except ValueError as error:
        raise CheckpointError(f"{contents.path}: {error}") from None
    return net.to(device).eval()


def encoder_config(folder: Path) -> EncoderConfig | OneHotConfig | None:
    """The text encoder a checkpoint was trained with, or None where it does not say.

    Raises ConfigError where the reference's arguments name an encoder whose pooling is not known (UndefinedEncoder).
    """
    if form(folder) == "native":
        return stated_encoder(native_blocks(folder), folder / CONFIG_NAME)
    from t2l_engine import reference_format

    return reference_format.encoder_config(folder)


def describe(folder: Path) -> dict[str, Any]:
    """The extra blocks of a checkpoint: of ``config.json``, or what a reference folder says of base model and training."""
    if form(folder) == "native":
        return {key: value for key, value in native_blocks(folder).items() if key in BLOCKS}
    from t2l_engine import reference_format

    return reference_format.describe(folder)


def prompt_form(folder: Path) -> str:
    """How prompts show an input to the adapted model: as in training; the chat template unless it says."""
    training = describe(folder).get("training") or {}
    return checked_form(training.get("prompt_form", CHAT), folder)


# --- native form ---------------------------------------------------------------------------------------------------


def _read_native(folder: Path, module_order: list[str] | None) -> Contents:
    blocks = native_blocks(folder)
    config = cfg.from_json(HyperNetworkConfig, blocks["hypernetwork"], f"{folder / CONFIG_NAME}: hypernetwork")
    if module_order is not None and list(module_order) != list(config.modules):
        raise CheckpointError(
            f"module_order: expected {list(config.modules)} as {folder / CONFIG_NAME} states, got {shown(module_order)}; "
            "another order can only be given to a reference folder"
        )
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    # Copied out of the mapped file: what was checked cannot change any more, and torch aligns its own memory.  Its products
    # may round by alignment; so a checkpoint gives the same adapters in either form.
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path, CheckpointError).items()}
    unused = {k.removeprefix(UNUSED_PREFIX): t for k, t in tensors.items() if k.startswith(UNUSED_PREFIX)}
    state = {k: t for k, t in tensors.items() if not k.startswith(UNUSED_PREFIX)}
    return Contents(config, state, unused, {k: v for k, v in blocks.items() if k in BLOCKS}, path)


def save(net: HyperNetwork, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """See :meth:`HyperNetwork.save_pretrained`."""
    unknown = set(metadata or {}) - set(BLOCKS)
    if unknown:
        raise ValueError(f"metadata: expected some of {BLOCKS}, got {sorted(unknown)}")
    write_native(folder, Contents(net.config, net.state_dict(), {}, metadata or {}, folder))


def write_native(folder: Path, contents: Contents) -> None:
    """Write ``contents`` as a native folder; CheckpointError where its blocks are larger than readers accept."""
    blocks = {"format": FORMAT, "hypernetwork": cfg.to_json(contents.config), **contents.blocks}
    state = contents.state | {UNUSED_PREFIX + key: tensor for key, tensor in contents.unused.items()}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    try:
        write_folder(folder, WEIGHTS_NAME, state, CONFIG_NAME, blocks)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def build(contents: Contents) -> HyperNetwork:
    """The hypernetwork that holds exactly ``contents.state``; every difference is an error that names its keys."""
    config, state, path, name_of = contents.config, contents.state, contents.path, contents.name_of
    if config.num_parameters > MAX_PARAMETERS:
        raise CheckpointError(f"{path}: the configuration asks for {config.num_parameters} parameters")
    try:
        with torch.device("meta"):
            net = HyperNetwork(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "offsets" and len(parts) == 3 and parts[1] in config.modules and parts[2] in Offsets.NAMES:
            i = config.modules.index(parts[1])
            shape = (config.rank, config.in_features[i]) if key.endswith("A") else (config.out_features[i], config.rank)
            expect_shape(path, name_of(key), tensor, (config.num_layers, *shape))
            if parts[2].startswith("std") and bool((tensor < 0).any()):
                raise CheckpointError(f"{path}: {name_of(key)}: expected standard deviations of 0 or more")
            setattr(net.offsets[parts[1]], parts[2], tensor)
    wanted = net.state_dict()
    missing, extra = (sorted(map(name_of, keys)) for keys in (wanted.keys() - state.keys(), state.keys() - wanted.keys()))
    if missing or extra:
        raise CheckpointError(f"{path}: missing keys {shown(missing)}, unexpected keys {shown(extra)}")
    for key, tensor in state.items():
        expect_shape(path, name_of(key), tensor, tuple(wanted[key].shape))
    net.load_state_dict(state, assign=True)
    return net


def expect_shape(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key}: expected shape {shape}, got {shown(tuple(tensor.shape))}")
