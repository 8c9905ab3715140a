"""Joules per unit of work and clocks under load, as a card tells them through nvidia-ml-py; nothing of it is ever set."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.harness import BenchError, Context, Record, record
from bench.timing import Call, Candidate, repeated

#: Seconds of replaying a case: the energy counter of a card moves in steps of a tenth of a second or so.
SECONDS, IDLE_SECONDS = 2.5, 1.0
#: Seconds between two readings of clocks.
EVERY = 0.05
CLOCKS = ("sm_mhz", "memory_mhz")
State = dict[str, float | int | None]


class Nvml:
    """The current card.  Raises BenchError without nvidia-ml-py, a driver, or an energy counter."""

    def __init__(self) -> None:
        try:
            import pynvml as nvml
        except ImportError:
            raise BenchError("energy: expected the package nvidia-ml-py, found none") from None
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._card = nvml.nvmlDeviceGetHandleByIndex(0)
            with contextlib.suppress(nvml.NVMLError):
                self._card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            self.joules()
        except nvml.NVMLError as error:
            raise BenchError(f"energy: NVML: {error}") from None

    def state(self, *names: str) -> State:
        """Watts, MHz, degrees, and the bits that say why clocks are low, or only ``names``; None for what is not told."""
        n, card = self._nvml, self._card
        queries: dict[str, Call] = {
            "watts": lambda: n.nvmlDeviceGetPowerUsage(card) / 1e3,
            "watts_limit": lambda: n.nvmlDeviceGetEnforcedPowerLimit(card) / 1e3,
            "sm_mhz": lambda: n.nvmlDeviceGetClockInfo(card, n.NVML_CLOCK_SM),
            "sm_mhz_max": lambda: n.nvmlDeviceGetMaxClockInfo(card, n.NVML_CLOCK_SM),
            "memory_mhz": lambda: n.nvmlDeviceGetClockInfo(card, n.NVML_CLOCK_MEM),
            "celsius": lambda: n.nvmlDeviceGetTemperature(card, n.NVML_TEMPERATURE_GPU),
            "throttled": lambda: n.nvmlDeviceGetCurrentClocksThrottleReasons(card),
        }
        told = dict.fromkeys(names or queries)
        for name in told:
            with contextlib.suppress(n.NVMLError, AttributeError):
                told[name] = queries[name]()
        return told

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3


class DryMeter:
    """One watt for ever."""

    def state(self, *names: str) -> State:
        return dict.fromkeys(names or ("watts", *CLOCKS), 1)

    def joules(self) -> float:
        return time.monotonic()


@dataclasses.dataclass(frozen=True)
class Work:
    """``calls``, which together make ``count`` of ``unit``, the noun that joules are of."""

    case: str
    unit: str
    count: int
    calls: Sequence[Call]


def _spent(context: Context, run: Call, seconds: float, *names: str) -> tuple[float, float, Sequence[State]]:
    """Joules and seconds of calling ``run`` for ``seconds``, and the state while the card works on each call."""
    meter = Nvml() if context.device.on_card else DryMeter()
    states = []
    context.device.synchronize()
    before, start = meter.joules(), time.perf_counter()
    while time.perf_counter() - start < seconds or not states:
        run()
        states.append(meter.state(*names))
        context.device.synchronize()
    return meter.joules() - before, time.perf_counter() - start, states


def _record(case: str, unit: str | None, count: int, joules: float, seconds: float, known: Record) -> Record:
    known |= {"watts": round(joules / seconds, 1), "joules": round(joules, 3), "seconds": round(seconds, 3)}
    return record("energy", case=case, unit=unit, count=count, **known)


def idle(context: Context) -> Iterator[Record]:
    """The card with nothing to do."""
    seconds = IDLE_SECONDS if context.device.on_card else 0.01
    joules, taken, states = _spent(context, lambda: time.sleep(seconds), seconds)
    yield _record("idle", None, 0, joules, taken, states[-1])


@torch.inference_mode()
def measured(context: Context, make: Callable[[], Work]) -> Iterator[Record]:
    """Joules, time, mean power and clocks of replaying what ``make`` gives for SECONDS."""
    device, work = context.device, make()
    replay = device.capture(Candidate(work.calls).once)
    us = min(device.elapsed_us(replay, covered=True) for _ in range(3))
    passes, seconds = (max(1, int(EVERY * 1e6 / us)), SECONDS) if device.on_card else (1, 0.02)
    joules, taken, states = _spent(context, repeated(replay, passes), seconds, *CLOCKS)
    made = passes * len(states) * work.count
    known = {"us_each": round(1e6 * taken / made, 4), "mj_each": round(1e3 * joules / made, 5)}
    for clock in CLOCKS:
        if told := [state[clock] for state in states if state[clock] is not None]:
            known[clock] = round(statistics.fmean(told), 1)
    yield _record(work.case, work.unit, work.count, joules, taken, known)
