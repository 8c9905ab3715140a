"""Changes of vLLM's own code.

Each is made only where vLLM's functions have the expected parameters.  Another vLLM keeps its own code, with a warning:
:func:`install` never makes a server fail to start.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

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


def install(settings: Settings) -> Settings:
    """Put this package's code into vLLM as ``settings`` ask; returns the settings in force.

    May be called more than once in a process.
    """
    if settings.kernels and not _made(_use_kernels, "vLLM's own LoRA kernels are used"):
        settings = dataclasses.replace(settings, kernels=False)
    if settings.mode == "memory":
        load = functools.partial(_load_from_embeddings, settings)
        if not _made(load, "adapters are written as whole PEFT folders (mode disk)"):
            settings = dataclasses.replace(settings, mode="disk")
    _made(_refuse_misfits, "sizes are not compared, modules that --lora-target-modules leaves out are ignored")
    _made(_answer_refusals, "with tensor parallelism an adapter that is refused may make a later one fail")
    if settings.enabled:
        _made(_forget_adapters_of_metrics, "vllm:lora_requests_info keeps every set of adapters")
        _made(_guard_all_routes, "--api-key does not cover all routes that make adapters")
    return settings


class _NotPossible(Exception):
    """A change cannot be made; the message says why."""


def _made(change: Callable[[], None], without: str) -> bool:
    """Whether ``change`` was made; else a warning says what is so ``without`` it, and why."""
    try:
        change()
    except (ImportError, AttributeError) as error:
        reason = f"this vLLM lacks what would be changed ({error})"
    except _NotPossible as error:
        reason = str(error)
    else:
        return True
    logger.warning("T2L: %s: %s", without, reason)
    return False


def _expect(owner: type, name: str, parameters: str) -> None:
    """_NotPossible unless the method ``name`` has these parameters, after ``self``; AttributeError if there is none."""
    found = inspect.signature(getattr(owner, name)).parameters
    if " ".join(parameter for parameter in found if parameter not in ("self", "cls")) != parameters:
        raise _NotPossible(f"{owner.__name__}.{name} of this vLLM has other parameters than ({parameters})")


def _use_kernels() -> None:
    """Have vLLM make :class:`PunicaWrapperT2L` and pass it every LoRA layer."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise _NotPossible("the kernels are for CPUs")
    if not ops.has_kernel("lora_add_group_", "CPU"):
        raise _NotPossible("t2l_engine was installed without native kernels")
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name, parameters in OVERRIDDEN.items():
        _expect(PunicaWrapperCPU, name, parameters)
    _expect(LoRAModelManager, "register_module", "module_name module")
    _expect(LoRAModelManager, "_get_punica_wrapper", "module_name")
    from t2l_engine.serving.vllm.punica import PunicaWrapperT2L

    followed = (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)

    def register_module(self: Any, module_name: str, module: Any) -> None:
        stock(self, module_name, module)
        wrapper = self._get_punica_wrapper(module_name)
        if isinstance(wrapper, PunicaWrapperT2L) and isinstance(module, followed):
            wrapper.add_layer(module)

    stock = _once(LoRAModelManager, "register_module", register_module)
    _once(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: WRAPPER))


def _load_from_embeddings(settings: Settings) -> None:
    """Have vLLM's workers generate the weights of folders that hold an embedding."""
    from vllm.lora.lora_model import LoRAModel

    from t2l_engine.serving.vllm import memory

    stock = LoRAModel.from_local_checkpoint.__func__
    taken = set(inspect.signature(LoRAModel.from_lora_tensors).parameters)
    needed = {"lora_model_id", "tensors", "peft_helper", "device", "dtype", "weights_mapper"}
    if not needed <= taken:
        raise _NotPossible(f"LoRAModel.from_lora_tensors lacks parameters: {sorted(needed - taken)}")
    if list(inspect.signature(stock).parameters)[1:4] != ["lora_dir", "expected_lora_modules", "peft_helper"]:
        raise _NotPossible("LoRAModel.from_local_checkpoint has other parameters")

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


