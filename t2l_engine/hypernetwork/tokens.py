"""TokenHyperNetwork: what hypernetworks share that read the hidden states of a text's tokens."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2l_engine.adapters.paths import module_names
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.weights import cast_matrices
from t2l_engine.hypernetwork.output import check_out, meta_stack

if TYPE_CHECKING:
    from typing_extensions import Self


class TokenHyperNetwork(nn.Module, ABC):
    """From the hidden states of a text's tokens to a LoRA adapter; the base of hypernetworks that read texts.

    :meth:`latents` reads chunks, :meth:`generate` makes adapters of latents, :meth:`forward` is both with gradients.
    A subclass has ``projection``, the linear or linears that tokens pass first, and ``bias_A``, ``bias_B``: of each module,
    ``[adapted layers, r, in]`` and ``[adapted layers, r, out]``.
    """

    projection: Any  # a module; Any, since nn.Module does not declare its linears
    bias_A: nn.ParameterDict
    bias_B: nn.ParameterDict

    def __init__(self, config: Any):
        super().__init__()
        self.config: Any = config
        self._paths = {name: path for path, name in module_names(config.module_paths.values()).items()}

    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """The weight matrices."""

    @abstractmethod
    def latents(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[chunks, *config.latent_shape]`` of the states of the tokens of chunks."""

    @abstractmethod
    def _heads(self, latents: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each module its name in stacks, A ``[chunks, layers, r, in]`` and B ``[chunks, layers, r, out]``."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight matrices and of generated adapters."""
        return next(self.projection.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """That of its parameters."""
        return next(self.projection.parameters()).device

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Cast the weight matrices to ``dtype``; norms, queries, scales and biases stay float32 (or float64).

        Raises ValueError if ``dtype`` is not floating point or values exceed its range; nothing changes then.
        """
        cast_matrices(self, dtype, self.matrices())
        return self

    def read(self, batches: Iterable[tuple[Sequence[int], Tensor, Tensor]]) -> list[Tensor]:
        """:meth:`latents` of each chunk, in order; ``batches``: as of :meth:`DocumentEncoder.read`."""
        found: dict[int, Tensor] = {}
        for indices, states, mask in batches:
            found |= zip(indices, self.latents(states.to(self.device), mask.to(self.device)), strict=True)
        return [found[i] for i in range(len(found))]

    def forward(self, batches: Iterable[tuple[Sequence[int], Tensor, Tensor]]) -> AdapterStack:
        """Adapters with gradients, of texts of one chunk each, which :meth:`read` takes."""
        return self._stack([latents[None] for latents in self.read(batches)], None)

    @torch.no_grad()
    def generate(self, latents: Sequence[Tensor], out: AdapterStack | None = None) -> AdapterStack:
        """Adapters of texts: a stack of ``len(latents)``, of rank ``(chunks + bias) * rank`` each.

        Args:
            latents: of each text, those of its chunks ``[chunks, *config.latent_shape]``, as :meth:`latents` gives them.
            out: a stack of the same modules and at least the largest rank, such as :meth:`LoRAHandle.borrow_slots` gives,
                that is overwritten and returned; None: a new one.

        Raises ValueError for no text, latents of another shape or device, or an ``out`` that does not fit.
        """
        return self._stack(latents, out)

    def meta_stack(self, chunks: int | Sequence[int]) -> AdapterStack:
        """A stack with the shapes and ranks of :meth:`generate` for texts of ``chunks`` chunks each, without memory.

        A number: so many texts of one chunk.  A, B and scaling are on the meta device, ranks on the CPU;
        :meth:`LoRAHandle.borrow_slots` takes it.
        """
        c, counts = self.config, [1] * chunks if isinstance(chunks, int) else chunks
        return meta_stack(c, self._paths, [*map(c.total_rank, counts)], self.dtype, c.first_layer)

    def _stack(self, latents: Sequence[Tensor], out: AdapterStack | None) -> AdapterStack:
        c, device = self.config, self.device
        if not len(latents):
            raise ValueError("latents: expected those of one or more texts, got none")
        for of in latents:
            if not len(of) or of.shape[1:] != c.latent_shape or of.device != device:
                expected = f"[chunks, {', '.join(map(str, c.latent_shape))}] on {device}"
                raise ValueError(f"latents: expected {expected}, got {tuple(of.shape)} on {of.device}")
        counts = [len(of) for of in latents]
        like = self.meta_stack(counts)
        if out is None:
            # Not zeros_like, which takes 30 us a tensor of the meta device.
            zeros = functools.partial(torch.zeros, dtype=self.dtype, device=device)
            lora_A = {name: zeros(a.shape) for name, a in like.lora_A.items()}
            # Transposed views: rows of B are written in one piece, as the head makes them.
            lora_B = {name: zeros(b.mT.shape).mT for name, b in like.lora_B.items()}
            scaling = torch.full((len(counts),), c.scaling_value, dtype=torch.float32, device=device)
            ranks = {name: of.to(device) for name, of in like.ranks.items()}
            out = AdapterStack(lora_A, lora_B, scaling, ranks, self._paths)
        else:
            check_out(out, c, self._paths, [*map(c.total_rank, counts)], device, higher_rank=True)
            out.scaling.fill_(c.scaling_value)
            for name, of in like.ranks.items():
                out.ranks[name].copy_(of)
        last = torch.tensor(counts, device=device)
        texts = torch.repeat_interleave(torch.arange(len(counts), device=device), last)
        places = torch.arange(len(texts), device=device) - (last.cumsum(0) - last)[texts]
        for i, (name, A, B) in enumerate(self._heads(torch.cat([*latents]))):
            module = c.modules[i]
            for target, made, bias in (
                (out.lora_A[name], A, self.bias_A[module]),
                (out.lora_B[name].mT, B, self.bias_B[module]),
            ):
                whole = target.shape[2] // c.rank * c.rank
                target = target[:, c.first_layer :, :whole]
                blocks = target.unflatten(2, (-1, c.rank)).transpose(1, 2)  # [texts, chunks, layers, r, size]
                blocks[texts, places] = made.to(target.dtype)
                if c.bias:
                    blocks[torch.arange(len(counts), device=device), last] = bias.to(target.dtype)
        return out
