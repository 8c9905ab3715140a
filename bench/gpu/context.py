"""What a step works with: its device, its time, and the file its results go to, entry by entry."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.timing import Cuda, Device, Dry

Entries = Iterable[tuple[str, dict[str, Any]]]
#: What CUDA says once its context is lost: nothing else will run in this process.
LOST = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "illegal memory access", "unspecified launch failure")


class Skip(Exception):
    """Something that is needed is not here; the message says what."""


class Lost(Exception):
    """The device no longer answers this process."""


class Part:
    """The results of one step, written anew after every entry: a step that is killed keeps what it had.

    A file that is there already is gone on with: what was running then has ended its process, and is not tried again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"done": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if running := self.data.pop("running", None):
                self.data["done"].append(running)
                self.add("failed", {"case": running, "error": "the process ended"})

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Append to the list ``kind``."""
        self.data.setdefault(kind, []).append(entry)
        self.write()

    def set(self, **fields: Any) -> None:
        self.data |= fields
        self.write()

    def write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


class Context:
    """One process of a step.  ``seconds``: when it should have ended."""

    def __init__(self, device: Device, part: Part, seconds: float):
        self.device, self.part = device, part
        self._end = time.monotonic() + seconds

    @property
    def dry(self) -> bool:
        return isinstance(self.device, Dry)

    @property
    def on_card(self) -> bool:
        """Whether bars apply: they are stated for a card."""
        return isinstance(self.device, Cuda)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def attempt(self, case: str, make: Callable[[], Entries], needs: float = 0.0) -> None:
        """Keep what ``make`` gives, entry by entry; keep what goes wrong too, and go on.

        Nothing happens where the case was done before.  It is left out where less than ``needs`` seconds are left.  Raises
        Lost where the rest needs a new process.
        """
        if case in self.part.data["done"]:
            return
        if self.left < needs:
            self.part.add("left_out", {"case": case, "why": f"{self.left:.0f} s left, {needs:.0f} s needed"})
            return
        print(f"{case} ({self.left:.0f} s left)", flush=True)
        self.part.set(running=case)
        lost = False
        try:
            for kind, entry in make():
                self.part.add(kind, entry)
        except Skip as why:
            self.part.add("left_out", {"case": case, "why": str(why)})
        except Exception as error:  # one case that fails must not cost the others
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
            self.part.add("failed", {"case": case, "error": text})
            lost = self.on_card and any(sign in str(error) for sign in LOST)
        self.part.data["done"].append(self.part.data.pop("running"))
        self.part.write()
        if lost:
            raise Lost(case)
        if self.on_card:
            gc.collect()
            torch.cuda.empty_cache()
