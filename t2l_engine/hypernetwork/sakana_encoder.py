"""The text encoder that a checkpoint in Sakana format names, by the rules of SakanaAI's code."""

from __future__ import annotations

from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import from_json
from t2l_engine.text.config import REFERENCE_LENGTH, EncoderConfig, OneHotConfig

#: What the reference puts around a description for the SFR encoders.
SFR_TEMPLATE = "Instruct: Retrieve semantically similar text.\nQuery: {text}"


class UndefinedEncoder(ConfigError):
    """A checkpoint names an encoder for which nothing says how texts are embedded."""


def reference_encoder_config(args: dict[str, Any], where: str) -> EncoderConfig | OneHotConfig:
    """The encoder of a checkpoint in the reference's form, by the reference's rules, from its ``args.yaml``.

    ``where`` names the file in errors.  The reference knows the pooling of "gte" and "SFR" models and of the base model
    itself (no ``emb_model``); for any other it is undefined.

    Raises:
        UndefinedEncoder: the rules do not cover the encoder.
        ConfigError: a field is of another kind; the message names it.
    """
    one_hot = args.get("use_one_hot_task_emb")
    if one_hot is not None and not isinstance(one_hot, bool):
        raise ConfigError(f"{where}: use_one_hot_task_emb: expected true or false, got {short_repr(one_hot)}")
    if one_hot:
        return from_json(OneHotConfig, {"tasks": args.get("train_ds_names")}, f"{where}: train_ds_names")
    name = args.get("emb_model")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: emb_model: expected a string, got {short_repr(name)}")
    if not name:
        base = args.get("model_dir")
        if not isinstance(base, str) or not base.rstrip("/"):
            raise ConfigError(f"{where}: model_dir: expected the base model, which embeds the texts, got {short_repr(base)}")
        return EncoderConfig(base.rstrip("/"), "last", REFERENCE_LENGTH, dtype="bfloat16")
    if "gte" in name:
        return EncoderConfig(name, "cls", REFERENCE_LENGTH)
    if "SFR" in name:
        return EncoderConfig(name, "last", REFERENCE_LENGTH, template=SFR_TEMPLATE, dtype="bfloat16")
    raise UndefinedEncoder(
        f"{where}: emb_model: expected a 'gte' or 'SFR' model or none, as the reference defines pooling, "
        f"got {short_repr(name)}; "
        "pass encoder=..."
    )
