"""Every instruction set that this CPU has, beside the others and eager torch: generating adapters, and the LoRA op.

The native library reads T2L_ISA once, so each instruction set runs in a process of its own.  All of them take turns with
torch in this one, as candidates of one measurement; only one works at a time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

import torch
from torch import Tensor

from bench import baselines, cases
from bench.cases import LAYERS, Case, Layer, Operands, even, rows
from bench.harness import OURS, BenchError, Context, Error, Record, Task, record, row, verify, worst
from bench.suites import apply, generate
from bench.timing import WARM_BELOW_US, Call, Candidate, Cpu, Name, Pass, elapsed_us, filling
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.ops import native
from t2l_engine.testing.models import SHAPES, VARIANTS, HyperShape

#: Seconds of untimed calls before a sample of a short one: threads of the process before it spin for a while.
SETTLE_S = 0.03
#: What takes so many times as long as the fastest gets two samples: more would not make it the fastest.
HOPELESS = 4
DTYPES = (torch.bfloat16, torch.float32)
COUNTS = (1, 8)
#: The kernels of amx in plain C++, for tests: no instruction set of a CPU, and none that anybody waits for.
MODEL = "amx_model"
SPREADS = {"64x1": even(64, 1), "8x8": rows(*range(8)), "64x64": rows(*range(64))}
#: Seeds of the inputs that errors are measured on (apply.lora_errors draws these), and of those that are timed.
CHECKED, TIMED = 1, 2


class Settled(Cpu):
    """This CPU where another process worked just now; what is :class:`Away` is sampled where it is."""

    def prepare(self, name: Hashable, candidate: Candidate) -> Pass:
        (call,) = candidate.calls
        if isinstance(call, Away):
            return Pass(call, 1, call.ask(_prepared))
        us = elapsed_us(call)  # of a long one that is enough: it was verified, so this is not its first call
        return Pass(call, 1, us) if us > WARM_BELOW_US else super().prepare(name, candidate)

    def samples(self, passes: Mapping[Name, Pass], seconds: float, rounds: tuple[int, int]) -> tuple[int, dict[Name, int]]:
        """As many as fill the share of each in ``seconds``, whatever the others do."""
        each = {name: one.us / one.calls for name, one in passes.items()}
        wanted = filling({name: max(us, SETTLE_S * 1e6) for name, us in each.items()}, seconds, rounds)
        wanted |= dict.fromkeys((name for name, us in each.items() if us > HOPELESS * min(each.values())), 2)
        return max(wanted.values()), wanted

    def sample(self, one: Pass) -> float:
        if isinstance(one.run, Away):
            return one.run.ask(_us)
        end = time.perf_counter() + SETTLE_S
        while one.warm and time.perf_counter() < end:
            one.warm()
        return super().sample(one)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a work: its name and shape, the ways of torch, and the errors of these and of every instruction set."""

    case: str
    shape: Record
    torches: Mapping[str, Call]
    errors: Mapping[str, Error]


class Work(ABC):
    """What is timed, by a description that every process gets."""

    @abstractmethod
    def call(self) -> Call:
        """Ours, on the inputs that are timed."""

    @abstractmethod
    def result(self) -> list[Tensor]:
        """Ours, of the inputs that errors are measured on."""

    @abstractmethod
    def beside(self, results: Mapping[str, list[Tensor]]) -> Measured:
        """``results``: those of each instruction set."""


@dataclasses.dataclass(frozen=True)
class Generation(Work):
    """Adapters for ``count`` descriptions."""

    shape: HyperShape
    dtype: torch.dtype
    count: int

    def call(self) -> Call:
        return functools.partial(_net(self.shape, self.dtype).generate, self.shape.task_embeddings(self.count, TIMED))

    def result(self) -> list[Tensor]:
        made = baselines.of_stack(_net(self.shape, self.dtype))(self.shape.task_embeddings(self.count, CHECKED))
        return [side for sides in made.values() for side in sides]

    def beside(self, results: Mapping[str, list[Tensor]]) -> Measured:
        net, modules = _net(self.shape, self.dtype), self.shape.config().modules
        ways = {name: way(net) for name, way in generate.cpu_ways(self.shape).items() if name != OURS}

        def there(made: list[Tensor]) -> generate.Generate:
            return lambda task_emb: dict(zip(modules, zip(made[::2], made[1::2], strict=True), strict=True))

        fresh, timed = (self.shape.task_embeddings(self.count, seed) for seed in (CHECKED, TIMED))
        exact = copy.deepcopy(net).set_dtype(torch.float64)
        levels = {level: there(made) for level, made in results.items()}
        errors = generate.adapter_errors(exact, ways | levels, fresh, self.dtype)
        case, shape = generate.described(self.shape, str(self.dtype).removeprefix("torch."), self.count)
        return Measured(case, shape, {name: functools.partial(way, timed) for name, way in ways.items()}, errors)


