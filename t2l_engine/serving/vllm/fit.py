"""Whether adapters of a checkpoint fit the served model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from t2l_engine.hypernetwork.config import HyperNetworkConfig


def misfit(config: HyperNetworkConfig, model: str) -> str | None:
    """How the sizes of ``config`` and of ``model``, a folder or hub name, differ; None if they agree.

    Linears that transformers' model lacks are not compared.

    Raises OSError or ValueError if transformers cannot read the model's configuration, or has no such model.
    """
    served = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    try:
        layers, sizes = served.num_hidden_layers, _sizes(served)
    except AttributeError as error:
        raise ValueError(f"{type(served).__name__}: {error}") from None
    if layers != config.num_layers:
        return f"the checkpoint is for a model of {config.num_layers} layers, the served one has {layers}"
    for name, *own in zip(config.modules, config.in_features, config.out_features, strict=True):
        if name in sizes and tuple(own) != sizes[name]:
            return (
                f"the checkpoint is for a model whose {name} has {own[0]} inputs and {own[1]} outputs, "
                f"the served one has {sizes[name][0]} and {sizes[name][1]}"
            )
    return None


def _sizes(served: Any) -> dict[str, tuple[int, int]]:
    """Linear -> (in, out) features if they are the same in all layers; from transformers' model on the meta device."""
    try:
        with torch.device("meta"):  # float32: another dtype would become the default of all threads meanwhile
            model = AutoModel.from_config(served, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a model's own code may raise anything, such as for a missing import
        raise ValueError(f"{type(served).__name__}: {error}") from error
    found: dict[str, set[tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(path.rpartition(".")[2], set()).add((module.in_features, module.out_features))
    return {name: next(iter(sizes)) for name, sizes in found.items() if len(sizes) == 1}
