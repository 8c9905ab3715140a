"""Training through a frozen language model: an adapter a sample, its memory, a library of adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import t2l_engine as t2l
from bench import models
from bench.baselines import batched
from bench.ceilings import apart, peak_bytes, resident_bytes
from bench.harness import Context, Error, Record, Target, Task, record, row, verify, worst
from bench.models import MODULES, linears, shared
from bench.records import BASE, HOOKS, OURS, ROOT
from t2l_engine.testing import numerics
from t2l_engine.text import packaged

BMM, SEPARATE = "plain bmm", "one task at a time"
TARGET = Target(1.12, of=BASE)
MEASURE = "gradient, relative Frobenius against another way, float32"
#: Seconds for each case, in those of an ordinary one: a step takes up to seconds.
FACTOR = 30
#: Steps change what they train, but hardly: times belong to the same values.
LEARNING_RATE = 1e-6
#: Samples a task or a step, predicted positions a sample, rank of the adapters.
SAMPLES, ANSWER, RANK = 8, 8, 8
#: SDPA's bfloat16 backward on CPU is slower at these lengths.
ATTENTION = {"float32": "sdpa", "bfloat16": "eager"}
Gradients = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Samples of ``tokens`` each through a model in ``dtype``; adapters for ``modules``, a key of MODULES."""

    modules: str
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.modules}, {self.tokens} tokens, {self.dtype}"

    def shape(self, model: str, **more: Any) -> Record:
        """The fields of a row's shape."""
        return {"model": model, **more, "tokens": self.tokens, "modules": self.modules, "rank": RANK, "dtype": self.dtype}


def cases(context: Context) -> list[Case]:
    """In float32, and more of them in bfloat16 unless this CPU multiplies float32 faster."""
    fast = context.ceilings.fastest("bfloat16")
    lengths = {"float32": (48,), fast: (48, 128)} if context.full else dict.fromkeys(("float32", fast), (16,))
    few = [Case("q,v", tokens, dtype) for dtype, of in lengths.items() for tokens in of]
    return [*few, Case("all linears", lengths[fast][-1], fast)]


def plan(context: Context) -> list[Task]:
    context.only("cpu", "train")
    measured, of = (cases(context), WAYS) if context.full else (cases(context)[:1], [BASE, OURS, HOOKS])
    # Fail fast: cheapest checks first.
    dtypes = dict.fromkeys(case.dtype for case in cases(context))
    tasks = [Task.of(f"library {dtype}", library, context, dtype) for dtype in dtypes]
    tasks += [Task.of(f"step {case.name}", applied, context, case) for case in cases(context)]
    return tasks + [Task.of(f"memory {case.name}", memory, context, case, of) for case in measured]


class Frozen(NamedTuple):
    """A model whose parameters ask for no gradients, and tokens of a text that it can read."""

    name: str
    model: nn.Module
    text: Tensor


def load(context: Context, dtype: str) -> Frozen:
    """The model in ``dtype``, its weights bfloat16 numbers; at size tiny a random one, whose tokens are bytes.

    The text is English: on random tokens bfloat16 gets gradients so wrong (a quarter) that a mistake would not show.
    """
    name, model = models.load(context, getattr(torch, dtype))
    model.set_attn_implementation(ATTENTION[dtype])
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(packaged.convert())(text)["input_ids"] if context.full else list(text.encode())
    return Frozen(name, model.requires_grad_(False), torch.tensor(ids) % model.config.vocab_size)


def both(context: Context, dtype: str) -> tuple[Frozen, Frozen]:
    """The model in ``dtype``, and in float32."""
    return load(context, dtype), load(context, "float32")


class Batch(NamedTuple):
    """``embeds [rows, tokens, hidden]``, ``mask [rows, tokens]``, ``labels [rows * ANSWER]``."""

    embeds: Tensor
    mask: Tensor
    labels: Tensor

    @staticmethod
    def of(frozen: Frozen, rows: int, tokens: int, seed: int) -> Batch:
        """Samples from random places of the text; gradients go down to the embeddings."""
        starts = torch.randint(len(frozen.text) - tokens, (rows, 1), generator=torch.Generator().manual_seed(seed))
        ids = frozen.text[starts + torch.arange(tokens)]
        embeds = frozen.model.get_input_embeddings()(ids).detach().requires_grad_()
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


