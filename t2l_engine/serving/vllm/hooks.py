"""Changes of vLLM's own code, each made once in a process.

Each is made only where vLLM's functions have the expected parameters.  Another vLLM keeps its own code, with a warning:
:func:`install` never makes a server fail to start.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from t2l_engine import ops
from t2l_engine.serving import names
from t2l_engine.serving.vllm import memory
from t2l_engine.serving.vllm.settings import DISK, MEMORY, Settings

logger = logging.getLogger("vllm.t2l_engine")  # below "vllm", whose handlers vLLM sets up

WRAPPER = "t2l_engine.serving.vllm.punica.PunicaWrapperT2L"
#: A parameter of LoRAModel.from_local_checkpoint since vLLM 0.34, for adapters of other origins than this package.
_SINCE_34 = "unsupported_lora_modules"
#: Functions of vLLM that are replaced, overridden or relied on, by module and class that define them -> their parameters, as
#: :func:`signature` gives them.
PARAMETERS = {
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": {
        "__init__": "max_num_batched_tokens max_batches device kwargs",
        "add_lora_logits": "y x lora_a_stacked lora_b_stacked scale buffer kwargs",
        "_shrink_decode": "y x w_t_all scale",
        "_expand_slice_decode": "y x w_t_all y_offset y_slice_size add_inputs",
    },
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": {
        "update_metadata": "mapping lora_index_to_id max_loras vocab_size kwargs",
    },
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": {"_apply_lora_to_output": "x output"},
    "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA": {"forward": "x"},
    "vllm.lora.model_manager:LoRAModelManager": {
        "register_module": "module_name module",
        "_get_punica_wrapper": "module_name",
    },
    "vllm.platforms.cpu:CpuPlatform": {"check_and_update_config": "vllm_config"},
    "vllm.lora.lora_model:LoRAModel": {
        "from_lora_tensors": "lora_model_id tensors peft_helper device dtype model_vocab_size weights_mapper skip_prefixes",
        "from_local_checkpoint": "lora_dir expected_lora_modules peft_helper lora_model_id device dtype model_vocab_size "
        "weights_mapper skip_prefixes moe_ep_spec",
    },
    "vllm.lora.worker_manager:WorkerLoRAManager": {"_load_adapter": "lora_request"},
    "vllm.v1.executor.abstract:Executor": {"add_lora": "lora_request"},
    "vllm.v1.worker.gpu_worker:Worker": {"add_lora": "lora_request"},
    "vllm.v1.metrics.loggers:PrometheusStatLogger": {"record": "scheduler_stats iteration_stats mm_cache_stats engine_idx"},
}
#: Routes outside /v1 that take the name of a model, for which an adapter is made.
NAMING_MODELS = (
    "/tokenize", "/detokenize", "/invocations", "/adapters", "/pooling", "/classify", "/score", "/rerank",
    "/generative_scoring",
)  # fmt: skip


def install(settings: Settings) -> Settings:
    """Put this package's code into vLLM as ``settings`` ask; returns the settings in force.

    May be called more than once in a process.
    """
    if settings.kernels and not _make(_use_kernels, "vLLM's own LoRA kernels are used"):
        settings = dataclasses.replace(settings, kernels=False)
    if settings.kernels:
        _make(_keep_compilation, "vLLM does not compile the model")
    if settings.mode == MEMORY:
        without = "adapters are written as whole PEFT folders (mode disk)"
        if not _make(_load_from_embeddings, without, settings):
            settings = dataclasses.replace(settings, mode=DISK)
    _make(_refuse_misfits, "sizes are not compared, modules that --lora-target-modules leaves out are ignored")
    _make(_answer_refusals, "with tensor parallelism an adapter that is refused may make a later one fail")
    if settings.checkpoints:
        _make(_forget_adapters_of_metrics, "vllm:lora_requests_info keeps every set of adapters")
        _make(_guard_all_routes, "--api-key does not cover all routes that make adapters")
    return settings


class _NotPossible(Exception):
    """A change cannot be made; the message says why."""


_made: dict[Callable[..., None], bool] = {}  # a change that was tried -> whether it was made


def _make(change: Callable[..., None], without: str, *arguments: Any) -> bool:
    """Whether ``change`` is made, now or before; else a warning says once what is so ``without`` it, and why."""
    if change not in _made:
        _made[change] = False
        try:
            change(*arguments)
            _made[change] = True
        except (ImportError, AttributeError) as error:
            logger.warning("T2L: %s: this vLLM lacks what would be changed (%s)", without, error)
        except _NotPossible as error:
            logger.warning("T2L: %s: %s", without, error)
    return _made[change]


@functools.cache  # once a process
def _warn_not_compiled(layers: str) -> None:
    logger.warning("T2L: the model is not compiled, since adapters of %s are vLLM's own", layers)


def signature(parameters: Iterable[str]) -> str:
    """Names of parameters as one string, without those that make no difference."""
    return " ".join(name for name in parameters if name not in ("self", "cls", _SINCE_34))


def _expect(owner: type) -> None:
    """_NotPossible unless the functions of ``owner`` have the PARAMETERS, after ``self``; AttributeError if one lacks."""
    for definer, functions in PARAMETERS.items():
        if definer.rpartition(":")[2] not in (of.__name__ for of in owner.__mro__):
            continue
        for name, parameters in functions.items():
            if signature(inspect.signature(getattr(owner, name)).parameters) != parameters:
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

    for owner in (PunicaWrapperCPU, BaseLinearLayerWithLoRA, VocabParallelEmbeddingWithLoRA, LoRAModelManager):
        _expect(owner)
    from t2l_engine.serving.vllm.punica import PunicaWrapperT2L

    stock = LoRAModelManager.register_module
    followed = (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)

    def register_module(self: Any, module_name: str, module: Any) -> None:
        stock(self, module_name, module)
        wrapper = self._get_punica_wrapper(module_name)
        if isinstance(wrapper, PunicaWrapperT2L) and isinstance(module, followed):
            wrapper.add_layer(module)
        if not isinstance(module, followed):
            _run_eagerly(self.model, module_name)

    LoRAModelManager.register_module = register_module
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: WRAPPER)


def _run_eagerly(model: Any, layer: str) -> None:
    """Have vLLM not compile ``model``: its LoRA layer ``layer`` would read the batch when it is traced, and never again."""
    compiled = [part for part in model.modules() if getattr(part, "do_not_compile", True) is False]
    for part in compiled:
        part.do_not_compile = True
    if compiled:
        _warn_not_compiled(layer)


def _keep_compilation() -> None:
    """Have vLLM compile a model with LoRA on a CPU as it compiles one without."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    _expect(platform)
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora, model = vllm_config.lora_config, vllm_config.model_config
        if lora is None:
            return stock(cls, vllm_config)
        sharded, experts = lora.fully_sharded_loras, model is not None and model.is_moe
        if sharded or experts:  # they have other ops than this package's
            _warn_not_compiled("experts" if experts else "shards")
            return stock(cls, vllm_config)
        vllm_config.lora_config = None  # vLLM asks nothing else of it there
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)


