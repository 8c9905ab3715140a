"""Training through a frozen language model: an adapter a sample, its memory, hypernetworks, a library of adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench.harness import BenchError, Context, Error, Record, Target, Task, record, row, verify, worst
from bench.records import BASE, HOOKS, OURS
from bench.suites import train_ways as ways
from bench.suites.train_ways import BMM, RANK, SAMPLES, Batch, Case, Frozen, Way
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.testing import numerics
from t2l_engine.testing.models import SHAPES, HyperShape

TARGET = Target(1.12, of=BASE)
#: Peak memory of hooks over that of ours, at least.
MEMORY_TARGET = Target(1.25, of=HOOKS)
SEPARATE = "one task at a time"
MEASURE = "gradient, relative Frobenius against another way, float32"
#: Seconds for each case, in those of an ordinary one: a step takes up to seconds.
FACTOR = 30
#: Steps change what they train, but hardly: times belong to the same values.
LEARNING_RATE, GRAD_CLIP = 1e-6, 1.0
Gradients = list[Tensor]


def plan(context: Context) -> list[Task]:
    if not context.on_cpu:
        raise BenchError(f"device: expected 'cpu' for the suite train, got {context.device.kind!r}")
    few = [case for case in ways.cases(context) if case.modules == "q,v"]
    # Fail fast: a mistake shows soonest in the cheapest.
    tasks = [Task(f"library {dtype}", functools.partial(library, context, dtype)) for dtype in ways.ATTENTION]
    tasks += [Task(f"sft step {case.name}", functools.partial(whole, context, case)) for case in few]
    tasks += [Task(f"step {case.name}", functools.partial(applied, context, case)) for case in ways.cases(context)]
    measured, of = (ways.cases(context), ways.WAYS) if context.full else (few[:1], [BASE, OURS, HOOKS])
    return tasks + [Task(f"memory {case.name}", functools.partial(memory, context, case, of)) for case in measured]


def errors(results: Mapping[str, Gradients], exact: Gradients, other: Gradients, dtype: str) -> dict[str, Error]:
    """The worst error of each result over its gradients; arguments as in :func:`numerics.model_gradient_bound`."""
    bounds = [numerics.model_gradient_bound(*pair, getattr(torch, dtype)) for pair in zip(exact, other, strict=True)]

    def error(got: Tensor, right: Tensor, bound: float) -> Error:
        return Error(numerics.relative_frobenius(got, right), bound, MEASURE)

    return {name: worst(map(error, got, exact, bounds)) for name, got in results.items()}


def models(context: Context, dtype: str) -> tuple[Frozen, Frozen]:
    """The model in ``dtype``, and in float32."""
    frozen = ways.load(context, dtype)
    return frozen, frozen if dtype == "float32" else ways.load(context, "float32")


def _shape(name: str, case: Case, **more: Any) -> Record:
    return {"model": name, **more, "tokens": case.tokens, "modules": case.modules, "rank": RANK, "dtype": case.dtype}


# --- a step with an adapter a sample ---------------------------------------------------------------------------------


def applied(context: Context, case: Case) -> Iterator[Record]:
    """Forward and backward of eight samples with eight adapters, by every way, in the same rounds."""
    frozen, single = models(context, case.dtype)
    stack = ways.adapters(frozen.model, case)
    made = {way: ways.BUILDERS[way](frozen.model, stack) for way in ways.WAYS}
    found = step_errors(made, frozen, single, stack, case)
    del single
    timed = Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    calls = {way: ways.step(one, None if way == BASE else stack, timed) for way, one in made.items()}
    unadapted = {BASE: calls.pop(BASE)}  # nothing was added that could be wrong
    functions, wrong = verify(case.name, calls, found)
    timings = context.time(unadapted | functions, factor=FACTOR)
    shape = _shape(frozen.name, case, samples=SAMPLES)
    yield row(context, case.name, "train", shape, timings, found[OURS], skipped=ways.SKIPPED | wrong, target=TARGET)


def step_errors(
    made: Mapping[str, Way], frozen: Frozen, single: Frozen, stack: t2l.AdapterStack, case: Case
) -> dict[str, Error]:
    """The error of every way but the base, on samples that are not timed; ``single``: the model in float32."""
    fresh, exact_fresh = (Batch.of(f, SAMPLES, case.tokens, seed=1) for f in (frozen, single))
    results = {way: ways.step(one, stack, fresh)() for way, one in made.items() if way != BASE}
    exact = results[BMM]
    if case.dtype != "float32":
        exact = ways.step(ways.BUILDERS[BMM](single.model, stack), stack, exact_fresh)()
    return errors(results, exact, results[BMM], case.dtype)


def memory(context: Context, case: Case, of: Sequence[str]) -> Iterator[Record]:
    """The peak of a step by each of the ways ``of``, each in a process of its own."""
    found = {way: ways.peak(context, case, way) for way in of}
    target = MEMORY_TARGET.to_json() if context.full else None
    yield record("train_memory", case=case.name, ways=found, skipped=ways.SKIPPED, target=target)


# --- a whole step of a hypernetwork ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """A hypernetwork with the optimiser and the task embeddings of a step."""

    net: HyperNetwork
    task_emb: Tensor
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(context: Context, model: nn.Module, variant: str) -> Trained:
        """Of the sizes of the bundled checkpoint."""
        shape = SHAPES["smollm2-135m"]
        if not context.full:
            c = model.config
            widths = c.hidden_size, c.hidden_size, c.num_key_value_heads * c.head_dim
            shape = HyperShape("tiny", c.num_hidden_layers, *widths, embed_dim=16, latent_size=32, head_in_size=16)
        shape = dataclasses.replace(shape, variant=variant, rank=RANK)
        net = shape.make(seed=1).requires_grad_().train()
        return Trained(net, shape.task_embeddings(SAMPLES), torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE))

    def backward(self, way: Way, batch: Batch) -> None:
        """Generate, apply, and leave gradients where the optimiser finds them."""
        self.optimizer.zero_grad(set_to_none=True)
        with way.applied(self.net(self.task_emb)):
            ways.loss_of(way.model, batch).backward()

    def gradients(self, way: Way, batch: Batch) -> Gradients:
        """Those of all parameters as one vector."""
        self.backward(way, batch)
        return [torch.cat([p.grad.flatten() for p in self.net.parameters()])]

    def generate(self, grads: Gradients) -> None:
        """The share of the hypernetwork: forward, and backward from gradients of A and B."""
        self.optimizer.zero_grad(set_to_none=True)
        stack = self.net(self.task_emb)
        torch.autograd.backward([*stack.lora_A.values(), *stack.lora_B.values()], grads)

    def update(self) -> None:
        """The share of the optimiser."""
        nn.utils.clip_grad_norm_(self.net.parameters(), GRAD_CLIP)
        self.optimizer.step()

    def step(self, way: Way, batch: Batch) -> None:
        """All of it."""
        self.backward(way, batch)
        self.update()


def whole(context: Context, case: Case) -> Iterator[Record]:
    """Supervised steps of hypernetworks: generate eight adapters, apply them, backward, clip, AdamW; and the parts alone.

    Gradients end at the adapters of the first layer, as in training; the base without adapters goes down to its inputs.
    """
    frozen, single = models(context, case.dtype)
    model = frozen.model
    to_inputs = Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    timed, fresh, exact = (
        Batch.of(f, SAMPLES, case.tokens, seed, to_inputs=False) for f, seed in ((frozen, 0), (frozen, 1), (single, 1))
    )
    functions: dict[Any, Callable[[], object]] = {BASE: ways.step(ways.base(model, None), None, to_inputs)}
    found = {}
    for variant in ("L", "M"):
        trained = Trained.of(context, model, variant)
        stack = trained.net.generate(trained.task_emb)
        way, plain, right = ways.ours(model, stack), *(ways.BUILDERS[BMM](m, stack) for m in (model, single.model))
        other = trained.gradients(plain, fresh)
        results = {OURS: trained.gradients(way, fresh)}
        found[variant] = errors(results, trained.gradients(right, exact), other, case.dtype)
        apply = ways.step(way, stack, timed)
        grads = apply()
        step = functools.partial(trained.step, way, timed)
        calls, _ = verify(f"sft step {variant} {case.name}", {OURS: step}, found[variant])
        functions |= {
            (variant, "whole"): calls[OURS],
            (variant, "model"): apply,
            (variant, "hypernetwork"): functools.partial(trained.generate, grads),
            (variant, "update"): trained.update,
        }
    del single, right, exact
    timings = context.time(functions, factor=FACTOR)
    for variant, of in found.items():
        title = f"sft step {variant}, {case.name}"
        shape = _shape(frozen.name, case, variant=variant, samples=SAMPLES)
        yield row(context, title, "sft step", shape, {OURS: timings[variant, "whole"], BASE: timings[BASE]}, of[OURS])
        parts = {part: timings[variant, part].to_json() for part in ("model", "hypernetwork", "update")}
        yield record("train_parts", case=title, parts=parts)


# --- a library of adapters -------------------------------------------------------------------------------------------


def library(context: Context, dtype: str) -> Iterator[Record]:
    """A training step of several adapters, eight samples each, in one batch; beside a step for each, one after another."""
    frozen, single = models(context, dtype)
    model = frozen.model
    case = Case("q,v", 48 if context.full else 12, dtype)
    for count in (1, 8) if context.full else (1, 2):
        stack = ways.adapters(model, case, count)
        timed, fresh, exact = (
            Batch.of(f, count * SAMPLES, case.tokens, seed, to_inputs=False)
            for f, seed in ((frozen, 0), (frozen, 1), (single, 1))
        )
        results = {OURS: together(model, stack)(fresh), SEPARATE: _joined(separately(model, stack)(fresh))}
        right = _joined(separately(single.model, stack)(exact))
        found = errors(results, right, results[SEPARATE], dtype)
        calls = {OURS: together(model, stack, update=True), SEPARATE: separately(model, stack, update=True)}
        title = f"{count} task{'s' if count > 1 else ''} x {SAMPLES} samples, {case.tokens} tokens, {dtype}"
        functions, wrong = verify(title, {way: functools.partial(call, timed) for way, call in calls.items()}, found)
        timings = context.time(functions, factor=FACTOR)
        shape = _shape(frozen.name, case, tasks=count, samples=SAMPLES)
        yield row(context, title, "library", shape, timings, found[OURS], skipped=wrong)


def together(model: nn.Module, stack: t2l.AdapterStack, update: bool = False) -> Callable[[Batch], Gradients]:
    """A step of all adapters in one batch; gradients of A and B by module.  ``update``: AdamW too."""
    ids = [adapter for adapter in range(len(stack)) for _ in range(SAMPLES)]
    way = ways.ours(model, stack, ids)
    own, trained = ways.leaves(stack)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE) if update else None

    def run(batch: Batch) -> Gradients:
        with way.applied(own):
            grads = list(torch.autograd.grad(ways.loss_of(way.model, batch), trained))
        if optimizer is not None:
            for leaf, grad in zip(trained, grads, strict=True):
                leaf.grad = grad
            optimizer.step()
        return grads

    return run


def separately(model: nn.Module, stack: t2l.AdapterStack, update: bool = False) -> Callable[[Batch], list[Gradients]]:
    """A step of each adapter, one after another, each over its rows of the batch."""
    made = [together(model, adapter, update) for adapter in stack]

    def run(batch: Batch) -> list[Gradients]:
        cuts = [batch.cut(slice(i * SAMPLES, (i + 1) * SAMPLES)) for i in range(len(made))]
        return [one(cut) for one, cut in zip(made, cuts, strict=True)]

    return run


def _joined(grads: list[Gradients]) -> Gradients:
    """Those of the adapters as one stack has them."""
    return [torch.cat(sides) for sides in zip(*grads, strict=True)]