@dataclasses.dataclass(frozen=True)
class Lora(Work):
    """The LoRA op alone, with a warm cache."""

    case: Case

    def call(self) -> Call:
        return cases.operands(self.case, apply.CPU, TIMED).grouped()

    def result(self) -> list[Tensor]:
        operands = cases.operands(self.case, apply.CPU, CHECKED)
        operands.grouped()()
        return [member["y"] for member in operands.members]

    def beside(self, results: Mapping[str, list[Tensor]]) -> Measured:
        builders = {name: build for name, build in apply.BUILDERS.items() if name != OURS}
        ways = {name: functools.partial(Operands.one_by_one, build=build) for name, build in builders.items()}

        def there(made: list[Tensor]) -> Callable[[Operands], Call]:
            return lambda operands: lambda: [m["y"].copy_(y) for m, y in zip(operands.members, made, strict=True)]

        levels = {level: there(made) for level, made in results.items()}
        errors = apply.lora_errors(self.case, ways | levels, apply.CPU, None)
        timed = cases.operands(self.case, apply.CPU, TIMED)
        return Measured(self.case.name, self.case.shape(), {name: build(timed) for name, build in ways.items()}, errors)


@functools.lru_cache(1)
def _net(shape: HyperShape, dtype: torch.dtype) -> HyperNetwork:
    return shape.make(dtype, seed=1)


# --- in a process of its own --------------------------------------------------------------------------------------------


def _begin(level: str, threads: int) -> None:
    """Before the first native call."""
    os.environ["T2L_ISA"] = level
    torch.set_num_threads(threads)
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if (about := native.about()) is None or about["instruction_sets"]["chosen"] != level:
        raise BenchError(f"levels: expected {level}, got {about}")


def _end_with_parent() -> None:
    """A parent that is killed tells its processes nothing."""
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@functools.lru_cache(1)
@torch.inference_mode()
def _pass(work: Work) -> Pass:
    return Settled().prepare(work, Candidate([work.call()]))


def _prepared(work: Work) -> float:
    """Some microseconds a call."""
    return _pass(work).us / _pass(work).calls


@torch.inference_mode()
def _us(work: Work) -> float:
    """A sample: microseconds a call."""
    return Settled().sample(one := _pass(work)) / one.calls


@torch.inference_mode()
def _result(work: Work) -> list[Tensor]:
    return work.result()


@dataclasses.dataclass(frozen=True)
class Away:
    """``work`` in the process of ``pool``."""

    pool: ProcessPoolExecutor
    work: Work

    def ask(self, what: Callable[[Work], float]) -> float:
        return self.pool.submit(what, self.work).result()

    def __call__(self) -> Future:
        """Its result, some time."""
        return self.pool.submit(_result, self.work)


# --- the suite ----------------------------------------------------------------------------------------------------------


def plan(context: Context) -> list[Task]:
    if not context.on_cpu:
        raise BenchError(f"levels: expected the device cpu, got {context.device.kind}")
    about, lowered = native.about(), os.environ.get("T2L_ISA")
    if about is None or lowered:
        raise BenchError(f"levels: expected native kernels and no T2L_ISA, got {lowered or 'no native library'}")
    chosen = about["instruction_sets"]["chosen"]
    levels = [name for name in about["instruction_sets"]["available"] if name != MODEL]
    run = functools.partial(measured, context, levels, chosen)
    return [
        Task("levels", lambda: [record("levels", available=levels, chosen=chosen)]),
        Task.of("generate", run, "generate", generations(context.full)),
        Task.of("lora", run, "lora", loras(context.full)),
    ]


def generations(full: bool) -> list[Work]:
    shape, variants = (SHAPES[generate.TARGETED], VARIANTS) if full else (generate.CUDA_TINY, VARIANTS[:1])
    shapes = [dataclasses.replace(shape, variant=variant) for variant in variants]
    return [Generation(*of) for of in itertools.product(shapes, DTYPES, COUNTS)]


def loras(full: bool) -> list[Work]:
    layer = LAYERS["linear"] if full else Layer.linear(64)
    made = (Case(layer, spread, dtype=dtype, label=label) for dtype in DTYPES for label, spread in SPREADS.items())
    return [Lora(dataclasses.replace(case, label=f"LoRA {case.label} {case.dtype_name}")) for case in made]


@torch.inference_mode()
def measured(context: Context, levels: Sequence[str], chosen: str, group: str, works: Sequence[Work]) -> Iterator[Record]:
    """A row for each of ``works``; ours is the chosen instruction set."""
    context = dataclasses.replace(context, device=Settled(), rounds=(3, context.rounds[1]))
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        given = {level: {"initializer": _begin, "initargs": (level, context.threads)} for level in levels}
        pools = {level: stack.enter_context(ProcessPoolExecutor(1, spawn, **given[level])) for level in levels}
        for work in works:
            away = {level: Away(pool, work) for level, pool in pools.items()}
            begun = {level: one() for level, one in away.items()}  # side by side: weights take a while to make
            of = work.beside({level: made.result() for level, made in begun.items()})
            for level in levels:
                verify(f"{of.case}, {level}", {OURS: None}, {OURS: of.errors[level]})
            torches, skipped = verify(of.case, of.torches, of.errors)
            timings = context.time({**away, **torches}, factor=2)
            error = worst(of.errors[level] for level in levels)
            yield row(context, of.case, group, of.shape, {OURS: timings[chosen], **timings}, error, skipped=skipped)