def _load_from_embeddings(settings: Settings) -> None:
    """Have vLLM's workers generate the weights of folders that hold an embedding."""
    from vllm.lora.lora_model import LoRAModel

    _expect(LoRAModel)
    stock = LoRAModel.from_local_checkpoint.__func__

    def from_local_checkpoint(cls: type, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **options: Any):
        folder = Path(lora_dir)
        if not memory.is_memory(folder):
            return stock(cls, lora_dir, expected_lora_modules, peft_helper, **options)
        # New tensors on every call: vLLM scales B in place.
        tensors = memory.peft_tensors(folder, settings, options["dtype"])
        unexpected = sorted({key.split(".")[-3] for key in tensors} - expected_lora_modules)
        if unexpected:
            raise ValueError(f"{lora_dir}: expected adapters for {sorted(expected_lora_modules)}, got also {unexpected}")
        for unused in ("moe_ep_spec", _SINCE_34):
            options.pop(unused, None)
        return cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **options)

    LoRAModel.from_local_checkpoint = classmethod(from_local_checkpoint)


def _refuse_misfits() -> None:
    """Have vLLM's workers refuse adapters of other sizes, and generated adapters with modules that they would ignore.

    vLLM mentions ignored modules in its debug log alone, and serves the rest of the adapter.  It copies a smaller adapter
    into a corner of its slot, and notices a larger one only when the slot already counts as the adapter's.
    """
    from vllm.distributed import get_pp_group
    from vllm.lora.worker_manager import WorkerLoRAManager

    _expect(WorkerLoRAManager)
    stock = WorkerLoRAManager._load_adapter

    def load_adapter(self: Any, lora_request: Any) -> Any:
        loaded, name = stock(self, lora_request), lora_request.lora_name
        manager, ignored = self._adapter_manager, []
        known = manager.__dict__.setdefault("t2l_sizes", {})  # the layers of a manager stay as they are
        for path, weights in loaded.loras.items():
            if path not in known:
                known[path] = _served_sizes(manager, path)
            if (sizes := known[path]) is _NOT_SERVED:
                ignored.append(path)
            elif sizes:
                got = weights.lora_a.shape[1], weights.lora_b.shape[0]
                if got != sizes:
                    raise ValueError(
                        f"{name}: {path}: expected {sizes[0]} -> {sizes[1]} features as the served model has, "
                        f"got {got[0]} -> {got[1]}"
                    )
        # Each pipeline stage wraps its own layers.
        if ignored and name.startswith((names.CREATED, names.RESOLVED)) and get_pp_group().world_size == 1:
            kinds = sorted({path.rpartition(".")[2] for path in ignored})
            raise ValueError(
                f"{name}: adapts {kinds}, such as {ignored[0]}, which this server does not; start it with the model that "
                "the checkpoint is for and the flags that t2l serve-flags prints (--lora-target-modules)"
            )
        return loaded

    WorkerLoRAManager._load_adapter = load_adapter


