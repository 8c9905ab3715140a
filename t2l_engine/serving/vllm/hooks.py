"""What is changed in vLLM, and only where its functions have the parameters that are expected here.

Another vLLM than the tested ones keeps its own code, with a warning: :func:`install` never makes a server fail to start.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2l_engine import ops
from t2l_engine.serving import names

if TYPE_CHECKING:
    from t2l_engine.serving.vllm.settings import Settings

logger = logging.getLogger("vllm.t2l_engine")  # below "vllm", whose handlers vLLM sets up

WRAPPER = "t2l_engine.serving.vllm.punica.PunicaWrapperT2L"
#: Method of vLLM's PunicaWrapperCPU that is overridden -> its parameters.
OVERRIDDEN = {
    "__init__": "max_num_batched_tokens max_batches device kwargs",
    "update_metadata": "mapping lora_index_to_id max_loras vocab_size kwargs",
    "add_lora_linear": "y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    "add_lora_logits": "y x lora_a_stacked lora_b_stacked scale buffer kwargs",
    "add_lora_embedding": "y x lora_b_stacked add_inputs kwargs",
    "_shrink_decode": "y x w_t_all scale",
    "_expand_slice_decode": "y x w_t_all y_offset y_slice_size add_inputs",
}
_REGISTER_MODULE = "module_name module"


def install(settings: Settings) -> Settings:
    """Put this package's code into vLLM as ``settings`` ask, where this vLLM is known; returns the settings in force.

    May be called more than once in a process.
    """
    if settings.kernels and (reason := _changed(_use_kernels)) is not None:
        logger.warning("T2L: vLLM's own LoRA kernels are used: %s", reason)
        settings = dataclasses.replace(settings, kernels=False)
    if settings.mode == "memory" and (reason := _changed(_load_from_embeddings, settings)) is not None:
        logger.warning("T2L: adapters are written as whole PEFT folders (mode disk): %s", reason)
        settings = dataclasses.replace(settings, mode="disk")
    if (reason := _changed(_refuse_misfits)) is not None:
        logger.warning("T2L: sizes are not compared, modules that --lora-target-modules leaves out are ignored: %s", reason)
    return settings


def _changed(change: Callable[..., str | None], *arguments: Any) -> str | None:
    """None where ``change`` was made; else why not: what it says, or what this vLLM has no longer or elsewhere."""
    try:
        return change(*arguments)
    except (ImportError, AttributeError) as error:
        return f"this vLLM lacks what would be changed ({error})"


def _parameters(function: Any) -> str:
    """Names of the parameters of a function, without ``self``."""
    return " ".join(name for name in inspect.signature(function).parameters if name not in ("self", "cls"))


def _use_kernels() -> str | None:
    """Have vLLM make :class:`PunicaWrapperT2L` and tell it of every LoRA layer; returns why not."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "the kernels are for CPUs"
    if not ops.has_kernel("lora_add_group_", "CPU"):
        return "t2l_engine was installed without native kernels"
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name, parameters in OVERRIDDEN.items():
        if _parameters(getattr(PunicaWrapperCPU, name)) != parameters:
            return f"PunicaWrapperCPU.{name} of this vLLM has other parameters than ({parameters})"
    if _parameters(LoRAModelManager.register_module) != _REGISTER_MODULE:
        return f"LoRAModelManager.register_module of this vLLM has other parameters than ({_REGISTER_MODULE})"
    if _parameters(LoRAModelManager._get_punica_wrapper) != "module_name":
        return "LoRAModelManager._get_punica_wrapper of this vLLM has other parameters than (module_name)"
    from t2l_engine.serving.vllm.punica import PunicaWrapperT2L

    followed = (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)

    def register_module(self: Any, module_name: str, module: Any) -> None:
        stock(self, module_name, module)
        wrapper = self._get_punica_wrapper(module_name)
        if isinstance(wrapper, PunicaWrapperT2L) and isinstance(module, followed):
            wrapper.add_layer(module)

    stock = _once(LoRAModelManager, "register_module", register_module)
    _once(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: WRAPPER))
    return None


