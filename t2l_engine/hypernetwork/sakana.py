"""Reads checkpoint folders in Sakana format, that of SakanaAI/text-to-lora.

``hypermod.pt`` (a state_dict), ``args.yaml`` (training arguments) and ``adapter_config.json`` (PEFT).  The structure is
taken from the tensors; flags that contradict them are an error.  The rows of the module embedding are in the order of the
``heads.<module>`` keys: SakanaAI's code enumerates a Python set, whose order depends on the hash seed of the training
process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.files.errors import ConfigError, boolean, positive_number, short_repr
from t2l_engine.files.text import from_json, read_json, to_json
from t2l_engine.files.torch_file import read_torch_file
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.folder import (
    BLOCKS,
    SAKANA_NAMES,
    CheckpointError,
    Contents,
    check_blocks,
    expect_keys,
    expect_shape,
    sakana_encoder_config,
)

#: Our block in args.yaml: facts of a converted native checkpoint that the Sakana format cannot express.
OWN_BLOCK = "t2l_engine"
OWN_VALUES = ("lora_alpha", "scaling", "output_scale")
DICTIONARIES = {"AB_offset": "add", "mean_recon_target": "mean", "std_recon_target": "std"}

#: Key prefix in Sakana format -> our parameter prefix, in the order of SakanaAI's state_dict.
_LINEAR_ENCODER = {"task_encoder.mlp.0.": "task_encoder.linear.", "task_encoder.mlp.1.": "task_encoder.norm."}
_OTHER_ENCODERS = {
    "task_encoder.embed": "task_encoder.embed",
    "task_encoder.cluster_size": "task_encoder.cluster_size",
    "task_encoder.embed_avg": "task_encoder.embed_avg",
    "task_encoder.mlp.0.": "task_encoder.linear1.",
    "task_encoder.mlp.3.": "task_encoder.linear2.",
    "task_encoder.ln.": "task_encoder.norm.",
}
_REST = {
    "layer_depth_encoder.0.": "depth_emb.",
    "layer_depth_encoder.1.": "depth_emb.norm.",
    "layer_type_encoder.0.": "module_emb.",
    "layer_type_encoder.1.": "module_emb.norm.",
    "mixer.1.": "mixer.linear1.",
    "mixer.4.": "mixer.linear2.",
    "mlp1.mlp.0.": "mlp1.norm.",
    "mlp1.mlp.1.": "mlp1.linear1.",
    "mlp1.mlp.4.": "mlp1.linear2.",
    "mlp2.mlp.0.": "mlp2.norm.",
    "mlp2.mlp.1.": "mlp2.linear1.",
    "mlp2.mlp.4.": "mlp2.linear2.",
    "mlp3.0.": "mlp3.norm.",
    "mlp3.1.": "mlp3.linear1.",
    "mlp3.4.": "mlp3.linear2.",
    "pos_emb.0.": "pos_emb.",
    "pos_emb.1.": "pos_emb.norm.",
    "out_emb_norm.": "side_emb.norm.",
    "heads.": "heads.",
}


def renamed(task_encoder: str) -> dict[str, str]:
    """Key prefix in Sakana format -> our parameter prefix."""
    return (_LINEAR_ENCODER if task_encoder == "linear" else _OTHER_ENCODERS) | _REST


def sakana_key(key: str, task_encoder: str) -> str:
    """The key in Sakana format of a native ``key``."""
    if key.startswith("offsets."):
        _, module, name = key.split(".")
        dictionary = next(d for d, ours in DICTIONARIES.items() if ours == name[:-2])
        return f"{dictionary}.{name[-1]}.{module}"
    fitting = [pair for pair in renamed(task_encoder).items() if key.startswith(pair[1])]
    theirs, ours = max(fitting, key=lambda pair: len(pair[1]), default=("", ""))
    return theirs + key[len(ours) :]


@dataclasses.dataclass
class SakanaFiles:
    """The contents of the files of a checkpoint; the paths name them in errors.

    ``own``: our block of ``args``, empty in a file that SakanaAI's code wrote.
    """

    args: dict[str, Any]
    peft: dict[str, Any]
    weights: Path = Path(SAKANA_NAMES[0])
    args_path: Path = Path(SAKANA_NAMES[1])
    peft_path: Path = Path(SAKANA_NAMES[2])
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = self.args.get(OWN_BLOCK, {})
        if not isinstance(self.own, dict):
            raise CheckpointError(f"{self.args_path}: {OWN_BLOCK}: expected a mapping, got {short_repr(self.own)}")
        check_blocks(self.own, f"{self.args_path}: {OWN_BLOCK}")

    @classmethod
    def open(cls, folder: Path, tensors: bool = False) -> SakanaFiles:
        """The two configuration files in ``folder``, and the ``tensors`` if asked for."""
        from t2l_engine.files.yaml import read_yaml  # here: only this format needs PyYAML

        weights, args_path, peft_path = (folder / name for name in SAKANA_NAMES)
        # Intermediate checkpoints are in checkpoints/it_<step>/, their configuration in the folder above "checkpoints".
        steps = folder.absolute().parent
        if not args_path.is_file() and steps.name == "checkpoints":
            args_path, peft_path = (steps.parent / name for name in SAKANA_NAMES[1:])
        for path in (args_path, peft_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: not found")
        values = read_yaml(args_path), read_json(peft_path)
        for path, value in zip((args_path, peft_path), values, strict=True):
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise CheckpointError(f"{path}: expected a mapping from names, got {short_repr(value)}")
        state = read_torch_file(weights, CheckpointError)[0] if tensors else {}
        return cls(*values, weights, args_path, peft_path, state)

    def blocks(self) -> dict[str, Any]:
        """The optional blocks of a native folder, as far as the files state them."""
        if self.own:
            return {key: self.own[key] for key in BLOCKS if key in self.own}
        blocks: dict[str, Any] = {}
        for name in (self.args.get("model_dir"), self.peft.get("base_model_name_or_path")):
            if isinstance(name, str) and name:
                blocks["base_model"] = name
        blocks["reference"] = {"args": self.args, "adapter_config": self.peft}
        with contextlib.suppress(ConfigError):  # unknown pooling: generating needs an encoder from the caller
            blocks["encoder"] = to_json(sakana_encoder_config(self.args, "args.yaml"))
        return blocks

    def contents(self, module_order: list[str] | None = None) -> Contents:
        """The checkpoint under native names; CheckpointError if tensors and flags contradict each other."""
        state, args = self.state, self.args
        modules = self._modules(module_order)
        sizes = self._sizes(modules)
        num_layers, rank = sizes[0][:2]
        encoder, task_width = self._task_encoder()
        recon, factorized, z_scores = self._training()
        bias = f"heads.{modules[0]}.bias" in state
        self._check_bias(modules[0], bias, recon, z_scores)
        self._check_peft(modules, rank, warn=not recon and module_order is None)
        head_in_size = self._take("mlp3.4.weight", 2).shape[0]
        for field, got in (("hypernet_latent_size", 2 * task_width), ("head_in_size", head_in_size)):
            value = args.get(field, got)
            # The tensors determine half of the latent size.
            same = isinstance(value, int) and (value == got or (field == "hypernet_latent_size" and value == got + 1))
            if not same:
                raise CheckpointError(
                    f"{self.args_path}: {field}: {short_repr(value)} contradicts the tensors, which say {got}"
                )
        delta_scale = positive_number(f"{self.args_path}: delta_w_scaling", args.get("delta_w_scaling", 10000))
        values = {
            "variant": self._variant(modules, sizes[0]),
            "modules": modules,
            "in_features": [s[2] for s in sizes],
            "out_features": [s[4] for s in sizes],
            "num_layers": num_layers,
            "rank": rank,
            "embed_dim": self._take("task_encoder.mlp.0.weight", 2).shape[1],
            "latent_size": args.get("hypernet_latent_size", 2 * task_width),
            "head_in_size": head_in_size,
            "lora_alpha": positive_number(f"{self.peft_path}: lora_alpha", self.peft.get("lora_alpha")),
            "scaling": "rslora" if _flag(self.peft, "use_rslora", False, self.peft_path) else "plain",
            "head_bias": bias,
            "output_scale": delta_scale**-0.5 if recon and not factorized else 1.0,
            "task_encoder": encoder,
            "paths": self._paths(modules),
        }
        config = self._with_own_values(from_json(HyperNetworkConfig, values, str(self.weights)))
        applied = {"AB_offset": not recon or factorized, "mean_recon_target": z_scores, "std_recon_target": z_scores}
        native, unused = _rename(state, config, applied, self.weights)
        key_in_file = lambda key: sakana_key(key, encoder)  # noqa: E731
        return Contents(config, native, unused, self.blocks(), self.weights, self.args_path, key_in_file)

    # --- what the tensors say --------------------------------------------------------------------------------------

    def _take(self, key: str, dims: int) -> Tensor:
        """The tensor ``key``; CheckpointError names it if it is missing or has another number of dimensions."""
        if key not in self.state:
            raise CheckpointError(f"{self.weights}: missing key {short_repr(key)}")
        if self.state[key].dim() != dims:
            got = short_repr(tuple(self.state[key].shape))
            raise CheckpointError(f"{self.weights}: {short_repr(key)}: expected {dims} dimensions, got {got}")
        return self.state[key]

    def _modules(self, module_order: list[str] | None) -> list[str]:
        """Module names in the order of the keys of the file, or in ``module_order``."""
        modules, sides = (
            list(dict.fromkeys(k.split(".")[1] for k in self.state if k.startswith(prefix) and k.count(".") >= 2))
            for prefix in ("heads.", "out_emb.")
        )
        if not modules:
            raise CheckpointError(f"{self.weights}: missing keys heads.<module>.weight")
        if sides and sides != modules:
            raise CheckpointError(
                f"{self.weights}: module order of heads {short_repr(modules)} and of out_emb {short_repr(sides)} disagree"
            )
        if module_order is None:
            return modules
        if sorted(module_order) != sorted(modules):
            raise CheckpointError(
                f"module_order: expected an order of {short_repr(modules)}, got {short_repr(list(module_order))}"
            )
        return list(module_order)

    def _sizes(self, modules: list[str]) -> list[tuple[int, ...]]:
        """Shapes of A ``(n, r, in)`` and B ``(n, out, r)`` of each module, as one tuple."""
        sizes = []
        for name in modules:
            a, b = self._take(f"AB_offset.A.{name}", 3), self._take(f"AB_offset.B.{name}", 3)
            sizes.append((*a.shape, *b.shape))
            if a.shape[:2] != (b.shape[0], b.shape[2]) or sizes[-1][:2] != sizes[0][:2]:
                raise CheckpointError(
                    f"{self.weights}: AB_offset of {short_repr(name)}: expected A (n, r, in) and B (n, out, r), "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        return sizes

    def _task_encoder(self) -> tuple[str, int]:
        """Kind of the task encoder, and width t of its result."""
        if "task_encoder.cluster_size" in self.state:
            return "vq", self._take("task_encoder.mlp.3.weight", 2).shape[0]
        if "task_encoder.embed" in self.state:
            return "softmax", self._take("task_encoder.embed", 2).shape[1]
        if "task_encoder.mlp.3.weight" in self.state:
            return "discrete", self._take("task_encoder.mlp.3.weight", 2).shape[0]
        return "linear", self._take("task_encoder.mlp.0.weight", 2).shape[0]

    def _variant(self, modules: list[str], sizes: tuple[int, ...]) -> str:
        """Variant by the tensors, checked against the flags; the flags decide for rank 1, where shapes are equal."""
        rank, n_in, n_out = sizes[1], sizes[2], sizes[4]
        shared = any(k.startswith("out_emb.") for k in self.state)
        learnable = "pos_emb.0.weight" in self.state
        names = ("shared_AB_head", "autoreg_gen", "learnable_pos_emb")
        flags = {name: _flag(self.args, name, False, self.args_path) for name in names}
        key = f"heads.{modules[0]}.weight"
        rows = self._take(key, 2).shape[0]
        per_rank = max(n_in, n_out) if shared else n_in + n_out
        possible = {autoreg for autoreg, expected in ((False, rank * per_rank), (True, per_rank)) if rows == expected}
        if not possible:
            raise CheckpointError(
                f"{self.weights}: {short_repr(key)}: expected {rank * per_rank} or {per_rank} rows for rank {rank}, "
                f"in {n_in}, out {n_out}, got {rows}"
            )
        # Rank 1: only autoregressive heads have learned positions; without those the flag decides.
        autoreg = possible.pop() if len(possible) == 1 else learnable or flags["autoreg_gen"]
        found = {"shared_AB_head": shared, "autoreg_gen": autoreg}
        if autoreg:
            found["learnable_pos_emb"] = learnable
        for name, value in found.items():
            if flags[name] != value:
                raise CheckpointError(
                    f"{self.args_path}: {name}: {flags[name]} contradicts the tensors in {self.weights.name}, which say "
                    f"{value}"
                )
        if not autoreg:
            return "M" if shared else "L"
        return f"{'S' if shared else 'autoregressive'}-{'learnable' if learnable else 'rotary'}"

    # --- what the configuration says -------------------------------------------------------------------------------

    def _training(self) -> tuple[bool, bool, bool]:
        """Whether the checkpoint reconstructs adapters, and if so whether A and B, and whether their z-scores."""
        task = self.args.get("training_task", "sft")
        if task not in ("sft", "recon"):
            raise CheckpointError(f"{self.args_path}: training_task: expected 'sft' or 'recon', got {short_repr(task)}")
        factorized = _flag(self.args, "factorized", False, self.args_path)
        z_scores = _flag(self.args, "pred_z_score", True, self.args_path) and task == "recon"
        if z_scores and not factorized:
            raise CheckpointError(
                f"{self.args_path}: pred_z_score with factorized=false: SakanaAI's code does not define generation for it"
            )
        return task == "recon", factorized, z_scores

    def _check_bias(self, module: str, bias: bool, recon: bool, z_scores: bool) -> None:
        mt_lora_path = self.args.get("mt_lora_path")  # an empty path adds nothing, but removes the bias too
        expected = not z_scores if recon else mt_lora_path is None
        if bias != expected:
            raise CheckpointError(
                f"{self.weights}: 'heads.{module}.bias': expected {'present' if expected else 'absent'} for training_task="
                f"{'recon' if recon else 'sft'}, mt_lora_path={short_repr(mt_lora_path)}, pred_z_score={z_scores}"
            )

    def _check_peft(self, modules: list[str], rank: int, warn: bool) -> None:
        got, targets = self.peft.get("r"), self.peft.get("target_modules")
        if got != rank:
            raise CheckpointError(f"{self.peft_path}: r: expected {rank} as in the tensors, got {short_repr(got)}")
        names = targets if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else []
        if sorted(names) != sorted(modules):
            expected = short_repr(sorted(modules))
            raise CheckpointError(
                f"{self.peft_path}: target_modules: expected {expected} in any order, got {short_repr(targets)}"
            )
        if warn and targets != modules:
            warnings.warn(
                f"{self.peft_path}: target_modules lists {short_repr(targets)}, the tensors say rows belong to "
                f"{short_repr(modules)}; the tensors are followed",
                stacklevel=6,  # the caller of from_pretrained
            )

    def _paths(self, modules: list[str]) -> list[Any] | None:
        """Paths of ``modules`` that a converted native checkpoint states, else None."""
        paths = self.own.get("paths")
        if paths is None:
            return None
        if not isinstance(paths, dict) or sorted(map(str, paths)) != sorted(modules):
            raise CheckpointError(
                f"{self.args_path}: {OWN_BLOCK}: paths: expected one for each of {modules}, got {short_repr(paths)}"
            )
        return [paths[name] for name in modules]

    def _with_own_values(self, config: HyperNetworkConfig) -> HyperNetworkConfig:
        """``config`` with the exact numbers of a converted native checkpoint; CheckpointError for a contradiction."""
        own = {key: value for key, value in self.own.items() if key in OWN_VALUES}
        if not own:
            return config
        where = f"{self.args_path}: {OWN_BLOCK}"
        exact = from_json(HyperNetworkConfig, to_json(config) | own, where)
        for name, a, b in (
            ("scaling", exact.scaling_value, config.scaling_value),
            ("output_scale", exact.output_scale, config.output_scale),
        ):
            if abs(a - b) > 1e-9 * b:
                raise CheckpointError(f"{where}: {name} {a} contradicts the other fields, which say {b}")
        return exact


def _flag(values: dict[str, Any], name: str, default: bool, path: Path) -> bool:
    return boolean(f"{path}: {name}", values.get(name, default))


def _is_blank(tensor: Tensor) -> bool:
    """Whether ``tensor`` is float32 +0.0 throughout, which SakanaAI's code writes for unset dictionaries."""
    return tensor.dtype == torch.float32 and not bool(tensor.contiguous().view(torch.uint8).any())


