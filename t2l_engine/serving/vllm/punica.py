"""PunicaWrapperT2L: the ops of this package under vLLM's LoRA layers on a CPU.

Unlike vLLM's own wrapper for CPUs it never touches a row without an adapter (index -1), returns at once for a batch without
adapters, skips a slice that no loaded adapter has, and multiplies at an adapter's true rank, with float32 accumulation and
one rounding.  Segments are bound once a mapping, slots and ranks once a layer.

In a model that vLLM compiles a layer's part is one op, which gets the layer's number as a tensor and reads the batch and the
slots when it runs: nothing is compiled again when they change.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

import t2l_engine  # noqa: F401  # registers torch.ops.t2l_engine

_ops = torch.ops.t2l_engine
_add, _add_bound = _ops.lora_add_.default, _ops.lora_add_bound_.default
_numbers = itertools.count()

Slices = tuple[Tensor, ...]  # A or B of every slice of a layer
#: Bounds and adapters of runs of rows, and the longest run.
Segments = tuple[Tensor, Tensor, int]


def _number(owner: object) -> Tensor:
    """A number of this process ``[1]`` for what is bound to it as long as ``owner`` lives."""
    number = torch.tensor([next(_numbers)])
    weakref.finalize(owner, _ops.lora_unbind, number)
    return number


class Layer:
    """The slots of one LoRA layer of vLLM: views of its weights, and true ranks, at first 0.

    Args:
        lora_a: ``[slots, 1, R, in]`` per slice; R is vLLM's ``max_lora_rank``.
        lora_b: ``[slots, 1, out, R]`` per slice.
        batch: the number of the wrapper's batch.
    """

    def __init__(self, lora_a: Slices, lora_b: Slices, batch: Tensor):
        self.number, self.batch = _number(self), batch
        slots, _, self.width, _ = lora_a[0].shape
        self.scaling = torch.ones(slots)
        self.ranks = [*torch.zeros(len(lora_a), slots, dtype=torch.int32)]
        self._ranks = [[0] * slots for _ in lora_a]  # the same, which Python reads faster
        self.A, self.B = [a[:, 0] for a in lora_a], [b[:, 0] for b in lora_b]
        self.offsets = [0, *itertools.accumulate(b.shape[1] for b in self.B[:-1])]
        self.bound: list[int] | None = None  # the slices that an adapter in a slot has
        self.set_ranks(0, [0] * len(lora_a))

    def set_ranks(self, slot: int, ranks: list[int]) -> None:
        """Set the true rank of every slice in ``slot``; 0: the adapter there lacks the slice."""
        for tensor, known, rank in zip(self.ranks, self._ranks, ranks, strict=True):
            if known[slot] != rank:
                tensor[slot] = known[slot] = rank
        bound = [i for i, known in enumerate(self._ranks) if any(known)]
        if bound != self.bound:
            self.bound = bound
            A, B, of_ranks, offsets = ([of[i] for i in bound] for of in (self.A, self.B, self.ranks, self.offsets))
            _ops.lora_bind_layer(self.number, A, B, self.scaling, of_ranks, offsets, self.batch)


def _as_tuple(weights: Tensor | Slices) -> Slices:
    return weights if isinstance(weights, tuple) else (weights,)


class PunicaWrapperT2L(PunicaWrapperCPU):
    """vLLM's punica wrapper for CPUs with this package's kernels; see the module."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._heads: dict[int, tuple[Layer, Tensor]] = {}  # by the id of their A
        self._batch = _number(self)
        # One segment a token, for calls with other row counts than the mapping; rows beyond it have no adapter.
        self._iota = torch.arange(max_num_batched_tokens + 1, dtype=torch.int32)
        self._token_ids = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)
        self._sampler_ids = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)
        self._bind(self._iota[:1], self._token_ids[:0], 0, 0)
        self._adapted = torch.empty(0, dtype=torch.long)  # rows with an adapter

    def _bind(self, bounds: Tensor, ids: Tensor, tokens: int, longest: int) -> None:
        """Bind the segments of a batch; ``longest`` 0: no row has an adapter."""
        _ops.lora_bind_batch(self._batch, bounds, ids, self._iota, self._token_ids, tokens, longest)

    # --- what changes with the adapters in the slots ---

    def add_layer(self, module: Any) -> None:
        """Follow the slots of ``module``, a LoRA layer of vLLM, and store its B as ``[slots, 1, R, out]`` transposed.

        So the kernel reads B of any rank in whole vectors.  Shapes, and what vLLM copies into B, do not change.
        """
        lora_a, lora_b = _as_tuple(module.lora_a_stacked), _as_tuple(module.lora_b_stacked)
        lora_b = tuple(torch.zeros_like(b.mT, memory_format=torch.contiguous_format).mT for b in lora_b)
        zeroed = True  # whether what an adapter leaves in its slot must be
        module.lora_b_stacked = lora_b if isinstance(module.lora_b_stacked, tuple) else lora_b[0]
        if isinstance(module, VocabParallelEmbeddingWithLoRA):  # its A is [slots, vocabulary, R]
            width, table = lora_b[0].shape[-1], module.lora_a_stacked_2d
            identity = torch.eye(width, dtype=table.dtype).expand(len(lora_b[0]), 1, width, width)
            layer = Layer((identity,), lora_b, self._batch)
            module.forward = functools.partial(_embed, module.base_layer, self._embeddings_indices, table, layer.number)
        else:
            layer = Layer(lora_a, lora_b, self._batch)
            if getattr(type(module), "_apply_lora_to_output", None) is BaseLinearLayerWithLoRA._apply_lora_to_output:
                module._apply_lora_to_output = functools.partial(_add_to, layer.number)
                zeroed = module.lora_config.fully_sharded_loras  # else nothing beyond a rank is read
            else:  # heads of the language model and of classifiers call add_lora_logits
                self._heads[id(lora_a[0])] = layer, lora_a[0]  # kept alive so that no other tensor gets the id
        set_lora, reset_lora, slices = module.set_lora, module.reset_lora, len(lora_a)

        def set_(index: int, lora_a: Any, lora_b: Any) -> None:
            given = list(lora_a) if isinstance(lora_a, (list, tuple)) else [lora_a]  # one matrix, or one for each slice
            if len(given) != slices:
                reset_lora(index)
            set_lora(index, lora_a, lora_b)  # resets by the function below
            # vLLM may share one A among slices: then all have full width, and the rows of A beyond the rank are zero.
            if len(given) == slices:
                layer.set_ranks(index, [0 if a is None else min(a.shape[0], layer.width) for a in given])
            else:
                layer.set_ranks(index, [layer.width] * slices)

        def reset(index: int) -> None:
            if zeroed:
                reset_lora(index)
            layer.set_ranks(index, [0] * slices)

        module.set_lora, module.reset_lora = set_, reset

    # --- what changes with the batch ---

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """vLLM's ids of tokens and samples (0: none) to slots (-1: none), and segments."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        tokens, samples = (_slots(ids, slot_of) for ids in (mapping.index_mapping, mapping.prompt_mapping))
        count, adapted = len(tokens), np.flatnonzero(tokens >= 0)
        self.no_lora = not len(adapted) and bool((samples < 0).all())
        self.is_prefill = False  # so that vLLM calls its functions for single rows, overridden below
        starts = np.flatnonzero(np.diff(tokens, prepend=-2))
        bounds = np.append(starts, count).astype(np.int32)
        longest = int(np.diff(bounds).max()) if len(adapted) else 0
        self._bind(torch.from_numpy(bounds), torch.from_numpy(tokens[starts].astype(np.int32)), count, longest)
        self._adapted = torch.from_numpy(adapted)
        for target, values in (
            (self._token_ids, tokens),
            (self._sampler_ids, samples),
            (self._token_lora_indices, tokens),
            (self._sampler_indices, samples),
            (self._embeddings_indices, np.maximum(tokens, 0) * vocab_size),
        ):
            target[: len(values)] = torch.from_numpy(values)
            if target.dtype == torch.int32:
                target[len(values) :] = -1
        self.indices_len[:] = [count, len(samples), 0, count]

    def _samples(self, count: int) -> Segments:
        ids = self._sampler_ids[: self.indices_len[1]]
        if count == len(ids):
            return self._iota[: count + 1], ids, 1
        # Log-probabilities of a prompt's tokens: rows of one request, and vLLM does not say of which.
        if len(ids) == 0 or not bool((ids == ids[0]).all()):
            raise RuntimeError(
                f"LoRA for the language model's head: expected {len(ids)} rows, one a sample, got {count}, and samples have "
                "different adapters; ask for log-probabilities of a prompt alone, or adapt no lm_head"
            )
        return torch.tensor([0, count], dtype=torch.int32), ids[:1], count

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """``y += scale * (x @ A.T) @ B.T`` for the language model's head: a row is a sample.

        ``y`` may have more columns than the vocabulary.
        """
        if self.no_lora:
            return
        layer, _ = self._heads[id(lora_a_stacked)]
        y, x = y.view(-1, y.shape[-1])[:, : lora_b_stacked.shape[-2]], x.view(-1, x.shape[-1]).to(y.dtype)
        _add(y, x, layer.A[0], layer.B[0], layer.scaling * scale, *self._samples(len(x)), layer.ranks[0])

    # --- fully sharded layers (S-LoRA): shrink and expand apart, with a gather between them ---

    def _on_adapted(self, y: Tensor, x: Tensor, run: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """``run(y, x, ids)`` on the rows that have an adapter; the others stay as they are."""
        rows = self._adapted
        if len(rows) == 0:
            return
        part = y[rows]
        run(part, x[rows], self._token_lora_indices[rows])
        y[rows] = part

    def _shrink_decode(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        self._on_adapted(y, x, lambda y, x, ids: bgmv_shrink(x, w_t_all, y, ids, scale))

    def _expand_slice_decode(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool
    ) -> None:
        self._on_adapted(y, x, lambda y, x, ids: bgmv_expand_slice(x, w_t_all, y, ids, y_offset, y_slice_size, add_inputs))


# --- also in compiled models: all tensors are inputs of the graph ---


def _add_to(number: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``y[..., slice i] += (x @ A[i].T) @ B[i].T`` with the adapter of each row; ``x [..., in]``, ``y [..., out]``."""
    _add_bound(y, x.to(y.dtype), number)
    return y


def _embed(base: Any, indices: Tensor, table: Tensor, number: Tensor, x: Tensor) -> Tensor:
    """``indices``: of the first row in ``table [slots * vocabulary, R]`` that belongs to each token's adapter."""
    return _add_to(number, functional.embedding(x + indices[: x.numel()].view_as(x), table), base.forward(x))


def _slots(ids: Any, slot_of: dict[int, int]) -> np.ndarray:
    """Adapter ids (0: none) of tokens to slots (-1: none), int64."""
    known, position = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    return np.array([slot_of[i] if i > 0 else -1 for i in known.tolist()], dtype=np.int64)[position]
