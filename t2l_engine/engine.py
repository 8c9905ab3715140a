"""Text to adapters: the facade over encoder and hypernetwork."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.hypernetwork.sakana_encoder import UndefinedEncoder
from t2l_engine.text.config import EncoderConfig, OneHotConfig
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder
from t2l_engine.text.prompts import CHAT, prompt_of


def _encoder_config(folder: Path, given: str | Path | None) -> EncoderConfig | OneHotConfig | str | None:
    """How a checkpoint's texts are embedded, by the encoder in the folder ``given`` where that is not None.

    A string: that folder itself must say; None: nothing does.
    """
    from t2l_engine.hypernetwork.checkpoint import encoder_config

    try:
        config = encoder_config(folder)
    except UndefinedEncoder:
        if given is None:
            raise
        config = None
    if given is None:
        return config
    if config is None and str(given) == MINILM.name:
        return MINILM
    if isinstance(config, OneHotConfig):
        raise ValueError(f"encoder: expected none, since {folder} knows tasks by their names (one-hot), got {str(given)!r}")
    if not Path(given).is_dir():
        raise FileNotFoundError(f"encoder {str(given)!r}: no such folder")
    if config is None:
        return str(given)
    return dataclasses.replace(config, name=str(given))


class TextToLoRA:
    """One call from sentences to LoRA adapters (paper section 3).  ``encoder`` and ``hypernetwork`` may be used alone.

    >>> import t2l_engine as t2l
    >>> engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    >>> stack = engine.generate(["Return the last element of the list.", "Give the antonym of the word."])
    >>> len(stack), stack.scaling.tolist()
    (2, [2.0, 2.0])
    """

    def __init__(self, encoder: TextEncoder | OneHotEncoder, hypernetwork: HyperNetwork, prompt_form: str = CHAT):
        """``prompt_form``: "chat" or "raw", how :meth:`prompt` shows an input to the adapted model.

        Raises ValueError where the encoder's width is not the one the hypernetwork was trained with.
        """
        if encoder.embed_dim != hypernetwork.config.embed_dim:
            raise ValueError(
                f"encoder: expected embeddings of width {hypernetwork.config.embed_dim} as the hypernetwork was trained "
                f"with, got {encoder.embed_dim} from {encoder.config.name!r}"
            )
        self.encoder, self.hypernetwork, self.prompt_form = encoder, hypernetwork, prompt_form

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        encoder: TextEncoder | OneHotEncoder | str | Path | None = None,
        scaling: str | float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        module_order: list[str] | None = None,
        trust_remote_code: bool = False,
    ) -> TextToLoRA:
        """Load a bundled checkpoint by name ("smollm2-135m"), or a native or reference folder.

        Args:
            encoder: of the texts; None = the one the checkpoint was trained with (MiniLM where it names none).  A local
                folder: that same encoder, found there: pooling, template, length and dtype are the checkpoint's.  Only
                where the checkpoint does not say them the folder must, as a sentence-transformers folder does.
            trust_remote_code: run Python code that the encoder's folder brings; off by default.
            scaling, dtype, device, module_order: as in :meth:`HyperNetwork.from_pretrained`.

        Raises:
            FileNotFoundError: no such checkpoint or encoder folder, or the packaged encoder is not installed.
            OSError: the checkpoint's encoder is neither a local folder nor to be had from the hub; pass ``encoder``.
            ValueError: the checkpoint cannot be used, or the encoder does not fit it or needs ``trust_remote_code``.
        """
        from t2l_engine.hypernetwork.checkpoint import prompt_form

        folder = resolve_checkpoint(checkpoint)
        hypernetwork = HyperNetwork.from_pretrained(
            folder, scaling=scaling, dtype=dtype, device=device, module_order=module_order
        )
        if encoder is None or isinstance(encoder, (str, Path)):
            config = _encoder_config(folder, encoder)
            if isinstance(config, OneHotConfig):
                encoder = OneHotEncoder(config, device=device)
            else:
                encoder = TextEncoder.from_pretrained(config or MINILM, device=device, trust_remote_code=trust_remote_code)
            if config is None and encoder.embed_dim != hypernetwork.config.embed_dim:
                raise ValueError(
                    f"{folder}: names no text encoder and needs embeddings of width {hypernetwork.config.embed_dim}, "
                    f"which the default, {MINILM.name!r} of width {encoder.embed_dim}, does not give; pass encoder=..."
                )
        return cls(encoder, hypernetwork, prompt_form(folder))

    def generate(self, texts: Sequence[str]) -> AdapterStack:
        """One adapter a description (a task name, where the checkpoint knows tasks as one-hot vectors), all in one pass.

        Raises ValueError for an empty list, an empty text, anything but strings or an unknown task name; a description
        beyond the encoder's length is truncated with a warning.  Raises RuntimeError where the language model is the encoder
        and has adapters in use.
        """
        return self.hypernetwork.generate(self.encoder.encode(texts))

    def prompt(self, tokenizer: Any, text: str, description: str = "") -> str:
        """``text`` as the adapted model reads it: in the form of the prompts that the checkpoint was trained on.

        Tokenize it without special tokens.  ``tokenizer``: the base model's; ``description``: in front, for a checkpoint
        that was trained with it there.
        """
        return prompt_of(self.prompt_form, tokenizer, text, description)