def _rename(
    state: dict[str, Tensor], config: HyperNetworkConfig, applied: dict[str, bool], weights: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Native state, and tensors that generation ignores; CheckpointError for missing or unknown keys and wrong shapes."""
    modules, prefixes = config.modules, renamed(config.task_encoder)
    known = {f"{d}.{s}.{m}" for d in DICTIONARIES for s in "AB" for m in modules}
    if config.num_sides == 2:
        known |= {f"out_emb.{m}.{s}" for s in "AB" for m in modules}
    native: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        if key in known:
            continue
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        name = None if prefix is None else prefixes[prefix] + key[len(prefix) :]
        # Translated back: an unknown key may map to a known name, as "pos_emb.0.norm.bias" to that of "pos_emb.1.bias".
        if name is None or sakana_key(name, config.task_encoder) != key:
            unknown.append(key)
        else:
            native[name] = tensor
    expect_keys(weights, [*(known & state.keys()), *unknown], known)
    for key in sorted(known):
        like = None if key.startswith("out_emb.") else state["AB_offset." + key.split(".", 1)[1]]
        expect_shape(weights, key, state[key], (config.width,) if like is None else tuple(like.shape))
    if config.num_sides == 2:
        kinds = sorted({str(state[f"out_emb.{m}.{s}"].dtype) for s in "AB" for m in modules})
        if len(kinds) > 1:  # torch.stack would promote dtypes
            raise CheckpointError(f"{weights}: out_emb.*: expected tensors of one dtype, got {', '.join(kinds)}")
        native["side_emb.weight"] = torch.stack(
            [torch.stack([state[f"out_emb.{m}.A"], state[f"out_emb.{m}.B"]]) for m in modules]
        )
    unused = {}
    for dictionary, name in DICTIONARIES.items():
        for side in "AB":
            for module in modules:
                key = f"{dictionary}.{side}.{module}"
                # Applied statistics are kept even if zero; an offset of zeros adds nothing.
                if applied[dictionary] and (name != "add" or not _is_blank(state[key])):
                    native[f"offsets.{module}.{name}_{side}"] = state[key]
                elif not _is_blank(state[key]):
                    unused[key] = state[key]
    return native, unused