def step(way: Way, stack: t2l.AdapterStack | None, batch: Batch) -> Callable[[], Gradients]:
    """A call of forward and backward: gradients of A and B by module (None: without), then of the embeddings."""
    own, wanted = (None, []) if stack is None else leaves(stack)

    def run() -> Gradients:
        with contextlib.nullcontext() if own is None else way.applied(own):
            return list(torch.autograd.grad(loss_of(way.model, batch), [*wanted, batch.embeds]))

    return run


def ours(model: nn.Module, stack: t2l.AdapterStack, ids: Sequence[int] | None = None) -> Way:
    """Ours; row i has adapter ``ids[i]``, by default i."""
    model = shared(model)
    handle = t2l.attach(model, stack)
    chosen = list(range(len(stack)) if ids is None else ids)
    return Way(model, lambda own: handle.differentiable(own, chosen))


def repeated(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The delta of ``x [rows, tokens, in]`` as in SakanaAI's hooks, A and B repeated for every token."""
    rows, tokens, features = x.shape
    A, B = (side.repeat_interleave(tokens, dim=0) for side in (lora_A, lora_B))
    v = torch.bmm(A, x.reshape(rows * tokens, features, 1)) * scaling
    return torch.bmm(B, v).view(rows, tokens, -1)


def hooked(model: nn.Module, stack: t2l.AdapterStack, delta: Callable[..., Tensor] = repeated) -> Way:
    """A forward hook on every adapted linear adds ``delta(x, A, B, scaling)``; row i has adapter i, all have one scaling."""
    model = shared(model)
    dtype, adapted = next(model.parameters()).dtype, {n: [layer for _, layer in linears(model, n)] for n in stack.lora_A}
    current: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}

    def add(linear: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + delta(arguments[0], *current[linear])

    for linear in itertools.chain(*adapted.values()):
        linear.register_forward_hook(add)

    @contextlib.contextmanager
    def applied(own: t2l.AdapterStack) -> Iterator[None]:
        scaling = float(own.scaling[0])
        for name, found in adapted.items():
            sides = (side[name].to(dtype).unbind(1) for side in (own.lora_A, own.lora_B))
            current.update({linear: (A, B, scaling) for linear, A, B in zip(found, *sides, strict=True)})
        try:
            yield
        finally:
            current.clear()

    return Way(model, applied)


BUILDERS: dict[str, Callable[[nn.Module, t2l.AdapterStack], Way]] = {
    BASE: lambda model, _: Way(model, lambda _: contextlib.nullcontext()),
    OURS: ours,
    HOOKS: hooked,
    BMM: functools.partial(hooked, delta=batched),
}
WAYS = list(BUILDERS)


def adapters(model: nn.Module, case: Case, count: int = SAMPLES) -> t2l.AdapterStack:
    return models.random_adapters(model, MODULES[case.modules], count, RANK)


def errors(results: Mapping[str, Gradients], exact: Gradients, other: Gradients, dtype: str) -> dict[str, Error]:
    """The worst error of each result over its gradients; arguments as in :func:`numerics.model_gradient_bound`."""
    bounds = [numerics.model_gradient_bound(*pair, getattr(torch, dtype)) for pair in zip(exact, other, strict=True)]

    def error(got: Tensor, right: Tensor, bound: float) -> Error:
        return Error(numerics.relative_frobenius(got, right), bound, MEASURE)

    return {name: worst(map(error, got, exact, bounds)) for name, got in results.items()}


def step_errors(
    made: Mapping[str, Way], frozen: Frozen, single: Frozen, stack: t2l.AdapterStack, case: Case
) -> dict[str, Error]:
    """The error of every way but the base, on samples that are not timed; ``single``: the model in float32."""
    fresh, exact_fresh = (Batch.of(f, SAMPLES, case.tokens, seed=1) for f in (frozen, single))
    results = {way: step(one, stack, fresh)() for way, one in made.items() if way != BASE}
    exact = step(BUILDERS[BMM](single.model, stack), stack, exact_fresh)()
    return errors(results, exact, results[BMM], case.dtype)


def applied(context: Context, case: Case) -> Iterator[Record]:
    """Forward and backward of eight samples with eight adapters, by every way, in the same rounds."""
    frozen, single = both(context, case.dtype)
    stack, timed = adapters(frozen.model, case), Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    made = {way: BUILDERS[way](frozen.model, stack) for way in WAYS}
    found = step_errors(made, frozen, single, stack, case)
    del single
    calls = {way: step(one, None if way == BASE else stack, timed) for way, one in made.items()}
    unadapted = {BASE: calls.pop(BASE)}  # nothing was added that could be wrong
    functions, wrong = verify(case.name, calls, found)
    timings = context.time(unadapted | functions, factor=FACTOR)
    shape = case.shape(frozen.name, samples=SAMPLES)
    yield row(context, case.name, "train", shape, timings, found[OURS], skipped=wrong, target=TARGET)


#: The allocator's settings, equal for all ways: what is freed goes back to the system, so that resident is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def memory(context: Context, case: Case, of: Sequence[str]) -> Iterator[Record]:
    """The peak of a step by each of the ways ``of``, each in a process of its own."""
    found = {way: peak(context, case, way) for way in of}
    yield record("train_memory", case=case.name, ways=found)


def peak(context: Context, case: Case, way: str) -> dict[str, float]:
    """MiB of a process of its own, with the model ``loaded_mib``, and at most, during a second step, ``peak_mib``."""
    with mock.patch.dict(os.environ, MALLOC):  # read when the process starts
        return apart(held, context.size, context.threads, case, way)


def held(size: str, threads: int, case: Case, way: str) -> dict[str, float]:
    """What :func:`peak` says, of this process, which should have done nothing else."""
    torch.set_num_threads(threads)
    frozen = load(Context.of(size, threads), case.dtype)
    for tensor in frozen.model.state_dict().values():  # what was mapped from a file is read
        tensor.sum()
    gc.collect()
    loaded = resident_bytes("VmRSS")
    stack, batch = adapters(frozen.model, case), Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    run = step(BUILDERS[way](frozen.model, stack), None if way == BASE else stack, batch)
    run()
    return {"loaded_mib": round(loaded / 2**20, 1), "peak_mib": round(peak_bytes(run) / 2**20, 1)}


def library(context: Context, dtype: str) -> Iterator[Record]:
    """A training step of several adapters, eight samples each, in one batch; beside a step for each, one after another."""
    frozen, single = both(context, dtype)
    case = Case("q,v", 48 if context.full else 12, dtype)
    for count in (1, 8) if context.full else (1, 2):
        stack = adapters(frozen.model, case, count)
        size = count * SAMPLES, case.tokens
        timed, fresh, exact = (Batch.of(model, *size, seed) for model, seed in ((frozen, 0), (frozen, 1), (single, 1)))
        other, right = (separately(f.model, stack)(batch) for f, batch in ((frozen, fresh), (single, exact)))
        # Gradients of the adapters one by one, as one stack has them.
        other, right = ([torch.cat(sides) for sides in zip(*grads, strict=True)] for grads in (other, right))
        found = errors({OURS: together(frozen.model, stack)(fresh), SEPARATE: other}, right, other, dtype)
        calls = {name: make(frozen.model, stack, True) for name, make in ((OURS, together), (SEPARATE, separately))}
        title = f"{count} task{'s' if count > 1 else ''} x {SAMPLES} samples, {case.tokens} tokens, {dtype}"
        functions, wrong = verify(title, {way: functools.partial(call, timed) for way, call in calls.items()}, found)
        timings = context.time(functions, factor=FACTOR)
        shape = case.shape(frozen.name, tasks=count, samples=SAMPLES)
        yield row(context, title, "library", shape, timings, found[OURS], skipped=wrong)


def together(model: nn.Module, stack: t2l.AdapterStack, update: bool = False) -> Callable[[Batch], Gradients]:
    """A step of all adapters in one batch; gradients of A and B by module.  ``update``: AdamW too."""
    way = ours(model, stack, [adapter for adapter in range(len(stack)) for _ in range(SAMPLES)])
    own, trained = leaves(stack)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def run(batch: Batch) -> Gradients:
        with way.applied(own):
            grads = list(torch.autograd.grad(loss_of(way.model, batch), trained))
        if update:
            for leaf, grad in zip(trained, grads, strict=True):
                leaf.grad = grad
            optimizer.step()
        return grads

    return run


def separately(model: nn.Module, stack: t2l.AdapterStack, update: bool = False) -> Callable[[Batch], list[Gradients]]:
    """A step of each adapter, one after another, each over its rows of the batch."""
    made = [together(model, adapter, update) for adapter in stack]
    return lambda batch: [one(batch.cut(slice(i * SAMPLES, (i + 1) * SAMPLES))) for i, one in enumerate(made)]
