"""What a card says of itself through nvidia-ml-py; nothing of it is ever set."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.context import Context, Skip


class Nvml:
    """The current card.  Raises Skip without nvidia-ml-py or without a driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise Skip("no nvidia-ml-py") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._card = self._find()
        except pynvml.NVMLError as error:
            raise Skip(f"NVML: {error}") from None

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
            raise Skip(f"NVML: no energy counter: {error}") from None


class DryMeter:
    """One watt for ever."""

    def state(self, *names: str) -> dict[str, float | int | None]:
        return dict.fromkeys(names or ("watts", "sm_mhz", "memory_mhz"), 1)

    def joules(self) -> float:
        return time.monotonic()


Meter = Nvml | DryMeter


def meter(context: Context) -> Meter:
    """That of this device.  Raises Skip as :class:`Nvml` does."""
    return Nvml() if context.on_card else DryMeter()
