"""Exports an adapter to PEFT: the configuration, the tensors under PEFT's names, and folders with both.

All exports call :func:`config` and :func:`state_dict`, so a folder and an adapter handed over in memory hold equal values.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.adapters.paths import DEFAULT_PATHS, LAYER, layer_list
from t2l_engine.adapters.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME, PeftAdapter, folded
from t2l_engine.files.errors import MAX_NUMBER, MIN_NUMBER, short_repr
from t2l_engine.files.weights import MODEL_WEIGHTS, check_dtype, expect_none, is_finite, write_folder

#: Files of checkpoints and models, whose loaders would read an adapter_config.json beside them.
_OTHER_WEIGHTS = ("hypermod.pt", "hypernet.safetensors", *MODEL_WEIGHTS)


def check_place(directory: Path) -> None:
    """FileExistsError for a folder with a checkpoint or a model, NotADirectoryError for a file."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory}: expected a folder for an adapter, got a file")
    expect_none(directory, _OTHER_WEIGHTS, "which an adapter beside it would change")


def config(adapter: PeftAdapter, base_model_name_or_path: str | None, fold: bool) -> dict[str, Any]:
    """See :meth:`.stack.AdapterStack.peft_config`; ``adapter`` must have a rank that is not 0."""
    rank_of = {path: len(a) for path, (a, _) in matrices(adapter).items()}
    r = max(rank_of.values())
    scaling = float(adapter.scaling[0])
    if not MIN_NUMBER <= scaling <= MAX_NUMBER / r:
        raise ValueError(f"scaling: expected a positive number in [{MIN_NUMBER}, {MAX_NUMBER / r}], got {scaling}")
    if fold:
        scaling = 1
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": r,
        "lora_alpha": scaling * r,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {path: rank for path, rank in sorted(rank_of.items()) if rank != r},
        "alpha_pattern": {path: scaling * rank for path, rank in sorted(rank_of.items()) if rank != r},
        **_targets(adapter, sorted(rank_of)),
    }
    return dict(sorted(fields.items()))


def state_dict(
    adapter: PeftAdapter, dtype: torch.dtype | None, adapter_name: str | None, prefix: str, fold: bool
) -> dict[str, Tensor]:
    """See :meth:`.stack.AdapterStack.state_dict_peft`."""
    dtype = torch.float32 if dtype is None else dtype
    check_dtype(dtype)
    # What torch takes as the name of a module.
    if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name):
        raise ValueError(f"adapter_name: expected a non-empty string without '.', or None, got {short_repr(adapter_name)}")
    if not isinstance(prefix, str) or not re.fullmatch(r"([^.]+\.)*", prefix, re.DOTALL):
        raise ValueError(f"prefix: expected '' or a path that ends in '.', such as '{PREFIX}', got {short_repr(prefix)}")
    ending = "weight" if adapter_name is None else f"{adapter_name}.weight"
    scaling = float(adapter.scaling[0]) if fold else 1.0

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)

    # All layers of a module at once: an adapter has hundreds of small matrices.
    lora_A = {path: cast(A) for path, A in adapter.lora_A.items()}
    lora_B = {path: cast(folded(B, scaling)) for path, B in adapter.lora_B.items()}
    finite = all(map(is_finite, (*lora_A.values(), *lora_B.values())))
    state = {}
    for path, pair in matrices(dataclasses.replace(adapter, lora_A=lora_A, lora_B=lora_B)).items():
        for side, tensor in zip("AB", pair, strict=True):
            key = f"{prefix}{path}.lora_{side}.{ending}"
            state[key] = tensor.contiguous()
            if not finite and not is_finite(tensor):  # beyond the ranks anything may be
                raise ValueError(f"{short_repr(key)}: holds NaN or infinite values, or values exceed the range of {dtype}")
    return state


def write(
    adapter: PeftAdapter, directory: Path, base_model_name_or_path: str | None, dtype: torch.dtype | None, fold: bool
) -> None:
    """Write :func:`config` and :func:`state_dict` as a PEFT folder."""
    check_place(directory)
    state = state_dict(adapter, dtype, None, PREFIX, fold)
    write_folder(directory, WEIGHTS_NAME, state, CONFIG_NAME, config(adapter, base_model_name_or_path, fold))


def matrices(adapter: PeftAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> views of A ``[rank, in]`` and B ``[out, rank]``, of every module whose rank is not 0."""
    found = {}
    for module, ranks in adapter.ranks.items():
        A, B = adapter.lora_A[module][0], adapter.lora_B[module][0]
        for layer, rank in enumerate(ranks[0].tolist()):
            if rank:
                found[module.replace(LAYER, str(layer))] = A[layer, :rank], B[layer, :, :rank]
    return found


def _targets(adapter: PeftAdapter, full_paths: list[str]) -> dict[str, Any]:
    """The configuration fields with which PEFT adapts the modules of ``adapter``.

    It also wraps other modules of the model whose paths end alike, such as a vision tower's, and leaves B zero there.
    """
    layers = {path: tuple(torch.nonzero(ranks[0]).flatten().tolist()) for path, ranks in adapter.ranks.items()}
    layers = {path: found for path, found in layers.items() if found}
    # The path below the layer, since two modules of a layer may share the last name (c_proj in GPT-2).
    ends = {path: path.rpartition(".")[2] for path in layers}
    short = sorted(end if DEFAULT_PATHS.get(end) == path else path.rpartition(f"{LAYER}.")[2] for path, end in ends.items())
    if not adapter.partial and all(found == tuple(range(adapter.ranks[path].shape[1])) for path, found in layers.items()):
        return {"target_modules": short}
    lists = {layer_list(path) for path in layers}
    if len(lists) == 1 and len(set(layers.values())) == 1 and (before := lists.pop()):
        # PEFT's own guess of the pattern fails for a list of layers at the top of the model.
        pattern = before.removesuffix(".").rpartition(".")[2]
        return {
            "target_modules": short,
            "layers_to_transform": list(next(iter(layers.values()))),
            "layers_pattern": pattern,
        }
    return {"target_modules": full_paths}
