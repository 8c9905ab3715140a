"""vLLM's own LoRA layers, alone in a process, around random weights; what a test puts into their slots, it knows."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.lora import layers as lora_layers
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 96, 6, 2, 16, 160, 200
SLOTS, RANK = 3, 16
DTYPE = torch.bfloat16
OPTIONS = {"bias": False, "params_dtype": DTYPE}
#: Kind of layer -> the sizes of its slices, in -> out; vLLM's layer; and the class that adapts it, {}: Sharded or nothing.
KINDS = {
    "qkv": (
        [(HIDDEN, HEADS * HEAD), (HIDDEN, KV_HEADS * HEAD), (HIDDEN, KV_HEADS * HEAD)],
        lambda: linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **OPTIONS), "MergedQKVParallelLinearWith{}LoRA",
    ),
    "gate_up": (
        [(HIDDEN, INNER), (HIDDEN, INNER)],
        lambda: linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **OPTIONS),
        "MergedColumnParallelLinearWith{}LoRA",
    ),
    "o": (
        [(HEADS * HEAD, HIDDEN)], lambda: linear.RowParallelLinear(HEADS * HEAD, HIDDEN, **OPTIONS),
        "RowParallelLinearWith{}LoRA",
    ),
    "embedding": (
        [(VOCABULARY, HIDDEN)], lambda: VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=DTYPE),
        "VocabParallelEmbeddingWithLoRA",
    ),
    "logits": (
        [(HIDDEN, VOCABULARY)], lambda: ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=DTYPE), "LogitsProcessorWithLoRA",
    ),
}  # fmt: skip
SIZES = {kind: sizes for kind, (sizes, *_) in KINDS.items()}
LINEAR = ("qkv", "gate_up", "o")


@contextlib.contextmanager
def single_process(tmp_path):
    """vLLM's state of a model-parallel group of one process, in a forward pass."""
    config = VllmConfig()
    with set_current_vllm_config(config), set_forward_context(None, config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/group", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


def base_layer(kind: str) -> torch.nn.Module:
    with torch.device("cpu"):
        layer = KINDS[kind][1]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 8)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@dataclass
class Adapted:
    """A LoRA layer with adapters in its slots; ``adapters[slot][slice]`` is (A, B), or None where the slice has none."""

    kind: str
    base: torch.nn.Module
    layer: Any
    adapters: list[list[tuple[torch.Tensor, torch.Tensor] | None]]
    wrapper: Any

    def put(self, slot: int, adapter: list) -> None:
        a, b = ([m and m[side] for m in adapter] for side in (0, 1))
        self.layer.set_lora(slot, *((a, b) if len(adapter) > 1 else (a[0], b[0])))
        self.adapters[slot] = adapter

    def __call__(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """The layer's output for rows whose adapters lie in ``slots``, -1: none."""
        ids = tuple(slot + 1 for slot in slots)  # any ids do; 0 is none
        mapping = LoRAMapping(ids, ids, is_prefill=True)
        self.wrapper.update_metadata(mapping, [1, 2, 3], SLOTS + 1, VOCABULARY)
        with torch.inference_mode():
            if self.kind == "logits":
                return self.layer._get_logits(x, self.base)
            out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def random_adapter(kind: str, ranks: list[int], seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DTYPE)  # noqa: E731
    return [(make(r, n), make(out, r)) if r else None for r, (n, out) in zip(ranks, SIZES[kind], strict=True)]


def adapted(kind: str, wrapper_class: type, fully_sharded: bool = False) -> Adapted:
    """The layer of vLLM for ``kind`` with adapters of ranks 4, 7 and 16; of some, one slice is missing."""
    base = base_layer(kind)
    config = LoRAConfig(
        max_lora_rank=RANK, max_loras=SLOTS, max_cpu_loras=SLOTS, lora_dtype=DTYPE, fully_sharded_loras=fully_sharded
    )
    kind_of = getattr(lora_layers, KINDS[kind][2].format("Sharded" if fully_sharded else ""))
    if kind == "logits":
        layer = kind_of(LogitsProcessor(VOCABULARY), HIDDEN, DTYPE, torch.device("cpu"), None)
    else:
        layer = kind_of(base)
    layer.create_lora_weights(SLOTS, config)
    wrapper = wrapper_class(64, 8, torch.device("cpu"), lora_config=config)
    if hasattr(wrapper, "add_layer"):
        wrapper.add_layer(layer)
    layer.set_mapping(wrapper)
    made = Adapted(kind, base, layer, [[] for _ in range(SLOTS)], wrapper)
    several = len(SIZES[kind]) - 1
    for slot, ranks in enumerate(([4, *[4] * several], [7, *[0] * several], [16, *[3] * several])):
        made.put(slot, random_adapter(kind, ranks, slot))
    return made
