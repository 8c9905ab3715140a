"""LoRALinear: the wrapper that ``attach`` puts around a linear, which adds the output of the current adapters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad

from t2l_engine.adapters.paths import LAYER
from t2l_engine.lora.autograd import AdaptedLinear, is_plain
from t2l_engine.lora.locate import features
from t2l_engine.lora.routing import Routing
from t2l_engine.lora.sharding import Sharding, is_distributed
from t2l_engine.ops.registry import lora_add_group_op, lora_add_op, lora_delta_op

# Not public in torch; if it is missing, recomputation is not checked.
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)

Segments = tuple[Tensor, Tensor, int]  # as the ops take them


class AdaptedModule(NamedTuple):
    """A module that a linear computes, alone or as columns of a packed projection, and its adapters.

    ``key``: of its slots in the handle.  ``start``: its first output column, None if it is the whole linear.
    ``lora_A [slots, r, in]``, ``lora_B [slots, out, r]``, ``scaling [slots]``, ``ranks [slots]``: views of the slots.
    """

    key: str
    layer: int
    start: int | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    ranks: Tensor


def _in_place_operands(modules: list[AdaptedModule]) -> tuple[list[tuple], tuple | None]:
    """Of a ``lora_add_`` for each whole linear, and of one ``lora_add_group_`` for all columns of a packed projection."""
    whole = [(m.lora_A, m.lora_B, m.scaling, m.ranks) for m in modules if m.start is None]
    packed = [m for m in modules if m.start is not None]
    if not packed:
        return whole, None
    _, _, starts, A, B, scalings, ranks = map(list, zip(*packed, strict=True))
    return whole, (A, B, scalings[0], ranks, starts)


class LoRALinear(nn.Module):
    """``base(x)`` plus the LoRA update of the current adapters; ``base`` is any module, and its weight is shared.

    Created by :func:`t2l_engine.attach`.  ``x [..., in]`` to ``[..., out]`` in the dtype of ``base``'s output.
    ``state_dict`` has the keys of ``base``, so an attached model is saved as the base model (names of ``named_parameters``
    contain ``base.``).  Raises RuntimeError when copied or pickled: its routing belongs to one handle.

    Source: LoRA (arXiv 2106.09685).

    >>> import torch
    >>> import t2l_engine as t2l
    >>> model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})])
    >>> stack = t2l.AdapterStack({"q_proj": torch.ones(1, 1, 2, 8)}, {"q_proj": torch.ones(1, 1, 6, 2)}, torch.ones(1))
    >>> lora = t2l.attach(model, stack)
    >>> type(model[0]["q_proj"]).__name__, sorted(model.state_dict())
    ('LoRALinear', ['0.q_proj.bias', '0.q_proj.weight'])
    """

    base: Any  # a module; Any, since nn.Module does not declare weight, bias, in_features, ...

    def __init__(self, base: nn.Module, routing: Routing):
        super().__init__()
        self.base = base
        self._routing = routing
        self.adapted_modules: list[AdaptedModule] = []
        self._operands = _in_place_operands([])
        self._adapter_version: object | None = None  # in the last forward pass that a backward pass may recompute
        self._prefix = ""
        self.register_load_state_dict_post_hook(_own_names)
        self.training = base.training  # not train(), which would change submodules of base

    @property
    def weight(self) -> Tensor:
        """``base``'s; setting it sets ``base``'s, so that embeddings of an attached model can be tied."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """``base``'s; setting it sets ``base``'s."""
        return self.base.bias

    @bias.setter
    def bias(self, value: None) -> None:  # torch passes parameters to register_parameter
        self.base.bias = value

    @property
    def in_features(self) -> int | None:
        """``base``'s, None where it does not say."""
        return (features(self.base) or (None, None))[0]

    @property
    def out_features(self) -> int | None:
        """``base``'s, None where it does not say."""
        return (features(self.base) or (None, None))[1]

    @out_features.setter
    def out_features(self, value: int) -> None:
        raise RuntimeError(f"{self.extra_repr()}: detach the adapters before resizing the model")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set ``base``'s; RuntimeError for a parameter of another shape and while an adapter is merged."""
        if self._routing.merged:
            raise RuntimeError(f"{self.extra_repr()}: an adapter is merged into the {name}; call unmerge() first")
        old = getattr(self.base, name, None)
        if isinstance(old, Tensor) and param is not None and old.shape != param.shape:
            raise RuntimeError(
                f"{self.extra_repr()}: expected a {name} of shape {tuple(old.shape)}, got {tuple(param.shape)}; detach the "
                "adapters before resizing the model"
            )
        setattr(self.base, name, param)

    @property
    def adapted(self) -> bool:
        """Whether adapters are in use: ids are set, or an adapter is merged."""
        return self._routing.active or self._routing.merged

    def adapt(self, module: AdaptedModule) -> None:
        """Adapt one more module; they are sorted by column."""
        self.adapted_modules.append(module)
        self.adapted_modules.sort(key=lambda m: -1 if m.start is None else m.start)
        self._operands = _in_place_operands(self.adapted_modules)

    def _used_modules(self) -> list[AdaptedModule]:
        """The modules with the adapters in use: those of the slots, or of the stack that is differentiated."""
        overrides = self._routing.overrides
        if overrides is None:
            return self.adapted_modules
        return [m._replace(**overrides[m.key, m.layer]) for m in self.adapted_modules if (m.key, m.layer) in overrides]

    def _check_recomputation(self) -> None:
        """RuntimeError if gradient checkpointing recomputes this layer with other adapters: gradients would be wrong."""
        version = self._routing.adapter_version
        if version is self._adapter_version:
            return
        if _graph_task() == -1:  # not inside backward
            self._adapter_version = version
        else:
            raise RuntimeError(
                "backward recomputes the forward pass (gradient checkpointing) with other adapters than it ran with; call "
                "backward() inside the with-block, while the same ids are set and before another training forward pass"
            )

    def forward(self, *args, **kwargs) -> Tensor:
        """Takes the arguments of ``base``; the first, of any name, is ``x [..., in]``.

        The output of ``base``, to which the ops ``lora_add_`` or ``lora_add_group_`` add the adapters in place.  Where
        gradients are recorded, base and adapters are one autograd node if possible, else the sum of the two outputs.
        """
        x, routing = args[0] if args else next(iter(kwargs.values())), self._routing
        # A decode step runs this for every linear, with cold caches: it makes few calls.
        compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
        if (grad or self.training) and not compiling:
            self._check_recomputation()
            if routing.dropout and not grad:  # the first pass of reentrant checkpointing: only the recomputation would drop
                raise RuntimeError(
                    "dropout: expected gradients to be recorded while layers are in train mode, got none: with gradient "
                    "checkpointing use use_reentrant=False, for validation eval()"
                )
            if grad and (y := self._as_one_node(x)) is not None:
                return y
        y = self._modules["base"](*args, **kwargs)  # pyright: ignore[reportOptionalCall]  # faster than self.base
        if routing.ids is None and routing.batch is None:
            return y
        modules = self.adapted_modules if routing.overrides is None else self._used_modules()
        if not modules:
            return y
        if _forward_ad._current_level >= 0:  # torch.func.jvp would silently omit the adapter's derivative
            raise NotImplementedError("adapters have no forward-mode derivative; use backward-mode ones, or merge()")
        if not isinstance(y, Tensor):
            raise RuntimeError(f"{self.extra_repr()}: expected a layer that returns a tensor, got {type(y).__name__}")
        inner = x if x.dtype == y.dtype else x.to(y.dtype)  # under autocast, or in layers that compute in another dtype
        if routing.spread:  # `base` may have moved x to where its weights are
            inner = inner.to(y.device)
        inner = inner.contiguous()
        tokens = x.shape[:-1]
        batch = routing.segments(tokens, compiling)
        # Compiled code would specialise on max_seg_len; the number of tokens is an upper bound for it.
        longest = math.prod(tokens) if compiling and routing.batch is not None else batch.max_seg_len
        segments = (batch.seg_indptr, batch.seg_adapters, longest)
        if grad and (
            y.requires_grad or x.requires_grad or any(m.lora_A.requires_grad or m.lora_B.requires_grad for m in modules)
        ):
            return self._sum_of_outputs(y, inner, modules, segments)
        y = y.clone() if y is x else y.contiguous()  # an identity layer returns its input
        whole, group = self._operands if routing.overrides is None else _in_place_operands(modules)
        for A, B, scaling, ranks in whole:
            lora_add_op(y, inner, A, B, scaling, *segments, ranks)
        if group is not None:
            A, B, scaling, ranks, starts = group
            lora_add_group_op(y, inner, A, B, scaling, *segments, ranks, starts)
        return y

    def _as_one_node(self, x: Tensor) -> Tensor | None:
        """The output for training through a plain frozen linear, with one node of autograd; None where that cannot be."""
        routing = self._routing
        if routing.ids is None and routing.batch is None or not is_plain(self.base, x) or _forward_ad._current_level >= 0:
            return None
        modules = self._used_modules()
        # With dropout every module has its own; that two are the whole linear is rare.
        if not modules or modules[1:] and (routing.dropout or any(m.start is None for m in modules[1:])):
            return None
        batch, x = routing.segments(x.shape[:-1], False), x.contiguous()
        inner = nn.functional.dropout(x, routing.dropout) if routing.dropout else None
        segments = modules[0].scaling, batch.seg_indptr, batch.seg_adapters, batch.max_seg_len
        tensors = [t for m in modules for t in (m.lora_A, m.lora_B, m.ranks)]
        return AdaptedLinear.apply(
            x, inner, self.base.weight, self.base.bias, *segments, [m.start for m in modules], *tensors
        )

    def _sum_of_outputs(self, y: Tensor, x: Tensor, modules: list[AdaptedModule], segments: Segments) -> Tensor:
        """``y`` plus the outputs of all ``modules``, for any base layer under autograd."""
        for m in modules:
            dropped = nn.functional.dropout(x, self._routing.dropout) if self._routing.dropout else x
            delta = lora_delta_op(dropped, m.lora_A, m.lora_B, m.scaling, *segments, m.ranks)
            delta = delta.view(*y.shape[:-1], m.lora_B.shape[1])
            if m.start is not None:
                delta = nn.functional.pad(delta, (m.start, y.shape[-1] - m.start - delta.shape[-1]))
            y = y + delta.to(y.dtype)
        return y

    def extra_repr(self) -> str:
        return ", ".join(m.key.replace(LAYER, str(m.layer)) for m in self.adapted_modules)

    # --- saving, loading and copying as the base model ---------------------------------------------------------------

    def state_dict(self, *args, **kwargs):
        """``base``'s, so that the keys of an attached model are those of the base model."""
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # torch calls this before it loads "base"; rename the keys under our prefix to those of "base".
        if self._routing.merged:
            refuse_weights()
        self._prefix = prefix
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo):
        raise RuntimeError("this model has adapters attached; detach them before copying it, and attach to the copy")

    def __reduce_ex__(self, protocol):
        raise RuntimeError("this model has adapters attached; detach them before pickling it (state_dict() may be saved)")


