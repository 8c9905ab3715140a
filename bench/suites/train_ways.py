"""A training step through a frozen language model in which every sample has an adapter of its own, by every way to apply it.

A way is judged by what it adds to the model without adapters.  All take the same A and B, cut into layers once a step, and
give the same gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench.baselines import PEFT_ABSENT
from bench.ceilings import peak_memory, reset_peak, resident_bytes
from bench.harness import Context
from bench.models import MODULES, linears, random_adapters, shared
from bench.models import load as load_serving
from bench.records import BASE, HOOKS, OURS
from bench.source import ROOT
from t2l_engine.text import base_model

HOOKS_PEFT, BMM = f"{HOOKS}, PEFT base", "plain bmm"
#: Samples a task or a step, predicted positions a sample, rank of the adapters.
SAMPLES, ANSWER, RANK = 8, 8, 8
#: SDPA's bfloat16 backward on CPU is slower at these lengths.
ATTENTION = {"float32": "sdpa", "bfloat16": "eager"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Samples of ``tokens`` each through a model in ``dtype``; adapters for ``modules``, a key of MODULES."""

    modules: str
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.modules}, {self.tokens} tokens, {self.dtype}"


def cases(context: Context) -> list[Case]:
    """What is measured at the size of ``context``."""
    lengths = {"float32": (48,), "bfloat16": (48, 128)} if context.full else dict.fromkeys(ATTENTION, (16,))
    few = [Case("q,v", tokens, dtype) for dtype, of in lengths.items() for tokens in of]
    return [*few, Case("all linears", lengths["bfloat16"][-1], "bfloat16")]


class Frozen(NamedTuple):
    """A model whose parameters ask for no gradients, and tokens of a text that it can read."""

    name: str
    model: nn.Module
    text: Tensor


def load(context: Context, dtype: str) -> Frozen:
    """The model in ``dtype``, its weights bfloat16 numbers; at size tiny a random one, whose tokens are bytes.

    The text is English: on random tokens bfloat16 gets gradients so wrong (a quarter) that a mistake would not show.
    """
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    if context.full:
        model, tokenizer = base_model.load(base_model.LANGUAGE_MODEL, getattr(torch, dtype), ATTENTION[dtype])
        return Frozen("SmolLM2-135M", model.requires_grad_(False), torch.tensor(tokenizer(text)["input_ids"]))
    name, model = load_serving(context, getattr(torch, dtype))
    model.set_attn_implementation(ATTENTION[dtype])
    return Frozen(name, model.requires_grad_(False), torch.tensor(list(text.encode())) % model.config.vocab_size)


# --- steps -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """``embeds [rows, tokens, hidden]``, ``mask [rows, tokens]``, ``labels [rows * ANSWER]``."""

    embeds: Tensor
    mask: Tensor
    labels: Tensor

    @staticmethod
    def of(frozen: Frozen, rows: int, tokens: int, seed: int, *, to_inputs: bool = True) -> Batch:
        """Samples from random places of the text; ``to_inputs``: gradients go down to the embeddings."""
        starts = torch.randint(len(frozen.text) - tokens, (rows, 1), generator=torch.Generator().manual_seed(seed))
        ids = frozen.text[starts + torch.arange(tokens)]
        embeds = frozen.model.get_input_embeddings()(ids).detach().requires_grad_(to_inputs)
        return Batch(embeds, torch.ones_like(ids), ids[:, -ANSWER:].flatten())

    def cut(self, rows: slice) -> Batch:
        """Some of the samples."""
        return Batch(self.embeds[rows].detach(), self.mask[rows], self.labels.view(-1, ANSWER)[rows].flatten())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the mean losses of each SAMPLES rows: what tasks lose together is what they lose one by one."""
    decoder = model.get_decoder()
    hidden = decoder(inputs_embeds=batch.embeds, attention_mask=batch.mask, use_cache=False).last_hidden_state
    # Flat rows: a 3-d product would copy the vocabulary matrix for every row.
    flat = hidden[:, -ANSWER - 1 : -1].reshape(-1, hidden.shape[-1])
    logits = model.get_output_embeddings()(flat).float()
    return nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / (SAMPLES * ANSWER)


class Way(NamedTuple):
    """A model, and a context in which its rows use the adapters of a stack."""

    model: nn.Module
    applied: Callable[[t2l.AdapterStack], contextlib.AbstractContextManager]


def leaves(stack: t2l.AdapterStack) -> tuple[t2l.AdapterStack, list[Tensor]]:
    """The stack on A and B that ask for gradients, and these."""
    lora_A, lora_B = ({k: t.detach().clone().requires_grad_() for k, t in s.items()} for s in (stack.lora_A, stack.lora_B))
    return t2l.AdapterStack(lora_A, lora_B, stack.scaling, stack.ranks, stack.paths), [*lora_A.values(), *lora_B.values()]


def step(way: Way, stack: t2l.AdapterStack | None, batch: Batch) -> Callable[[], list[Tensor]]:
    """A call of forward and backward: gradients of A and B by module, then of the embeddings where they ask for them.

    None: without adapters.
    """
    own, wanted = (None, []) if stack is None else leaves(stack)
    if batch.embeds.requires_grad:
        wanted = [*wanted, batch.embeds]

    def run() -> list[Tensor]:
        with contextlib.nullcontext() if own is None else way.applied(own):
            return list(torch.autograd.grad(loss_of(way.model, batch), wanted))

    return run


# --- ways ------------------------------------------------------------------------------------------------------------


def base(model: nn.Module, _: t2l.AdapterStack | None) -> Way:
    """The frozen model alone."""
    return Way(model, lambda _: contextlib.nullcontext())


def ours(model: nn.Module, stack: t2l.AdapterStack, ids: Sequence[int] | None = None) -> Way:
    """Ours; row i has adapter ``ids[i]``, by default i."""
    model = shared(model)
    handle = t2l.attach(model, stack)
    chosen = list(range(len(stack)) if ids is None else ids)
    return Way(model, lambda own: handle.differentiable(own, chosen))


Delta = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Hooks:
    """A forward hook on every adapted linear of ``model`` that adds ``delta(x, A, B, scaling)``; row i has adapter i."""

    def __init__(self, model: nn.Module, names: Sequence[str], delta: Delta):
        self._delta, self._dtype = delta, next(model.parameters()).dtype
        self._current: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}
        self._linears = {name: [linear for _, linear in linears(model, name)] for name in names}
        for linear in (each for found in self._linears.values() for each in found):
            linear.register_forward_hook(self._add)

    def _add(self, linear: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + self._delta(arguments[0], *self._current[linear])

    @contextlib.contextmanager
    def applied(self, stack: t2l.AdapterStack):
        """Inside the block, adapters of ``stack``, which all have one scaling."""
        scaling = float(stack.scaling[0])
        for name, found in self._linears.items():
            sides = (side[name].to(self._dtype).unbind(1) for side in (stack.lora_A, stack.lora_B))
            self._current |= {linear: (A, B, scaling) for linear, A, B in zip(found, *sides, strict=True)}
        try:
            yield
        finally:
            self._current = {}


def repeated(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The delta of ``x [rows, tokens, in]`` as in SakanaAI's hooks: A and B repeated for every token."""
    rows, tokens, features = x.shape
    A, B = (side.repeat_interleave(tokens, dim=0) for side in (lora_A, lora_B))
    v = torch.bmm(A, x.reshape(rows * tokens, features, 1)) * scaling
    return torch.bmm(B, v).view(rows, tokens, -1)


