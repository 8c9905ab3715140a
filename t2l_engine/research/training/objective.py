"""The training loss: cross-entropy of answers through the frozen base model, with an adapter per row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError
from t2l_engine.lora.handle import LoRAHandle
from t2l_engine.research.training.sampling import Group, Sample, seeded

IGNORED = -100
Adapter = Callable[[Group], int]  # group -> index of its adapter in the stack


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of some groups as padded rows.

    ``ids``, ``mask`` ``[rows, L]``: int64, padded on the left, so that answers are aligned at the end.
    ``labels [rows, answer]``: the answers, -100 before shorter ones.
    ``weights [rows]``: weight of each of a row's answer tokens in the step's loss.
    ``adapters [rows]``: index of each row's adapter in the stack.
    """

    groups: Sequence[Group]
    ids: Tensor
    mask: Tensor
    labels: Tensor
    weights: Tensor
    adapters: list[int]

    @property
    def tasks(self) -> list[int]:
        """Task index of each row."""
        return [group.task for group in self.groups for _ in group.samples]

    @property
    def examples(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens that pass through the model, padding included."""
        return self.ids.numel()


def collate(
    groups: Sequence[Group],
    pad: int,
    weight: Callable[[Sample, Group], float],
    adapter: Adapter | None = None,
) -> Batch:
    """A batch of ``groups``, padded with token ``pad``.

    ``weight``: (sample, group) -> weight of each of its answer tokens; ``adapter``: None: group i uses adapter i.
    """
    rows = [(index, sample, group) for index, group in enumerate(groups) for sample in group.samples]
    tokens = [torch.tensor(s.tokens) for _, s, _ in rows]
    padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded(tokens, padding_value=pad)
    mask = padded([torch.ones_like(of) for of in tokens])
    labels = padded([of[-s.answer_len :] for of, (_, s, _) in zip(tokens, rows, strict=True)], padding_value=IGNORED)
    weights = torch.tensor([weight(s, g) for _, s, g in rows])
    adapters = [index if adapter is None else adapter(group) for index, _, group in rows]
    return Batch(groups, ids, mask, labels, weights, adapters)


def token_weights(kind: str, groups: Sequence[Group], per_task: bool) -> Callable[[Sample, Group], float]:
    """Token weights under which the summed loss of ``groups`` is a mean over all of them; with ``per_task``, over each task.

    ``kind``: "sample": the mean over samples of each sample's mean; "token": the mean over answer tokens.
    """
    totals: Counter[int | None] = Counter()
    for group in groups:
        for s in group.samples:
            totals[group.task if per_task else None] += 1 if kind == "sample" else s.answer_len
    return lambda s, g: 1 / (totals[g.task if per_task else None] * (s.answer_len if kind == "sample" else 1))


class Objective:
    """Cross-entropy of answers given prompts, through the frozen causal LM ``model`` with an adapter per row.

    ``handle``: of the attached adapters.  Raises ConfigError for a model whose logits depend on padding.
    """

    def __init__(self, model: nn.Module, handle: LoRAHandle):
        self.model, self.handle = model, handle
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        if not self._positions:
            self._check_padding()

    @torch.no_grad()
    def _check_padding(self) -> None:
        """Compare the logits of a few tokens with those behind padding."""
        device, places = next(self.model.parameters()).device, torch.arange(8)
        ids = torch.arange(1, 9, device=device)[None] % self.model.config.get_text_config().vocab_size
        mask = torch.ones_like(ids)
        padded, seen = nn.functional.pad(ids, (3, 0), value=1), nn.functional.pad(mask, (3, 0))
        alone, behind = self._logits(ids, mask, places), self._logits(padded, seen, places + 3)
        bound = (2.0**-3 if alone.dtype == torch.bfloat16 else 1e-3) * alone.abs().max()
        if bool(((alone - behind).abs() > bound).any()):
            raise ConfigError(
                f"base_model: {type(self.model).__name__} takes no position_ids and gives other logits behind padding"
            )

    def _logits(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """The model's logits ``[rows, places, vocabulary]``.

        Indices gather hidden states as one matrix; of a slice, a product would copy the vocabulary's matrix for every row.
        """
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)} if self._positions else {}
        return self.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places.to(ids.device), **positions
        ).logits

    def losses(
        self,
        batch: Batch,
        stack: AdapterStack,
        *,
        label_smoothing: float = 0.0,
        neftune_alpha: float = 0.0,
        lora_dropout: float = 0.0,
    ) -> Tensor:
        """Weighted cross-entropy of each row's answer, ``[rows]`` float32; the sum is the batch's part of the loss.

        ``stack``: the adapters that ``batch.adapters`` index.
        """
        device = next(self.model.parameters()).device
        ids, mask, labels = (t.to(device) for t in (batch.ids, batch.mask, batch.labels))
        chosen, head = labels != IGNORED, self.model.get_output_embeddings()
        with (
            # Answers differ in length: the head sees states [rows, places, hidden] of their tokens alone.
            head.register_forward_pre_hook(lambda module, args: (args[0][chosen], *args[1:])),
            self.handle.differentiable(stack, batch.adapters, dropout=lora_dropout),
            self._noise(batch, neftune_alpha) if neftune_alpha else contextlib.nullcontext(),
        ):
            logits = self._logits(ids, mask, torch.arange(-labels.shape[1] - 1, -1))
        losses = nn.functional.cross_entropy(
            logits.float(), labels[chosen], reduction="none", label_smoothing=label_smoothing
        )
        return torch.zeros(labels.shape, device=device).masked_scatter(chosen, losses).sum(dim=1) * batch.weights.to(device)

    def _noise(self, batch: Batch, alpha: float) -> contextlib.AbstractContextManager[Any]:
        """NEFTune (arXiv 2310.05914): uniform noise in ±alpha/sqrt(L D) on the input embeddings of a row's L tokens.

        L excludes padding, so that the noise does not depend on the batch.
        """

        def add(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            noise = torch.zeros(out.shape)
            rows = iter(noise)
            for group in batch.groups:
                generator = torch.Generator().manual_seed(seeded("neftune", group.key))
                for sample, row in zip(group.samples, rows):  # noqa: B905  # rows go on with the next group
                    drawn = torch.rand(len(sample.tokens), out.shape[-1], generator=generator) * 2 - 1
                    row[-len(drawn) :] = drawn * (alpha / math.sqrt(drawn.numel()))
            return out + noise.to(out)

        return self.model.get_input_embeddings().register_forward_hook(add)


def generated_l2(stack: AdapterStack) -> Tensor:
    """Sum over modules of mean(A^2) + mean(B^2), means over adapters, layers and entries (the paper's regulariser)."""
    return sum(side[name].square().mean() for side in (stack.lora_A, stack.lora_B) for name in side)
