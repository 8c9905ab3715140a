"""SGLang's Triton kernels for batched LoRA (chunked SGMV), called as SGLang calls them: two launches for linears that read
the same x."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from bench.baselines import token_ids
from bench.cases import Arguments, in_turn
from bench.timing import Call

#: Tokens of a chunk, at most: what SGLang takes unasked, and the most that its ``--max-lora-chunk-size`` may be.
SMALL, LARGE = 16, 128
#: Its cache of compiled kernels, on top of Triton's, does not look at ranks and dtypes: cases of several share a process.
_OWN_CACHE = "SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE"


def absent(dtype: torch.dtype) -> str | None:
    """Why they cannot run here, None where they can."""
    if importlib.util.find_spec("sglang") is None:
        return "sglang is not installed"
    try:
        _kernels()
    except ImportError as error:
        return f"sglang has no chunked SGMV where 0.5.23 has it, or cannot be imported: {error}"
    return None if dtype.itemsize == 2 else "takes A and B of 16 bits"


def ways(tokens: int) -> dict[str, int]:
    """Way -> tokens of a chunk at most, of a batch of ``tokens``."""
    large = {"SGLang csgmv, large chunks": LARGE} if chunk_of(tokens, LARGE) > SMALL else {}
    return {"SGLang csgmv": SMALL} | large


def chunk_of(tokens: int, most: int) -> int:
    """Tokens of a chunk, as SGLang's ``ChunkedSgmvLoRABackend`` chooses them."""
    return min(most, LARGE if tokens >= 256 else 32 if tokens >= 64 else SMALL)


def grouped(groups: list[Arguments], most: int) -> Call:
    """A call of all groups of a case.  Metadata of the batch is made before, as SGLang does."""
    return in_turn([_group(group, most) for group in groups])


def _kernels() -> tuple[ModuleType, ModuleType]:
    """Shrink and expand."""
    os.environ.setdefault(_OWN_CACHE, "0")
    from sglang.kernels.ops.lora.dense import chunked_sgmv_expand, chunked_sgmv_shrink

    return chunked_sgmv_shrink, chunked_sgmv_expand


def _group(group: Arguments, most: int) -> Call:
    shrink, expand = _kernels()
    y, x, scaling = group["y"], group["x"], group["scaling"]
    lora_A, lora_B, widths = _slices(group)
    batch = _batch(token_ids(group), scaling, lora_A[0].shape[1], chunk_of(len(x), most))
    A, B = torch.cat(lora_A, 1).contiguous(), torch.cat(lora_B, 1).contiguous()
    ends = torch.tensor([0, *widths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    on_device, start = ends.to(x.device), group["offsets"][0]
    columns = y[:, start : start + sum(widths)]

    def run() -> None:
        v = shrink.chunked_sgmv_lora_shrink_forward(x, A, batch, len(widths))
        expand.chunked_sgmv_lora_expand_forward(v, B, batch, on_device, max(widths), columns, slice_offsets_cpu=ends)

    return run


def _slices(group: Arguments) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """A, B and width of every slice: columns that no adapter changes are one with zeros, as SGLang fills them."""
    lora_A, lora_B, widths, at = [], [], [], group["offsets"][0]
    for offset, A, B in zip(group["offsets"], group["lora_A"], group["lora_B"], strict=True):
        if offset > at:
            lora_A.append(torch.zeros_like(A))
            lora_B.append(B.new_zeros(len(B), offset - at, B.shape[2]))
            widths.append(offset - at)
        lora_A.append(A)
        lora_B.append(B)
        widths.append(B.shape[1])
        at = offset + B.shape[1]
    return lora_A, lora_B, widths


def _batch(ids: Tensor, scaling: Tensor, rank: int, chunk: int) -> SimpleNamespace:
    """The fields of SGLang's ``LoRABatchInfo`` that its kernels read.

    Tokens are sorted by adapter and cut into chunks.  The base model is an adapter of rank 0, behind the others.
    """
    slots, device = len(scaling), ids.device
    slot = torch.where(ids < 0, slots, ids).cpu()
    order = slot.argsort(stable=True)
    found, counts = torch.unique_consecutive(slot[order], return_counts=True)
    chunks = [
        (adapter, min(chunk, count - first))
        for adapter, count in zip(found.tolist(), counts.tolist(), strict=True)
        for first in range(0, count, chunk)
    ]

    def put(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return SimpleNamespace(
        max_len=chunk,
        num_segments=len(chunks),
        use_cuda_graph=False,  # sizes that do not change need no padded grid
        seg_indptr=put([0] + [length for _, length in chunks]).cumsum(0, dtype=torch.int32),
        weight_indices=put([adapter for adapter, _ in chunks]),
        permutation=order.to(device, torch.int32),
        lora_ranks=put([rank] * slots + [0]),
        scalings=torch.cat([scaling.float(), scaling.new_zeros(1, dtype=torch.float32)]),
    )
