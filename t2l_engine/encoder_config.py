"""Encoder configurations out of files: a checkpoint's block, the reference's arguments, a sentence-transformers folder.

Everything here reads plain JSON values and executes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2l_engine.config import ConfigError, EncoderConfig, OneHotConfig, from_json, read_json, shown

#: What the reference puts around a description for the SFR encoders.
SFR_TEMPLATE = "Instruct: Retrieve semantically similar text.\nQuery: {text}"
REFERENCE_LENGTH = 8192

#: sentence-transformers' names of the poolings there are here.
_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


class UndefinedEncoder(ConfigError):
    """A checkpoint names an encoder for which nothing says how texts are embedded."""


def encoder_config_from_json(block: Any, where: str) -> EncoderConfig | OneHotConfig:
    """The "encoder" block of a checkpoint: one-hot where its name says so, else a text encoder.

    ``where`` names the source in errors.  Raises ConfigError for anything that is neither.
    """
    one_hot = isinstance(block, dict) and block.get("name") == OneHotConfig.name
    return from_json(OneHotConfig if one_hot else EncoderConfig, block, where)


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
        raise ConfigError(f"{where}: use_one_hot_task_emb: expected true or false, got {shown(one_hot)}")
    if one_hot:
        return from_json(OneHotConfig, {"tasks": args.get("train_ds_names")}, f"{where}: train_ds_names")
    name = args.get("emb_model")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{where}: emb_model: expected a string, got {shown(name)}")
    if not name:
        base = args.get("model_dir")
        if not isinstance(base, str) or not base.rstrip("/"):
            raise ConfigError(f"{where}: model_dir: expected the base model, which embeds the texts, got {shown(base)}")
        return EncoderConfig(base.rstrip("/"), "last", REFERENCE_LENGTH, dtype="bfloat16")
    if "gte" in name:
        return EncoderConfig(name, "cls", REFERENCE_LENGTH)
    if "SFR" in name:
        return EncoderConfig(name, "last", REFERENCE_LENGTH, template=SFR_TEMPLATE, dtype="bfloat16")
    raise UndefinedEncoder(
        f"{where}: emb_model: expected a 'gte' or 'SFR' model or none, as the reference defines pooling, got {shown(name)}; "
        "pass encoder=..."
    )


def read_sentence_transformers(folder: Path) -> EncoderConfig:
    """See :meth:`EncoderConfig.from_sentence_transformers`."""
    transformer, pooling = _modules(folder)
    pooling_path = pooling / "config.json"
    pooling_values = _read(pooling_path)
    template = _default_template(folder)
    if template is not None and pooling_values.get("include_prompt", True) is not True:
        raise ConfigError(f"{pooling_path}: include_prompt: a pooling that leaves the prompt out is not supported")
    values = {
        "name": str(transformer),
        "pooling": _pooling(pooling_values, pooling_path),
        "max_length": _max_length(transformer),
        "template": template,
    }
    return from_json(EncoderConfig, values, str(folder))


def _read(path: Path, kind: type = dict) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    values = read_json(path)
    if not isinstance(values, kind):
        raise ConfigError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got {type(values).__name__}")
    return values


def _modules(folder: Path) -> tuple[Path, Path]:
    """The folders of the Transformer and the Pooling module; any others but Normalize are refused."""
    path = folder / "modules.json"
    found: list[tuple[str, Path]] = []
    for entry in _read(path, list):
        kind, where = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(where, str) or not where.isprintable():
            raise ConfigError(f"{path}: expected objects with strings 'type' and 'path', got {shown(entry)}")
        package, _, name = kind.partition(".")
        name = name.rpartition(".")[2]
        if package != "sentence_transformers" or name not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(f"{path}: module {shown(kind)}: expected Transformer, Pooling and perhaps Normalize")
        target = folder / where
        try:
            inside = target.resolve().is_relative_to(folder.resolve())
            target.stat()
        except FileNotFoundError:
            pass  # said where the folder is read
        except (OSError, RuntimeError):  # too long a name, or a loop of links
            inside = False
        if not inside:
            raise ConfigError(f"{path}: path {shown(where)}: expected a folder inside {folder}")
        found.append((name, target))
    names = [name for name, _ in found]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ConfigError(f"{path}: expected Transformer, Pooling and perhaps Normalize, in this order, got {shown(names)}")
    return found[0][1], found[1][1]


def _pooling(values: dict[str, Any], path: Path) -> str:
    if "pooling_mode" in values:
        mode = values["pooling_mode"]
        modes = [mode] if isinstance(mode, str) else mode
    else:  # older files: a flag each, such as pooling_mode_cls_token and pooling_mode_mean_tokens
        flags = [key.removeprefix("pooling_mode_") for key, on in values.items() if key.startswith("pooling_mode_") and on]
        modes = [flag.removesuffix("s").removesuffix("_token") for flag in flags]
    if not isinstance(modes, list) or len(modes) != 1 or not isinstance(modes[0], str):
        raise ConfigError(f"{path}: expected one pooling mode, got {shown(modes)}")
    if modes[0] not in _POOLINGS:
        raise ConfigError(f"{path}: pooling {shown(modes[0])} is not supported; expected one of {sorted(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _max_length(folder: Path) -> Any:
    """``max_seq_length``, or what sentence-transformers takes where it is not set: the model's and tokenizer's limit."""
    # Old folders name the file after the model: sentence_roberta_config.json and the like.
    for path in sorted(folder.glob("sentence_*_config.json")):
        values = _read(path)
        if values.get("do_lower_case"):
            raise ConfigError(f"{path}: do_lower_case: expected false; lower-casing before the tokenizer is not supported")
        if values.get("max_seq_length") is not None:
            return values["max_seq_length"]
    limits = [_read(folder / "config.json").get("max_position_embeddings")]
    if (folder / "tokenizer_config.json").is_file():
        limits.append(_read(folder / "tokenizer_config.json").get("model_max_length"))
    limits = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool)]
    if not limits:
        raise ConfigError(f"{folder}: neither max_seq_length nor a limit of the model or tokenizer is stated")
    return min(limits)


def _default_template(folder: Path) -> str | None:
    """The default prompt of the folder as a template, None where there is none."""
    path = folder / "config_sentence_transformers.json"
    values = _read(path) if path.is_file() else {}
    name = values.get("default_prompt_name")
    if name is None:
        return None
    prompts = values.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str) or "{text}" in prompt:
        raise ConfigError(f"{path}: default_prompt_name: expected the name of a prompt, got {shown(name)}: {shown(prompt)}")
    return prompt + "{text}" if prompt else None
