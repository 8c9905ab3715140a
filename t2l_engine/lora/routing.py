"""Routing: which adapter each batch row uses, shared by the layers of a handle."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.ops.segments import AdapterBatch, check_segments, integer_tensor, is_capturing

Ids = int | Sequence[int] | Tensor | AdapterBatch


class Routing:
    """The current ids of one handle, shared by all its layers.

    There is one ids tensor per number of rows, which is written in place: compiled code, exported programs and CUDA graphs
    read the new ids.  A CUDA graph that was captured with another number of rows than the current ids have reads the one id
    of all rows, or -1 (base model) if rows have different ids.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # [rows] int32, one of _tensors
        self._tensors: dict[int, Tensor] = {}  # number of rows -> ids
        self._captured: set[int] = set()  # numbers of rows whose ids CUDA graphs read
        self._captured_batches: dict[int, AdapterBatch] = {}  # by id(): kept alive for the CUDA graphs that read them
        self.batch: AdapterBatch | None = None
        self._tokens = 0  # of batch, known here without asking a device
        self.merged = False  # an adapter is merged into the weights
        self.spread = False  # the model's layers lie on several devices, each with a routing of its own
        self.uniform = False  # one id for any number of rows
        # (key of the slots, layer) -> lora_A, lora_B, scaling, ranks of differentiable adapters, used instead of the slots
        self.overrides: dict[tuple[str, int], dict[str, Tensor]] | None = None
        self.dropout = 0.0  # probability, on the input of A; with overrides only
        self.adapter_version: object | None = None  # a new object for every selection of adapters, None: base model
        self._slots_version = 0  # incremented whenever a slot is written
        self._segments: tuple[Sequence[int], AdapterBatch] | None = None

    @property
    def active(self) -> bool:
        """Whether ids are set; else the model is the base model."""
        return self.ids is not None or self.batch is not None

    def state(self) -> tuple:
        """A snapshot for :meth:`restore`."""
        ids = None if self.ids is None else self.ids.clone()
        selected = ids, self.batch, self._tokens, self.uniform, self.overrides, self.dropout
        return *selected, self.adapter_version, self._slots_version

    def restore(self, state: tuple) -> None:
        """Back to a snapshot of :meth:`state`."""
        ids, self.batch, self._tokens, self.uniform, self.overrides, self.dropout, *versions = state
        self.adapter_version, slots_version = versions
        self._write(ids)
        if slots_version != self._slots_version:
            self._renew_version()

    def follow(self, other: Routing, device: torch.device) -> None:
        """Take over the selection of ``other`` for layers on ``device``; differentiable adapters are not copied."""
        self.merged, self.uniform, self.adapter_version = other.merged, other.uniform, other.adapter_version
        self.overrides, self.dropout = None if other.overrides is None else {}, other.dropout
        self.batch, self._tokens = other.batch, other._tokens
        if other.batch is not None:
            indptr, adapters = (t.to(device) for t in (other.batch.seg_indptr, other.batch.seg_adapters))
            self.batch = AdapterBatch(indptr, adapters, other.batch.max_seg_len)
        self._write(None if other.ids is None else other.ids.to(device))

    def clear(self) -> None:
        """Back to the base model."""
        self.restore((None, None, 0, False, None, 0.0, None, self._slots_version))

    def slots_changed(self) -> None:
        """To be called after writing a slot: the same ids mean other adapters, so earlier passes cannot be recomputed."""
        self._slots_version += 1
        self._renew_version()

    def _renew_version(self) -> None:
        if self.active and self.overrides is None:
            self.adapter_version = object()

    def set(self, ids: Ids, num_adapters: int, filled: Collection[int], device: torch.device) -> None:
        """Make ``ids`` current; ValueError or IndexError unless they are among the ``filled`` of ``num_adapters`` slots."""
        if isinstance(ids, AdapterBatch):
            tokens = _check_segments(ids)
            _check_ids(ids.seg_adapters, num_adapters, filled)
            with torch.inference_mode(False):  # as in _write; copied, so that the caller may change its tensors
                indptr, adapters = (t.to(device, copy=True) for t in (ids.seg_indptr, ids.seg_adapters))
            self.batch, self._tokens = AdapterBatch(indptr, adapters, ids.max_seg_len), tokens
            self.uniform, self.adapter_version = False, object()
            self._write(None)
            return
        uniform = isinstance(ids, int) and not isinstance(ids, bool)
        tensor = integer_tensor([ids] if uniform else ids)
        if tensor is None or not len(tensor):
            raise ValueError(
                f"ids: expected one int, a non-empty sequence of ints or an AdapterBatch, got {short_repr(ids)}"
            )
        _check_ids(tensor, num_adapters, filled)
        self.batch, self.uniform, self.adapter_version = None, uniform, object()
        if uniform and self.ids is not None:  # keep the shape for compiled code
            tensor = tensor.expand(len(self.ids))
        self._write(tensor.to(device=device, dtype=torch.int32))

    def _write(self, ids: Tensor | None) -> None:
        # Inference tensors could be neither written outside inference mode nor saved for a backward pass.
        with torch.inference_mode(False):
            if ids is None:
                self.ids = None
            else:
                kept = self._tensors.get(len(ids))
                if kept is None or kept.device != ids.device:
                    kept = self._tensors[len(ids)] = ids.clone()  # never the caller's storage
                else:
                    kept.copy_(ids)
                self.ids = kept
            for rows in self._captured - {0 if ids is None else len(ids)}:
                self._tensors[rows].copy_(ids[:1]) if ids is not None and self.uniform else self._tensors[rows].fill_(-1)
        self._segments = None

    def segments(self, shape: Sequence[int], compiling: bool = False) -> AdapterBatch:
        """Segments of tokens of shape ``[rows, ...]``; memoised, since all layers of a forward pass share them.

        ``compiling``: compiled code computes the segments from the ids at run time.  A CUDA graph that is being captured
        reads the memoised segments, which are then kept for it; without any, every layer computes them in the graph.
        """
        if self.batch is not None:
            if not compiling and math.prod(shape) != self._tokens:  # the op's own check would end the use of a GPU
                raise ValueError(f"ids: expected segments of all {math.prod(shape)} tokens, got segments of {self._tokens}")
            if not compiling and is_capturing(self.batch.seg_adapters):
                self._captured_batches[id(self.batch)] = self.batch
            return self.batch
        ids = self.ids
        if compiling:
            return self._make_segments(shape)
        if ids is not None and is_capturing(ids):
            self._captured.add(len(ids))
            if self._segments is not None and self._segments[0] == shape:
                known = self._segments[1]
                if known.seg_adapters.data_ptr() == ids.data_ptr():  # which is written in place
                    self._captured_batches[id(known)] = known
                    return known
            return self._make_segments(shape)
        if self._segments is None or self._segments[0] != shape:
            with torch.inference_mode(False):  # as in _write
                self._segments = (shape, self._make_segments(shape))
        return self._segments[1]

    def _make_segments(self, shape: Sequence[int]) -> AdapterBatch:
        rows, seq_len = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        ids = self.ids
        assert ids is not None  # active, and without a batch
        count = len(ids)
        if rows == count:
            pass
        elif rows % count == 0:
            # k x len(ids) rows: transformers repeats each row k times in place for beams and returned sequences.
            ids = ids.repeat_interleave(rows // count)
        elif self.uniform:
            ids = ids[:1].repeat(rows)  # contiguous, as the ops require
        else:
            raise ValueError(
                f"ids: expected one adapter id a row (or a divisor of the rows, for beams): the batch has {rows} rows, "
                f"got {count} ids"
            )
        return AdapterBatch.from_rows(ids, seq_len)


def _check_segments(batch: AdapterBatch) -> int:
    """The number of tokens of ``batch``; ValueError if it is none."""
    for name in ("seg_indptr", "seg_adapters"):
        value = getattr(batch, name)
        if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.dim() != 1:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"ids: {name}: expected a flat int32 tensor, got {got}")
    if not isinstance(batch.max_seg_len, int) or isinstance(batch.max_seg_len, bool):
        raise ValueError(f"ids: max_seg_len: expected an int, got {short_repr(batch.max_seg_len)}")
    indptr = batch.seg_indptr.tolist()
    try:
        check_segments(indptr, len(batch.seg_adapters), batch.max_seg_len)
    except RuntimeError as error:
        raise ValueError(f"ids: {error}") from None
    return indptr[-1]


def _check_ids(ids: Tensor, num_adapters: int, filled: Collection[int]) -> None:
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (-1, -1)
    if low < -1 or high >= num_adapters:
        raise IndexError(
            f"ids: expected -1 (base model) or an adapter in [0, {num_adapters}), got {low if low < -1 else high}"
        )
    if len(filled) < num_adapters:
        empty = sorted(set(ids.tolist()) - set(filled) - {-1})
        if empty:
            raise IndexError(f"ids: expected slots that hold an adapter, got {short_repr(empty)}; fill them with put()")
