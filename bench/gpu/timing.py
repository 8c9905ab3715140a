"""The device behind the suite: a card, its graphs and its events; or this CPU, for a dry run of the same code.

Candidates are timed beside each other in one process.  What is timed is the replay of a graph that holds many calls, one for
each set of operands in turn, so that neither Python nor a launch from the host is in the time.  What works on the host
between launches is called from the host, and so is ours where no graph can hold it; both say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from bench.gpu.tables import OURS

Call = Callable[[], object]
#: No candidate is sampled less often, however slow it is.
LEAST_REPLAYS = 5
#: Longest pass in us before which an untimed one is worth its time: it hides the launch and warms the caches.
COVERED_US = 20_000.0
#: More operand sets than three times the level-2 cache are asked for: an exact multiple could leave the first set in it.
ROTATED_CACHES = 3
#: What CUDA says once its context is lost: nothing else will run in this process.
LOST = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "illegal memory access", "unspecified launch failure")


class NotCaptured(Exception):
    """No graph can hold it; the message says why."""


def is_lost(error: Exception) -> bool:
    """Whether the device answers this process no more.  What a capture says is no sign of it."""
    return not isinstance(error, NotCaptured) and any(sign in str(error) for sign in LOST)


def first_line(error: Exception, length: int = 200) -> str:
    return str(error).strip().partition("\n")[0][:length]


@contextlib.contextmanager
def tolerant(name: str, absent: dict[str, str] | None) -> Iterator[None]:
    """What ``name`` fails with goes to ``absent``: a rival that throws must cost nobody else's times.

    Raised all the same: what ours fails with, a lost device, and everything where ``absent`` is None.
    """
    try:
        yield
    except Exception as error:
        if absent is None or name == OURS or is_lost(error):
            raise
        absent[name] = f"{type(error).__name__}: {first_line(error)}"


class Cuda:
    """The current card.

    ``on_card``: whether this is one, so that times mean something and bars apply.  ``uncaptured``: what no graph could hold,
    by name, and why; it is not tried again.  ``spoiled``: whether a capture has failed in this process.
    """

    on_card = True
    replays = 200
    pass_us = 500.0
    most_calls = 4096

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.torch).L2_cache_size
        self._stream = torch.cuda.Stream()  # of all captures: libraries keep a workspace for every stream
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.uncaptured: dict[str, str] = {}
        self.spoiled = False

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Call) -> Call:
        """A replay of the graph of ``run``, which is called once before.

        Raises NotCaptured where the capture fails; it leaves torch's allocator and generators as if it still went on, so
        this process is ``spoiled``.
        """
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _no_gc():  # freeing a graph would spoil the capture of another
            run()
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            except Exception as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise self._not_captured(error) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise self._not_captured(error) from error
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _not_captured(self, error: Exception) -> NotCaptured:
        self.spoiled = True
        return NotCaptured(first_line(error))

    def elapsed_us(self, run: Call, covered: bool) -> float:
        """Time of ``run`` between two events; ``covered``: an untimed one, still running, hides the launch."""
        start, end = self._events
        if covered:
            run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


class Dry:
    """This CPU: no graph, few and short samples.  Its times mean nothing and are never shown beside a bar."""

    on_card = False
    replays = LEAST_REPLAYS
    pass_us = 50.0
    most_calls = 16
    l2_bytes = 1 << 14
    spoiled = False

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.uncaptured: dict[str, str] = {}

    def synchronize(self) -> None:
        pass

    def capture(self, run: Call) -> Call:
        run()
        return run

    def elapsed_us(self, run: Call, covered: bool) -> float:
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e3


Device = Cuda | Dry


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call over ``rounds`` samples of ``calls`` calls each.

    ``graph``: the calls were replayed as one graph, else made from the host; ``note``: why, where a graph of ours was tried.
    """

    median_us: float
    iqr_us: float
    p5_us: float
    p95_us: float
    rounds: int
    calls: int
    graph: bool
    note: str | None = None

    @staticmethod
    def of(samples: Sequence[float], calls: int, graph: bool, note: str | None = None) -> Timing:
        """Of at least two samples in us, each of ``calls`` calls."""
        one = [sample / calls for sample in samples]
        low, median, high = statistics.quantiles(one, n=4, method="inclusive")
        cuts = statistics.quantiles(one, n=20, method="inclusive")
        return Timing(median, high - low, cuts[0], cuts[-1], len(one), calls, graph, note)

    def to_json(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        times = {name: round(value, 3) for name, value in fields.items() if name.endswith("_us")}
        return {name: value for name, value in (fields | times).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is timed: a call for each set of operands; ``graph``: False where it works on the host between launches."""

    calls: Sequence[Call]
    graph: bool = True


@dataclasses.dataclass(frozen=True)
class _Pass:
    """``calls`` calls that are timed together."""

    run: Call
    calls: int
    us: float
    graph: bool
    note: str | None


def num_sets(device: Device, num_bytes: int) -> int:
    """How many sets of operands of ``num_bytes`` together are well beyond the level-2 cache."""
    return 1 if num_bytes > ROTATED_CACHES * device.l2_bytes else ROTATED_CACHES * device.l2_bytes // num_bytes + 1


def measure(
    device: Device, candidates: Mapping[str, Candidate], seconds: float, absent: dict[str, str] | None = None
) -> dict[str, Timing]:
    """Time every candidate beside the others for about ``seconds`` in all.

    One that fails, or that no graph can hold, is left out and said so in ``absent`` (:func:`tolerant`).  Ours is called from
    the host where no graph can hold it.

    A round takes one sample of each in turn, beginning with another one every time.  All aim at ``device.replays`` samples;
    one that would exceed its share of the time gets fewer, spread over all rounds.
    """
    passes: dict[str, _Pass] = {}
    for name, candidate in candidates.items():
        with tolerant(name, absent):
            passes[name] = _prepare(device, name, candidate)
    share = seconds * 1e6 / len(passes)
    wanted = {name: _replays(device, one.us, share) for name, one in passes.items()}
    rounds, names = max(wanted.values()), list(passes)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_gc():
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if (i + 1) * wanted[name] // rounds > i * wanted[name] // rounds:
                    one = passes[name]
                    samples[name].append(device.elapsed_us(one.run, one.us < COVERED_US))
    return {name: Timing.of(samples[name], one.calls, one.graph, one.note) for name, one in passes.items()}


def _replays(device: Device, us: float, share: float) -> int:
    """Samples of a pass of ``us`` within ``share`` us, those that cover the launch counted."""
    cost = 2 * us if us < COVERED_US else us
    return max(LEAST_REPLAYS, min(device.replays, int(share / cost)))


def _prepare(device: Device, name: str, candidate: Candidate) -> _Pass:
    def once() -> None:
        for call in candidate.calls:
            call()

    graph, note = candidate.graph and device.on_card, None
    if graph and name in device.uncaptured:
        raise NotCaptured(device.uncaptured[name])
    try:
        run = device.capture(once) if candidate.graph else once
    except NotCaptured as error:
        device.synchronize()
        if name != OURS:
            device.uncaptured[name] = str(error)
            raise
        run, graph, note = once, False, str(error)
    run()
    us = min(device.elapsed_us(run, covered=True) for _ in range(3))
    count = len(candidate.calls)
    repeats = min(math.ceil(device.pass_us / us), max(1, device.most_calls // count))
    if repeats > 1:

        def many() -> None:
            for _ in itertools.repeat(None, repeats):
                once()

        run = device.capture(many) if graph else many
        us = device.elapsed_us(run, covered=True)
    return _Pass(run, repeats * count, us, graph, note)
