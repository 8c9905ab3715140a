"""vLLM's Triton kernels for batched LoRA, called as vLLM calls them: two launches for linears that read the same x."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.baselines import token_ids
from bench.cases import Arguments, in_turn
from bench.timing import Call

NAME = "vLLM Triton"


def absent(dtype: torch.dtype) -> str | None:
    """Why they cannot run here, None where they can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        return "Triton has no driver for this device"
    return None if dtype.itemsize == 2 else "takes A and B of 16 bits"


def grouped(groups: list[Arguments]) -> Call:
    """A call of all groups of a case.  Metadata of the batch is made before, and the scaling folded into B, as vLLM does."""
    return in_turn([_group(group) for group in groups])


def _group(group: Arguments) -> Call:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    y, x, lora_A, slots = group["y"], group["x"], group["lora_A"], len(group["scaling"])
    batch = LoRAKernelMeta.make(slots, len(x), x.device)
    batch.prepare_tensors(token_ids(group).int())
    meta = batch.meta_args(len(x), False)
    lora_B = [(B * group["scaling"][:, None, None]).to(B.dtype).contiguous() for B in group["lora_B"]]
    runs = list(_runs(group["offsets"], lora_B))
    rank = lora_A[0].shape[1]

    def run() -> None:
        v = torch.empty((len(lora_A), len(x), rank), dtype=torch.float32, device=x.device)
        lora_shrink(x, lora_A, v, *meta, 1.0)
        for first, start, weights in runs:
            lora_expand(v[first : first + len(weights)], weights, y, *meta, offset_start=start, add_inputs=True)

    return run


def _runs(offsets: list[int], lora_B: list[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(First member, its column, B of the members) where columns follow each other: a call has no gaps."""
    first = 0
    for i, B in enumerate(lora_B):
        last = i + 1 == len(lora_B) or offsets[i + 1] != offsets[i] + B.shape[1]
        if last:
            yield first, offsets[first], lora_B[first : i + 1]
            first = i + 1