class ShardedLoRALinear(LoRALinear):
    """A :class:`LoRALinear` whose ``base`` is divided among processes (tensor parallelism); for inference, not
    compiled.

    Where output features are divided, each process adds the update of its own.  Where input features are, each has a part of
    ``A x``, ``[tokens, r]``, rounded to the dtype of A: these are added up in float32 while ``base`` computes, and the sum
    is rounded to the dtype of its output.  ``base`` takes the features of this process, and gives those of this process or,
    of divided input features, the sum over processes.

    Source: S-LoRA (arXiv 2311.03285) section 6, whose partition of A and B this is where the base's is Megatron-LM's.
    """

    def __init__(self, base: nn.Module, routing: Routing, sharding: Sharding):
        super().__init__(base, routing)
        self._sharding = sharding
        self._identities: dict[str, tuple[Tensor, Tensor]] = {}  # by key: [slots, r, r], and scalings of 1

    def adapt(self, module: AdaptedModule) -> None:
        """Adapt one more module."""
        super().adapt(module)
        slots, r, _ = module.lora_A.shape
        eye = torch.eye(r, dtype=module.lora_A.dtype, device=module.lora_A.device)
        self._identities[module.key] = eye.expand(slots, -1, -1), torch.ones_like(module.scaling)

    def forward(self, *args, **kwargs) -> Tensor:
        """As :meth:`LoRALinear.forward`; RuntimeError while gradients are recorded and adapters are in use."""
        # In ``differentiable`` other modules have adapters: those of a stack without this one.
        if (self._routing.ids is None and self._routing.batch is None) or self._routing.overrides is not None:
            return self.base(*args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.extra_repr()}: adapters of a linear that is divided among processes have no gradients; call the "
                "model under torch.no_grad() or torch.inference_mode()"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self.extra_repr()}: adapters of a linear that is divided among processes are not compiled")
        return self._adapted(*args, **kwargs)

    def _adapted(self, *args, **kwargs) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        n_in, n_out = self._sharding.sizes
        self._check("an input", x, (*x.shape[:-1], n_in))
        batch = self._routing.segments(x.shape[:-1])
        segments = (batch.seg_indptr, batch.seg_adapters, batch.max_seg_len)
        summed = self._sharding.group is not None
        sums = [self._sum(x, m, segments) for m in self.adapted_modules if summed]
        y = self.base(*args, **kwargs)
        for _, work in sums:
            work.wait()
        self._check("an output", y, (*x.shape[:-1], n_out))
        y = y.contiguous()
        inner = [total.to(y.dtype) for total, _ in sums] or [x.to(y.dtype).contiguous()] * len(self.adapted_modules)
        for m, v in zip(self.adapted_modules, inner, strict=True):
            A = self._identities[m.key][0] if summed else m.lora_A
            lora_add_op(y, v, A, m.lora_B, m.scaling, *segments, m.ranks)
        return y

    def _sum(self, x: Tensor, m: AdaptedModule, segments: Segments) -> tuple[Tensor, Any]:
        """``A x`` ``[..., r]`` in float32 or wider, once the work that is returned with it is done."""
        A, (eye, ones) = m.lora_A, self._identities[m.key]
        part = lora_delta_op(x.to(A.dtype).contiguous(), A, eye, ones, *segments, m.ranks)
        total = part.to(torch.promote_types(A.dtype, torch.float32))
        return total, torch.distributed.all_reduce(total, group=self._sharding.group, async_op=True)

    def _check(self, what: str, value: object, shape: tuple[int, ...]) -> None:
        if isinstance(value, Tensor) and not is_distributed(value) and tuple(value.shape) == shape:
            return
        got = f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(
            f"{self.extra_repr()}: expected {what} {shape} of this process as a plain tensor, got {got}: linears that "
            "divide their input or gather their output themselves, and sequence parallelism, are not supported"
        )


def refuse_weights(*_: object) -> None:
    """In place of loading weights where an adapter is merged; as a hook of the model, before any is loaded."""
    raise RuntimeError("an adapter is merged into the weights; call unmerge() before loading others")


def _own_names(layer: LoRALinear, keys) -> None:
    """Rename missing and unexpected keys as in :meth:`LoRALinear.state_dict`."""
    ours = f"{layer._prefix}base."
    for found in keys:
        found[:] = [layer._prefix + k.removeprefix(ours) if k.startswith(ours) else k for k in found]
