"""Adapters on a live model, without PEFT: ``attach`` puts a thin layer around each adapted linear and shares its weight."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from t2l_engine import ops
from t2l_engine.adapters import AdapterStack
from t2l_engine.batch import AdapterBatch

Ids = int | Sequence[int] | Tensor | AdapterBatch


class Routing:
    """Which adapter each row of the next forward passes uses; shared by all layers of one handle.

    ``ids`` is one tensor, updated in place while the number of rows stays, so that compiled code sees new ids.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # [rows] int32, or [1] when one id serves all rows
        self.batch: AdapterBatch | None = None
        self.single = False
        # (module, layer) -> A, B, scaling, ranks of differentiable adapters that stand in for the slots
        self.overrides: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self._segments: tuple[tuple[int, int], AdapterBatch] | None = None

    @property
    def active(self) -> bool:
        return self.ids is not None or self.batch is not None

    def state(self) -> tuple:
        ids = None if self.ids is None else self.ids.clone()
        return ids, self.batch, self.single, self.overrides

    def restore(self, state: tuple) -> None:
        ids, self.batch, self.single, self.overrides = state
        self._write(ids)

    def set(self, ids: Ids, num_adapters: int, filled: Collection[int], device: torch.device) -> None:
        """Check ``ids`` against ``num_adapters`` and the ``filled`` among them, and make them current."""
        if isinstance(ids, AdapterBatch):
            _check_ids(ids.seg_adapters, num_adapters, filled)
            self.batch = AdapterBatch(ids.seg_indptr.to(device), ids.seg_adapters.to(device), ids.max_seg_len)
            self.single = False
            self._write(None)
            return
        single = isinstance(ids, int) and not isinstance(ids, bool)
        try:
            tensor = torch.as_tensor([ids] if single else ids)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or tensor.dim() != 1 or not len(tensor) or tensor.dtype.is_floating_point:
            raise ValueError(f"ids: expected one int, a non-empty sequence of ints or an AdapterBatch, got {ids!r}")
        if tensor.dtype == torch.bool:
            raise ValueError(f"ids: expected integers, got booleans {ids!r}")
        _check_ids(tensor, num_adapters, filled)
        self.batch, self.single = None, single
        self._write(tensor.to(device=device, dtype=torch.int32, copy=True))  # never the caller's storage

    def _write(self, ids: Tensor | None) -> None:
        if self.ids is not None and ids is not None and self.ids.shape == ids.shape and self.ids.device == ids.device:
            self.ids.copy_(ids)
        else:
            self.ids = ids
        self._segments = None

    def segments(self, rows: int, seq_len: int) -> AdapterBatch:
        """Segments for ``rows`` sequences of ``seq_len`` tokens (the last answer is kept: layers ask alike)."""
        if self.batch is not None:
            return self.batch
        key = (rows, seq_len)
        if not torch.compiler.is_compiling() and self._segments is not None and self._segments[0] == key:
            return self._segments[1]
        count = len(self.ids)
        if self.single:
            indptr = torch.arange(2, dtype=torch.int32, device=self.ids.device) * (rows * seq_len)
            batch = AdapterBatch(indptr, self.ids, rows * seq_len)
        else:
            if rows % count:
                raise ValueError(
                    f"ids: expected one adapter id a row (or a divisor of the rows, for beams): the batch has {rows} rows, "
                    f"got {count} ids"
                )
            # k x len(ids) rows: transformers repeats each row k times in place for beams and returned sequences.
            repeated = self.ids if rows == count else self.ids.repeat_interleave(rows // count)
            batch = AdapterBatch.from_rows(repeated, seq_len)
        if not torch.compiler.is_compiling():
            self._segments = (key, batch)
        return batch


def _check_ids(ids: Tensor, num_adapters: int, filled: Collection[int]) -> None:
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (-1, -1)
    if low < -1 or high >= num_adapters:
        raise IndexError(
            f"ids: expected -1 (base model) or an adapter in [0, {num_adapters}), got {low if low < -1 else high}"
        )
    if len(filled) < num_adapters:
        empty = sorted(set(ids.tolist()) - set(filled) - {-1})
        if empty:
            raise IndexError(f"ids: expected slots that hold an adapter, got {empty}; fill them with put()")


class LoRALinear(nn.Module):
    """``base(x)`` plus what the current adapters add.  ``base`` is any callable layer; its weight is shared, not copied.

    Slots of this layer: ``lora_A [slots, r, in]``, ``lora_B [slots, out, r]``, ``ranks [slots]``; views of the handle's
    storage.
    """

    def __init__(self, base: nn.Module, routing: Routing, name: str, layer: int):
        super().__init__()
        self.base = base
        self.name, self.layer = name, layer
        self._routing = routing
        self._slots: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        routing = self._routing
        if not routing.active:
            return y
        flat = x.reshape(-1, x.shape[-1])
        if flat.dtype != y.dtype:  # autocast, and layers that compute in another dtype
            flat = flat.to(y.dtype)
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        rows = x.shape[0] if x.dim() > 1 else 1
        batch = routing.segments(rows, flat.shape[0] // max(rows, 1))
        slots = self._slots if routing.overrides is None else routing.overrides.get((self.name, self.layer))
        if slots is None:
            return y
        A, B, scaling, ranks = slots
        segments = (batch.seg_indptr, batch.seg_adapters, batch.max_seg_len)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B)):
            delta = ops.lora_delta(flat, A, B, scaling, *segments, ranks)
            return y + delta.view(y.shape).to(y.dtype)
        y = y.clone() if y is x else y.contiguous()  # an identity layer hands us its input
        ops.lora_add_(y.view(-1, y.shape[-1]), flat, A, B, scaling, *segments, ranks)
        return y

    def extra_repr(self) -> str:
        return f"name={self.name}, layer={self.layer}"


