"""AdapterBatch: which adapter each token of a batch uses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class AdapterBatch:
    """Segments of consecutive tokens that share an adapter (CSR layout), as the LoRA ops take them.

    ``seg_indptr [S+1]`` int32: segment s is tokens ``seg_indptr[s] : seg_indptr[s+1]``.  ``seg_adapters [S]`` int32: its
    adapter, -1 for the base model.  ``max_seg_len``: length of the longest segment in tokens, a host integer.

    Models that flatten their tokens pass one to ``LoRAHandle.use``, which copies it.

    Source: segmented gather matrix multiplication of Punica (arXiv 2310.18547).

    >>> import torch
    >>> import t2l_engine as t2l
    >>> t2l.AdapterBatch.from_rows([2, -1], seq_len=3).seg_indptr.tolist()
    [0, 3, 6]
    >>> ragged = torch.tensor([0, 5, 6], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    >>> t2l.AdapterBatch(*ragged, max_seg_len=5).num_tokens
    6
    """

    seg_indptr: Tensor
    seg_adapters: Tensor
    max_seg_len: int

    @staticmethod
    def from_rows(ids: Sequence[int] | Tensor, seq_len: int) -> AdapterBatch:
        """One segment per row: row i has ``seq_len`` tokens that use adapter ``ids[i]`` (-1: base model).

        Raises ValueError unless ``ids`` is a flat sequence of integers that fit int32, as the number of all tokens does, and
        ``seq_len`` is 0 or more.
        """
        adapters = integer_tensor(ids)
        if adapters is None or adapters.dtype == torch.int64 and adapters.numel() and not _fits_int32(adapters):
            raise ValueError(f"ids: expected a flat sequence of integers that fit int32, got {ids!r}")
        if not isinstance(seq_len, (int, torch.SymInt)) or isinstance(seq_len, bool):
            raise ValueError(f"seq_len: expected an int, got {seq_len!r}")
        if not 0 <= seq_len * max(1, len(adapters)) < 2**31:
            raise ValueError(
                f"seq_len: expected 0 to {2**31 - 1} tokens in all rows, got {seq_len} in each of {len(adapters)}"
            )
        adapters = adapters.to(torch.int32).contiguous()
        indptr = torch.arange(len(adapters) + 1, dtype=torch.int32, device=adapters.device) * seq_len
        return AdapterBatch(indptr, adapters, seq_len)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all segments (reads one value from the device)."""
        return int(self.seg_indptr[-1])


def integer_tensor(ids: object) -> Tensor | None:
    """``ids`` as a flat tensor of integers, None if they are not a flat sequence of integers; booleans are none."""
    if not isinstance(ids, Tensor):
        try:
            values = list(ids)  # pyright: ignore[reportArgumentType, reportCallIssue]
            ids = torch.tensor(values, dtype=None if values else torch.int32)
        except (TypeError, ValueError, RuntimeError):  # no sequence, no numbers, unequal lists, integers beyond int64
            return None
        if any(isinstance(value, bool) for value in values):  # which torch takes beside integers
            return None
    return ids if ids.dim() == 1 and ids.dtype in _INTEGERS else None


def _fits_int32(tensor: Tensor) -> bool:
    return -(2**31) <= int(tensor.min()) <= int(tensor.max()) < 2**31


def check_segments(bounds: Sequence[int], count: int, max_seg_len: int) -> None:
    """RuntimeError unless ``bounds`` delimit ``count`` segments of at most ``max_seg_len`` tokens, starting at token 0."""
    if len(bounds) != count + 1:
        raise RuntimeError(f"seg_indptr: expected shape [{count + 1}], got [{len(bounds)}]")
    if bounds[0] != 0:
        raise RuntimeError(f"seg_indptr: expected 0 first, got {bounds[0]}")
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if not 0 <= hi - lo <= max_seg_len:
            expected = f"segments of 0 to max_seg_len = {max_seg_len} tokens"
            raise RuntimeError(f"seg_indptr: expected {expected}, got {hi - lo} at segment {i}")


def is_capturing(tensor: Tensor) -> bool:
    """Whether operations on ``tensor`` are being captured in a CUDA graph.

    Their results have values only after a replay, so they may not be memoised for other calls.
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
