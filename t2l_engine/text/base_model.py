"""Loads the frozen language model that a checkpoint or a training run names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.text import packaged
from t2l_engine.text.packaged import LANGUAGE_MODEL, no_adapter, own_name


def config_of(name: str) -> Any:
    """The transformers configuration of "smollm2-135m", under that name or its own, or of a local transformers folder.

    Raises FileNotFoundError if ``name`` is none of these.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_folder(name), trust_remote_code=False)


def _folder(name: str) -> str:
    folder = str(packaged.convert()) if own_name(name) == LANGUAGE_MODEL else name
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"base_model: expected {LANGUAGE_MODEL!r} or a local transformers folder with config.json, got {name!r}"
        )
    return folder


def check_device(device: str) -> None:
    """ConfigError unless a command's ``device`` is "cpu", or "cuda" where torch finds a CUDA device."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: got 'cuda', but torch finds no CUDA device")


def load(name: str, dtype: torch.dtype, attention: str | None = None):
    """(model in eval mode, tokenizer with left padding) of "smollm2-135m", under that name or its own, or of a local folder.

    ``attention``: a transformers ``attn_implementation``, None = its default for the model (Gemma-2 has no "sdpa").  Python
    code in the folder is never run.  Of its ``generation_config.json`` only the special tokens count: transformers would
    apply a repetition penalty to greedy decoding, too.

    Raises:
        FileNotFoundError: ``name`` is neither.
        ValueError: the folder's weights are incomplete, it contains an adapter, its model needs custom code, or its
            tokenizer has no ``eos_token``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = _folder(name)
    no_adapter(folder, f"base_model {name!r}")
    # trust_remote_code is False, not unset, for which transformers would ask at the terminal.
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False, output_loading_info=True
    )
    model, info = cast("tuple[Any, dict[str, Any]]", loaded)
    if info["missing_keys"]:  # transformers would initialise them at random
        raise ValueError(f"base_model {name!r}: its weights lack {short_repr(sorted(info['missing_keys']))}")
    model = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"base_model {name!r}: expected a tokenizer with an eos_token, at which answers end, got none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stated = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = stated["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in ends:  # with which answers are trained to end
        stated["eos_token_id"] = [*(end for end in ends if end is not None), tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(**stated)
    return model, tokenizer


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """``cache`` by its keyword: ``cache``, or ``past_key_values`` before transformers 5.24 (which ignores unknown ones)."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
