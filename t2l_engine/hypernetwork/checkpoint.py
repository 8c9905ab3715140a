"""Reads checkpoint folders in native and Sakana format, and writes native ones.

Native: ``config.json`` (a ``HyperNetworkConfig`` under "hypernetwork", with optional "encoder", "base_model", "training" and
"reference" blocks) and ``hypernet.safetensors``, whose keys are the parameter names of :class:`HyperNetwork`.  Keys
``reference.*`` are tensors of a converted Sakana checkpoint that generation ignores, kept for converting back.  Sakana
format: see :mod:`.sakana`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import to_json
from t2l_engine.files.weights import check_no_model, check_weights, read_safetensors, write_folder
from t2l_engine.hypernetwork import d2l
from t2l_engine.hypernetwork.config import config_from_json
from t2l_engine.hypernetwork.folder import (
    CONFIG_NAME,
    FORMAT,
    UNUSED_PREFIX,
    WEIGHTS_NAME,
    CheckpointError,
    Contents,
    check_blocks,
    format_of,
    native_blocks,
)
from t2l_engine.hypernetwork.sakana import SakanaFiles


def read(folder: Path, module_order: list[str] | None = None) -> Contents:
    """The checked contents of a checkpoint folder; nothing in it is executed."""
    try:
        if format_of(folder) == "native":
            return _read_native(folder, module_order)
        if format_of(folder) == "doc-to-lora":
            return d2l.read(folder)
        return SakanaFiles.open(folder, tensors=True).contents(module_order)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def describe(folder: Path) -> dict[str, Any]:
    """The optional blocks of a checkpoint's ``config.json``, or the same from a folder in Sakana format."""
    if format_of(folder) == "native":
        return native_blocks(folder)[1]
    if format_of(folder) == "doc-to-lora":
        return d2l.read(folder).blocks
    return SakanaFiles.open(folder).blocks()


def has_described_prompts(about: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained with descriptions in the prompts; ``about``: from :func:`describe`."""
    return (about.get("training") or {}).get("prompt") == "description"


def trained_tasks(about: Mapping[str, Any]) -> set[str]:
    """Names of the tasks that a checkpoint and its start were trained on; ``about``: from :func:`describe`."""
    training = about.get("training") or {}
    found = [training.get("tasks"), training.get("tasks_before")]
    return {name for names in found if isinstance(names, (dict, list)) for name in names if isinstance(name, str)}


# --- native format -------------------------------------------------------------------------------------------------


def _read_native(folder: Path, module_order: list[str] | None) -> Contents:
    config_path, path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    hypernetwork, blocks = native_blocks(folder)
    config = config_from_json(hypernetwork, f"{config_path}: hypernetwork")
    if module_order is not None and list(module_order) != list(config.modules):
        raise CheckpointError(
            f"module_order: expected {list(config.modules)} as {config_path} states, got {short_repr(module_order)}; "
            "another order can only be given to a folder in Sakana format"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    # Copied from the memory map, so that checked values cannot change, and so that both formats give the same adapters:
    # rounding of torch's products may depend on alignment.
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path, CheckpointError).items()}
    unused = {k.removeprefix(UNUSED_PREFIX): t for k, t in tensors.items() if k.startswith(UNUSED_PREFIX)}
    state = {k: t for k, t in tensors.items() if not k.startswith(UNUSED_PREFIX)}
    return Contents(config, state, unused, blocks, path, config_path)


def write_native(folder: Path, contents: Contents) -> None:
    """Write a native folder.

    Raises CheckpointError for contents that :func:`read` refuses, FileExistsError for a model's folder.
    """
    check_no_model(folder)
    check_blocks(contents.blocks, str(folder))
    blocks = {"format": FORMAT, "hypernetwork": to_json(contents.config), **contents.blocks}
    state = contents.state | {UNUSED_PREFIX + key: tensor for key, tensor in contents.unused.items()}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    check_weights(folder, state, CheckpointError)
    try:
        write_folder(folder, WEIGHTS_NAME, state, CONFIG_NAME, blocks)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
