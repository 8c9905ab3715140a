"""A whole language model: decode steps and prefills without adapters, with ours, and with the other ways to have them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import models
from bench.baselines import PEFT_ABSENT
from bench.harness import OURS, Context, Error, Record, Target, Task, logits_error, row, verify
from bench.models import LINEARS, MODULES, TINY, Forward, Step
from bench.records import BASE

ROWS, CACHED = 8, 64
#: Name of a set of adapters -> its target.
TARGETS = {"q,v": Target(1.05, of=BASE), "all linears": Target(1.15, of=BASE)}
PHASES = {"decode": models.decode, "prefill": models.prefill}
#: The way that gives every row adapter 0.
MERGED = "merged"

#: On a card, of a 7B-shaped model: (modules, rows, adapters) in order of worth; rank; tokens that a row has when the step
#: ends: few, so that the base step is short and the adapters' share large.
CUDA_FULL = (("q,v", 64, (1, 8, 64)), ("q,v", 1, (1,)), ("all linears", 64, (64,)), ("q,v", 8, (8,)))
CUDA_TINY = (("q,v", 4, (1, 4)), ("all linears", 2, (2,)))
CUDA_TARGET = Target(1.08, of=BASE)
RANK, CONTEXT = 8, 128


def plan(context: Context) -> list[Task]:
    if not context.on_cpu:
        chosen = CUDA_FULL if context.full else CUDA_TINY
        return [Task.of(step_name(modules, rows), cuda, context, modules, rows, n) for modules, rows, n in chosen]
    both = itertools.product(("float32", "bfloat16"), {"model": steps, "model sweep": sweep}.items())
    return [Task.of(f"{name} {dtype}", run, context, getattr(torch, dtype)) for dtype, (name, run) in both]


def _tokens(model: nn.Module, rows: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, count), generator=generator)


def steps(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    """Both phases for eight rows with eight adapters: of q and v, and of all linears."""
    (name, model), (_, wide) = models.load(context, dtype), models.load(context, torch.float64)
    sets = {
        "q,v": models.bundled_adapters(context, wide, ROWS).to(dtype=dtype),
        "all linears": models.random_adapters(wide, LINEARS, ROWS, 16).to(dtype=dtype),
    }
    fresh, timed = (_tokens(model, ROWS, CACHED + 1, seed) for seed in (1, 0))
    chosen = {of: _ways(context, model, stack) for of, stack in sets.items()}
    with torch.inference_mode():
        base = _exact(wide, model, None, fresh, range(ROWS))
        for of, (ways, skipped) in chosen.items():
            stack = sets[of]
            exact = {BASE: base, MERGED: _exact(wide, model, stack, fresh, [0] * ROWS)}
            each = _exact(wide, model, stack, fresh, range(ROWS))
            for phase, make in PHASES.items():
                case = f"{phase} {ROWS} rows, {of}"
                got = {way: make(forward, fresh)() for way, forward in ways.items()}
                errors = {way: logits_error(logits, *exact.get(way, each)[phase]) for way, logits in got.items()}
                calls, wrong = verify(case, {way: make(forward, timed) for way, forward in ways.items()}, errors)
                shape = {"model": name, "phase": phase, "rows": ROWS, "modules": of, "rank": _rank(stack)}
                given = {"skipped": skipped | wrong, "target": TARGETS[of]}
                yield _row(context, case, shape, dtype, context.time(calls, factor=10), errors[OURS], **given)


def _rank(stack: t2l.AdapterStack) -> int:
    return next(iter(stack.lora_A.values())).shape[2]


def _exact(
    wide: nn.Module, model: nn.Module, stack: t2l.AdapterStack | None, tokens: Tensor, ids: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By phase the float64 logits, and those of the merged models in the dtype of ``model``."""
    exact, other = (models.exact_logits(m, stack, tokens, ids) for m in (wide, model))
    return {phase: (exact[phase], other[phase]) for phase in PHASES}


def _ways(context: Context, model: nn.Module, stack: t2l.AdapterStack) -> tuple[dict[str, Forward], dict[str, str]]:
    """Ways to run ``stack``, row i with adapter i, but for MERGED and BASE; and what is skipped."""
    ways: dict[str, Forward] = {OURS: models.ours(model, stack, range(ROWS)), MERGED: models.merged(model, stack, 0)}
    ways[BASE] = model
    if why := PEFT_ABSENT or (None if context.full else "left out at this size"):
        return ways, {"PEFT mixed": why}
    mixed = functools.partial(models.peft_model(model, stack), adapter_names=[str(i) for i in range(ROWS)])
    return ways | {"PEFT mixed": mixed}, {}


