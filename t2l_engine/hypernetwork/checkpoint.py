"""Checkpoint folders: the native form, and the reference's (SakanaAI/text-to-lora, see :mod:`.sakana`).

Native: ``config.json`` (a ``HyperNetworkConfig`` under "hypernetwork", with optional "encoder", "base_model", "training" and
"reference" blocks) and ``hypernet.safetensors``, whose keys are the parameter names of :class:`HyperNetwork`.  Keys under
``reference.`` are tensors of a converted reference file that generation ignores; they are kept for the way back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.files.weights import read_safetensors, write_folder
from t2l_engine.hypernetwork import sakana
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.contents import UNUSED_PREFIX, Contents
from t2l_engine.hypernetwork.folder import (
    BLOCKS,
    CONFIG_NAME,
    FORMAT,
    WEIGHTS_NAME,
    CheckpointError,
    form,
    native_blocks,
    stated_encoder,
)
from t2l_engine.text.config import EncoderConfig, OneHotConfig
from t2l_engine.text.prompts import CHAT, checked_form


def read(folder: Path, module_order: list[str] | None = None) -> Contents:
    """Everything a checkpoint folder says, checked; nothing in it is executed."""
    native = form(folder) == "native"
    try:
        if native:
            return _read_native(folder, module_order)
        return sakana.read(folder, module_order)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def encoder_config(folder: Path) -> EncoderConfig | OneHotConfig | None:
    """The text encoder a checkpoint was trained with, or None where it does not say.

    Raises ConfigError where the reference's arguments name an encoder whose pooling is not known (UndefinedEncoder).
    """
    if form(folder) == "native":
        return stated_encoder(native_blocks(folder), folder / CONFIG_NAME)
    return sakana.encoder_config(folder)


def describe(folder: Path) -> dict[str, Any]:
    """The extra blocks of a checkpoint: of ``config.json``, or what a reference folder says of base model and training."""
    if form(folder) == "native":
        return {key: value for key, value in native_blocks(folder).items() if key in BLOCKS}
    return sakana.describe(folder)


def prompt_form(folder: Path) -> str:
    """How prompts show an input to the adapted model: as in training; the chat template unless it says."""
    training = describe(folder).get("training") or {}
    return checked_form(training.get("prompt_form", CHAT), folder)


# --- native form ---------------------------------------------------------------------------------------------------


def _read_native(folder: Path, module_order: list[str] | None) -> Contents:
    blocks = native_blocks(folder)
    config = from_json(HyperNetworkConfig, blocks["hypernetwork"], f"{folder / CONFIG_NAME}: hypernetwork")
    if module_order is not None and list(module_order) != list(config.modules):
        raise CheckpointError(
            f"module_order: expected {list(config.modules)} as {folder / CONFIG_NAME} states, "
            f"got {short_repr(module_order)}; "
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


def write_native(folder: Path, contents: Contents) -> None:
    """Write ``contents`` as a native folder; CheckpointError where its blocks are larger than readers accept."""
    blocks = {"format": FORMAT, "hypernetwork": to_json(contents.config), **contents.blocks}
    state = contents.state | {UNUSED_PREFIX + key: tensor for key, tensor in contents.unused.items()}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    try:
        write_folder(folder, WEIGHTS_NAME, state, CONFIG_NAME, blocks)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
