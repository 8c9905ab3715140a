"""What a step works with: its device, its time, and the file its results go to, entry by entry."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.timing import Device, first_line, is_lost

Entries = Iterable[tuple[str, dict[str, Any]]]


class Skip(Exception):
    """Something that is needed is not here; the message says what."""


class Lost(Exception):
    """This process cannot go on: the device no longer answers it, or a capture has failed in it."""


class Part:
    """The results of one step, written anew after every entry: a step that is killed keeps what it had.

    A file that is there already is gone on with: what was running then has ended its process, and is not tried again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"done": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            left_out = self.data.get("left_out", [])
            self.data["left_out"] = [e for e in left_out if e["case"] in self.data["done"]]  # the late ones get another try
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
    """One process of a step, which should end within ``seconds``."""

    def __init__(self, device: Device, part: Part, seconds: float):
        self.device, self.part = device, part
        self._end = time.monotonic() + seconds
        device.uncaptured |= part.data.get("uncaptured", {})

    @property
    def on_card(self) -> bool:
        """Whether times mean something: bars are stated for a card."""
        return self.device.on_card

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
            self.part.add("failed", {"case": case, "error": f"{type(error).__name__}: {first_line(error, 300)}"})
            lost = self.on_card and is_lost(error)
        self.part.data["done"].append(self.part.data.pop("running"))
        self.part.set(uncaptured=self.device.uncaptured)
        if lost or self.device.spoiled:
            raise Lost(case)
        if self.on_card:
            gc.collect()
            with contextlib.suppress(RuntimeError):  # only memory is at stake
                torch.cuda.empty_cache()