def _refuse_misfits() -> None:
    """Have vLLM's workers refuse adapters of other sizes, and generated adapters with modules that they would ignore.

    vLLM mentions ignored modules in its debug log alone, and serves the rest of the adapter.  It copies a smaller adapter
    into a corner of its slot, and notices a larger one only when the slot already counts as the adapter's.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    _expect(WorkerLoRAManager, "_load_adapter", "lora_request")

    def load_adapter(self: Any, lora_request: Any) -> Any:
        loaded = stock(self, lora_request)
        for path, weights in loaded.loras.items():
            sizes = _sizes(self._adapter_manager, path)
            if sizes and weights is not None and (weights.lora_a.shape[1], weights.lora_b.shape[0]) != sizes:
                raise ValueError(
                    f"{lora_request.lora_name}: {path}: expected {sizes[0]} -> {sizes[1]} features as the served model has, "
                    f"got {weights.lora_a.shape[1]} -> {weights.lora_b.shape[0]}"
                )
        if lora_request.lora_name.startswith((names.CREATED, names.RESOLVED)) and _stages() == 1:
            ignored = [path for path in loaded.loras if not _wrapping(self._adapter_manager, path)]
            if ignored:
                kinds = sorted({path.rpartition(".")[2] for path in ignored})
                raise ValueError(
                    f"{lora_request.lora_name}: adapts {kinds}, such as {ignored[0]}, which this server does not; start it "
                    "with the model that the checkpoint is for and the flags that t2l serve-flags prints "
                    "(--lora-target-modules)"
                )
        return loaded

    stock = _once(WorkerLoRAManager, "_load_adapter", load_adapter)


def _answer_refusals() -> None:
    """Have workers answer the reason of a refusal instead of raising.

    With several workers vLLM raises at the first answer that is an error and leaves the other answers in their queues,
    where the next call takes them for its own.
    """
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    for owner in (Executor, Worker):
        _expect(owner, "add_lora", "lora_request")

    def try_lora(self: Any, lora_request: Any) -> bool | str:
        try:
            return self.add_lora(lora_request)
        except Exception as error:  # of any kind: the other workers raise the same
            logger.error("T2L: adapter %s is not loaded", lora_request.lora_name, exc_info=error)
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def add_lora(self: Any, lora_request: Any) -> bool:
        answers = self.collective_rpc(try_lora.__name__, args=(lora_request,))
        if refused := next((answer for answer in answers if isinstance(answer, str)), None):
            raise ValueError(refused)
        return all(answers)

    try_lora.__name__ = "t2l_try_lora"
    setattr(Worker, try_lora.__name__, try_lora)
    _once(Executor, "add_lora", add_lora)


def _forget_adapters_of_metrics() -> None:
    """Have vLLM's metric of adapters in use show the current ones alone.

    Its labels are the names of all adapters that run and wait, and vLLM keeps every set of them for ever: with one name a
    sentence, memory and /metrics would grow with the requests.  Nothing changes where several engines share the metric, Ray
    keeps it, or it lies in files of several processes, from which nothing can be removed.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    if "scheduler_stats" not in inspect.signature(PrometheusStatLogger.record).parameters:
        raise _NotPossible("PrometheusStatLogger.record of this vLLM has other parameters")

    in_files = "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def record(self: Any, scheduler_stats: Any, *arguments: Any, **named: Any) -> None:
        gauge = getattr(self, "gauge_lora_info", None)
        if scheduler_stats is not None and hasattr(gauge, "clear") and len(self.engine_indexes) == 1 and not in_files:
            gauge.clear()
        stock(self, scheduler_stats, *arguments, **named)

    stock = _once(PrometheusStatLogger, "record", record)


#: Routes outside /v1 that take the name of a model, for which an adapter is made.
NAMING_MODELS = (
    "/tokenize", "/detokenize", "/invocations", "/adapters", "/pooling", "/classify", "/score", "/rerank",
    "/generative_scoring",
)  # fmt: skip


def _guard_all_routes() -> None:
    """Have --api-key cover NAMING_MODELS too."""
    from vllm.entrypoints.serve.middleware import authenticate

    if not isinstance(authenticate.GUARDED_PREFIX, tuple):
        raise _NotPossible(f"GUARDED_PREFIX of this vLLM is a {type(authenticate.GUARDED_PREFIX).__name__}")
    authenticate.GUARDED_PREFIX = (*dict.fromkeys(authenticate.GUARDED_PREFIX + NAMING_MODELS),)


def _wrapping(manager: Any, path: str) -> tuple[Any, list[str]] | None:
    """(LoRA layer of vLLM, names of its linears) for the linear ``path``; None if vLLM wraps no such linear."""
    prefix, dot, name = path.rpartition(".")
    for parent, parts in [(name, [name]), *manager.packed_modules_mapping.items()]:
        if name in parts and (found := f"{prefix}{dot}{parent}") in manager.modules:
            return manager.modules[found], parts
    return None


def _sizes(manager: Any, path: str) -> tuple[int, int] | None:
    """(in, out) features of a linear that vLLM wraps, counted over all tensor-parallel ranks; None for other modules."""
    module, parts = _wrapping(manager, path) or (None, [])
    lora_a, lora_b = (getattr(module, side, None) for side in ("lora_a_stacked", "lora_b_stacked"))
    if isinstance(lora_a, Tensor) and lora_a.dim() == 4:  # the head, which every rank holds whole
        return lora_a.shape[-1], lora_b.shape[-2]
    # A tuple, one matrix a linear: not so for embeddings, and linears that share one A.
    if not isinstance(lora_a, tuple) or not isinstance(lora_b, tuple) or len(lora_a) != len(parts):
        return None
    i = parts.index(path.rpartition(".")[2])
    if getattr(module, "tp_size", 1) == 1:
        return lora_a[i].shape[-1], lora_b[i].shape[-2]
    base = module.base_layer
    if (kv_heads := getattr(base, "total_num_kv_heads", None)) is not None:  # which vLLM copies where there are few
        size = base.head_size
        outputs = [base.total_num_heads * size, kv_heads * size, kv_heads * getattr(base, "v_head_size", size)]
    else:
        outputs = getattr(base, "output_sizes", [base.output_size])
    return (base.input_size, outputs[i]) if len(outputs) == len(parts) else None


def _stages() -> int:
    """Number of pipeline stages; each wraps its own layers."""
    from vllm.distributed import get_pp_group

    try:
        return get_pp_group().world_size
    except AssertionError:  # none has been made
        return 1


def _once(owner: type, name: str, replacement: Any) -> Callable[..., Any]:
    """Replace a method of ``owner`` unless it is replaced already; returns vLLM's own."""
    current = owner.__dict__.get(name, getattr(owner, name))
    function = getattr(current, "__func__", current)
    if not hasattr(function, "_t2l_replaced"):
        new = getattr(replacement, "__func__", replacement)
        new._t2l_replaced = function
        setattr(owner, name, replacement)
        return function
    return function._t2l_replaced
