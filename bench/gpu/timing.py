"""The device behind the suite: a card, its graphs and its events; or this CPU, for a dry run of the same code.

Candidates are timed beside each other in one process.  What is timed is the replay of a graph that holds many calls, one for
each set of operands in turn, so that neither Python nor a launch from the host is in the time.  What no graph can hold is
called from the host, and says so.
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

Call = Callable[[], object]
#: No candidate is sampled less often, however slow it is.
LEAST_REPLAYS = 5
#: Longest pass in us before which an untimed one is worth its time: it hides the launch and warms the caches.
COVERED_US = 2000.0
#: More operand sets than three times the level-2 cache are asked for: an exact multiple could leave the first set in it.
ROTATED_CACHES = 3


class Cuda:
    """The current card."""

    kind = "cuda"
    replays = 200
    pass_us = 500.0
    most_calls = 4096

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.torch).L2_cache_size
        self._stream = torch.cuda.Stream()  # of all captures: libraries keep a workspace for every stream
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Call) -> Call:
        """A replay of the graph of ``run``, which is called once before.  Raises what ``run`` or the capture raises."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _no_gc():  # freeing a graph would spoil the capture of another
            run()
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

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

    kind = "dry"
    replays = LEAST_REPLAYS
    pass_us = 50.0
    most_calls = 16
    l2_bytes = 1 << 14

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

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

    ``graph``: the calls were replayed as one graph, else made from the host; ``note``: why, where a graph was tried.
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


def measure(device: Device, candidates: Mapping[str, Candidate], seconds: float) -> dict[str, Timing]:
    """Time every candidate beside the others for about ``seconds`` in all.

    A round takes one sample of each in turn, beginning with another one every time.  All aim at ``device.replays`` samples;
    one that would exceed its share of the time gets fewer, spread over all rounds.
    """
    passes = {name: _prepare(device, candidate) for name, candidate in candidates.items()}
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


def _prepare(device: Device, candidate: Candidate) -> _Pass:
    def once() -> None:
        for call in candidate.calls:
            call()

    graph, note = candidate.graph and device.kind == "cuda", None
    try:
        run = device.capture(once) if candidate.graph else once
    except RuntimeError as error:
        device.synchronize()
        run, graph, note = once, False, str(error).partition("\n")[0][:200]
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
