"""Finds a checkpoint's folder and format, and reads the ``config.json`` of the native format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.sakana_encoder import sakana_encoder_config
from t2l_engine.text.config import AnyEncoderConfig, encoder_config_from_json

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "hypernet.safetensors"
SAKANA_NAMES = ("hypermod.pt", "args.yaml", "adapter_config.json")
FORMAT = "t2l_engine.hypernetwork.v1"
BLOCKS = ("encoder", "base_model", "training", "reference")


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names the file and the key.

    >>> import t2l_engine as t2l
    >>> issubclass(t2l.CheckpointError, ValueError)
    True
    """


def bundled_checkpoints() -> list[str]:
    """Names of the checkpoints in the package.

    >>> bundled_checkpoints()
    ['smollm2-135m', 'smollm2-135m-specs']
    """
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def resolve_checkpoint(name_or_folder: str | Path) -> Path:
    """The folder of a bundled checkpoint or of one on disk.

    Raises FileNotFoundError, which lists the bundled names, NotADirectoryError for a file.
    """
    if (name := str(name_or_folder)) in bundled_checkpoints():
        if any((Path(name) / file).is_file() for file in (WEIGHTS_NAME, SAKANA_NAMES[0])):
            warnings.warn(f"checkpoint {name!r}: the bundled checkpoint is used, not the folder ./{name}", stacklevel=2)
        return BUNDLED / name
    folder = Path(name_or_folder)
    if folder.is_file():
        raise NotADirectoryError(f"checkpoint {str(name_or_folder)!r}: expected a folder, got a file")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint {str(name_or_folder)!r}: no such folder; bundled checkpoints: {bundled_checkpoints()}"
        )
    return folder


def format_of(folder: Path) -> str:
    """Format of a checkpoint folder: "native" or "sakana"; FileNotFoundError if it is neither."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    weights, config = (folder / WEIGHTS_NAME).is_file(), (folder / CONFIG_NAME).is_file()
    # A folder in Sakana format may contain a model's config.json too, which some tools expect there.
    if config and (weights or not (folder / SAKANA_NAMES[0]).is_file()):
        return "native"
    if (folder / SAKANA_NAMES[0]).is_file():
        return "sakana"
    hint = "; a PEFT adapter is no checkpoint" if (folder / SAKANA_NAMES[2]).is_file() else ""
    raise FileNotFoundError(
        f"{folder}: holds neither {CONFIG_NAME} (native format) nor {SAKANA_NAMES[0]} (Sakana format){hint}"
    )


def native_blocks(folder: Path) -> dict[str, Any]:
    """The blocks of a native ``config.json``; ConfigError or CheckpointError names an unknown one or one of a wrong type."""
    path = folder / CONFIG_NAME
    blocks = read_json(path)
    if not isinstance(blocks, dict):
        raise CheckpointError(f"{path}: format: expected {FORMAT!r}, got {type(blocks).__name__}")
    if blocks.get("format") != FORMAT:
        hint = "; this is a language model, not a checkpoint for one" if "model_type" in blocks else ""
        raise CheckpointError(f"{path}: format: expected {FORMAT!r}, got {short_repr(blocks.get('format'))}{hint}")
    unknown = set(blocks) - {"format", "hypernetwork", *BLOCKS}
    if unknown or "hypernetwork" not in blocks:
        raise CheckpointError(
            f"{path}: expected blocks 'hypernetwork' and some of {BLOCKS}, got {short_repr(sorted(blocks))}"
        )
    check_blocks(blocks, str(path))
    return blocks


def check_blocks(blocks: dict[str, Any], where: str) -> None:
    """CheckpointError naming ``where`` unless the optional blocks in ``blocks`` have the right types."""
    kinds = {"encoder": (dict, type(None)), "base_model": (str, type(None)), "training": (dict,), "reference": (dict,)}
    for name, kind in kinds.items():
        if name in blocks and not isinstance(blocks[name], kind):
            raise CheckpointError(f"{where}: {name}: expected {kind[0].__name__}, got {short_repr(blocks[name])}")


def stated_encoder(blocks: dict[str, Any], path: Path) -> AnyEncoderConfig | None:
    """The text encoder stated by the ``blocks`` of ``path``, None if there is none.

    Raises UndefinedEncoder, a ConfigError, if converted Sakana arguments name an encoder whose pooling is not known.
    """
    if blocks.get("encoder") is not None:
        return encoder_config_from_json(blocks["encoder"], f"{path}: encoder")
    args = blocks.get("reference", {}).get("args")
    if isinstance(args, dict) and args.get("emb_model"):  # raises for an encoder without rules
        return sakana_encoder_config(args, f"{path}: reference.args")
    return None