def sweep(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    """Decode steps of many rows over the number of adapters among them, in the same rounds."""
    (name, model), (_, wide) = models.load(context, dtype), models.load(context, torch.float64)
    count, short = (64, 8) if context.full else (8, 4)
    stack = models.bundled_adapters(context, wide, count).to(dtype=dtype)
    choices = {2**i: [row % 2**i for row in range(count)] for i in range(count.bit_length())}
    forwards = {BASE: model} | {n: models.ours(model, stack[:n], ids) for n, ids in choices.items()}
    timed = _tokens(model, count, CACHED + 1, seed=0)
    # Every row reads the same: then the oracle needs a row an adapter, whichever rows use it.
    fresh = _tokens(model, 1, short + 1, seed=1).expand(count, -1)
    with torch.inference_mode():
        exact, other = _exact(wide, model, stack, fresh, range(count))["decode"]
        right = {n: (exact[ids], other[ids]) for n, ids in choices.items()}
        right[BASE] = tuple(t.expand(count, -1) for t in _exact(wide, model, None, fresh[:1], [0])["decode"])
        del wide
        errors = {n: logits_error(models.decode(f, fresh)(), *right[n]) for n, f in forwards.items()}
        # With one adapter all rows are alike, and one draw of rounding errors bounds no other: those of all adapters do.
        allowed = logits_error(other, exact, other).bound
        errors = {n: error._replace(bound=max(error.bound, allowed)) for n, error in errors.items()}
        for n, error in errors.items():
            verify(f"{n} adapters", {OURS: None}, {OURS: error})
        timings = context.time({n: models.decode(f, timed) for n, f in forwards.items()}, factor=20)
    for n in choices:
        mine = {OURS: timings[n], BASE: timings[BASE]}
        shape = {"model": name, "phase": "decode", "rows": count, "adapters": n, "modules": "q,v", "rank": _rank(stack)}
        yield _row(context, f"decode {count} rows, {n} adapters", shape, dtype, mine, errors[n])


def _row(context: Context, case: str, shape: Record, dtype: torch.dtype, timings, error: Error, **given: Any) -> Record:
    name = str(dtype).removeprefix("torch.")
    return row(context, f"{case}, {name}", "model", shape | {"dtype": name}, timings, error, **given)


def step_name(modules: str, rows: int, adapters: int = 0) -> str:
    """``adapters``: 0 for all numbers of them together."""
    of = f", {adapters} adapter{'s' if adapters > 1 else ''}" if adapters else ""
    return f"decode step, {rows} row{'s' if rows > 1 else ''}, {modules}{of}"


class Steps(NamedTuple):
    """One decode step of a 7B-shaped model on a card: without adapters, and by their number with them, verified."""

    tokens: Tensor
    base: Step
    adapted: dict[int, Step]
    errors: dict[int, Error]
    adapter_bytes: int

    @staticmethod
    def of(context: Context, modules: str, rows: int, counts: Sequence[int]) -> Steps:
        device, dtype = context.device.torch, torch.bfloat16
        shape = models.MISTRAL if context.full else TINY
        base = Step.of(models.decoder(shape, device, dtype), rows, CONTEXT if context.full else 6)
        tokens = torch.randint(shape["vocab_size"], (rows, 1), device=device)
        stack = models.random_adapters(base.model, MODULES[modules], max(counts), RANK).to(dtype=dtype)
        adapted, errors = {}, {}
        for count in counts:
            model = models.shared(base.model)
            t2l.attach(model, stack[:count]).set([row % count for row in range(rows)])
            adapted[count] = base.on(model)
            errors[count] = models.layer_error(adapted[count], tokens)
            verify(step_name(modules, rows, count), {OURS: None}, {OURS: errors[count]})
        return Steps(tokens, base, adapted, errors, stack.num_parameters * dtype.itemsize // max(counts))


@torch.inference_mode()
def cuda(context: Context, modules: str, rows: int, counts: Sequence[int]) -> Iterator[Record]:
    """A row for every number of adapters, all beside the same base step."""
    tokens, base, adapted, errors, adapter_bytes = Steps.of(context, modules, rows, counts)
    timings = context.time({n: functools.partial(s, tokens) for n, s in (adapted | {BASE: base}).items()}, factor=6)
    flops = 2 * rows * sum(m.weight.numel() for m in base.model.modules() if isinstance(m, nn.Linear))
    for count in counts:
        fields = {"model": "7B-shaped, random", "rows": rows, "adapters": count, "modules": modules, "rank": RANK}
        least = context.roofline(flops, base.num_bytes + count * adapter_bytes, "bfloat16")
        target = CUDA_TARGET if (modules, count) == ("q,v", 64) else None
        given = {"cache": "as it comes", "least": least, "target": target}
        mine = {OURS: timings[count], BASE: timings[BASE]}
        yield row(context, step_name(modules, rows, count), "model", fields, mine, errors[count], **given)
