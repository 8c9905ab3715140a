"""Converts checkpoints between native and Sakana format without loss.

Tensors keep their bits and dtypes.  ``args.yaml`` and ``adapter_config.json`` are stored in the "reference" block of
``config.json``; native values that the Sakana format cannot express are stored in a block of ``args.yaml`` that SakanaAI's
code ignores.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from t2l_engine.adapters.peft import WEIGHTS_NAME
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import read_json, to_json
from t2l_engine.files.weights import expect_none, replacing, save_torch
from t2l_engine.files.yaml import read_yaml
from t2l_engine.hypernetwork import d2l, sakana
from t2l_engine.hypernetwork.checkpoint import read, write_native
from t2l_engine.hypernetwork.config import HyperNetworkConfig, PerceiverConfig
from t2l_engine.hypernetwork.folder import (
    BLOCKS,
    CONFIG_NAME,
    D2L_NAME,
    SAKANA_NAMES,
    CheckpointError,
    Contents,
    format_of,
)
from t2l_engine.hypernetwork.network import build

FORMATS = ("native", "sakana", "doc-to-lora")
#: Weights of PEFT adapters.
ADAPTER_WEIGHTS = (WEIGHTS_NAME, "adapter_model.bin")


def convert(source: Path, target: Path, to: str | None = None, module_order: list[str] | None = None) -> str:
    """Write the checkpoint folder ``source`` to ``target`` in another format.

    ``to``: "native", "sakana", "doc-to-lora" or None: native, or of a native checkpoint the format that can express it.
    ``module_order``: as in :meth:`HyperNetwork.from_pretrained`.  Returns the format written.  Files in ``target`` are
    replaced by complete ones only.

    Raises:
        FileNotFoundError: ``source`` or one of its files does not exist.
        FileExistsError: ``target`` is a file, or contains a checkpoint in the other format, an adapter or a model.
        CheckpointError: ``source`` is not a valid checkpoint, or the format cannot express it; the message says why.

    Source: the files of SakanaAI/text-to-lora.

    >>> import tempfile
    >>> from t2l_engine.hypernetwork.folder import resolve_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = convert(resolve_checkpoint("smollm2-135m-paper"), folder)
    ...     print(written, sorted(path.name for path in Path(folder).iterdir()))
    sakana ['adapter_config.json', 'args.yaml', 'hypermod.pt']
    """
    source, target = Path(source), Path(target)
    if to is not None and to not in FORMATS:
        raise ValueError(f"to: expected one of {FORMATS}, got {to!r}")
    contents = read(source, module_order)
    if to is None:
        back = "doc-to-lora" if isinstance(contents.config, PerceiverConfig) else "sakana"
        to = back if format_of(source) == "native" else "native"
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, got a file")
    # A folder with files of both formats would be ambiguous.
    own = {"native": CONFIG_NAME, "sakana": SAKANA_NAMES[0], "doc-to-lora": D2L_NAME}[to]
    others = [name for name in (CONFIG_NAME, SAKANA_NAMES[0], D2L_NAME) if name != own]
    expect_none(target, others, f"of another format than {to}")
    if to == "sakana":  # it would replace the adapter's configuration and leave its weights
        expect_none(target, ADAPTER_WEIGHTS, "whose adapter_config.json would be replaced")
    build(contents)  # checks every key and shape
    contents.check_encoder()
    if to == "native":
        _expect_json(contents)
        write_native(target, contents)
    elif to == "doc-to-lora":
        d2l.write(target, contents)
    else:
        _write_sakana(target, *to_sakana(contents))
    return to


def _stored(contents: Contents, name: str) -> dict[str, Any]:
    """What a checkpoint keeps of a Sakana file, empty if nothing; CheckpointError unless it is a mapping."""
    value = contents.blocks.get("reference", {}).get(name, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{contents.path.parent}: reference.{name}: expected a mapping, got {short_repr(value)}")
    return value


def _expect_json(contents: Contents) -> None:
    """CheckpointError for a YAML argument that JSON cannot express (dates, sets, keys that are not strings)."""
    for name, value in _stored(contents, "args").items():
        try:
            same = repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise CheckpointError(
                f"{contents.path.parent}: args.yaml: {short_repr(name)}: expected a JSON value, got {short_repr(value)}"
            )


def _write_sakana(folder: Path, state: dict[str, Tensor], args: dict[str, Any], peft: dict[str, Any]) -> None:
    with replacing(folder, *SAKANA_NAMES) as temporary:
        weights, args_path, peft_path = (temporary / n for n in SAKANA_NAMES)
        save_torch(state, weights, folder)
        args_path.write_text(yaml.safe_dump(args, sort_keys=True), encoding="utf-8")
        peft_path.write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path, read_back in ((args_path, read_yaml), (peft_path, read_json)):
            try:
                read_back(path)
            except ConfigError as error:  # too long, or too many values
                raise CheckpointError(f"loading would refuse it: {error}".replace(str(temporary), str(folder))) from None


def to_sakana(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(state_dict, args, adapter_config) in Sakana format."""
    config = contents.config
    if not isinstance(config, HyperNetworkConfig):
        raise CheckpointError(f"{contents.path}: the Sakana format cannot express this checkpoint: it reads tokens")
    state = _sakana_state(contents, config)
    args, peft = (_stored(contents, name) for name in ("args", "adapter_config"))
    # The original files if they still describe the checkpoint, which may have been changed since.
    for args_now, peft_now in ((args, peft), _sakana_configs(contents, config, args, peft)):
        difference = _difference(contents, state, args_now, peft_now)
        if difference is None:
            return state, args_now, peft_now
    raise CheckpointError(f"{contents.path}: the Sakana format cannot express this checkpoint: {difference}")


