"""Timers: candidates are timed beside each other in one process, on the clock of a device.

:class:`Cuda` replays graphs between two events, so that neither Python nor a launch is in the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from bench.records import OURS

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

#: Longest call, in us, that is repeated untimed before a sample: beyond, what ran before it is a small part of it.
WARM_BELOW_US = 20_000.0
WARM_CALLS = 3
#: A sample of a CPU is one call, or as many in a row as fill so many us.
SAMPLE_US = 2000.0
#: What CUDA says once its context is lost: nothing else will run in this process.
LOST = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "illegal memory access", "unspecified launch failure")


class NotCaptured(Exception):
    """No graph can hold it; the message says why."""


def is_lost(error: Exception) -> bool:
    """Whether the GPU answers this process no more.  What a capture says is no sign of it."""
    return not isinstance(error, NotCaptured) and any(sign in str(error) for sign in LOST)


def first_line(error: Exception, length: int = 200) -> str:
    return str(error).strip().partition("\n")[0][:length]


@contextlib.contextmanager
def tolerant(name: Hashable, skipped: dict[Any, str] | None) -> Iterator[None]:
    """The error of a baseline goes to ``skipped``; one of ours or of a lost device is raised, and any if that is None."""
    try:
        yield
    except Exception as error:
        if skipped is None or name == OURS or is_lost(error):
            raise
        skipped[name] = f"{type(error).__name__}: {first_line(error)}"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call over ``rounds`` samples; of a card, whether one ``graph`` was replayed, and a ``note`` why not."""

    median_us: float
    iqr_us: float
    rounds: int
    graph: bool | None = None
    note: str | None = None

    @staticmethod
    def of(samples: Sequence[float], graph: bool | None = None, note: str | None = None) -> Timing:
        """Of at least two samples in us."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Timing(median, high - low, len(samples), graph, note)

    def to_json(self) -> dict[str, Any]:
        fields = {"median_us": round(self.median_us, 3), "iqr_us": round(self.iqr_us, 3), "rounds": self.rounds}
        more = {"graph": self.graph, "note": self.note}
        return fields | {name: value for name, value in more.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A call for each set of operands, in turn; ``graph``: False where the host works between launches."""

    calls: Sequence[Call]
    graph: bool = True

    def once(self) -> None:
        for call in self.calls:
            call()


@dataclasses.dataclass(frozen=True)
class Pass:
    """``run`` makes ``calls`` calls in some ``us``; ``warm``: what runs untimed before each, on a CPU."""

    run: Call
    calls: int
    us: float
    warm: Call | None = None
    graph: bool | None = None
    note: str | None = None


def repeated(call: Call, count: int) -> Call:
    """``count`` calls in a row."""

    def run() -> None:
        for _ in itertools.repeat(None, count):
            call()

    return call if count == 1 else run


def elapsed_us(run: Call) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e3


def filling(us: Mapping[Name, float], seconds: float, rounds: tuple[int, int]) -> dict[Name, int]:
    """Samples of ``us`` each, within ``rounds``, that fill equal shares of ``seconds``."""
    share = seconds * 1e6 / max(1, len(us))
    return {name: max(rounds[0], min(rounds[1], int(share / one))) for name, one in us.items()}


