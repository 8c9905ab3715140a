"""PunicaWrapperT2L: the ops of this package under vLLM's LoRA layers on a CPU.

Unlike vLLM's own wrapper for CPUs it never touches a row without an adapter (index -1), returns at once for a batch without
adapters, skips a slice that no running adapter has, and multiplies at an adapter's true rank, with float32 accumulation and
one rounding.  Token ids and segments are computed once a mapping, weights, ranks and offsets once a layer.

In a model that vLLM compiles a layer's part is one op, ``t2l_vllm::add_lora_``, which names the layer by a number and reads
the batch and the slots when it runs: nothing is compiled again when they change.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

import t2l_engine  # noqa: F401  # registers torch.ops.t2l_engine

_add_group = torch.ops.t2l_engine.lora_add_group_.default
_add = torch.ops.t2l_engine.lora_add_.default

#: Where vLLM's forward context of a model has its layers, (wrapper, :class:`Layer`) by number.
NUMBERED = "t2l_engine.lora"
_library = torch.library.Library("t2l_vllm", "DEF")  # lives as long as the process
_library.define("add_lora_(Tensor(a!) y, Tensor x, int layer) -> ()")

Slices = tuple[Tensor, ...]  # A or B of every slice of a layer
#: Slices of a layer, as arguments of ``lora_add_group_``: A ``[slots, rank, in]``, B ``[slots, out, rank]``, true ranks
#: ``[slots]`` int32, and the first column of each slice in the output.
Group = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]
#: Bounds and adapters of runs of rows, and the longest run.
Segments = tuple[Tensor, Tensor, int]


class Layer:
    """The slots of one LoRA layer of vLLM: views of its weights, and true ranks, at first 0.

    Args:
        lora_a: ``[slots, 1, R, in]`` per slice; R is vLLM's ``max_lora_rank``.
        lora_b: ``[slots, 1, out, R]`` per slice.
        table: of an embedding, ``[slots * vocabulary, R]``: the rows that B multiplies; ``lora_a`` is then the identity.
    """

    def __init__(self, lora_a: Slices, lora_b: Slices, table: Tensor | None = None):
        self.table = table
        slots, _, self.width, _ = lora_a[0].shape
        self.scaling = torch.ones(slots)
        self.ranks = [torch.zeros(slots, dtype=torch.int32) for _ in lora_a]
        #: Per slice a bit for each slot that holds an adapter with this slice.
        self.filled = [0] * len(lora_a)
        offsets = [0, *itertools.accumulate(b.shape[2] for b in lora_b[:-1])]
        self._slices = list(zip([a[:, 0] for a in lora_a], [b[:, 0] for b in lora_b], self.ranks, offsets, strict=True))
        self._last: tuple[int, Group | None] = (0, None)

    def set_ranks(self, slot: int, ranks: list[int]) -> None:
        """Set the true rank of every slice in ``slot``; 0: the adapter there lacks the slice."""
        for i, rank in enumerate(ranks):
            self.ranks[i][slot] = rank
            self.filled[i] = self.filled[i] & ~(1 << slot) | (bool(rank) << slot)
        self._last = (0, None)

    def group(self, active: int) -> Group | None:
        """The slices that an adapter in the slots ``active`` (a bit each) has; None: there are none."""
        if active != self._last[0]:
            chosen = [part for part, filled in zip(self._slices, self.filled, strict=True) if filled & active]
            columns: Any = tuple(map(list, zip(*chosen, strict=True)))
            self._last = (active, columns or None)
        return self._last[1]


def _as_tuple(weights: Tensor | Slices) -> Slices:
    return weights if isinstance(weights, tuple) else (weights,)


class PunicaWrapperT2L(PunicaWrapperCPU):
    """vLLM's punica wrapper for CPUs with this package's kernels; see the module."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._heads: dict[int, tuple[Layer, Tensor]] = {}  # by the id of their A
        # One segment a token, for calls with other row counts than the mapping; rows beyond it have no adapter.
        self._iota = torch.arange(max_num_batched_tokens + 1, dtype=torch.int32)
        self._token_ids = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)
        self._sampler_ids = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)
        self._active = 0  # a bit for each slot whose adapter the batch uses
        self._segments: tuple[int, Tensor, Tensor, int] = (0, self._iota[:1], self._token_ids[:0], 0)
        self._adapted = torch.empty(0, dtype=torch.long)  # rows with an adapter

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
            layer = Layer((identity,), lora_b, table)
            module.forward = functools.partial(_embed, module.base_layer, self._adding(layer))
        else:
            layer = Layer(lora_a, lora_b)
            if getattr(type(module), "_apply_lora_to_output", None) is BaseLinearLayerWithLoRA._apply_lora_to_output:
                module._apply_lora_to_output = self._adding(layer)
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

    def _adding(self, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
        """The function of ``(x, y)`` that adds the adapters' part of ``layer`` to ``y`` and returns it, also when traced."""
        numbered = get_current_vllm_config().compilation_config.static_forward_context.setdefault(NUMBERED, [])
        numbered.append((self, layer))
        return functools.partial(_add_to, self, layer, len(numbered) - 1)

    # --- what changes with the batch ---

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """vLLM's ids of tokens and samples (0: none) to slots (-1: none), segments and the set of slots in use."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        tokens, samples = (_slots(ids, slot_of) for ids in (mapping.index_mapping, mapping.prompt_mapping))
        count = len(tokens)
        used = set(np.unique(tokens).tolist()) | set(np.unique(samples).tolist())
        self._active = sum(1 << slot for slot in used if slot >= 0)
        self.no_lora, self.is_prefill = not self._active, False  # False: vLLM's functions for single rows, overridden below
        starts = np.flatnonzero(np.diff(tokens, prepend=-2))
        bounds = np.append(starts, count).astype(np.int32)
        longest = int(np.diff(bounds).max(initial=0))
        self._segments = (count, torch.from_numpy(bounds), torch.from_numpy(tokens[starts].astype(np.int32)), longest)
        self._adapted = torch.from_numpy(np.flatnonzero(tokens >= 0))
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

    def _rows(self, count: int) -> Segments:
        known, bounds, ids, longest = self._segments
        if count == known:
            return bounds, ids, longest
        return self._iota[: count + 1], self._token_ids[:count], 1

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

    # --- the hot path ---

    def add(self, y: Tensor, x: Tensor, layer: Layer) -> None:
        """``y[..., slice i] += (x @ A[i].T) @ B[i].T`` with the adapter of each row.

        ``x [..., in]``, or the tokens ``[...]`` of an embedding; ``y [..., out]``.
        """
        if not self._active:
            return
        if layer.table is None:
            x = x.reshape(-1, x.shape[-1])
        else:
            x = functional.embedding(x.flatten() + self._embeddings_indices[: x.numel()], layer.table)
        self._add_delta(y.view(-1, y.shape[-1]), x, layer, 1.0, self._rows)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """The same for the language model's head: a row is a sample, ``y`` may have more columns than the vocabulary."""
        if self._active:
            y, x = y.view(-1, y.shape[-1])[:, : lora_b_stacked.shape[-2]], x.view(-1, x.shape[-1])
            self._add_delta(y, x, self._heads[id(lora_a_stacked)][0], scale, self._samples)

    def _add_delta(self, y: Tensor, x: Tensor, layer: Layer, scale: float, rows: Callable[[int], Segments]) -> None:
        group = layer.group(self._active)
        if group is None:
            return
        lora_A, lora_B, ranks, offsets = group
        scaling = layer.scaling if scale == 1.0 else layer.scaling * scale
        x, segments = x.to(y.dtype), rows(len(x))
        if len(offsets) == 1 and lora_B[0].shape[1] == y.shape[1]:  # lists are slow to pass
            _add(y, x, lora_A[0], lora_B[0], scaling, *segments, ranks[0])
        else:
            _add_group(y, x, lora_A, lora_B, scaling, *segments, ranks, offsets)

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


# --- compiled models ---


def _add_numbered(y: Tensor, x: Tensor, layer: int) -> None:
    wrapper, of = get_forward_context().no_compile_layers[NUMBERED][layer]
    wrapper.add(y, x, of)


_library.impl("add_lora_", _add_numbered, "CPU")
torch.library.register_fake("t2l_vllm::add_lora_", lambda y, x, layer: None, lib=_library)
_add_in_graph = torch.ops.t2l_vllm.add_lora_.default


def _add_to(wrapper: PunicaWrapperT2L, layer: Layer, number: int, x: Tensor, y: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        _add_in_graph(y, x, number)
    else:
        wrapper.add(y, x, layer)
    return y


def _embed(base: Any, add: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    return add(x, base.forward(x))


def _slots(ids: Any, slot_of: dict[int, int]) -> np.ndarray:
    """Adapter ids (0: none) of tokens to slots (-1: none), int64."""
    known, position = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    return np.array([slot_of[i] if i > 0 else -1 for i in known.tolist()], dtype=np.int64)[position]