class LoRAHandle:
    """What :func:`attach` returns: the slots of a model, and which of them each row uses.

    Until :meth:`use` or :meth:`set` names adapters, the model is the base model.  The handle owns its slots; the stacks
    given to it are copied and never changed.
    """

    def __init__(self, model: nn.Module, slots: int, max_rank: int | None):
        self._model: nn.Module | None = model
        self._num_slots, self._max_rank = slots, max_rank
        self._routing = Routing()
        self._layers: dict[tuple[str, int], tuple[nn.Module, str, LoRALinear]] = {}
        self._storage: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._scaling: Tensor | None = None
        self._filled: set[int] = set()
        self._merged: dict[tuple[str, int], Tensor] | None = None

    # --- routing ---------------------------------------------------------------------------------------------------

    def set(self, ids: Ids) -> None:
        """Use ``ids`` until changed: one id a batch row, one int for all rows, or an :class:`AdapterBatch`; -1 is the base.

        Raises IndexError for an id outside the slots or of an empty one, ValueError for anything that is no ids; nothing
        changes then.
        """
        self._check_attached()
        if self._merged is not None:
            raise RuntimeError("set: an adapter is merged into the weights; call unmerge() first")
        self._routing.set(ids, self._num_slots, self._filled, self._device())
        self._routing.overrides = None

    @contextlib.contextmanager
    def use(self, ids: Ids) -> Iterator[LoRAHandle]:
        """``ids`` as in :meth:`set` inside the block; afterwards, also after an exception, what was current returns."""
        before = self._routing.state()
        self.set(ids)
        try:
            yield self
        finally:
            self._restore(before)

    @contextlib.contextmanager
    def differentiable(self, stack: AdapterStack, ids: Ids) -> Iterator[LoRAHandle]:
        """Inside the block rows use adapters of ``stack`` itself instead of the slots, with gradients into its A and B.

        For training: ``ids`` index ``stack``.  Modules of the stack must be attached already (give :func:`attach` a stack
        of the same shapes).
        """
        self._check_attached()
        if self._merged is not None:
            raise RuntimeError("differentiable: an adapter is merged into the weights; call unmerge() first")
        for name, a in stack.lora_A.items():
            self._check_fits(name, a.shape[1], a.shape[3], stack.lora_B[name].shape[2])
            if not all((name, layer) in self._layers for layer in range(a.shape[1])):
                raise ValueError(f"stack: module {name} is not attached; attach a stack that has it first")
        before = self._routing.state()
        self._routing.set(ids, len(stack), range(len(stack)), self._device())
        # Unbound once: slicing per layer would make its backward write a full-size gradient for every layer.
        self._routing.overrides = {
            (name, layer): (A, B, stack.scaling, ranks)
            for name, a in stack.lora_A.items()
            for layer, (A, B, ranks) in enumerate(
                zip(a.unbind(1), stack.lora_B[name].unbind(1), stack.ranks[name].T.contiguous(), strict=True)
            )
        }
        try:
            yield self
        finally:
            self._restore(before)

    def _restore(self, state: tuple) -> None:
        self._routing.restore(state if self._merged is None else (None, None, False, None))

    # --- slots -----------------------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Adapters the handle can hold."""
        return self._num_slots

    def put(self, slot: int, adapter: AdapterStack) -> None:
        """Copy a stack of one adapter into ``slot``; modules it lacks become rank 0 there.

        Raises IndexError for a slot outside ``[0, num_slots)``, ValueError when the adapter does not fit the model.
        """
        self._check_attached()
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < self._num_slots:
            raise IndexError(f"slot: expected an int in [0, {self._num_slots}), got {slot!r}")
        if len(adapter) != 1:
            raise ValueError(f"adapter: expected a stack of one adapter, got {len(adapter)}")
        if self._merged is not None:
            raise RuntimeError("put: an adapter is merged into the weights; call unmerge() first")
        self._reserve(adapter)
        with torch.no_grad():
            for name, (A, B, ranks) in self._storage.items():
                ranks[:, slot] = 0
                if name in adapter.lora_A:
                    a, b = adapter.lora_A[name], adapter.lora_B[name]
                    n, r = a.shape[1], min(a.shape[2], A.shape[2])  # beyond its rank an adapter may be padded
                    A[slot, :n, :r].copy_(a[0, :, :r])
                    B[slot, :n, :r].copy_(b[0].mT[:, :r])
                    ranks[:n, slot] = adapter.ranks[name][0].to(ranks.device)
            self._scaling[slot] = adapter.scaling[0]
        self._filled.add(slot)

    def _reserve(self, stack: AdapterStack) -> None:
        """Wrap the linears that ``stack`` needs and have room for its rank; checks everything before it changes anything."""
        found = {}
        for name, a in stack.lora_A.items():
            found[name] = self._find(name, stack.paths[name], a.shape[1], a.shape[3], stack.lora_B[name].shape[2])
            r_max = self._storage[name][0].shape[2] if name in self._storage else self._max_rank or a.shape[2]
            rank = int(stack.ranks[name].max())
            if rank > r_max:
                raise ValueError(f"{name}: rank {rank} exceeds the slots' rank {r_max}; attach with max_rank=...")
        for name, layers in found.items():
            if name in self._storage:
                continue
            a, b = stack.lora_A[name], stack.lora_B[name]
            n, r = a.shape[1], self._max_rank or a.shape[2]
            device, dtype = self._device(), self._slot_dtype(layers[0][2], a.dtype)
            A = torch.zeros(self._num_slots, n, r, a.shape[3], device=device, dtype=dtype)
            B = torch.zeros(self._num_slots, n, r, b.shape[2], device=device, dtype=dtype)
            ranks = torch.zeros(n, self._num_slots, device=device, dtype=torch.int32)
            self._storage[name] = (A, B, ranks)
            if self._scaling is None:
                self._scaling = torch.ones(self._num_slots, device=device)
            for layer, (parent, attribute, base) in enumerate(layers):
                wrapped = LoRALinear(base, self._routing, name, layer)
                wrapped._slots = (A[:, layer], B[:, layer].mT, self._scaling, ranks[layer])
                setattr(parent, attribute, wrapped)
                self._layers[name, layer] = (parent, attribute, wrapped)

    def _find(self, name: str, path: str, num_layers: int, n_in: int, n_out: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """(parent, attribute, layer) of module ``name`` in every decoder layer."""
        if (name, 0) in self._layers:
            self._check_fits(name, num_layers, n_in, n_out)
            return [(p, a, w.base) for (key, _), (p, a, w) in sorted(self._layers.items()) if key == name]
        by_layer: dict[int, tuple[nn.Module, str, nn.Module]] = {}
        for full, module in self._model.named_modules():
            parts = full.split(".")
            indices = [int(p) for p in parts if p.isdigit()]
            if parts[-1] == name and len(indices) == 1:
                if indices[0] in by_layer:
                    raise ValueError(f"{name}: layer {indices[0]} of the model has several modules of that name")
                parent = self._model.get_submodule(".".join(parts[:-1]))
                by_layer[indices[0]] = (parent, parts[-1], module)
        if not by_layer:
            raise ValueError(f"{name}: the adapter adapts {path}, but {type(self._model).__name__} has no such module")
        if sorted(by_layer) != list(range(len(by_layer))) or len(by_layer) != num_layers:
            raise ValueError(f"{name}: the adapter has {num_layers} layers, the model has {len(by_layer)}")
        layers = [by_layer[i] for i in range(num_layers)]
        for i, (_, _, module) in enumerate(layers):
            self._check_shape(name, i, module, n_in, n_out)
        return layers

    def _check_fits(self, name: str, num_layers: int, n_in: int, n_out: int) -> None:
        layers = [w for (key, _), (_, _, w) in self._layers.items() if key == name]
        if layers and len(layers) != num_layers:
            raise ValueError(f"{name}: the adapter has {num_layers} layers, the model has {len(layers)}")
        for wrapped in layers:
            self._check_shape(name, wrapped.layer, wrapped.base, n_in, n_out)

    @staticmethod
    def _check_shape(name: str, layer: int, module: nn.Module, n_in: int, n_out: int) -> None:
        if not callable(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"{name}: layer {layer} is a {type(module).__name__}, expected a linear")
        got = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if None not in got and got != (n_in, n_out):
            raise ValueError(
                f"{name}: layer {layer}: the adapter has in/out features {n_in}/{n_out}, the model has {got[0]}/{got[1]}"
            )

    @staticmethod
    def _slot_dtype(layer: nn.Module, fallback: torch.dtype) -> torch.dtype:
        weight = getattr(layer, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else fallback

    def _device(self) -> torch.device:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.device.type == "meta":
                raise ValueError("model: its weights are on the meta device; load them first")
            return tensor.device
        return torch.device("cpu")

    # --- merge and detach ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, index: int) -> None:
        """Add adapter ``index`` to the weights themselves (all rows use it, at no cost); keeps the bits for unmerge."""
        self._check_attached()
        if self._merged is not None:
            raise RuntimeError("merge: an adapter is merged already; call unmerge() first")
        if not isinstance(index, int) or index not in self._filled:
            raise IndexError(f"index: expected a filled slot {sorted(self._filled)}, got {index!r}")
        for (name, layer), (_, _, wrapped) in self._layers.items():
            if not isinstance(getattr(wrapped.base, "weight", None), nn.Parameter):
                raise ValueError(f"merge: {name} layer {layer} has no plain weight to merge into")
        self._routing.restore((None, None, False, None))
        self._merged = {}
        for key, (_, _, wrapped) in self._layers.items():
            A, B, scaling, ranks = wrapped._slots
            r = int(ranks[index])
            weight = wrapped.base.weight
            self._merged[key] = weight.detach().clone()
            delta = (B[index, :, :r].float() @ A[index, :r].float()) * scaling[index]
            weight.copy_((weight.float() + delta).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`; the weights are bit for bit what they were."""
        self._check_attached()
        if self._merged is None:
            raise RuntimeError("unmerge: no adapter is merged")
        for key, original in reversed(self._merged.items()):  # layers may share a weight
            self._layers[key][2].base.weight.copy_(original)
        self._merged = None

    def detach(self) -> None:
        """Put the original layers back: the model is bit for bit, module for module what it was."""
        self._check_attached()
        if self._merged is not None:
            self.unmerge()
        for parent, attribute, wrapped in self._layers.values():
            setattr(parent, attribute, wrapped.base)
        self._layers.clear()
        self._storage.clear()
        self._model = None

    def _check_attached(self) -> None:
        if self._model is None:
            raise RuntimeError("this handle is detached; call attach() again")


def attach(
    model: nn.Module, stack: AdapterStack | None = None, *, slots: int | None = None, max_rank: int | None = None
) -> LoRAHandle:
    """Put adapters on ``model``: no PEFT, no weight copied, the adapter of every batch row chosen at run time.

    Args:
        model: any module whose decoder layers hold linears of the adapters' module names (transformers causal LMs).
        stack: adapters copied into slots 0 .. len(stack) - 1, or None for empty slots that ``put`` fills.
        slots: adapters the handle can hold; default ``len(stack)``, or 8 without a stack.
        max_rank: widest rank the slots can hold; default the stack's.  Slots take the dtype of the layer's weight.

    Raises:
        ValueError: a module is missing or of another shape, the model is attached already or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch module, got {type(model).__name__}")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("model: adapters are attached already; use that handle, or detach it first")
    for name, value in (("slots", slots), ("max_rank", max_rank)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected a positive int, got {value!r}")
    if slots is None:
        slots = 8 if stack is None else len(stack)
    if stack is not None and len(stack) > slots:
        raise ValueError(f"slots: expected room for the {len(stack)} adapters of the stack, got {slots}")
    handle = LoRAHandle(model, slots, max_rank)
    handle._device()
    for i, adapter in enumerate(stack or ()):
        handle.put(i, adapter)
    return handle
