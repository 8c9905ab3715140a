"""AdapterStack: LoRA adapters for the same modules in memory; modules ``peft`` and ``peft_write`` know folders."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.adapters import peft, peft_write
from t2l_engine.adapters.paths import DEFAULT_PATHS, LAYER, layer_list, module_names, path_error
from t2l_engine.adapters.peft import AdapterError
from t2l_engine.files.errors import short_repr
from t2l_engine.files.weights import check_dtype
from t2l_engine.ops.segments import is_capturing

__all__ = ["AdapterError", "AdapterStack"]

_MODULES_SHOWN = 8  # by repr


class AdapterStack:
    """``len(stack)`` LoRA adapters for the same modules.

    Attributes:
        lora_A: per module name ``[num_adapters, num_layers, r, in_features]``.
        lora_B: per module name ``[num_adapters, num_layers, out_features, r]`` (may be a transposed view).
        scaling: ``[num_adapters]`` float32; delta W = scaling * B @ A.
        ranks: per module name ``[num_adapters, num_layers]`` int32, the true rank; 0 where an adapter lacks the module
            or the layer.  Entries of A and B beyond the rank are undefined.
        paths: per module name its path in the base model with ``{layer}`` for the layer index.  A path without it is a
            module outside the decoder layers (``lm_head``), which has ``num_layers`` 1.
        partial: whether the adapters may end before the last layer of the model.

    Source: LoRA (arXiv 2106.09685); names, paths and shapes of one adapter are PEFT's.

    Iterating gives stacks of one adapter.  ``==`` compares identity; compare values with :meth:`allclose`.

    Raises:
        ValueError: shapes, dtypes or devices do not match; the message names the module.

    >>> import torch
    >>> import t2l_engine as t2l
    >>> A, B = torch.randn(3, 2, 4, 16), torch.randn(3, 2, 8, 4)  # 3 adapters, 2 layers, rank 4, 16 -> 8 features
    >>> stack = t2l.AdapterStack({"q_proj": A}, {"q_proj": B}, torch.full((3,), 2.0))
    >>> len(stack), len(stack[1:]), t2l.AdapterStack.cat([stack[0], stack[[2, 1]]]).allclose(stack[[0, 2, 1]])
    (3, 2, True)
    >>> stack
    AdapterStack(3 adapters, rank 4, scaling 2, float32, cpu; modules in->out x layers: q_proj 16->8 x2)
    >>> config, tensors = stack.peft_config(1), stack.state_dict_peft(1, adapter_name="task", prefix="")  # for PEFT
    >>> config["r"], config["lora_alpha"], config["target_modules"], stack.peft_config(1, fold=True)["lora_alpha"]
    (4, 8.0, ['q_proj'], 4)
    >>> next(iter(tensors))
    'model.layers.0.self_attn.q_proj.lora_A.task.weight'
    """

    _constants: tuple[list[Tensor], list[int], float, int] | None = None  # of fill_constants, with versions

    def __init__(
        self,
        lora_A: dict[str, Tensor],
        lora_B: dict[str, Tensor],
        scaling: Tensor,
        ranks: dict[str, Tensor] | None = None,
        paths: dict[str, str] | None = None,
        *,
        partial: bool = False,
    ):
        if not lora_A or lora_A.keys() != lora_B.keys():
            raise ValueError(f"lora_A, lora_B: expected the same module names, got {sorted(lora_A)} and {sorted(lora_B)}")
        self.lora_A, self.lora_B, self.scaling = dict(lora_A), dict(lora_B), scaling
        if scaling.dim() != 1 or scaling.dtype != torch.float32:
            raise ValueError(f"scaling: expected float32 [num_adapters], got {scaling.dtype} {tuple(scaling.shape)}")
        self.ranks, self.paths, dtype = {}, {}, self.dtype
        for name, a in self.lora_A.items():
            b = self.lora_B[name]
            if a.dim() != 4 or b.dim() != 4 or a.shape[:2] != b.shape[:2] or a.shape[2] != b.shape[3]:
                raise ValueError(
                    f"{name}: expected lora_A [N, n, r, in] and lora_B [N, n, out, r], "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            if len(a) != len(scaling):
                raise ValueError(f"{name}: expected {len(scaling)} adapters as in scaling, got {len(a)}")
            if not a.dtype == b.dtype == dtype or not a.is_floating_point() or not a.device == b.device == scaling.device:
                raise ValueError(
                    f"{name}: expected one floating-point dtype and one device, got lora_A {a.dtype} on {a.device}, "
                    f"lora_B {b.dtype} on {b.device}, scaling on {scaling.device}, the first module in {dtype}"
                )
            self.ranks[name] = self._checked_ranks(name, ranks)
            path = (paths or {}).get(name, DEFAULT_PATHS.get(name))
            if not isinstance(path, str) or (LAYER not in path and a.shape[1] != 1):
                raise ValueError(
                    f"paths: expected a path with '{LAYER}' for module {short_repr(name)}, got {short_repr(path)}"
                )
            error = "expected a path of its own for every module" if path in self.paths.values() else path_error(path)
            if error is not None:
                raise ValueError(f"paths: {short_repr(path)} of module {short_repr(name)}: {error}")
            self.paths[name] = path
        self.partial = partial

    def _checked_ranks(self, name: str, ranks: dict[str, Tensor] | None) -> Tensor:
        a = self.lora_A[name]
        if ranks is None:
            return torch.full(a.shape[:2], a.shape[2], dtype=torch.int32, device=a.device)
        rank = ranks.get(name)
        if rank is None or rank.shape != a.shape[:2] or rank.dtype != torch.int32:
            raise ValueError(f"ranks: expected int32 {tuple(a.shape[:2])} for {name}, got {rank}")
        # Checked on the CPU only: reading other devices would synchronise.
        if rank.device.type == "cpu" and bool(((rank < 0) | (rank > a.shape[2])).any()):
            raise ValueError(f"ranks: expected values in [0, {a.shape[2]}] for {name}, got {rank}")
        return rank

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        state.pop("_constants", None)  # a copy's tensors have other versions
        return state

    def fill_constants(self, scaling: float, rank: int) -> None:
        """Give all adapters one scaling and one rank in every layer, in place.

        Writes nothing if this method wrote the same values and the tensors have not been written since, so a stack that is
        generated into repeatedly is filled once.  Writes through ``.data``, NumPy or DLPack are not seen.
        """
        tensors = [self.scaling, *self.ranks.values()]
        # Inference tensors have no versions; a captured write has not happened yet, and its replays are not seen.
        tracked = not is_capturing(self.scaling) and not any(tensor.is_inference() for tensor in tensors)
        if tracked and self._constants is not None:
            held, versions, *values = self._constants
            same = len(held) == len(tensors) and all(map(operator.is_, held, tensors))
            if same and versions == [tensor._version for tensor in tensors] and values == [scaling, rank]:
                return
        for tensor, value in zip(tensors, (scaling, *[rank] * len(self.ranks)), strict=True):
            tensor.fill_(value)
        self._constants = (tensors, [tensor._version for tensor in tensors], scaling, rank) if tracked else None

    def __len__(self) -> int:
        return len(self.scaling)

    def __repr__(self) -> str:
        known = self.scaling.device.type != "meta"
        numbers = [int(n) for ranks in self.ranks.values() for n in ranks.unique().tolist() if n] if known else []
        details = [
            f"{len(self)} adapters",
            "rank " + _range(numbers or [a.shape[2] for a in self.lora_A.values()]),
            *(["scaling " + _range(self.scaling.tolist())] if known and len(self) else []),
            str(self.dtype).removeprefix("torch."),
            str(self.scaling.device),
            *(["partial"] if self.partial else []),
        ]
        modules = [
            f"{name} {a.shape[3]}->{self.lora_B[name].shape[2]}" + (f" x{a.shape[1]}" if LAYER in self.paths[name] else "")
            for name, a in self.lora_A.items()
        ]
        more = [f"{len(modules) - _MODULES_SHOWN} more"] if len(modules) > _MODULES_SHOWN else []
        return f"AdapterStack({', '.join(details)}; modules in->out x layers: {', '.join(modules[:_MODULES_SHOWN] + more)})"

    def __getitem__(self, index: int | slice | Sequence[int]) -> AdapterStack:
        """The stack of the selected adapters: of one for an int, of several for a slice, list, tuple or range of ints.

        Negative indices count from the end.  An int or a slice gives views that share memory with this stack, a list, tuple
        or range gives copies.  Raises IndexError out of range, TypeError for another type.
        """
        if isinstance(index, slice):
            return self._map(lambda tensor: tensor[index])
        if isinstance(index, (list, tuple, range)):
            positions = [self._position(i) for i in index]
            return self._map(lambda tensor: tensor[positions])
        i = self._position(index)
        return self._map(lambda tensor: tensor[i : i + 1])

    def _position(self, index: object) -> int:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"index: expected an int, a slice or a list of ints, got {type(index).__name__}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected within [{-len(self)}, {len(self)}), got {index}")
        return index % len(self)

    def __iter__(self) -> Iterator[AdapterStack]:
        return (self[i] for i in range(len(self)))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> AdapterStack:
        apply = lambda tensors: {name: fn(t) for name, t in tensors.items()}  # noqa: E731
        return AdapterStack(
            apply(self.lora_A),
            apply(self.lora_B),
            fn(self.scaling),
            apply(self.ranks),
            self.paths,
            partial=self.partial,
        )

    def _with(self, lora_A: dict[str, Tensor], lora_B: dict[str, Tensor]) -> AdapterStack:
        """A stack with these A and B, and all else from this one."""
        return AdapterStack(lora_A, lora_B, self.scaling, self.ranks, self.paths, partial=self.partial)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of A and B."""
        return next(iter(self.lora_A.values())).dtype

    @property
    def num_parameters(self) -> int:
        """Number of values of one adapter at full rank."""
        return sum(t[0].numel() for side in (self.lora_A, self.lora_B) for t in side.values())

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """(layers, in features, out features) of each module."""
        return {name: (a.shape[1], a.shape[3], self.lora_B[name].shape[2]) for name, a in self.lora_A.items()}

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> AdapterStack:
        """A stack on ``device`` with A and B in ``dtype`` (scaling stays float32); None: unchanged.

        Raises ValueError for a dtype that is not floating point, or in place of the device.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"device: expected a device or None, got {device}; pass dtype={device}")

        moved = self if device is None else self._map(lambda tensor: tensor.to(device))
        lora_A, lora_B = (
            {name: t.to(dtype or t.dtype) for name, t in side.items()} for side in (moved.lora_A, moved.lora_B)
        )
        return moved._with(lora_A, lora_B)

    def zero_padded(self) -> AdapterStack:
        """A copy whose entries beyond the ranks, which may be anything, are zero."""
        lora_A, lora_B = {}, {}
        for name, a in self.lora_A.items():
            beyond = torch.arange(a.shape[2], device=a.device) >= self.ranks[name][..., None]  # [N, n, r]
            lora_A[name] = a.masked_fill(beyond[..., None], 0)
            lora_B[name] = self.lora_B[name].mT.masked_fill(beyond[..., None], 0).mT
        return self._with(lora_A, lora_B)

    def allclose(self, other: AdapterStack, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether both stacks have equal adapters: scalings, and per module path ranks, and A and B within the ranks.

        Padding (columns beyond the rank, layers and modules of rank 0), names of modules, dtype, device and
        :attr:`partial` are ignored.  ``rtol``, ``atol`` as in ``torch.allclose``.
        """
        other = other.to(self.scaling.device)
        if len(self) != len(other) or not torch.allclose(self.scaling, other.scaling, rtol, atol):
            return False
        for i in range(len(self)):
            mine, theirs = (peft_write.matrices(stack._peft(i)) for stack in (self, other))
            if mine.keys() != theirs.keys():
                return False
            for a, b in ((a, b) for path, pair in mine.items() for a, b in zip(pair, theirs[path], strict=True)):
                kind = torch.promote_types(a.dtype, b.dtype)
                if a.shape != b.shape or not torch.allclose(a.to(kind), b.to(kind), rtol, atol):
                    return False
        return True

    @staticmethod
    def cat(stacks: Sequence[AdapterStack]) -> AdapterStack:
        """One stack of all adapters.

        Ranks and module sets may differ: smaller ranks are padded, missing modules get rank 0.  Stacks that are not
        :attr:`partial` must have the same number of layers; partial ones may have fewer.  The result is partial if all are.

        Raises:
            ValueError: sizes or paths of a module, layers, dtypes or devices differ; the message names the module.
        """
        stacks = list(stacks)
        if not stacks:
            raise ValueError("stacks: expected at least one AdapterStack, got none")
        depths, total = _common_depths(stacks), sum(map(len, stacks))
        lora_A, lora_B, ranks, paths = {}, {}, {}, {}
        for name in dict.fromkeys(name for s in stacks for name in s.lora_A):
            holders = [s for s in stacks if name in s.lora_A]
            a0, b0, path = holders[0].lora_A[name], holders[0].lora_B[name], holders[0].paths[name]
            depth, r = depths.get(layer_list(path), 1), max(s.lora_A[name].shape[2] for s in holders)
            paths[name] = path
            lora_A[name] = a0.new_zeros(total, depth, r, a0.shape[3])
            lora_B[name] = b0.new_zeros(total, depth, r, b0.shape[2]).mT
            ranks[name] = torch.zeros(total, depth, dtype=torch.int32, device=a0.device)
            ends = itertools.accumulate(map(len, stacks))
            for s, rows in ((s, slice(end - len(s), end)) for s, end in zip(stacks, ends, strict=True) if name in s.lora_A):
                a, b = s.lora_A[name], s.lora_B[name]
                if a.shape[3] != a0.shape[3] or b.shape[2] != b0.shape[2] or s.paths[name] != path:
                    raise ValueError(
                        f"{name}: expected in/out features {a0.shape[3]}/{b0.shape[2]} at {path}, "
                        f"got {a.shape[3]}/{b.shape[2]} at {s.paths[name]}"
                    )
                if a.dtype != a0.dtype or a.device != a0.device:
                    raise ValueError(f"{name}: expected {a0.dtype} on {a0.device}, got {a.dtype} on {a.device}")
                lora_A[name][rows, : a.shape[1], : a.shape[2]] = a
                lora_B[name][rows, : a.shape[1], :, : a.shape[2]] = b
                ranks[name][rows, : a.shape[1]] = s.ranks[name]
        scaling = torch.cat([s.scaling for s in stacks])
        return AdapterStack(lora_A, lora_B, scaling, ranks, paths, partial=all(s.partial for s in stacks))

    # --- PEFT folders ----------------------------------------------------------------------------------------------

    def peft_config(self, index: int, base_model_name_or_path: str | None = None, *, fold: bool = False) -> dict[str, Any]:
        """What :meth:`save_pretrained` writes for adapter ``index`` as adapter_config.json: keywords of PEFT's LoraConfig.

        ``lora_alpha = scaling * r``; with ``fold``, for :meth:`state_dict_peft` with ``fold``, ``lora_alpha = r``.

        Raises IndexError out of range, ValueError for ranks of 0 throughout or a scaling out of range.
        """
        return peft_write.config(self._peft(index, adapts=True), base_model_name_or_path, fold)

    def state_dict_peft(
        self,
        index: int,
        *,
        dtype: torch.dtype | None = None,
        adapter_name: str | None = None,
        prefix: str = peft.PREFIX,
        fold: bool = False,
    ) -> dict[str, Tensor]:
        """Adapter ``index`` under PEFT's keys: A ``[rank, in]`` and B ``[out, rank]`` at the true rank of each module.

        The tensors are new, contiguous and on the CPU.

        Args:
            dtype: of the tensors, None = float32.
            adapter_name: part of the keys, ``<prefix><path>.lora_A.<adapter_name>.weight``, as PEFT's hotswap takes them;
                None: as in a file, ``<prefix><path>.lora_A.weight``.
            prefix: ``base_model.model.`` as in a file and in a PeftModel, "" as in a transformers model.
            fold: multiply B by the scaling, in float32 or the stack's wider dtype, before it is rounded to ``dtype``.

        Raises:
            IndexError: out of range.
            ValueError: another kind of argument, or values that are not finite in ``dtype``.
        """
        return peft_write.state_dict(self._peft(index), dtype, adapter_name, prefix, fold)

    def save_pretrained(
        self,
        directory: str | Path,
        adapter: int = 0,
        base_model_name_or_path: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        fold: bool = False,
    ) -> None:
        """Write adapter ``adapter`` as a PEFT folder of :meth:`peft_config` and :meth:`state_dict_peft`.

        An existing adapter in ``directory`` is replaced only when the new files are complete.  ``dtype``: of A and B,
        None = float32; ``fold``: the scaling is in B instead of ``lora_alpha``.

        Raises:
            IndexError: ``adapter`` is out of range.
            ValueError: the adapter has rank 0 throughout, values that are not finite, a scaling out of range; another dtype.
            OSError: the folder cannot be written, or contains a checkpoint or a model (FileExistsError).
        """
        peft_write.write(self._peft(adapter, adapts=True), Path(directory), base_model_name_or_path, dtype, fold)

    def save_gguf(
        self,
        file: str | Path,
        adapter: int = 0,
        *,
        config: Any,
        dtype: torch.dtype | None = None,
        description: str = "",
        prompt_prefix: str = "",
    ) -> None:
        """Write adapter ``adapter`` as a GGUF file, for llama.cpp; needs the package ``gguf``.

        Args:
            file: is replaced when the new one is complete.
            config: the transformers configuration of the base model, of type llama, mistral, qwen2, qwen3 or gemma2: its
                GGUF file may have rows of q and k in another order, and B has to follow.
            dtype: of A and B: float32 (None), float16 or bfloat16.
            description: the task's, kept in the file (``adapter.lora.task_name``).
            prompt_prefix: what prompts begin with, kept in the file, for a checkpoint trained with descriptions in prompts.

        Raises:
            IndexError: ``adapter`` is out of range.
            ValueError: another type of base model, heads that do not fit it, a module without a GGUF name, ranks of 0
                throughout, values that are not finite or a scaling out of range.
            ImportError: ``gguf`` is not installed, or before 0.18.
        """
        from t2l_engine.adapters import gguf_write

        gguf_write.write(self._peft(adapter, adapts=True), Path(file), config, dtype, description, prompt_prefix)

    def _peft(self, index: int, adapts: bool = False) -> peft.PeftAdapter:
        """Adapter ``index`` under its paths; ``adapts``: ValueError if its ranks are all 0."""
        one = self[self._position(index)]
        if adapts and not any(bool(ranks.any()) for ranks in one.ranks.values()):
            raise ValueError(f"adapter {index}: expected one that adapts a module, got ranks of 0 throughout")
        by_path = ({one.paths[name]: t for name, t in side.items()} for side in (one.lora_A, one.lora_B, one.ranks))
        lora_A, lora_B, ranks = by_path
        return peft.PeftAdapter(lora_A, lora_B, ranks, one.scaling, one.partial)

    @staticmethod
    def from_peft(directories: str | Path | Sequence[str | Path], dtype: torch.dtype | None = None) -> AdapterStack:
        """Read PEFT LoRA folders (safetensors) into one stack; ranks, modules and scalings may differ between folders.

        A module is named after the last component of its path.  Modules that would share a name, such as GPT-2's two
        ``c_proj``, get the shortest dotted suffixes that differ: ``attn.c_proj``, ``mlp.c_proj``.  The stack is
        :attr:`partial` if every folder may leave out layers (``layers_to_transform``, full paths or a regular expression as
        ``target_modules``, ``exclude_modules``).  If scalings differ between modules, the most common one is kept and the
        ratio multiplied into B of the others.

        ``dtype``: of A and B, None = the widest in the files.

        Raises:
            FileNotFoundError: a missing folder or file.
            AdapterError: anything but plain LoRA (DoRA, trained biases, ``modules_to_save``, other PEFT types), damaged
                files, folders that do not fit into one stack; the message names file and field or key.
        """
        if dtype is not None:
            check_dtype(dtype)
        if isinstance(directories, (str, Path)):
            directories = [directories]
        directories = list(directories)
        if not directories:
            raise ValueError("directories: expected at least one folder, got none")
        folders = [peft.read(Path(directory), dtype) for directory in directories]
        peft.check_padding(folders, short_repr([str(d) for d in directories]))
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, (a.dtype for folder in folders for a in folder.lora_A.values()))
        names = module_names(path for folder in folders for path in folder.lora_A)
        stacks = [
            AdapterStack(
                {names[path]: tensor.to(dtype) for path, tensor in folder.lora_A.items()},
                {names[path]: tensor.to(dtype) for path, tensor in folder.lora_B.items()},
                folder.scaling,
                {names[path]: tensor for path, tensor in folder.ranks.items()},
                {names[path]: path for path in folder.lora_A},
                partial=folder.partial,
            )
            for folder in folders
        ]
        try:
            return stacks[0] if len(stacks) == 1 else AdapterStack.cat(stacks)
        except ValueError as error:
            raise AdapterError(f"{short_repr([str(d) for d in directories])}: do not fit into one stack: {error}") from None


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _common_depths(stacks: Sequence[AdapterStack]) -> dict[str | None, int]:
    """Path up to the layer index -> number of layers; ValueError if the stacks contradict each other."""
    depths: dict[str | None, tuple[int, bool]] = {}  # number, and whether the model has exactly so many
    for stack in sorted(stacks, key=lambda s: s.partial):
        own: dict[str | None, int] = {}
        for name, a in stack.lora_A.items():
            prefix = layer_list(stack.paths[name])
            own[prefix] = max(own.get(prefix, 1), a.shape[1])
        for prefix, n in own.items():
            most, exact = depths.setdefault(prefix, (n, not stack.partial))
            if exact and (n > most if stack.partial else n != most):
                raise ValueError(f"stacks: expected {most} layers at {prefix}{LAYER}, got {n}; partial ones may have fewer")
            depths[prefix] = (max(n, most), exact)
    return {prefix: n for prefix, (n, _) in depths.items()}
