"""Reads and writes folders of a safetensors and a JSON file, for checkpoints and adapters.

Weights are untrusted.  Reading returns plain tensors or raises an error that names the file; nothing in a file is executed,
and refusing a file takes at most twice its size in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.files.errors import MAX_CONFIG_BYTES, ConfigError, short_repr
from t2l_engine.files.text import read_start

#: Key of the content checksum in the metadata of safetensors files that we write; other programs ignore it.
CHECKSUM = "t2l_engine.sha256"
#: About 7,000 tensors.  Python objects need many times the bytes that describe them.
MAX_HEADER_BYTES = 1 << 20
#: How the name of a folder of files begins that are not complete.
UNFINISHED = ".writing-"
#: Files of models' weights, beside a config.json.
MODEL_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError unless ``dtype`` is one of WEIGHT_DTYPES."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: expected a floating-point dtype, one of {WEIGHT_DTYPES}, got {dtype!r}")


def cast_matrices(module: nn.Module, dtype: torch.dtype, matrices: Iterable[Tensor]) -> None:
    """Cast the parameters ``matrices`` of ``module`` to ``dtype``; all others become float32 (or float64).

    Raises ValueError if ``dtype`` is not floating point or values exceed its range; nothing changes then.
    """
    check_dtype(dtype)
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = set(map(id, matrices))
    casts = [
        (name, tensor, dtype if id(tensor) in narrow else vector_dtype)
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    ]
    for name, tensor, kind in casts:
        narrower = torch.finfo(kind).max < torch.finfo(tensor.dtype).max and not tensor.is_meta
        if narrower and tensor.numel() and max_abs(tensor) > torch.finfo(kind).max:
            raise ValueError(f"dtype: {name} holds values beyond the range of {kind}")
    for _, tensor, kind in casts:
        tensor.data = tensor.data.to(kind)


def check_no_model(directory: Path) -> None:
    """FileExistsError for a folder with a model, whose config.json that of a checkpoint would replace."""
    expect_none(directory, MODEL_WEIGHTS, "whose config.json a checkpoint's would replace")


def expect_none(directory: Path, names: Iterable[str], why: str) -> None:
    """FileExistsError for a folder with one of the files ``names``; ``why`` not to write beside it, to follow its name."""
    for name in names:
        if (directory / name).exists():
            raise FileExistsError(f"{directory}: holds {name}, {why}; choose another folder")


def content_checksum(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process left of :func:`replacing` in ``directory``, into which no other may be writing."""
    for left in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def replacing(directory: Path, *names: str) -> Iterator[Path]:
    """A temporary folder inside ``directory``; on exit its files ``names`` replace those in ``directory``, in this order.

    ``directory`` is created.  After an exception of the caller nothing is replaced.  Readers see old or new files, never
    partial ones; of several, for a moment, the first ones new and the others old.

    Raises FileExistsError where one of ``names`` is a device, a pipe or a folder, NotADirectoryError for a ``directory``
    that is a file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{directory}: expected a folder, got a file") from None
    for path in (directory / name for name in names):
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path}: expected a regular file, or none, to write there")
    try:
        made = tempfile.TemporaryDirectory(dir=directory, prefix=UNFINISHED)
    except OSError as error:  # which names the temporary one
        raise OSError(error.errno, error.strerror, str(directory)) from None
    with made as temporary:
        yield Path(temporary)
        for name in names:
            os.replace(Path(temporary) / name, directory / name)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whose folder is created; an existing file is replaced by a complete one only."""
    with replacing(path.parent, path.name) as temporary:
        (temporary / path.name).write_text(text, encoding="utf-8")


def save_torch(content: Any, path: Path, target: Path) -> None:
    """``torch.save`` to ``path``; its RuntimeError, such as of a full disk, is an OSError that names ``target``."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{target}: cannot be written: {error}") from error


def write_folder(
    directory: Path, weights_name: str, state: dict[str, Tensor], config_name: str, config: dict[str, Any]
) -> None:
    """Write a safetensors and a JSON file into ``directory``; existing files are replaced by complete ones only.

    Raises ConfigError if ``config`` is larger than MAX_CONFIG_BYTES, OSError if the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps(config, indent=2) + "\n"  # ASCII
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{directory / config_name}: expected at most {MAX_CONFIG_BYTES} bytes to write, got {len(text)}")
    with replacing(directory, weights_name, config_name) as temporary:
        (temporary / config_name).write_text(text, encoding="utf-8")
        weights = temporary / weights_name
        try:
            save_file(state, weights, metadata={"format": "pt", CHECKSUM: content_checksum(state)})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{directory}: cannot be written: {error}") from error
        shutil.copymode(temporary / config_name, weights)  # safetensors creates files that only their owner may read


def read_safetensors(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """The tensors of ``path``, memory-mapped; raises ``error`` naming the file and the fault.

    Checked: the format, the content checksum if the file has one, floating-point dtypes, and that all values are finite.
    """
    from safetensors import SafetensorError, safe_open

    header = int.from_bytes(read_start(path, 8, error), "little")
    if header > MAX_HEADER_BYTES:
        raise error(f"{path}: not a readable safetensors file: its header claims more than {MAX_HEADER_BYTES} bytes")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, TypeError) as reason:
        raise error(f"{path}: not a readable safetensors file: {str(reason)[:200]}") from None
    check_weights(path, state, error)
    if CHECKSUM in metadata and metadata[CHECKSUM] != content_checksum(state):
        raise error(f"{path}: the content does not match its checksum {CHECKSUM}: the file is damaged or was edited")
    return state


def max_abs(tensor: Tensor) -> float:
    """The largest absolute value in a non-empty tensor."""
    return float(max(map(abs, torch.aminmax(tensor.detach()))))


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the extremes, which are found several times faster than by ``isfinite``."""
    return not tensor.numel() or all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))


def check_weights(path: Path, state: dict[str, Tensor], error: type[ValueError]) -> None:
    """``error`` naming the key unless every tensor is plain, of a floating-point dtype, and finite."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.dtype not in WEIGHT_DTYPES or tensor.device.type != "cpu":
            raise error(
                f"{path}: {short_repr(name)}: expected a dense floating-point tensor, got {tensor.dtype} {tensor.layout}"
            )
        if not is_finite(tensor):
            raise error(f"{path}: {short_repr(name)}: holds NaN or infinite values")