_NOT_SERVED = (0, 0)


def _served_sizes(manager: Any, path: str) -> tuple[int, int] | None:
    """(in, out) features of the linear ``path``, of all tensor-parallel ranks together; None: not known.

    _NOT_SERVED if vLLM wraps no such linear.
    """
    prefix, dot, name = path.rpartition(".")
    for parent, parts in [(name, [name]), *manager.packed_modules_mapping.items()]:
        if name in parts and (found := f"{prefix}{dot}{parent}") in manager.modules:
            return _sizes(manager.modules[found], parts, name)
    return _NOT_SERVED


def _sizes(module: Any, parts: Sequence[str], name: str) -> tuple[int, int] | None:
    lora_a, base = module.lora_a_stacked, module.base_layer
    if isinstance(lora_a, Tensor) and lora_a.dim() == 4:  # the head, which every rank holds whole
        return lora_a.shape[-1], module.lora_b_stacked.shape[-2]
    if not hasattr(base, "input_size"):  # an embedding, or experts
        return None
    if (kv_heads := getattr(base, "total_num_kv_heads", None)) is not None:  # which vLLM copies where there are few
        size = base.head_size
        outputs = [base.total_num_heads * size, kv_heads * size, kv_heads * base.v_head_size]
    else:
        outputs = getattr(base, "output_sizes", [base.output_size])
    if len(parts) == 1:  # also a model's own packed linear
        outputs = [sum(outputs)]
    return (base.input_size, outputs[parts.index(name)]) if len(outputs) == len(parts) else None


def _answer_refusals() -> None:
    """Have workers answer the reason of a refusal instead of raising.

    With several workers vLLM raises at the first answer that is an error and leaves the other answers in their queues,
    where the next call takes them for its own.
    """
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    for owner in (Executor, Worker):
        _expect(owner)

    def try_lora(self: Any, lora_request: Any) -> bool | str:
        try:
            return self.add_lora(lora_request)
        except Exception as error:  # of any kind: the other workers raise the same
            logger.error("T2L: adapter %s is not loaded", lora_request.lora_name, exc_info=error)
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def add_lora(self: Any, lora_request: Any) -> bool:
        answers = self.collective_rpc("t2l_try_lora", args=(lora_request,))
        if refused := next((answer for answer in answers if isinstance(answer, str)), None):
            raise ValueError(refused)
        return all(answers)

    Worker.t2l_try_lora = try_lora
    Executor.add_lora = add_lora


def _forget_adapters_of_metrics() -> None:
    """Have vLLM's metric of adapters in use show the current ones alone.

    Its labels are the names of all adapters that run and wait, and vLLM keeps every set of them for ever: with one name a
    sentence, memory and /metrics would grow with the requests.  Nothing changes where several engines share the metric, Ray
    keeps it, or it lies in files of several processes, from which nothing can be removed.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    _expect(PrometheusStatLogger)
    stock = PrometheusStatLogger.record
    in_files = "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def record(self: Any, scheduler_stats: Any, *arguments: Any, **named: Any) -> None:
        gauge = getattr(self, "gauge_lora_info", None)
        if scheduler_stats is not None and hasattr(gauge, "clear") and len(self.engine_indexes) == 1 and not in_files:
            gauge.clear()
        stock(self, scheduler_stats, *arguments, **named)

    PrometheusStatLogger.record = record


def _guard_all_routes() -> None:
    """Have --api-key cover NAMING_MODELS too."""
    from vllm.entrypoints.serve.middleware import authenticate

    if not isinstance(authenticate.GUARDED_PREFIX, tuple):
        raise _NotPossible(f"GUARDED_PREFIX of this vLLM is a {type(authenticate.GUARDED_PREFIX).__name__}")
    authenticate.GUARDED_PREFIX += NAMING_MODELS
