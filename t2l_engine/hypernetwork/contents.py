"""Contents: what a checkpoint folder of either format contains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.folder import CheckpointError
from t2l_engine.text.config import AnyEncoderConfig
from t2l_engine.text.prompts import CHAT, check_prompt_form

UNUSED_PREFIX, POOLING_PREFIX = "reference.", "pooling."


@dataclasses.dataclass
class Contents:
    """The configuration and tensors of a checkpoint of either format.

    ``state``: under native keys; ``unused``: tensors of the Sakana format that generation ignores, under its keys;
    ``blocks``: the optional blocks of ``config.json``; ``path``: of the weights file; ``encoder_config()``: of the text
    encoder that the checkpoint was trained with, None if it does not state one, UndefinedEncoder, a ConfigError, for one in
    Sakana format whose pooling is not known; ``key_in_file``: native key -> the file's key, for errors.  ``pooling``:
    tensors of the encoder's trained pooling (:class:`t2l_engine.text.llm_encoder.AttentionPooling`), empty for an encoder
    without one.
    """

    config: HyperNetworkConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor]
    blocks: dict[str, Any]
    path: Path
    encoder_config: Callable[[], AnyEncoderConfig | None]
    key_in_file: Callable[[str], str] = str
    pooling: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def prompt_form(self) -> str:
        """The prompt template of the training, "chat" unless the checkpoint states another; ConfigError if unknown."""
        training = self.blocks.get("training") or {}
        return check_prompt_form(training.get("prompt_form", CHAT), self.path.parent)


def expect_shape(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """CheckpointError naming ``path`` and ``key`` unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key}: expected shape {shape}, got {short_repr(tuple(tensor.shape))}")
