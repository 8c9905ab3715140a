"""Description of a checkpoint or adapter folder as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2l_engine.adapters import peft
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.config import PerceiverConfig
from t2l_engine.hypernetwork.folder import CONFIG_NAME, D2L_NAME, SAKANA_NAMES, WEIGHTS_NAME, format_of
from t2l_engine.hypernetwork.network import HyperNetwork, hypernet_flops, load, num_parameters
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork


def describe(folder: Path) -> dict[str, Any]:
    """Structure, sizes and origin of a checkpoint (native, Sakana or Doc-to-LoRA format) or of a PEFT adapter folder.

    Files are read and checked completely.  Checkpoints: ``parameters`` counts ``trunk`` (all but the heads), ``heads``
    and ``offsets`` (buffers).  Adapters: ``parameters`` counts true ranks; ``partial``: the base model may have more
    layers.  Raises ValueError for another folder or an invalid file.
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
    training = blocks.get("training")
    return {
        "kind": "checkpoint",
        "folder": str(folder),
        "form": format_of(folder),
        "variant": c.variant,
        "modules": [
            {"name": name, "in_features": n_in, "out_features": n_out}
            for name, n_in, n_out in zip(c.modules, c.in_features, c.out_features, strict=True)
        ],
        "num_layers": c.num_layers,
        "rank": c.rank,
        "lora_alpha": c.lora_alpha,
        "scaling": {"mode": c.scaling if isinstance(c.scaling, str) else "given", "value": c.scaling_value},
        "latent_size": c.latent_size,
        **(_of_task_embedding(net) if isinstance(net, HyperNetwork) else _of_documents(net)),
        "dtype": str(net.dtype).removeprefix("torch."),
        "file_bytes": contents.path.stat().st_size,
        "values_per_adapter": c.adapter_values,
        "encoder": blocks.get("encoder") or _named_encoder(blocks),
        "base_model": blocks.get("base_model"),
        "prompt": {"form": contents.prompt_form, "description": checkpoint.has_described_prompts(blocks)},
        "training": _training(training) if isinstance(training, dict) else None,
    }


def _of_task_embedding(net: HyperNetwork) -> dict[str, Any]:
    c, heads = net.config, sum(p.numel() for p in net.heads.parameters())
    return {
        "task_encoder": c.task_encoder,
        "trunk_width": c.width,
        "head_in_size": c.head_in_size,
        "embed_dim": c.embed_dim,
        "parameters": {
            "total": num_parameters(c),
            "trunk": num_parameters(c) - heads,
            "heads": heads,
            "offsets": sum(b.numel() for b in net.offsets.buffers()),
        },
        "gflop_per_adapter": sum(hypernet_flops(c).values()) / 1e9,
    }


def _of_documents(net: TokenHyperNetwork) -> dict[str, Any]:
    c = net.config
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in net.named_children()}
    about = {"feature_size": c.feature_size, "parameters": {"total": num_parameters(c), **parts}}
    if not isinstance(c, PerceiverConfig):
        return about | {"blocks": c.num_blocks, "copied": list(c.copied), "first_layer": c.first_layer}
    about["parameters"]["head"] = net.get_parameter("head").numel()
    return about | {
        "latents": {"queries": c.num_latents, "blocks": c.num_blocks, "self_attention": c.num_self_attention},
        "mlps": {"count": c.num_mlps, "per_layer": c.per_layer_mlps},
        "bias": c.bias,
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