class Cpu:
    """This CPU.  ``timed``: whether times mean something; ``spoiled``: whether a capture failed in this process."""

    kind = "cpu"
    on_card, timed, spoiled = False, True, False
    torch = torch.device("cpu")

    def prepare(self, name: Hashable, candidate: Candidate) -> Pass:
        """WARM_CALLS untimed calls come before every sample of a short function, so that it finds what its own calls
        left in cache (one does not fill a cache of evictions).  Where sets take turns, half of them come before: else what
        another candidate wrote would be written back on this one's account.
        """
        sets = len(candidate.calls)
        call = candidate.calls[0] if sets == 1 else candidate.once
        call()
        repeats = 1
        while (taken := elapsed_us(repeated(call, repeats))) < SAMPLE_US / 2 and repeats < 1 << 16:
            repeats *= 4
        one = taken / repeats
        repeats = max(1, math.ceil(SAMPLE_US / one))
        warm = repeated(call, WARM_CALLS) if one < WARM_BELOW_US else None
        if sets > 1:
            warm = Candidate(candidate.calls[sets // 2 :]).once
        return Pass(repeated(call, repeats), repeats * sets, repeats * one, warm)

    def sample(self, one: Pass) -> float:
        """Microseconds of its pass."""
        if one.warm:
            one.warm()
        return elapsed_us(one.run)

    def samples(self, passes: Mapping[Name, Pass], seconds: float, rounds: tuple[int, int]) -> tuple[int, dict[Name, int]]:
        """The least rounds, and the most samples of each.  Where all take long, as models do, each gets the same time."""
        if not all(one.us > WARM_BELOW_US for one in passes.values()):
            return rounds[0], dict.fromkeys(passes, rounds[1])
        wanted = filling({name: one.us for name, one in passes.items()}, seconds, rounds)
        return max(wanted.values(), default=rounds[0]), wanted

    def synchronize(self) -> None:
        pass


class Dry(Cpu):
    """A card's way on this CPU; its times mean nothing.  ``uncaptured``: why no graph held a name; it is not tried again."""

    timed = False
    #: Samples that all aim at, and the least of any; us and calls of a pass.
    replays, least_replays, pass_us, most_calls = 5, 5, 50.0, 16
    #: Longest pass in us before which an untimed one is worth its time: it hides the launch and warms the caches.
    covered_us = 20_000.0
    l2_bytes = 1 << 14

    def __init__(self, kind: str = "dry") -> None:
        self.kind = kind
        self.uncaptured: dict[str, str] = {}
        if kind == "emulator":  # where a call takes seconds
            self.replays, self.least_replays, self.pass_us = 2, 2, 0.0

    def num_sets(self, num_bytes: int) -> int:
        """Sets of operands of ``num_bytes`` that together exceed three level-2 caches."""
        return 1 if num_bytes > 3 * self.l2_bytes else 3 * self.l2_bytes // num_bytes + 1

    def prepare(self, name: Hashable, candidate: Candidate) -> Pass:
        """Ours is called from the host where no graph can hold it.  Raises NotCaptured for anything else then."""
        graph, note = candidate.graph and self.on_card, None
        if graph and name in self.uncaptured:
            raise NotCaptured(self.uncaptured[name])
        try:
            run = self.capture(candidate.once) if candidate.graph else candidate.once
        except NotCaptured as error:
            self.synchronize()
            if name != OURS:
                self.uncaptured[name] = str(error)
                raise
            run, graph, note = candidate.once, False, str(error)
        run()
        us = min(self.elapsed_us(run, covered=True) for _ in range(3))
        count = len(candidate.calls)
        repeats = max(1, min(math.ceil(self.pass_us / us), self.most_calls // count))
        if repeats > 1:
            many = repeated(candidate.once, repeats)
            run = self.capture(many) if graph else many
            us = self.elapsed_us(run, covered=True)
        return Pass(run, repeats * count, us, graph=graph, note=note)

    def sample(self, one: Pass) -> float:
        return self.elapsed_us(one.run, one.us < self.covered_us)

    def samples(self, passes: Mapping[Name, Pass], seconds: float, rounds: tuple[int, int]) -> tuple[int, dict[Name, int]]:
        """A pass that would exceed its share of ``seconds`` gets fewer samples, spread over all rounds."""
        costs = {name: 2 * one.us if one.us < self.covered_us else one.us for name, one in passes.items()}
        wanted = filling(costs, seconds, (self.least_replays, self.replays))
        return max(wanted.values(), default=0), wanted

    def capture(self, run: Call) -> Call:
        """A replay of the graph of ``run``, which is called once before; here ``run`` itself."""
        run()
        return run

    def elapsed_us(self, run: Call, covered: bool) -> float:
        """Time of ``run``; ``covered``: an untimed one, still running on a card, hides the launch."""
        return elapsed_us(run)


class Cuda(Dry):
    """The current card."""

    on_card = timed = True
    replays, least_replays, pass_us, most_calls = 200, 5, 500.0, 4096

    def __init__(self) -> None:
        super().__init__("cuda")
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.torch).L2_cache_size
        self._stream = torch.cuda.Stream()  # of all captures: libraries keep a workspace for every stream
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Call) -> Call:
        """A capture that fails (NotCaptured) leaves torch's allocator as if it still went on: the process is ``spoiled``."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _no_gc():  # freeing a graph would spoil the capture of another
            run()
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
                graph.capture_end()
            except Exception as error:
                self.spoiled = True
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise NotCaptured(first_line(error)) from error
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def elapsed_us(self, run: Call, covered: bool) -> float:
        """Between two events."""
        start, end = self._events
        if covered:
            run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


Device = Cpu | Dry | Cuda


def measure(
    device: Device,
    functions: Mapping[Name, Call | Candidate],
    *,
    rounds: tuple[int, int] = (5, 200),
    seconds: float = 1.0,
    skipped: dict[Name, str] | None = None,
) -> dict[Name, Timing]:
    """Time every function beside the others for about ``seconds`` in all.

    A round takes one sample of each, beginning with another one every time, so that a change of the machine's speed affects
    all alike.  The first round is discarded; there are from ``rounds[0]``, two or more, to ``rounds[1]`` others.  What fails
    goes to ``skipped`` (:func:`tolerant`).
    """
    passes: dict[Name, Pass] = {}
    for name, function in functions.items():
        with tolerant(name, skipped):
            passes[name] = device.prepare(name, function if isinstance(function, Candidate) else Candidate([function]))
    least, wanted = device.samples(passes, seconds, rounds)
    most, names = max(wanted.values(), default=0), list(passes)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    with _no_gc():
        for name in names:
            device.sample(passes[name])
        end = time.perf_counter() + seconds
        for i in range(1, most + 1):
            start = i % max(1, len(names))
            for name in names[start:] + names[:start]:
                if i * wanted[name] // most > (i - 1) * wanted[name] // most:
                    samples[name].append(device.sample(passes[name]) / passes[name].calls)
            if i >= least and time.perf_counter() >= end:
                break
    return {name: Timing.of(samples[name], passes[name].graph, passes[name].note) for name in names}


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and the kernels that borrow its pool, on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