def _difference(contents: Contents, state: dict[str, Tensor], args: dict[str, Any], peft: dict[str, Any]) -> str | None:
    """What reading the converted checkpoint would change, or None."""
    order = list(contents.config.modules)
    try:
        back = sakana.SakanaFiles(args, peft, state=state).contents(order)
    except ConfigError as error:
        return str(error)
    ours, theirs = ({**to_json(c.config), **{n: c.blocks.get(n) for n in BLOCKS}} for c in (contents, back))
    for name, value in ours.items():
        if theirs[name] != value:
            return f"{name} {short_repr(value)} would become {short_repr(theirs[name])}"
    ours, theirs = ({**c.state, **{f"unused {k}": t for k, t in c.unused.items()}} for c in (contents, back))
    if ours.keys() != theirs.keys():
        return f"tensors {short_repr(sorted(ours.keys() ^ theirs.keys()))} are not part of it"
    return None


def _sakana_state(contents: Contents, config: HyperNetworkConfig) -> dict[str, Tensor]:
    native = dict(contents.state)
    state: dict[str, Tensor] = OrderedDict()
    for dictionary, name in sakana.DICTIONARIES.items():
        for side in "AB":
            for module in sorted(config.modules):
                key, i = f"{dictionary}.{side}.{module}", config.modules.index(module)
                shape = (config.rank, config.in_features[i]) if side == "A" else (config.out_features[i], config.rank)
                tensor = native.pop(f"offsets.{module}.{name}_{side}", contents.unused.get(key))
                state[key] = torch.zeros(config.num_layers, *shape) if tensor is None else tensor
    sides = native.pop("side_emb.weight", None)
    for theirs, ours in sakana.renamed(config.task_encoder).items():
        if theirs == "out_emb_norm." and sides is not None:
            for i, module in enumerate(config.modules):
                for j, side in enumerate("AB"):
                    state[f"out_emb.{module}.{side}"] = sides[i, j].clone()
        for key in _keys_of(ours, native, config):
            state[theirs + key[len(ours) :]] = native.pop(key)
    return state


def _keys_of(prefix: str, native: dict[str, Tensor], config: HyperNetworkConfig) -> list[str]:
    """The keys directly below ``prefix`` ("depth_emb.norm.weight" is not below "depth_emb."), weight before bias."""
    if prefix == "heads.":  # in module order, which the order of the keys states
        return [k for m in config.modules for p in ("weight", "bias") if (k := f"heads.{m}.{p}") in native]
    return [k for k in (prefix, f"{prefix}weight", f"{prefix}bias") if k in native]


def _sakana_configs(
    contents: Contents, c: HyperNetworkConfig, args: dict[str, Any], peft: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``args.yaml`` and ``adapter_config.json`` for a checkpoint that SakanaAI's code did not write, or changed since."""
    blocks = contents.blocks
    encoder = blocks.get("encoder") or {}
    z_scores = any(".std_" in key for key in contents.state)
    delta_w = c.output_scale != 1.0
    recon = z_scores or delta_w or blocks.get("training", {}).get("method") == "reconstruction"
    own = {name: value for name, value in to_json(c).items() if name in sakana.OWN_VALUES}
    if c.paths is not None:
        own["paths"] = c.module_paths
    # Copied: YAML would write an object that occurs twice as an alias.
    own |= {key: copy.deepcopy(blocks[key]) for key in BLOCKS if key in blocks}
    base = blocks.get("base_model")
    # In Sakana format no name means the base model's last token.
    own_encoder = bool(base) and (encoder.get("name"), encoder.get("pooling")) == (base.rstrip("/"), "last")
    new_args = {
        "training_task": "recon" if recon else "sft",
        "shared_AB_head": c.num_sides == 2,
        "autoreg_gen": c.num_ranks > 1 or c.variant not in ("L", "M"),
        "learnable_pos_emb": c.variant.endswith("learnable"),
        "hypernet_latent_size": c.latent_size,
        "head_in_size": c.head_in_size,
        # An encoder without rules is named in the original arguments only.
        "emb_model": "" if own_encoder else encoder.get("name") or args.get("emb_model") or "",
        "use_one_hot_task_emb": encoder.get("name") == "one-hot",
        "target_modules": list(c.modules),
        "pred_z_score": z_scores,
        "factorized": z_scores or (recon and not delta_w),
        "delta_w_scaling": c.output_scale**-2 if delta_w else 10000,
        # In Sakana format heads without bias imply a multi-task LoRA.
        "mt_lora_path": None if c.head_bias or recon else "AB_offset",
        "encoder_type": c.task_encoder,
        "head_use_bias": False,
        "model_dir": base,
        sakana.OWN_BLOCK: own,
    }
    rslora = c.scaling == "rslora"
    new_peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.rank,
        "lora_alpha": c.lora_alpha if rslora else c.scaling_value * c.rank,
        "use_rslora": rslora,
        "target_modules": list(c.modules),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    return args | new_args, peft | new_peft
