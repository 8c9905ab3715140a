"""compute-sanitizer's tools over the small cases, a step each: under one of them torch takes half a minute to start."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
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


def _run(tool: str, context: Context) -> None:
    """The step of one tool; a dry run does what it would watch."""
    sanitizer = find_cuda_tool("compute-sanitizer")
    if context.on_card and not sanitizer:
        raise Skip("no compute-sanitizer")
    context.attempt(tool, functools.partial(_entries, tool, sanitizer, context))


def _entries(tool: str, sanitizer: str | None, context: Context) -> Entries:
    """The verdict.  Raises Skip for a card that the tool does not know, TimeoutError where it is late."""
    out = context.part.path.with_suffix(".pt")
    out.unlink(missing_ok=True)
    command = (sys.executable, "-m", MODULE, "--few", "--out", str(out), "--backend", "cuda" if context.on_card else "cpu")
    if context.on_card:
        command = (sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND), *command)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, timeout=max(1.0, context.left), **streams)
    except subprocess.TimeoutExpired as late:
        print(_text(late.stdout), flush=True)
        raise TimeoutError("it came to no end") from None
    print(done.stdout, flush=True)
    if UNSUPPORTED in done.stdout:
        raise Skip(f"{tool}: {UNSUPPORTED}")
    return [("checks", verdict(tool, done.returncode, done.stdout, out.exists()))]


def _text(output: str | bytes | None) -> str:
    """What a process that was killed had printed, which comes as bytes."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def verdict(tool: str, code: int, text: str, made: bool) -> dict[str, Any]:
    """An entry of "checks".  ``made``: whether the cases ran to their end: a tool that ran nothing finds nothing."""
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    detail = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "it printed nothing")
    passed = code == 0 and made
    why = "" if passed else "; the cases gave no outputs" if not made else f"; exit status {code}"
    return {"check": tool, "passed": passed, "detail": f"{detail[:200]}{why}"}


memcheck, racecheck, synccheck, initcheck = (functools.partial(_run, tool) for tool in TOOLS)