def _load_from_embeddings(settings: Settings) -> str | None:
    """Have vLLM's workers generate the weights of folders that hold an embedding; returns why not."""
    from vllm.lora.lora_model import LoRAModel

    from t2l_engine.serving.vllm import memory

    stock = LoRAModel.from_local_checkpoint.__func__
    taken = set(inspect.signature(LoRAModel.from_lora_tensors).parameters)
    needed = {"lora_model_id", "tensors", "peft_helper", "device", "dtype", "weights_mapper"}
    if not needed <= taken:
        return f"LoRAModel.from_lora_tensors lacks parameters: {sorted(needed - taken)}"
    if list(inspect.signature(stock).parameters)[1:4] != ["lora_dir", "expected_lora_modules", "peft_helper"]:
        return "LoRAModel.from_local_checkpoint has other parameters"

    def from_local_checkpoint(cls: type, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **options: Any):
        if not memory.is_memory(Path(lora_dir)):
            return stock(cls, lora_dir, expected_lora_modules, peft_helper, **options)
        # New tensors on every call: vLLM scales B in place.
        tensors = memory.peft_tensors(Path(lora_dir), settings, options["dtype"])
        unexpected = sorted({key.split(".")[-3] for key in tensors} - expected_lora_modules)
        if unexpected:
            raise ValueError(f"{lora_dir}: expected adapters for {sorted(expected_lora_modules)}, got also {unexpected}")
        known = {name: value for name, value in options.items() if name in taken}
        return cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **known)  # type: ignore[attr-defined]

    _once(LoRAModel, "from_local_checkpoint", classmethod(from_local_checkpoint))
    return None


def _refuse_misfits() -> str | None:
    """Have vLLM's workers refuse adapters of other sizes, and generated ones of which they would ignore modules; returns why
    not.

    vLLM says of what it ignores in its debug log alone, and serves the rest.  It fills a corner of a slot with a smaller
    adapter, and finds a larger one when the slot already counts as its own.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    if _parameters(WorkerLoRAManager._load_adapter) != "lora_request":
        return "WorkerLoRAManager._load_adapter of this vLLM has other parameters than (lora_request)"

    def load_adapter(self: Any, lora_request: Any) -> Any:
        loaded = stock(self, lora_request)
        for path, weights in loaded.loras.items():
            sizes = _sizes(self._adapter_manager, path)
            if sizes and weights is not None and (weights.lora_a.shape[1], weights.lora_b.shape[0]) != sizes:
                raise ValueError(
                    f"{lora_request.lora_name}: {path}: expected {sizes[0]} -> {sizes[1]} features as the served model has, "
                    f"got {weights.lora_a.shape[1]} -> {weights.lora_b.shape[0]}"
                )
        if lora_request.lora_name.startswith((names.CREATED, names.RESOLVED)):
            manager = self._adapter_manager
            wrapped = {_last(path) for path in manager.modules}
            wrapped |= {part for name in wrapped for part in manager.packed_modules_mapping.get(name, ())}
            ignored = sorted({_last(path) for path in loaded.loras} - wrapped)
            if ignored:
                raise ValueError(
                    f"{lora_request.lora_name}: adapts {ignored}, which this server does not; start it with the flags that "
                    "t2l serve-flags prints (--lora-target-modules)"
                )
        return loaded

    stock = _once(WorkerLoRAManager, "_load_adapter", load_adapter)
    return None


def _sizes(manager: Any, path: str) -> tuple[int, int] | None:
    """(in, out) features of a linear that vLLM wraps; None for others, and for one that is divided among processes."""
    prefix, _, name = path.rpartition(".")
    parents = [(name, [name]), *manager.packed_modules_mapping.items()]
    for parent, parts in parents:
        module = manager.modules.get(f"{prefix}.{parent}") if name in parts else None
        lora_a, lora_b = (getattr(module, side, None) for side in ("lora_a_stacked", "lora_b_stacked"))
        # A tuple, a matrix a part: not so for embeddings, the head, and parts that share one A.
        if isinstance(lora_a, tuple) and len(lora_a) == len(parts) and getattr(module, "tp_size", 1) == 1:
            i = parts.index(name)
            return lora_a[i].shape[-1], lora_b[i].shape[-2]
    return None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _once(owner: type, name: str, replacement: Any) -> Callable[..., Any]:
    """Replace a method of ``owner`` unless this function did before; returns the one that was there at first."""
    current = owner.__dict__.get(name, getattr(owner, name))
    function = getattr(current, "__func__", current)
    if not hasattr(function, "_t2l_replaced"):
        new = getattr(replacement, "__func__", replacement)
        new._t2l_replaced = function
        setattr(owner, name, replacement)
        return function
    return function._t2l_replaced
