"""Loads the model and tokenizer of a text encoder; Python code beside them runs with ``trust_remote_code`` only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t2l_engine.files.errors import short_repr
from t2l_engine.text.packaged import no_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(source: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a local folder or hub name; ValueError if its files lack a weight."""
    from transformers import AutoModel, AutoTokenizer, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    no_adapter(source, f"encoder {source!r}")
    try:
        # Both files are only parsed here: code is refused before transformers could run it, or use another class instead.
        values, _ = PreTrainedConfig.get_config_dict(source)
        if not values:
            raise OSError("no config.json")
        if not trust_remote_code and ("auto_map" in values or "auto_map" in get_tokenizer_config(source)):
            raise ValueError(
                f"encoder {source!r}: brings Python code of its own (auto_map in its configuration), which runs only with "
                "trust_remote_code=True (--trust-remote-code, which t2l train has not); read the code first"
            )
        if values.get("is_encoder_decoder"):
            raise ValueError(f"encoder {source!r}: expected an encoder or a decoder, got an encoder-decoder model")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, info = AutoModel.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except OSError as error:
        reason = str(error).partition("\n")[0][:300]
        raise OSError(
            f"encoder {source!r}: cannot be loaded ({reason}); pass encoder=FOLDER (--encoder FOLDER) or a configuration of "
            "a local folder"
        ) from error
    # We pool the last hidden state, so a missing pooler, which transformers initialises at random, does not matter.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"encoder {source!r}: its weights lack {short_repr(missing)}")
    return model, tokenizer


def positions(model: PreTrainedModel) -> int | None:
    """Number of positions of ``model`` in tokens, None if it states no limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa and its relatives count from padding_idx + 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None
