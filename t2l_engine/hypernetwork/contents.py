"""What a checkpoint folder says, whatever its format: the record that readers make and writers take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.folder import CheckpointError

UNUSED_PREFIX = "reference."


@dataclasses.dataclass
class Contents:
    """What a folder of either form says.

    ``state``: native keys; ``unused``: tensors of a reference file that generation ignores, under the reference's keys;
    ``blocks``: the optional blocks of ``config.json``; ``name_of``: a native key as the file spells it.
    """

    config: HyperNetworkConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor]
    blocks: dict[str, Any]
    path: Path
    name_of: Callable[[str], str] = str


def expect_shape(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {key}: expected shape {shape}, got {short_repr(tuple(tensor.shape))}")
