"""The frozen language model that a checkpoint or a training run names."""

from __future__ import annotations

from pathlib import Path

import torch

from t2l_engine.integrations import smollm2

PACKAGED = "smollm2-135m"


def load(name: str, dtype: torch.dtype, attention: str = "sdpa"):
    """(model in eval mode, tokenizer with left padding) of "smollm2-135m" or of a local transformers folder.

    ``attention``: as transformers names it.  Raises FileNotFoundError for anything else.
    """
    if name == PACKAGED:
        model, tokenizer = smollm2.load(dtype, attn_implementation=attention)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(name).is_dir():
            raise FileNotFoundError(f"base_model: expected {PACKAGED!r} or a local transformers folder, got {name!r}")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
