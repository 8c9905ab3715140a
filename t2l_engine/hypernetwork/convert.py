"""Checkpoints between the native form and the reference's, loss-free both ways.

Tensors keep their bits and dtypes.  A reference folder's ``args.yaml`` and ``adapter_config.json`` travel in the "reference"
block of ``config.json``; what the reference's files cannot say of a native checkpoint travels in a block of ``args.yaml``
that the reference ignores.
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

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import read_json, to_json
from t2l_engine.files.weights import replacing
from t2l_engine.files.yaml import read_yaml
from t2l_engine.hypernetwork import sakana as ref
from t2l_engine.hypernetwork.checkpoint import read, write_native
from t2l_engine.hypernetwork.config import HyperNetworkConfig, resolve_scaling
from t2l_engine.hypernetwork.contents import Contents
from t2l_engine.hypernetwork.folder import BLOCKS, CONFIG_NAME, REFERENCE_NAMES, CheckpointError, form
from t2l_engine.hypernetwork.network import build

FORMS = ("native", "reference")


def convert(source: Path, target: Path, to: str | None = None, module_order: list[str] | None = None) -> str:
    """Write the checkpoint folder ``source`` to ``target`` in the form ``to`` ("native", "reference"; None: the other one).

    ``module_order``: as in :meth:`HyperNetwork.from_pretrained`.  Returns the form written.  Files in ``target`` are
    replaced only by complete ones.

    Raises:
        FileNotFoundError: ``source`` or one of its files is absent.
        FileExistsError: ``target`` is a file, or holds a checkpoint of the other form.
        CheckpointError: ``source`` is no sound checkpoint, or the other form cannot express it; the message says what.

    >>> import tempfile
    >>> from t2l_engine.hypernetwork.folder import resolve_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     form_written = convert(resolve_checkpoint("smollm2-135m"), folder)
    ...     print(form_written, sorted(path.name for path in Path(folder).iterdir()))
    reference ['adapter_config.json', 'args.yaml', 'hypermod.pt']
    """
    source, target = Path(source), Path(target)
    if to is not None and to not in FORMS:
        raise ValueError(f"to: expected one of {FORMS}, got {to!r}")
    to = to or next(name for name in FORMS if name != form(source))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, got a file")
    # Files of both forms in one folder would leave open which one counts.
    other = REFERENCE_NAMES[0] if to == "native" else CONFIG_NAME
    if (target / other).exists():
        raise FileExistsError(f"{target}: holds {other}, of another form than {to}; choose another folder")
    contents = read(source, module_order)
    build(contents)  # every key and shape is right
    if to == "native":
        _expect_json(contents)
        write_native(target, contents)
    else:
        _write_reference(target, *to_reference(contents))
    return to


def _expect_json(contents: Contents) -> None:
    """YAML says more than JSON does (dates, sets, keys that are no text); such an argument would be lost."""
    for name, value in contents.blocks.get("reference", {}).get("args", {}).items():
        try:
            same = repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise CheckpointError(
                f"{contents.path.parent}: args.yaml: {short_repr(name)}: expected a JSON value, got {short_repr(value)}"
            )


def _write_reference(folder: Path, state: dict[str, Tensor], args: dict[str, Any], peft: dict[str, Any]) -> None:
    with replacing(folder, *REFERENCE_NAMES) as temporary:
        weights, args_path, peft_path = (temporary / n for n in REFERENCE_NAMES)
        torch.save(state, weights)
        args_path.write_text(yaml.safe_dump(args, sort_keys=True), encoding="utf-8")
        peft_path.write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path, reader in ((args_path, read_yaml), (peft_path, read_json)):
            try:
                reader(path)
            except ConfigError as error:  # too long, or too many values
                raise CheckpointError(f"no reader would accept it: {error}".replace(str(temporary), str(folder))) from None


def to_reference(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(state_dict, args, adapter_config) of the reference's form."""
    state = _reference_state(contents)
    stored = contents.blocks.get("reference", {})
    args, peft = (stored.get(name, {}) for name in ("args", "adapter_config"))
    for name, value in (("args", args), ("adapter_config", peft)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{contents.path.parent}: reference.{name}: expected a mapping, got {short_repr(value)}")
    # As it came, unless the native folder was changed since.
    for candidate in ((args, peft), _reference_configs(contents, args, peft)):
        difference = _difference(contents, state, *candidate)
        if difference is None:
            return state, *candidate
    raise CheckpointError(f"{contents.path}: the reference's form cannot express this checkpoint: {difference}")


def _difference(contents: Contents, state: dict[str, Tensor], args: dict[str, Any], peft: dict[str, Any]) -> str | None:
    """What reading the converted checkpoint would change, or None."""
    order = list(contents.config.modules)
    try:
        back = ref.translate(state, args, peft, *(Path(name) for name in REFERENCE_NAMES), module_order=order)
    except ConfigError as error:
        return str(error)
    ours, theirs = ({**to_json(c.config), **{n: c.blocks.get(n) for n in BLOCKS}} for c in (contents, back))
    for name, value in ours.items():
        if theirs[name] != value:
            return f"{name} {short_repr(value)} would become {short_repr(theirs[name])}"
    ours, theirs = ({**c.state, **{f"unused {k}": t for k, t in c.unused.items()}} for c in (contents, back))
    if ours.keys() != theirs.keys():
        return f"tensors {short_repr(sorted(ours.keys() ^ theirs.keys()))} have no place in it"
    return None


def _reference_state(contents: Contents) -> dict[str, Tensor]:
    config, native = contents.config, dict(contents.state)
    state: dict[str, Tensor] = OrderedDict()
    for dictionary, name in ref.DICTIONARIES.items():
        for side in "AB":
            for module in sorted(config.modules):
                key, i = f"{dictionary}.{side}.{module}", config.modules.index(module)
                shape = (config.rank, config.in_features[i]) if side == "A" else (config.out_features[i], config.rank)
                tensor = native.pop(f"offsets.{module}.{name}_{side}", contents.unused.get(key))
                state[key] = torch.zeros(config.num_layers, *shape) if tensor is None else tensor
    sides = native.pop("side_emb.weight", None)
    for theirs, ours in ref.renamed(config.task_encoder).items():
        if theirs == "out_emb_norm.":
            for i, module in enumerate(config.modules if sides is not None else ()):
                for j, side in enumerate("AB"):
                    state[f"out_emb.{module}.{side}"] = sides[i, j].clone()
        for key in _keys_of(ours, native, config):
            state[theirs + key[len(ours) :]] = native.pop(key)
    return state


def _keys_of(prefix: str, native: dict[str, Tensor], config: HyperNetworkConfig) -> list[str]:
    """The keys right below ``prefix`` ("depth_emb.norm.weight" is not of "depth_emb."), weight before bias."""
    if prefix == "heads.":  # in module order, which is what the file's order means
        return [k for m in config.modules for p in ("weight", "bias") if (k := f"heads.{m}.{p}") in native]
    return [k for k in (prefix, f"{prefix}weight", f"{prefix}bias") if k in native]


def _reference_configs(
    contents: Contents, args: dict[str, Any], peft: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``args.yaml`` and ``adapter_config.json`` for a checkpoint the reference did not write (or that was changed since)."""
    c, blocks = contents.config, contents.blocks
    encoder = blocks.get("encoder") or {}
    z_scores = any(".std_" in key for key in contents.state)
    delta_w = c.output_scale != 1.0
    recon = z_scores or delta_w or blocks.get("training", {}).get("method") == "reconstruction"
    own = {name: value for name, value in to_json(c).items() if name in ref.OWN_VALUES}
    if c.paths is not None:
        own["paths"] = c.module_paths
    # Copies: YAML would write an object that occurs twice as an alias.
    own |= {key: copy.deepcopy(blocks[key]) for key in BLOCKS if key in blocks}
    base = blocks.get("base_model")
    # To the reference no name is the base model's last token.
    own_encoder = bool(base) and (encoder.get("name"), encoder.get("pooling")) == (base.rstrip("/"), "last")
    new_args = {
        "training_task": "recon" if recon else "sft",
        "shared_AB_head": c.num_sides == 2,
        "autoreg_gen": c.num_ranks > 1 or c.variant not in ("L", "M"),
        "learnable_pos_emb": c.variant.endswith("learnable"),
        "hypernet_latent_size": c.latent_size,
        "head_in_size": c.head_in_size,
        # A name without rules for its texts is in the reference's arguments only.
        "emb_model": "" if own_encoder else encoder.get("name") or args.get("emb_model") or "",
        "use_one_hot_task_emb": encoder.get("name") == "one-hot",
        "target_modules": list(c.modules),
        "pred_z_score": z_scores,
        "factorized": z_scores or (recon and not delta_w),
        "delta_w_scaling": c.output_scale**-2 if delta_w else 10000,
        # Where heads have no bias, the reference knows a multi-task LoRA as the reason.
        "mt_lora_path": None if c.head_bias or recon else "AB_offset",
        "encoder_type": c.task_encoder,
        "head_use_bias": False,
        "model_dir": base,
        ref.OWN_BLOCK: own,
    }
    rslora = c.scaling == "rslora"
    new_peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.rank,
        "lora_alpha": c.lora_alpha if rslora else resolve_scaling(c.scaling, c.lora_alpha, c.rank) * c.rank,
        "use_rslora": rslora,
        "target_modules": list(c.modules),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    return args | new_args, peft | new_peft
