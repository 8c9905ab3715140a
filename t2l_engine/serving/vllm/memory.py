"""Memory mode: a worker generates the tensors of an adapter from its embedding, which a folder holds instead of weights."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine.files.text import read_json
from t2l_engine.files.weights import read_safetensors
from t2l_engine.hypernetwork.checkpoint import read
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.hypernetwork.network import HyperNetwork, load
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.serving.checkpoints import adapter, fingerprint
from t2l_engine.serving.store import DTYPE, EMBEDDING, EMBEDDING_NAME, NOTE_NAME
from t2l_engine.serving.vllm.settings import Settings


def is_memory(folder: Path) -> bool:
    """Whether a store's folder holds an embedding instead of weights."""
    return (folder / NOTE_NAME).is_file()


@torch.inference_mode(False)
def peft_tensors(folder: Path, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that the PEFT folder of the same key holds, cast to ``dtype``; new ones in every call, on the CPU.

    The folder names the checkpoint, which must be among ``settings.checkpoints`` and is loaded once in a process.

    Raises ValueError, naming the file, for an invalid note or embedding, or another checkpoint.
    """
    note = read_json(folder / NOTE_NAME)
    if not isinstance(note, dict) or not isinstance(note.get("sha256"), str):
        raise ValueError(f"{folder / NOTE_NAME}: expected an object with the sha256 of a checkpoint")
    hypernetwork = own_hypernetwork(note["sha256"], settings, note.get("checkpoint"))
    path = folder / EMBEDDING_NAME
    embedding = read_safetensors(path, ValueError).get(EMBEDDING)
    if embedding is None or embedding.dtype != torch.float32:
        raise ValueError(f"{path}: expected {EMBEDDING} in float32")
    try:
        tensors = adapter(hypernetwork, embedding).state_dict_peft(0, dtype=DTYPE, fold=True)
    except ValueError as error:  # of its shape
        raise ValueError(f"{path}: {error}") from None
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def own_hypernetwork(sha256: str, settings: Settings, name: object = None) -> HyperNetwork | TokenHyperNetwork:
    """The hypernetwork of ``settings.checkpoints`` with this fingerprint; the checkpoint ``name`` is tried first.

    Raises ValueError if none has it, and as :meth:`TextToLoRA.from_pretrained` for the checkpoint's files.
    """
    for _, source in sorted(settings.checkpoints.items(), key=lambda item: item[0] != name):
        hypernetwork, found = _load(source)
        if found == sha256:
            return hypernetwork
    raise ValueError(
        f"checkpoint: expected that of the adapter, sha256 {sha256[:16]}, among T2L_VLLM_CHECKPOINT of this worker, "
        f"got {list(settings.checkpoints)}"
    )


@functools.cache
@torch.inference_mode(False)  # parameters outlive the call
def _load(source: str) -> tuple[HyperNetwork | TokenHyperNetwork, str]:
    hypernetwork = load(read(resolve_checkpoint(source)))
    return hypernetwork, fingerprint(hypernetwork)
