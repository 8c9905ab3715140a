"""Joules per unit of work and clocks under load, as a card tells them through nvidia-ml-py; nothing of it is ever set."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.harness import BenchError, Context, Record, record
from bench.timing import Call, Candidate

#: Seconds of replaying a case: the energy counter of a card moves in steps of a tenth of a second or so.
SECONDS = 2.5
IDLE_SECONDS = 1.0
#: Seconds between two readings of clocks.
EVERY = 0.05
CLOCKS = ("sm_mhz", "memory_mhz")


class Nvml:
    """The current card.  Raises BenchError without nvidia-ml-py or without a driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise BenchError("energy: expected the package nvidia-ml-py, found none") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._card = self._find()
        except pynvml.NVMLError as error:
            raise BenchError(f"energy: NVML: {error}") from None

    def _find(self) -> Any:
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
        with contextlib.suppress(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return self._nvml.nvmlDeviceGetHandleByIndex(0)

    def state(self, *names: str) -> dict[str, float | int | None]:
        """Watts, MHz, degrees, and the bits that say why clocks are low, or only ``names``; None for what is not told."""
        n = self._nvml
        questions: dict[str, Callable[[], float | int]] = {
            "watts": lambda: n.nvmlDeviceGetPowerUsage(self._card) / 1e3,
            "watts_limit": lambda: n.nvmlDeviceGetEnforcedPowerLimit(self._card) / 1e3,
            "sm_mhz": lambda: n.nvmlDeviceGetClockInfo(self._card, n.NVML_CLOCK_SM),
            "sm_mhz_max": lambda: n.nvmlDeviceGetMaxClockInfo(self._card, n.NVML_CLOCK_SM),
            "memory_mhz": lambda: n.nvmlDeviceGetClockInfo(self._card, n.NVML_CLOCK_MEM),
            "celsius": lambda: n.nvmlDeviceGetTemperature(self._card, n.NVML_TEMPERATURE_GPU),
            "throttled": lambda: n.nvmlDeviceGetCurrentClocksThrottleReasons(self._card),
        }
        told: dict[str, float | int | None] = dict.fromkeys(names or questions)
        for name in told:
            with contextlib.suppress(n.NVMLError, AttributeError):
                told[name] = questions[name]()
        return told

    def joules(self) -> float:
        """Since the driver was loaded."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3
        except self._nvml.NVMLError as error:
            raise BenchError(f"energy: NVML: no energy counter: {error}") from None


class DryMeter:
    """One watt for ever."""

    def state(self, *names: str) -> dict[str, float | int | None]:
        return dict.fromkeys(names or ("watts", "sm_mhz", "memory_mhz"), 1)

    def joules(self) -> float:
        return time.monotonic()


@dataclasses.dataclass(frozen=True)
class Work:
    """``calls``, which together make ``count`` of ``unit``: what joules are told of, a noun."""

    case: str
    unit: str
    count: int
    calls: Sequence[Call]


def _meter(context: Context) -> Nvml | DryMeter:
    return Nvml() if context.device.on_card else DryMeter()


def idle(context: Context) -> Iterator[Record]:
    """The card with nothing to do."""
    meter = _meter(context)
    context.device.synchronize()
    before, start = meter.joules(), time.perf_counter()
    time.sleep(IDLE_SECONDS if context.device.on_card else 0.01)
    spent, taken = meter.joules() - before, time.perf_counter() - start
    known = {"watts": round(spent / taken, 1), "joules": round(spent, 3), "seconds": round(taken, 3)}
    yield record("energy", case="idle", unit=None, count=0, **(meter.state() | known))


@torch.inference_mode()
def measured(context: Context, make: Callable[[], Work]) -> Iterator[Record]:
    """Joules, time, mean power and clocks of replaying what ``make`` gives for SECONDS."""
    device, meter, work = context.device, _meter(context), make()
    replay = device.capture(Candidate(work.calls).once)
    us = min(device.elapsed_us(replay, covered=True) for _ in range(3))
    batch, seconds = (max(1, int(EVERY * 1e6 / us)), SECONDS) if device.on_card else (1, 0.02)
    states, passes = [], 0
    device.synchronize()
    before, start = meter.joules(), time.perf_counter()
    while time.perf_counter() - start < seconds or not passes:
        for _ in range(batch):
            replay()
        states.append(meter.state(*CLOCKS))  # while they run
        device.synchronize()
        passes += batch
    spent, taken = meter.joules() - before, time.perf_counter() - start
    known = {key: [s[key] for s in states if s[key] is not None] for key in CLOCKS}
    made = passes * work.count
    yield record(
        "energy",
        case=work.case,
        unit=work.unit,
        count=work.count,
        us_each=round(1e6 * taken / made, 4),
        mj_each=round(1e3 * spent / made, 5),
        watts=round(spent / taken, 1),
        joules=round(spent, 3),
        seconds=round(taken, 3),
        **{key: round(statistics.fmean(values), 1) for key, values in known.items() if values},
    )
