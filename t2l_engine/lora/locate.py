"""Finds the linears of a model that an adapter adapts, by name and layer, also inside packed projections."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from t2l_engine.adapters.paths import LAYER, path_template
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import short_repr
from t2l_engine.files.weights import WEIGHT_DTYPES
from t2l_engine.lora.sharding import Sharding, is_distributed, is_fully_sharded, sharding

#: Packed projection -> its modules in order of columns.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Packed projection -> transformers' ``model_type`` of the models with this layout.  Others use these names for another order
# of columns (CodeGen, MiniMax), which sizes alone do not reveal.
_PACKED_IN = {
    "qkv_proj": ("phi3", "phi4_multimodal"),
    "gate_up_proj": ("phi3", "phi4_multimodal", "glm", "glm4"),
}

# Classes of torch and transformers that read the weights of these linears instead of calling them; None: of all.
# TransformerEncoderLayer does in eval mode without gradients; state-space mixers pass the weights to fused kernels if these
# are installed, and never call dt_proj.
_NOT_CALLED: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("MultiheadAttention", "TransformerEncoderLayer", "WavLMAttention")),
    "DisentangledSelfAttention": ("in_proj",),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("dt_proj", "x_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "Zamba2MambaMixer"), ("out_proj",)),
    **dict.fromkeys(("NemotronHMamba2Mixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
}

#: Packed projection -> module -> number of columns, in order.
Packed = Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class Target:
    """One linear of a model: attribute ``attribute`` of ``parent``, at ``path``.

    ``columns``: half-open range of output columns inside a packed projection, None = the whole output.
    """

    parent: nn.Module
    attribute: str
    path: str
    linear: nn.Module
    columns: tuple[int, int] | None = None


def is_transposed(linear: nn.Module) -> bool:
    """Whether the layer stores its weight as ``[in, out]`` (transformers' ``Conv1D``, in GPT-2)."""
    return hasattr(linear, "nf") and hasattr(linear, "nx")


def features(linear: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear, None if unknown."""
    names = ("nx", "nf") if is_transposed(linear) else ("in_features", "out_features")
    n_in, n_out = (getattr(linear, name, None) for name in names)
    if n_in is not None and n_out is not None:
        return n_in, n_out
    weight = getattr(linear, "weight", None)
    return (weight.shape[1], weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def packed_columns(model: nn.Module, packed: Packed | None) -> dict[str, dict[str, tuple[int, int]]]:
    """Packed projection -> module -> half-open range of columns: of ``packed``, else by the model's configuration."""
    if packed is None:
        config, known = getattr(model, "config", None), {}
        model_type = getattr(config, "model_type", None)
        if config is not None and model_type in _PACKED_IN["qkv_proj"]:
            heads, kv = config.num_attention_heads, config.num_key_value_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            known["qkv_proj"] = dict(zip(PACKED["qkv_proj"], (heads * head_dim, *[kv * head_dim] * 2), strict=True))
        if config is not None and model_type in _PACKED_IN["gate_up_proj"]:
            known["gate_up_proj"] = dict.fromkeys(PACKED["gate_up_proj"], config.intermediate_size)
        packed = known
    if not isinstance(packed, Mapping) or not all(isinstance(widths, Mapping) for widths in packed.values()):
        raise ValueError(f"packed: expected linear -> module -> number of columns, got {short_repr(packed)}")
    columns: dict[str, dict[str, tuple[int, int]]] = {}
    for host, widths in packed.items():
        start = 0
        for name, width in widths.items():
            if not isinstance(width, int) or isinstance(width, bool) or width < 1:
                raise ValueError(f"packed: {host}: {name}: expected a positive number of columns, got {short_repr(width)}")
            columns.setdefault(host, {})[name] = (start, start + width)
            start += width
    return columns


def find(model: nn.Module, name: str, path: str, packed: Packed | None = None) -> dict[int, Target]:
    """Layer index -> the linear of module ``name``; a module outside the layers is layer 0.

    A linear matches if its path ends with ``name`` and has one layer index (none for a ``path`` without ``{layer}``).  If
    linears at several paths match (in a vision tower and in the language model), those at ``path`` are taken, else those in
    the decoder (transformers' ``get_decoder``).  Raises ValueError, naming them, unless linears at one path match.
    """
    groups = _candidates(model, name, path)
    if not groups:
        for host, modules in packed_columns(model, packed).items():
            if name in modules:
                hosts = _candidates(model, host, path)
                if hosts:
                    layers = _choose(model, hosts, host, f"{path.rpartition('.')[0]}.{host}")
                    _check_columns(host, layers, modules)
                    return {i: dataclasses.replace(target, columns=modules[name]) for i, target in layers.items()}
        raise ValueError(f"{name}: the adapter adapts {path}, but {type(model).__name__} has no such module")
    return _choose(model, groups, name, path)


def _candidates(model: nn.Module, name: str, path: str) -> dict[str, dict[int, Target]]:
    """Path with ``{layer}`` -> layer index -> target, for all matching linears."""
    suffix = name.split(".")
    groups: dict[str, dict[int, Target]] = {}
    # With duplicates: a module shared by several layers has a path in each.
    modules = dict(model.named_modules(remove_duplicate=False))
    for full, module in modules.items():
        template, parts = path_template(full), full.split(".")
        pattern = template.split(".")
        if pattern.count(LAYER) != (1 if LAYER in path else 0):
            continue
        if pattern[-len(suffix) :] != suffix:  # a name may begin above the layer: "encoder.layers.{layer}.q_proj"
            continue
        layer = int(parts[pattern.index(LAYER)]) if LAYER in pattern else 0
        parent = modules[".".join(parts[:-1])]
        groups.setdefault(template, {})[layer] = Target(parent, parts[-1], full, module)
    return groups


def _choose(model: nn.Module, groups: dict[str, dict[int, Target]], name: str, path: str) -> dict[int, Target]:
    if len(groups) > 1 and path in groups:
        groups = {path: groups[path]}
    get_decoder = getattr(model, "get_decoder", None)
    if len(groups) > 1 and get_decoder is not None:
        inside = {id(module) for module in get_decoder().modules()}
        groups = {g: t for g, t in groups.items() if all(id(target.linear) in inside for target in t.values())} or groups
    if len(groups) > 1:
        raise ValueError(
            f"{name}: the model has several modules of that name: {sorted(groups)}; the adapter's path is {path}"
        )
    layers = next(iter(groups.values()))
    owners: dict[tuple[int, str], int] = {}
    for layer, target in sorted(layers.items()):
        other = owners.setdefault((id(target.parent), target.attribute), layer)
        if other != layer:
            raise ValueError(f"{name}: layers {other} and {layer} of the model are one module, which has one adapter")
        if not callable(target.linear) or isinstance(target.linear, (nn.ModuleList, nn.ModuleDict, nn.Embedding)):
            raise ValueError(f"{name}: layer {layer} is a {type(target.linear).__name__}, expected a linear")
        if _only_read(target):
            parent = type(target.parent).__name__
            raise ValueError(f"{name}: {target.path} cannot be adapted: {parent} reads its weight and does not call it")
    return dict(sorted(layers.items()))


def _only_read(target: Target) -> bool:
    """Whether the parent is known to read the weight of the linear instead of calling it."""
    read = (_NOT_CALLED.get(kind.__name__, ()) for kind in type(target.parent).__mro__)
    return any(linears is None or target.attribute in linears for linears in read)


def _check_columns(host: str, layers: dict[int, Target], modules: Mapping[str, tuple[int, int]]) -> None:
    total = max(end for _, end in modules.values())
    for target in layers.values():
        got = features(target.linear)
        if got is not None and got[1] != total:
            raise ValueError(
                f"packed: {host}: expected {total} columns ({', '.join(modules)}), but {target.path} has {got[1]}"
            )


def check_layers(name: str, stack: AdapterStack, targets: dict[int, Target]) -> None:
    """ValueError unless the layers of module ``name`` of ``stack`` are those of ``targets``."""
    path, num_layers = stack.paths[name], stack.lora_A[name].shape[1]
    depth = max(targets) + 1
    if LAYER not in path or num_layers == depth == len(targets):
        return
    # Modules that the last layers of a model lack are filled up to its depth, with rank 0.
    needed = set(stack.ranks[name].amax(dim=0).nonzero().flatten().tolist())
    if max(needed, default=0) >= depth or (num_layers < depth and not stack.partial):
        raise ValueError(f"{name}: the adapter has {num_layers} layers, the model has {depth}")
    if needed - targets.keys():
        raise ValueError(f"{name}: the adapter adapts layers {sorted(needed - targets.keys())}, where the model has none")


def check_features(name: str, targets: dict[int, Target], n_in: int, n_out: int) -> None:
    """ValueError unless all ``targets`` have these features, as far as they are known, and none is on the meta device."""
    for layer, target in targets.items():
        got = features(target.linear)
        if got is not None and target.columns is not None:
            got = (got[0], target.columns[1] - target.columns[0])
        if got is not None and got != (n_in, n_out):
            raise ValueError(
                f"{name}: layer {layer}: the adapter has in/out features {n_in}/{n_out}, the model has {got[0]}/{got[1]}"
            )
        weight = getattr(target.linear, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            raise ValueError(f"model: {target.path} is on the meta device; load its weights first")


def find_sharding(model: nn.Module, name: str, targets: dict[int, Target]) -> Sharding | None:
    """How the linears of module ``name`` are divided among processes, None if they are not.

    Raises ValueError as :func:`.sharding.sharding`, if layers differ, and for weights that ``fully_shard`` has divided.
    """
    divided = [target.path for target in targets.values() if is_distributed(getattr(target.linear, "weight", None))]
    if divided and is_fully_sharded(model):
        raise ValueError(f"model: the weight of {divided[0]} is divided by fully_shard; attach the adapters before that")
    found = {i: sharding(target.linear, target.path, target.columns is not None) for i, target in targets.items()}
    (first, common), *others = found.items()
    alike = lambda one: one and one._replace(group=one.group is None)  # noqa: E731  # the same in all processes
    for layer, other in others:
        if alike(other) != alike(common):
            raise ValueError(
                f"model: {name}: expected layers divided alike among processes, got others in {first} and {layer}"
            )
    return common


#: Path -> linears that were found before, and the (in, out) features that fit their slots.
Known = Mapping[str, tuple[dict[int, Target], tuple[int, int]]]


def find_all(
    model: nn.Module, stack: AdapterStack, packed: Packed | None, known: Known | None = None
) -> dict[str, dict[int, Target]]:
    """Module name of ``stack`` -> its linears by layer, checked to fit; those of ``known`` are not looked at again.

    Raises ValueError for what is missing or does not fit, and if two modules are the same place of the model.
    """
    found: dict[str, dict[int, Target]] = {}
    for name, path in stack.paths.items():
        sizes = stack.lora_A[name].shape[3], stack.lora_B[name].shape[2]
        targets, fitting = known[path] if known and path in known else (find(model, name, path, packed), None)
        for other, taken in found.items():
            if same_place(taken, targets):
                raise ValueError(f"{name}: the model has it and {other} in the same place")
        check_layers(name, stack, targets)
        if sizes != fitting:
            check_features(name, targets, *sizes)
            if fitting is not None:  # of linears that do not state their features
                raise ValueError(f"{name}: the adapter has in/out features {sizes}, its slots have {fitting}")
        found[name] = targets
    return found


def same_place(targets: dict[int, Target], others: dict[int, Target]) -> bool:
    """Whether both are the same columns of the same linears."""
    return targets.keys() == others.keys() and all(
        (t.path, t.columns) == (others[i].path, others[i].columns) for i, t in targets.items()
    )


def check_stack(name: str, value: object) -> None:
    """ValueError naming the argument ``name`` unless ``value`` is an AdapterStack."""
    if not isinstance(value, AdapterStack):
        hint = "; read a folder with AdapterStack.from_peft" if isinstance(value, (str, Path)) else ""
        raise ValueError(f"{name}: expected an AdapterStack, got {type(value).__name__}{hint}")


def device_of(model: nn.Module, without: torch.device | None = None) -> torch.device:
    """Device of the first weight of ``model``, ``without`` (by default the CPU) if it has none; ValueError for the meta
    device."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "meta":
            raise ValueError("model: its weights are on the meta device; load them first")
        return tensor.device
    return without or torch.device("cpu")


def slot_dtype(linear: nn.Module, fallback: torch.dtype) -> torch.dtype:
    """Dtype for A and B of ``linear``: that of its weight, ``fallback`` if the weight is quantised."""
    weight = getattr(linear, "weight", None)
    # float8 is not among them: such layers compute in another dtype.
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in WEIGHT_DTYPES else fallback
