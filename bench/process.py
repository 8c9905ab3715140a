"""A process that answers: a line of JSON for a line of JSON, on its own standard input and output."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import BenchError


class Process:
    """Runs ``command`` in ``folder``; ``name``: what an error calls it.  Its standard error is that of this process."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self.name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self) -> Any:
        """The next line that it writes; BenchError where it ended."""
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name}: its worker ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it ended, which the answer says
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
