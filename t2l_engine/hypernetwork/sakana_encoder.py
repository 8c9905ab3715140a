"""The text encoder of a checkpoint in Sakana format, by the rules of SakanaAI's code."""

from __future__ import annotations

from typing import Any

from t2l_engine.files.errors import ConfigError, boolean, short_repr
from t2l_engine.files.text import from_json
from t2l_engine.text.config import SAKANA_MAX_LENGTH, EncoderConfig, OneHotConfig

#: Template of SakanaAI's code for the SFR encoders.
SFR_TEMPLATE = "Instruct: Retrieve semantically similar text.\nQuery: {text}"


class UndefinedEncoder(ConfigError):
    """A checkpoint names an encoder whose pooling is not known."""


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
            raise ConfigError(f"{where}: model_dir: expected the base model, which embeds the texts, got {short_repr(base)}")
        return EncoderConfig(base.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype="bfloat16")
    if "gte" in name:
        return EncoderConfig(name, "cls", SAKANA_MAX_LENGTH)
    if "SFR" in name:
        return EncoderConfig(name, "last", SAKANA_MAX_LENGTH, template=SFR_TEMPLATE, dtype="bfloat16")
    raise UndefinedEncoder(
        f"{where}: emb_model: expected a 'gte' or 'SFR' model or none, whose pooling SakanaAI's code defines, "
        f"got {short_repr(name)}; pass encoder=FOLDER (--encoder FOLDER)"
    )
