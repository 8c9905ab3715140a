"""Every instruction set that this CPU has, beside the others: generating adapters, and the LoRA op.

The native library reads T2L_ISA once, so each instruction set runs in a process of its own.  They take turns as candidates
of one measurement; only one works at a time.
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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from bench import baselines, cases
from bench.cases import LAYERS, Case, Layer, even, rows
from bench.harness import OURS, BenchError, Context, Error, Record, Task, record, row, verify, worst
from bench.suites import apply, generate
from bench.timing import Call, Candidate, Cpu, Pass, filling
from bench.worker import elapsed, settle
from t2l_engine.ops import native
from t2l_engine.testing.models import SHAPES, VARIANTS, HyperShape

#: Microseconds of a sample.
SAMPLE_US = 2000.0
DTYPES = (torch.bfloat16, torch.float32)
COUNTS = (1, 8)
#: The kernels of amx in plain C++, for tests: no instruction set of a CPU.
MODEL = "amx_model"
SPREADS = {"64x1": even(64, 1), "8x8": rows(*range(8)), "64x64": rows(*range(64))}
#: Seeds of the inputs that errors are measured on (apply.lora_errors draws these), and of those that are timed.
CHECKED, TIMED = 1, 2


@dataclasses.dataclass(frozen=True)
class Generation:
    """Adapters for ``count`` descriptions."""

    shape: HyperShape
    dtype: torch.dtype
    count: int

    @property
    def case(self) -> tuple[str, Record]:
        return generate.described(self.shape, str(self.dtype).removeprefix("torch."), self.count)

    def call(self) -> Call:
        return functools.partial(self.shape.make(self.dtype, seed=1).generate, self._inputs(TIMED))

    def result(self) -> list[Tensor]:
        made = baselines.of_stack(self.shape.make(self.dtype, seed=1))(self._inputs(CHECKED))
        return [side for sides in made.values() for side in sides]

    def errors(self, results: Mapping[str, list[Tensor]]) -> dict[str, Error]:
        """``results``: those of each instruction set."""

        def there(made: list[Tensor]) -> generate.Generate:
            return lambda task_emb: dict(zip(modules, zip(made[::2], made[1::2], strict=True), strict=True))

        net, modules = self.shape.make(self.dtype, seed=1), self.shape.config().modules
        ways = {"reference": baselines.plain(net)} | {level: there(made) for level, made in results.items()}
        exact = copy.deepcopy(net).set_dtype(torch.float64)
        return generate.adapter_errors(exact, ways, self._inputs(CHECKED), self.dtype)

    def _inputs(self, seed: int) -> Tensor:
        return self.shape.task_embeddings(self.count, seed)


@dataclasses.dataclass(frozen=True)
class Lora:
    """The LoRA op alone, with a warm cache."""

    of: Case

    @property
    def case(self) -> tuple[str, Record]:
        return self.of.name, self.of.shape()

    def call(self) -> Call:
        return cases.operands(self.of, apply.CPU, TIMED).grouped()

    def result(self) -> list[Tensor]:
        operands = cases.operands(self.of, apply.CPU, CHECKED)
        operands.grouped()()
        return [member["y"] for member in operands.members]

    def errors(self, results: Mapping[str, list[Tensor]]) -> dict[str, Error]:
        def there(made: list[Tensor]) -> Callable[[cases.Operands], Call]:
            return lambda operands: lambda: [m["y"].copy_(y) for m, y in zip(operands.members, made, strict=True)]

        levels = {level: there(made) for level, made in results.items()}
        return apply.lora_errors(self.of, levels, apply.CPU, {})


Work = Generation | Lora

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
def _call(work: Work) -> tuple[Call, float]:
    """The call that is timed, and some microseconds that it takes."""
    call = work.call()
    return call, min(elapsed(call, 1) for _ in range(3))


@torch.inference_mode()
def _us(work: Work) -> float:
    return _call(work)[1]


@torch.inference_mode()
def _sample(work: Work) -> float:
    call, us = _call(work)
    settle(call)
    return elapsed(call, max(1, round(SAMPLE_US / us)))


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

    def __call__(self) -> None:
        """Is asked instead."""


class Processes(Cpu):
    """This CPU, candidates being :class:`Away`."""

    def prepare(self, name: Hashable, candidate: Candidate) -> Pass:
        (away,) = candidate.calls
        return Pass(away, 1, away.ask(_us))

    def samples(self, passes: Mapping, seconds: float, rounds: tuple[int, int]) -> tuple[int, dict]:
        wanted = filling({name: max(one.us, SAMPLE_US) for name, one in passes.items()}, seconds, rounds)
        return max(wanted.values()), wanted

    def sample(self, one: Pass) -> float:
        return one.run.ask(_sample)


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
    context = dataclasses.replace(context, device=Processes(), rounds=(3, context.rounds[1]))
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        given = {level: {"initializer": _begin, "initargs": (level, context.threads)} for level in levels}
        pools = {level: stack.enter_context(ProcessPoolExecutor(1, spawn, **given[level])) for level in levels}
        for work in works:
            case, shape = work.case
            results = {level: pool.submit(_result, work) for level, pool in pools.items()}
            errors = work.errors({level: made.result() for level, made in results.items()})
            for level in levels:
                verify(f"{case}, {level}", {OURS: None}, {OURS: errors[level]})
            timings = context.time({level: Away(pool, work) for level, pool in pools.items()}, factor=2)
            yield row(
                context, case, group, shape, {OURS: timings[chosen], **timings}, worst(errors[level] for level in levels)
            )
