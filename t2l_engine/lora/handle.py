"""attach and LoRAHandle: adapters on a model, switched per batch row, merged and detached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import short_repr
from t2l_engine.lora.layer import AdaptedModule, LoRALinear, ShardedLoRALinear, refuse_weights
from t2l_engine.lora.locate import Packed, Target, check_stack, device_of, find_all, find_sharding, same_place
from t2l_engine.lora.merge import check_mergeable, merged_weight, overwrite
from t2l_engine.lora.routing import Ids, Routing
from t2l_engine.lora.sharding import local
from t2l_engine.lora.slots import Slots

#: Module name of a stack -> key of its slots, and its linears by layer.
Matched = dict[str, tuple[str, dict[int, Target]]]


class LoRAHandle:
    """The adapter slots of a model, and which slot each batch row uses; returned by :func:`attach`.

    Until :meth:`use` or :meth:`set` selects adapters, the model is the base model.  The handle owns its slots; adapters are
    copied (:meth:`put`) or written (:meth:`borrow_slots`) into them.  Layers may lie on several devices (transformers'
    ``device_map``); their slots lie beside them.  Linears that tensor parallelism has divided among processes have slots for
    each process' part; all processes make the same calls.  Not thread-safe: ids are state of the model, not of a call.
    With gradient checkpointing, call ``backward()`` while the same ids are set and before another training forward pass,
    else it raises RuntimeError; reentrant checkpointing needs train mode.  Code under ``torch.compile`` is not checked: call
    ``backward()`` before setting other ids.

    Source: LoRA (arXiv 2106.09685); adapters per row as in Punica (arXiv 2310.18547).

    >>> import torch
    >>> import t2l_engine as t2l
    >>> model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})])
    >>> stack = t2l.AdapterStack({"q_proj": torch.ones(2, 1, 2, 8)}, {"q_proj": torch.ones(2, 1, 6, 2)}, torch.ones(2))
    >>> lora, x = t2l.attach(model, stack), torch.randn(3, 8)
    >>> base = model[0]["q_proj"](x)
    >>> with lora.use([0, 1, -1]):  # row 2 uses the base model
    ...     adapted = model[0]["q_proj"](x)
    >>> (adapted == base).all(dim=1)
    tensor([False, False,  True])
    >>> lora.detach()
    """

    def __init__(self, model: nn.Module, slots: int, max_rank: int | None, packed: Packed | None):
        self._model: nn.Module | None = model
        #: Number of adapters that the handle can hold.
        self.num_slots = slots
        self._max_rank, self._packed = max_rank, packed
        # By device of the layers, first that of the model's first weight.
        self._routings: dict[torch.device, Routing] = {device_of(model): Routing()}
        self._slots: dict[str, Slots] = {}  # by path in the first stack that had the module
        self._keys: dict[str, str] = {}  # path in any stack -> key of _slots: paths of one module may differ by stack
        self._wrapped: list[tuple[Target, LoRALinear]] = []
        self._scalings: dict[torch.device, Tensor] = {}  # [slots], by device
        self._filled: set[int] = set()
        self._merged: list[tuple[LoRALinear, Tensor]] | None = None  # layer, its original weight
        self._load_hook: Any = None  # refuses to load a state_dict while merged

    # --- routing ---------------------------------------------------------------------------------------------------

    def set(self, ids: Ids) -> None:
        """Use ``ids`` until changed: one id per batch row, one int for all, or an :class:`AdapterBatch`; -1: base model.

        Rows are the first dimension of a layer's input; a sequence-first model needs an :class:`AdapterBatch`.

        Raises IndexError for an id out of range or of an empty slot, ValueError for other wrong ids; nothing changes then.
        """
        self._check_free("set")
        for device, routing in self._routings.items():
            routing.set(ids, self.num_slots, self._filled, device)
            routing.overrides, routing.dropout = None, 0.0

    @contextlib.contextmanager
    def use(self, ids: Ids) -> Iterator[LoRAHandle]:
        """``ids`` as in :meth:`set` inside the block; the previous ids are restored afterwards, also after an exception."""
        before = self._state()
        self.set(ids)
        try:
            yield self
        finally:
            self._restore(before)

    @contextlib.contextmanager
    def differentiable(self, stack: AdapterStack, ids: Ids, *, dropout: float = 0.0) -> Iterator[LoRAHandle]:
        """Inside the block rows use the adapters of ``stack`` instead of the slots, with gradients to its A and B.

        For training: ``ids`` index ``stack``; ``dropout``: probability with which an entry of A's input is zeroed while
        gradients are recorded.  The modules of the stack must be attached already (:func:`attach` a stack of the same
        shapes).  Raises as :meth:`set`, and ValueError for a module that is not attached.
        """
        self._check_free("differentiable")
        check_stack("stack", stack)
        matched = self._match(stack)
        for name, (key, _) in matched.items():
            if key not in self._slots:
                raise ValueError(f"stack: module {name} is not attached; attach a stack that has it first")
            if self._slots[key].sharding:
                raise ValueError(
                    f"stack: {name} is divided among processes (tensor parallelism), where adapters are not trained"
                )
        overrides: dict[torch.device, dict[tuple[str, int], dict[str, Tensor]]] = {d: {} for d in self._routings}
        for name, a in stack.lora_A.items():
            key, _ = matched[name]
            # unbind, not a slice per layer, whose backward would write a full-size gradient for every layer.
            layers = zip(a.unbind(1), stack.lora_B[name].unbind(1), stack.ranks[name].T.contiguous(), strict=True)
            # A layer without an adapter needs no gradients.  Fake tensors, of which compilers trace, have no values.
            known = type(stack.ranks[name]) is Tensor
            adapted = stack.ranks[name].any(dim=0).tolist() if known else [True] * a.shape[1]
            for layer, (A, B, ranks) in enumerate(layers):
                device = self._slots[key].device(layer)
                if device is not None and adapted[layer]:
                    tensors = {"lora_A": A, "lora_B": B, "scaling": stack.scaling, "ranks": ranks}
                    overrides[device][key, layer] = {k: t.to(device) for k, t in tensors.items()}
        before = self._state()
        try:
            for device, routing in self._routings.items():
                routing.set(ids, len(stack), range(len(stack)), device)
                routing.dropout = dropout
                routing.overrides = overrides[device]
            yield self
        finally:
            self._restore(before)

    def _state(self) -> dict[torch.device, tuple]:
        return {device: routing.state() for device, routing in self._routings.items()}

    def _restore(self, states: dict[torch.device, tuple]) -> None:
        first, *_ = self._routings.values()
        for device, routing in self._routings.items():
            if self._merged is not None:
                routing.clear()
            elif device in states:
                routing.restore(states[device])
            else:  # new since then
                routing.follow(first, device)

    def _slots_changed(self) -> None:
        for routing in self._routings.values():
            routing.slots_changed()

    # --- slots -----------------------------------------------------------------------------------------------------

    def put(self, slot: int, adapter: AdapterStack) -> None:
        """Copy a stack of one adapter into ``slot``; modules that it lacks get rank 0 there.

        Raises IndexError for a slot outside ``[0, num_slots)``, ValueError if the adapter does not fit the model; nothing
        changes then.
        """
        self._check_free("put")
        self._check_slots(slot, 1)
        check_stack("adapter", adapter)
        if len(adapter) != 1:
            raise ValueError(f"adapter: expected a stack of one adapter, got {len(adapter)}")
        self._reserve(adapter)
        with self._writing(slot, 1), torch.no_grad():
            for name, path in adapter.paths.items():
                tensors = adapter.lora_A[name], adapter.lora_B[name], adapter.ranks[name]
                self._slots[self._keys[path]].write(slot, *(t[0] for t in tensors))
            for scaling in self._scalings.values():
                scaling[slot] = adapter.scaling[0]

    @contextlib.contextmanager
    def borrow_slots(self, slot: int, like: AdapterStack, *, device: torch.device | None = None) -> Iterator[AdapterStack]:
        """The slots from ``slot`` on, as many as ``like`` has adapters, as a stack to be written in the block: no copy.

        ``like``: a stack of the same shapes, such as an earlier result or :meth:`HyperNetwork.meta_stack`; values of its A
        and B are not read.  ``device``: where the slots are expected; None: anywhere.  The stack in the block has the
        modules and layers of ``like``, and views of the slots in their dtype.  Write all of it, ranks ``[N, n]`` and
        scaling ``[N]`` too, as ``HyperNetwork.generate(task_emb, out=...)`` does.  Until the block ends the slots are empty,
        and if it raises they stay empty.  Modules that ``like`` lacks get rank 0 there.

        Raises IndexError for slots outside ``[0, num_slots)``, ValueError if ``like`` does not fit the model, or if the
        slots of its modules have several dtypes, or lie on several devices or another one (use :meth:`put`); nothing changes
        then.

        >>> import torch
        >>> import t2l_engine as t2l
        >>> model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})])
        >>> stack = t2l.AdapterStack({"q_proj": torch.ones(1, 1, 2, 8)}, {"q_proj": torch.ones(1, 1, 6, 2)}, torch.ones(1))
        >>> lora = t2l.attach(model, stack, slots=3)
        >>> with lora.borrow_slots(1, stack) as out:
        ...     for written in (out.lora_A["q_proj"], out.lora_B["q_proj"], out.ranks["q_proj"], out.scaling):
        ...         _ = written.fill_(2)
        >>> lora.set([0, 1])
        """
        self._check_free("borrow_slots")
        check_stack("like", like)
        count = len(like)
        self._check_slots(slot, count)
        matched, new = self._missing_slots(like)
        places = {name: new[key] if key in new else self._slots[key] for name, (key, _) in matched.items()}
        for name, (_, *sizes) in like.sizes.items():
            if tuple(sizes) != places[name].features:
                raise ValueError(
                    f"like: {name}: expected the in/out features {places[name].features} of this process, got "
                    f"{tuple(sizes)}; use put()"
                )
        dtypes = {name: slots.dtype for name, slots in places.items()}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"like: expected modules whose slots have one dtype, got {short_repr(dtypes)}; use put()")
        devices = {part for slots in places.values() for part in slots.parts}
        device = device if device is None else torch.empty(0, device=device).device  # with its index
        if len(devices) > 1 or device not in (None, *devices):
            expected = "one device" if device is None else device
            raise ValueError(f"like: expected layers on {expected}, got {', '.join(sorted(map(str, devices)))}; use put()")
        self._add_slots(like, matched, new)
        (device,) = devices
        rows, lora_A, lora_B, ranks = slice(slot, slot + count), {}, {}, {}
        with self._writing(slot, count):
            with torch.inference_mode(False), torch.no_grad():  # as in _missing_slots
                for name, slots in places.items():
                    (part,), (n, r) = slots.parts.values(), like.lora_A[name].shape[1:3]
                    lora_A[name], lora_B[name] = part.A[rows, :n, :r], part.B[rows, :n, :r].mT
                    ranks[name] = part.ranks[:n, rows].T
                scaling = self._scalings[device][rows]
                out = AdapterStack(lora_A, lora_B, scaling, ranks, like.paths, partial=like.partial)
            yield out

    def _check_slots(self, slot: int, count: int) -> None:
        """IndexError unless there are ``count`` slots from ``slot`` on."""
        if count > self.num_slots:
            raise IndexError(f"slot: expected at most {self.num_slots} adapters, as many as there are slots, got {count}")
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot <= self.num_slots - count:
            raise IndexError(
                f"slot: expected an int in [0, {self.num_slots - count}], for {count} of {self.num_slots} slots, "
                f"got {short_repr(slot)}"
            )

    @contextlib.contextmanager
    def _writing(self, slot: int, count: int) -> Iterator[None]:
        """``count`` slots are empty in the block, and after one that raises: half an adapter would be another one."""
        self._empty(slot, count)
        try:
            yield
        except BaseException:
            self._empty(slot, count)
            raise
        self._filled.update(range(slot, slot + count))
        self._slots_changed()

    def _empty(self, slot: int, count: int) -> None:
        """Rank 0 in ``count`` slots."""
        with torch.no_grad():
            for slots in self._slots.values():
                slots.empty(slot, count)
        self._filled.difference_update(range(slot, slot + count))
        self._slots_changed()

    def _reserve(self, stack: AdapterStack) -> None:
        """Allocate the slots that ``stack`` needs, after all checks, and wrap the linears once there is memory for all."""
        self._add_slots(stack, *self._missing_slots(stack))

    @torch.inference_mode(False)  # inference tensors could be written in inference mode only
    def _missing_slots(self, stack: AdapterStack) -> tuple[Matched, dict[str, Slots]]:
        """What :meth:`_match` gives, and new slots by key for the modules that have none; the handle does not change."""
        model, new = self._check_attached(), {}
        matched = self._match(stack)
        for name, (key, _) in matched.items():
            width, known = stack.lora_A[name].shape[2], self._slots.get(key)
            r_max = known.rank if known else self._max_rank or width
            if width > r_max and (rank := int(stack.ranks[name].max())) > r_max:
                raise ValueError(f"{name}: rank {rank} exceeds the slots' rank {r_max}; attach with max_rank=...")
        for name, (key, targets) in matched.items():
            if key not in self._slots:
                a, b = stack.lora_A[name], stack.lora_B[name]
                rank, sizes = self._max_rank or a.shape[2], (a.shape[3], b.shape[2])
                sharding = find_sharding(model, name, targets)
                new[key] = Slots(targets, a.shape[1], self.num_slots, rank, sizes, a.dtype, device_of(model), sharding)
        return matched, new

    @torch.inference_mode(False)
    def _add_slots(self, stack: AdapterStack, matched: Matched, new: dict[str, Slots]) -> None:
        """Make ``new`` slots the handle's, and wrap their linears."""
        for slots in new.values():
            for device in slots.parts:
                self._add_device(device)
        self._slots |= new
        for name, (key, targets) in matched.items():
            self._keys[stack.paths[name]] = key
            if key in new:
                for layer, target in targets.items():
                    self._wrap(key, layer, target)

    def _add_device(self, device: torch.device) -> None:
        """Routing and scalings on ``device``, equal to those on the others."""
        (first, *_), scalings = self._routings.values(), list(self._scalings.values())
        if device not in self._scalings:
            values = scalings[0] if scalings else torch.ones(self.num_slots, dtype=torch.float32)
            self._scalings[device] = values.to(device, copy=True)
        if device not in self._routings:
            self._routings[device] = Routing()
            self._routings[device].follow(first, device)
        for routing in self._routings.values():
            routing.spread = len(self._routings) > 1

    def _wrap(self, key: str, layer: int, target: Target) -> None:
        slots = self._slots[key]
        device = slots.device(layer)
        assert device is not None  # the layer has a target
        # Another module of a packed projection may have wrapped it already.
        wrapped = getattr(target.parent, target.attribute)
        if not isinstance(wrapped, LoRALinear):
            base, routing, how = target.linear, self._routings[device], slots.sharding
            wrapped = LoRALinear(base, routing) if how is None else ShardedLoRALinear(base, routing, how)
            setattr(target.parent, target.attribute, wrapped)
            self._wrapped.append((target, wrapped))
        start = None if target.columns is None else target.columns[0]
        A, B, ranks = slots.layer(layer)
        wrapped.adapt(AdaptedModule(key, layer, start, A, B, self._scalings[device], ranks))

    def _match(self, stack: AdapterStack) -> Matched:
        """The modules of ``stack``; a key need not have slots yet."""
        slots = {path: self._slots[key] for path, key in self._keys.items() if key in self._slots}
        known = {path: (one.targets, one.whole_features) for path, one in slots.items()}
        found = find_all(self._check_attached(), stack, self._packed, known)
        matched: Matched = {}
        for name, targets in found.items():
            path = stack.paths[name]
            key = self._keys.get(path)
            if key is None:  # perhaps another spelling of a place that has slots
                key = next((k for k, slots in self._slots.items() if same_place(slots.targets, targets)), path)
            matched[name] = key, self._slots[key].targets if key in self._slots else targets
        return matched

    # --- merge and detach ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, index: int) -> None:
        """Add adapter ``index`` to the weights, so that all rows use it at no cost, until :meth:`unmerge`.

        The original weights are kept, which doubles the memory of the adapted weights.  Current ids are dropped: after
        :meth:`unmerge` the model is the base model.  Loading a state_dict while merged raises RuntimeError; other changes of
        a merged weight (by an optimiser or another handle on the same linear) are undone by :meth:`unmerge` too.

        Raises IndexError for an empty slot, ValueError for a layer that is not a plain linear or whose weight other modules
        share, RuntimeError if an adapter is merged already; nothing changes then.
        """
        model = self._check_free("merge")
        if not isinstance(index, int) or isinstance(index, bool) or index not in self._filled:
            raise IndexError(f"index: expected a filled slot {short_repr(sorted(self._filled))}, got {short_repr(index)}")
        check_mergeable(model, self._wrapped)
        for routing in self._routings.values():
            routing.clear()
            routing.merged = True
        self._merged, self._load_hook = [], model.register_load_state_dict_pre_hook(refuse_weights)
        try:
            for _, wrapped in self._wrapped:
                merged = merged_weight(wrapped, index)
                weight = local(wrapped.weight)
                self._merged.append((wrapped, weight.detach().clone()))
                overwrite(weight, merged)
        except BaseException:  # such as out of memory
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: the weights get their original bits.  Raises RuntimeError if nothing is merged."""
        self._check_attached()
        if self._merged is None:
            raise RuntimeError("unmerge: no adapter is merged")
        for wrapped, original in self._merged:
            overwrite(local(wrapped.weight), original)
        self._load_hook.remove()
        self._merged = None
        for routing in self._routings.values():
            routing.merged = False

    def detach(self) -> None:
        """Put the original layers back: modules and weights are those from before :func:`attach`, bit for bit.

        Raises RuntimeError if the handle is detached already.
        """
        self._check_attached()
        if self._merged is not None:
            self.unmerge()
        for target, wrapped in self._wrapped:
            setattr(target.parent, target.attribute, wrapped.base)
        self._wrapped.clear()
        self._slots.clear()
        self._model = None

    def _check_attached(self) -> nn.Module:
        """The model; RuntimeError once detached."""
        if self._model is None:
            raise RuntimeError("this handle is detached; call attach() again")
        return self._model

    def _check_free(self, call: str) -> nn.Module:
        """The model; RuntimeError, naming ``call``, once detached or while an adapter is merged."""
        if self._merged is not None:
            raise RuntimeError(f"{call}: an adapter is merged into the weights; call unmerge() first")
        return self._check_attached()


def attach(
    model: nn.Module,
    stack: AdapterStack | None = None,
    *,
    slots: int | None = None,
    max_rank: int | None = None,
    packed: Packed | None = None,
) -> LoRAHandle:
    """Put adapters on ``model`` without PEFT and without copying its weights; each batch row's is selected at run time.

    Detach before moving the model to another device, resizing, copying or pickling it.

    Source: LoRA (arXiv 2106.09685).

    Args:
        model: any module whose layers have linears with the adapters' module names: a transformers causal LM or a custom
            model.  A layer may be any module (such as a quantised linear) that returns a new tensor.  Its parent must call
            it: known parents that read the weight instead (torch's MultiheadAttention, Mamba's dt_proj) are refused; with an
            unknown one the adapter has no effect.
        stack: adapters copied into slots 0 .. len(stack) - 1, or None for empty slots that ``put`` fills.
        slots: number of adapters that the handle can hold; default ``len(stack)``, or 8 without a stack.
        max_rank: largest rank that the slots can hold; default, per module, that of the first stack with the module.
            Slots have the dtype of the layer's weight, of a quantised layer that of the first stack.
        packed: linears whose outputs are several modules: ``{"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}}``
            (numbers of columns, in order).  None: those of transformers' Phi-3 and Phi-4-multimodal, and ``gate_up_proj`` of
            GLM.

    Raises:
        ValueError: a module is missing, has another shape or is known not to be called by its parent; layers share one
            module; the model has adapters attached already, or is on the meta device.

    >>> import torch
    >>> import t2l_engine as t2l
    >>> model = torch.nn.ModuleList([torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 12)}) for _ in range(2)])
    >>> A, B = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 4)  # [N, layers, r, in], [N, layers, out, r]
    >>> stack = t2l.AdapterStack({"v_proj": A}, {"v_proj": B}, torch.tensor([2.0]))
    >>> lora = t2l.attach(model, stack, packed={"qkv": {"q_proj": 8, "k_proj": 2, "v_proj": 2}})
    >>> with lora.use(0):
    ...     model[1]["qkv"](torch.randn(5, 8)).shape
    torch.Size([5, 12])
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch module, got {type(model).__name__}")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("model: adapters are attached already; use that handle, or detach it first")
    if stack is not None:
        check_stack("stack", stack)
    for name, value in (("slots", slots), ("max_rank", max_rank)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected a positive int, got {short_repr(value)}")
    if slots is None:
        slots = 8 if stack is None else len(stack)
    if stack is not None and len(stack) > slots:
        raise ValueError(f"slots: expected room for the {len(stack)} adapters of the stack, got {slots}")
    handle = LoRAHandle(model, slots, max_rank, packed)
    try:
        if stack is not None:  # at once for all adapters
            handle._reserve(stack)
        for i, adapter in enumerate(stack or ()):
            handle.put(i, adapter)
    except BaseException:  # such as out of memory, or an interrupt: the model stays as it was
        handle.detach()
        raise
    return handle