def batched(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The same without repetition: two batched products of a matrix a sample."""
    return torch.bmm(torch.bmm(x, lora_A.mT) * scaling, lora_B.mT)


def hooked(model: nn.Module, stack: t2l.AdapterStack, delta: Delta = repeated, peft_base: bool = False) -> Way:
    """Hooks; ``peft_base``: around a base that PEFT has wrapped in a LoRA with B = 0, as SakanaAI's training keeps it."""
    model = shared(model)
    if peft_base:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(stack.lora_A))
        get_peft_model(model, config, autocast_adapter_dtype=False).requires_grad_(False).eval()  # in place
    return Way(model, Hooks(model, list(stack.lora_A), delta).applied)


BUILDERS: dict[str, Callable[[nn.Module, t2l.AdapterStack], Way]] = {
    BASE: base,
    OURS: ours,
    HOOKS: hooked,
    HOOKS_PEFT: functools.partial(hooked, peft_base=True),
    BMM: functools.partial(hooked, delta=batched),
}
SKIPPED = {HOOKS_PEFT: PEFT_ABSENT} if PEFT_ABSENT else {}
WAYS = [name for name in BUILDERS if name not in SKIPPED]


def adapters(model: nn.Module, case: Case, count: int = SAMPLES) -> t2l.AdapterStack:
    """``count`` adapters in float32 for the modules of ``case``."""
    return random_adapters(model, MODULES[case.modules], count, RANK)


# --- memory ----------------------------------------------------------------------------------------------------------

#: The allocator's settings, equal for all ways: what is freed goes back to the system, so that resident is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak(context: Context, case: Case, way: str) -> dict[str, float]:
    """MiB of a process of its own: ``loaded_mib`` resident once packages and the model are, ``peak_mib`` the most during a
    step after a first one."""
    with mock.patch.dict(os.environ, MALLOC):  # read when the process starts
        return peak_memory(held, context.size, context.threads, case, way)[1]


def held(size: str, threads: int, case: Case, way: str) -> dict[str, float]:
    """What :func:`peak` says, of this process, which should have done nothing else."""
    if not SKIPPED:
        import peft  # noqa: F401 - before, so that no way is charged for it
    torch.set_num_threads(threads)
    frozen = load(Context.of(size, threads), case.dtype)
    for tensor in frozen.model.state_dict().values():  # what was mapped from a file is read
        tensor.sum()
    gc.collect()
    loaded = resident_bytes("VmRSS")
    stack, batch = adapters(frozen.model, case), Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    run = step(BUILDERS[way](frozen.model, stack), None if way == BASE else stack, batch)
    run()
    gc.collect()
    reset_peak()
    run()
    return {"loaded_mib": round(loaded / 2**20, 1), "peak_mib": round(resident_bytes("VmHWM") / 2**20, 1)}
