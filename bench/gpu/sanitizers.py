"""compute-sanitizer's tools over the small cases, all at once: nothing is timed, and there are cores enough."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.build import ROOT, find_cuda_tool
from bench.gpu.context import Context, Entries, Skip
from bench.gpu.outputs import MODULE

#: Tool -> its options.  Calls of the API that fail are torch's own questions, not errors of kernels.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": (), "initcheck": ()}
#: Exit status of a tool that has found errors.
FOUND = 9
#: Every tensor an allocation of its own: what lies beyond one belongs to no other.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
UNSUPPORTED = "Device not supported"


class Sanitized:
    """A tool that was started; without ``sanitizer`` only what it would watch."""

    def __init__(self, tool: str, sanitizer: str | None, scratch: Path):
        self.tool, self.out, self.log = tool, scratch / f"{tool}.pt", scratch / f"{tool}.txt"
        script = (sys.executable, "-m", MODULE, "--few", "--out", str(self.out))
        checked = (sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND)) if sanitizer else ()
        command = (*checked, *script, "--backend", "cuda" if sanitizer else "cpu")
        with self.log.open("w", encoding="utf-8") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, **streams)

    def entries(self, context: Context) -> Entries:
        """Its verdict, once it has ended.  Raises Skip for a card that it does not know, TimeoutError where it is late."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(1.0, context.left))
        code, text = self.process.poll(), self.log.read_text(encoding="utf-8", errors="replace")
        print(text, flush=True)
        if code is None:
            raise TimeoutError("it came to no end")
        if UNSUPPORTED in text:
            raise Skip(f"{self.tool}: {UNSUPPORTED}")
        return [("checks", verdict(self.tool, code, text, self.out.exists()))]


def verdict(tool: str, code: int, text: str, made: bool) -> dict[str, Any]:
    """An entry of "checks".  ``made``: whether the cases ran to their end: a tool that ran nothing finds nothing."""
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    detail = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "it printed nothing")
    passed = code == 0 and made
    why = "" if passed else "; the cases gave no outputs" if not made else f"; exit status {code}"
    return {"check": tool, "passed": passed, "detail": f"{detail[:200]}{why}"}


def run(context: Context) -> None:
    sanitizer = find_cuda_tool("compute-sanitizer")
    if context.on_card and not sanitizer:
        raise Skip("no compute-sanitizer")
    wanted = [tool for tool in TOOLS if tool not in context.part.data["done"]]
    if not context.on_card:
        sanitizer, wanted = None, wanted[:1]
    started = [Sanitized(tool, sanitizer, context.part.path.parent) for tool in wanted]
    try:
        for one in started:
            context.attempt(one.tool, functools.partial(one.entries, context))
    finally:
        for one in started:
            one.process.kill()
            one.process.wait()
