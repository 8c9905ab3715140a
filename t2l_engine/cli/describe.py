"""Description of a checkpoint or adapter folder as JSON values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from t2l_engine.adapters import peft
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json, to_json
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import CONFIG_NAME, D2L_NAME, SAKANA_NAMES, WEIGHTS_NAME, format_of
from t2l_engine.hypernetwork.network import load, num_parameters

#: Fields of a configuration with an entry for each module.
_OF_MODULES = "modules", "in_features", "out_features", "paths"


def describe(folder: Path) -> dict[str, Any]:
    """Structure, sizes and origin of a checkpoint (native, Sakana or Doc-to-LoRA format) or of a PEFT adapter folder.

    Files are read and checked completely.  Checkpoints: the fields of the hypernetwork's configuration; ``parameters``:
    their number, and that of entries, buffers included, by part.  Adapters: ``parameters`` counts true ranks; ``partial``:
    the base model may have more layers.  Raises ValueError for another folder or an invalid file.
    """
    native = (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
    documents = (folder / D2L_NAME).is_file() and not (folder / CONFIG_NAME).is_file()
    if native or documents or (folder / SAKANA_NAMES[0]).is_file():
        return _checkpoint(folder)
    if (folder / peft.CONFIG_NAME).is_file():
        return _adapter(folder)
    raise ConfigError(
        f"{folder}: expected a checkpoint ({CONFIG_NAME} and {WEIGHTS_NAME}, or {SAKANA_NAMES[0]}, or {D2L_NAME}) or a PEFT "
        f"adapter ({peft.CONFIG_NAME} and {peft.WEIGHTS_NAME}), found none of them"
    )


def _checkpoint(folder: Path) -> dict[str, Any]:
    contents = checkpoint.read(folder)
    contents.check_encoder()
    net = load(contents)
    c, blocks = net.config, contents.blocks
    training, parts = blocks.get("training"), Counter[str]()
    for name, tensor in net.state_dict().items():
        parts[name.partition(".")[0]] += tensor.numel()
    return {
        "kind": "checkpoint",
        "folder": str(folder),
        "form": format_of(folder),
        "modules": [
            {"name": name, "in_features": n_in, "out_features": n_out}
            for name, n_in, n_out in zip(c.modules, c.in_features, c.out_features, strict=True)
        ],
        **{name: value for name, value in to_json(c).items() if name not in _OF_MODULES},
        "scaling": {"mode": c.scaling if isinstance(c.scaling, str) else "given", "value": c.scaling_value},
        "parameters": {"total": num_parameters(c), **parts},
        "dtype": str(net.dtype).removeprefix("torch."),
        "file_bytes": contents.path.stat().st_size,
        "values_per_adapter": c.adapter_values,
        "encoder": blocks.get("encoder") or _named_encoder(blocks),
        "base_model": blocks.get("base_model"),
        "prompt": {"form": contents.prompt_form, "description": checkpoint.has_described_prompts(blocks)},
        "training": _training(training) if isinstance(training, dict) else None,
    }


def _named_encoder(blocks: dict[str, Any]) -> dict[str, Any] | None:
    """The encoder in the arguments of a checkpoint in Sakana format, which do not state its pooling."""
    args = blocks.get("reference", {}).get("args")
    name = args.get("emb_model") if isinstance(args, dict) else None
    return {"name": name, "pooling": None} if isinstance(name, str) and name else None


def _training(block: dict[str, Any]) -> dict[str, Any]:
    """Steps and number of tasks, as far as the (unchecked) block has them."""
    tasks, steps = block.get("tasks"), block.get("steps_done")
    return {
        "steps": steps if isinstance(steps, int) else None,
        "num_tasks": len(tasks) if isinstance(tasks, (list, dict)) else None,
    }


def _adapter(folder: Path) -> dict[str, Any]:
    stack = AdapterStack.from_peft([folder])
    config = read_json(folder / peft.CONFIG_NAME)
    modules, parameters = [], 0
    for name, (_, n_in, n_out) in stack.sizes.items():
        ranks = stack.ranks[name][0].tolist()
        sizes = {"name": name, "in_features": n_in, "out_features": n_out}
        modules.append(sizes | {"ranks": sorted(set(ranks) - {0}), "layers": sum(rank > 0 for rank in ranks)})
        parameters += sum(ranks) * (n_in + n_out)
    return {
        "kind": "adapter",
        "folder": str(folder),
        "base_model": config.get("base_model_name_or_path"),
        "modules": modules,
        "num_layers": max(layers for layers, _, _ in stack.sizes.values()),
        "partial": stack.partial,
        "scaling": float(stack.scaling[0]),
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "parameters": parameters,
        "dtype": str(stack.dtype).removeprefix("torch."),
        "file_bytes": (folder / peft.WEIGHTS_NAME).stat().st_size,
    }
