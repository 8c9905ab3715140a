"""A checkpoint's folder: where it is, its format and contents, and the text encoder that it states."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from t2l_engine.files.errors import ConfigError, boolean, short_repr
from t2l_engine.files.text import from_json, read_json
from t2l_engine.hypernetwork.config import AnyConfig
from t2l_engine.text.config import (
    SAKANA_MAX_LENGTH,
    AnyEncoderConfig,
    EncoderConfig,
    OneHotConfig,
    encoder_config_from_json,
)
from t2l_engine.text.prompts import CHAT, check_prompt_form

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "hypernet.safetensors"
SAKANA_NAMES = ("hypermod.pt", "args.yaml", "adapter_config.json")
#: Of doc-to-lora; models of transformers have a config.json beside it.
D2L_NAME = "pytorch_model.bin"
FORMAT = "t2l_engine.hypernetwork.v1"
BLOCKS = ("encoder", "base_model", "training", "reference")
UNUSED_PREFIX = "reference."
#: Template of SakanaAI's code for the SFR encoders.
SFR_TEMPLATE = "Instruct: Retrieve semantically similar text.\nQuery: {text}"


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names the file and the key.

    >>> import t2l_engine as t2l
    >>> issubclass(t2l.CheckpointError, ValueError)
    True
    """


class UndefinedEncoder(ConfigError):
    """A checkpoint names an encoder whose pooling is not known."""


@dataclasses.dataclass
class Contents:
    """The configuration and tensors of a checkpoint of either format.

    ``state``: under native keys; ``unused``: tensors of the Sakana format that generation ignores, under its keys;
    ``blocks``: the optional blocks of ``config.json``, which ``source`` states; ``path``: of the weights file;
    ``key_in_file``: native key -> the file's key, for errors.
    """

    config: AnyConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor]
    blocks: dict[str, Any]
    path: Path
    source: Path
    key_in_file: Callable[[str], str] = str

    def encoder_config(self) -> AnyEncoderConfig | None:
        """Of the encoder that the checkpoint was trained with, None if it states none.

        Raises UndefinedEncoder, a ConfigError, if Sakana arguments name an encoder whose pooling is not known.
        """
        if self.blocks.get("encoder") is not None:
            return encoder_config_from_json(self.blocks["encoder"], f"{self.source}: encoder")
        args = self.blocks.get("reference", {}).get("args")
        if isinstance(args, dict) and args:  # raises, since blocks of defined encoders are written
            native = self.source.name == CONFIG_NAME
            return sakana_encoder_config(args, f"{self.source}: reference.args" if native else str(self.source))
        return None

    def check_encoder(self) -> None:
        """Raises ConfigError for an invalid text encoder.  One of unknown pooling passes: users may give another."""
        with contextlib.suppress(UndefinedEncoder):
            self.encoder_config()

    @property
    def prompt_form(self) -> str:
        """The prompt template of the training, "chat" unless the checkpoint states another; ConfigError if unknown."""
        training = self.blocks.get("training") or {}
        return check_prompt_form(training.get("prompt_form", CHAT), self.path.parent)


def expect_shape(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """CheckpointError naming ``path`` and ``key`` unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key}: expected shape {shape}, got {short_repr(tuple(tensor.shape))}")


def expect_keys(path: Path, got: Collection[str], wanted: Collection[str]) -> None:
    """CheckpointError naming ``path`` and what is missing or unexpected unless the keys ``got`` are those ``wanted``."""
    missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    if missing or extra:
        raise CheckpointError(f"{path}: missing keys {short_repr(missing)}, unexpected keys {short_repr(extra)}")


def bundled_checkpoints() -> list[str]:
    """Names of the checkpoints in the package.

    >>> bundled_checkpoints()
    ['smollm2-135m', 'smollm2-135m-paper']
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
    """Format of a checkpoint folder: "native", "sakana" or "doc-to-lora"; FileNotFoundError if it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    weights, config = (folder / WEIGHTS_NAME).is_file(), (folder / CONFIG_NAME).is_file()
    # A folder in Sakana format may contain a model's config.json too, which some tools expect there.
    if config and (weights or not (folder / SAKANA_NAMES[0]).is_file()):
        return "native"
    if (folder / SAKANA_NAMES[0]).is_file():
        return "sakana"
    if (folder / D2L_NAME).is_file():
        return "doc-to-lora"
    hint = "; a PEFT adapter is no checkpoint" if (folder / SAKANA_NAMES[2]).is_file() else ""
    raise FileNotFoundError(
        f"{folder}: holds none of {CONFIG_NAME} (native format), {SAKANA_NAMES[0]} (Sakana format) and {D2L_NAME} "
        f"(Doc-to-LoRA){hint}"
    )


def native_blocks(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The block "hypernetwork" of a native ``config.json``, and the optional ones.

    Raises ConfigError or CheckpointError naming an unknown one or one of a wrong type.
    """
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
    del blocks["format"]
    return blocks.pop("hypernetwork"), blocks


def check_blocks(blocks: dict[str, Any], where: str) -> None:
    """CheckpointError naming ``where`` unless the optional blocks in ``blocks`` have the right types."""
    kinds = {"encoder": (dict, type(None)), "base_model": (str, type(None)), "training": (dict,), "reference": (dict,)}
    for name, kind in kinds.items():
        if name in blocks and not isinstance(blocks[name], kind):
            raise CheckpointError(f"{where}: {name}: expected {kind[0].__name__}, got {short_repr(blocks[name])}")


def sakana_encoder_config(args: dict[str, Any], where: str) -> EncoderConfig | OneHotConfig:
    """The encoder stated in the ``args.yaml`` of a checkpoint in Sakana format.

    ``where`` names the file in errors.  SakanaAI's code defines the pooling of "gte" and "SFR" models and of the base model
    itself (no ``emb_model``), and of no other.

    Raises:
        UndefinedEncoder: the pooling of the encoder is not defined.
        ConfigError: a field has a wrong type; the message names it.
    """
    one_hot = args.get("use_one_hot_task_emb")
    if one_hot is not None and boolean(f"{where}: use_one_hot_task_emb", one_hot):
        return from_json(OneHotConfig, {"tasks": args.get("train_ds_names")}, f"{where}: train_ds_names")
    name = args.get("emb_model")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: emb_model: expected a string, got {short_repr(name)}")
    if not name:
        base = args.get("model_dir")
        if not isinstance(base, str) or not base.rstrip("/"):
            raise UndefinedEncoder(
                f"{where}: model_dir: expected the base model, which embeds the texts, got {short_repr(base)}"
            )
        return EncoderConfig(base.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype="bfloat16")
    if "gte" in name:
        return EncoderConfig(name, "cls", SAKANA_MAX_LENGTH)
    if "SFR" in name:
        return EncoderConfig(name, "last", SAKANA_MAX_LENGTH, template=SFR_TEMPLATE, dtype="bfloat16")
    raise UndefinedEncoder(
        f"{where}: emb_model: expected a 'gte' or 'SFR' model or none, whose pooling SakanaAI's code defines, "
        f"got {short_repr(name)}; pass encoder=FOLDER (--encoder FOLDER)"
    )
