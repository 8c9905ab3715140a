"""The steps of the suite, in order of worth, and how long each may take: a plan that fits a deadline whatever fails."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds of the whole run, its end included.
DEADLINE = 530.0
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
#: Exit status of a step that cannot be done here (its last line says why), and of one that must go on in a new process.
EXIT_SKIPPED, EXIT_AGAIN = 77, 75


@dataclasses.dataclass(frozen=True)
class Step:
    """``limit``: seconds; ``least``: with fewer left it is not worth a start.

    ``needs``: steps that must have passed.  ``background``: it runs beside the steps after it, on the host alone.
    ``skip_codes``: exit statuses that mean there was nothing to do.  In ``command`` ``{seconds}`` is what the step gets.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 10.0
    required: bool = True
    needs: tuple[str, ...] = ()
    background: bool = False
    skip_codes: tuple[int, ...] = (EXIT_SKIPPED,)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """How a step ended; ``why``: for anything but PASSED."""

    name: str
    status: str
    seconds: float
    required: bool
    why: str = ""

    @property
    def fine(self) -> bool:
        return self.status == PASSED or not self.required


def allowance(step: Step, left: float, outcomes: Sequence[Outcome]) -> tuple[float, str]:
    """Seconds that ``step`` gets with ``left`` seconds to the deadline; 0 and the reason where it is not to start."""
    known = {outcome.name: outcome.status for outcome in outcomes}
    unmet = [name for name in step.needs if known.get(name, PASSED) != PASSED]
    if unmet:
        return 0.0, f"needs {', '.join(unmet)}, which {known[unmet[0]]}"
    if left < step.least:
        return 0.0, f"{max(0.0, left):.0f} s left, {step.least:.0f} s needed"
    return min(step.limit, left), ""


def plan(scratch: Path, dry: bool, sanitizer: str | None) -> list[Step]:
    """``scratch``: where steps leave their parts; ``sanitizer``: path of compute-sanitizer."""
    python = sys.executable
    kernels = () if dry else ("build",)
    flag = ("--dry",) if dry else ()

    def own(name: str, limit: float, **fields) -> Step:
        part = str(scratch / f"{name.replace(' ', '-')}.json")
        command = (python, "-m", "bench.gpu.step", name, "--part", part, "--seconds", "{seconds}", *flag)
        return Step(name, command, limit, **{"needs": kernels, **fields})

    def tests(name: str, limit: float, *arguments: str, **fields) -> Step:
        listing = ("--collect-only",) if dry else ()
        command = (python, "-m", "pytest", "-q", "--maxfail=25", *arguments, *listing)
        return Step(name, command, limit, needs=kernels, skip_codes=(5,), **fields)

    def sanitized(tool: str, limit: float, **fields) -> Step:
        script = (python, "-m", "bench.gpu.outputs", "--few", "--backend", "cpu" if dry else "cuda")
        script = (*script, "--out", str(scratch / f"{tool}.pt"))
        checked = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        # Every tensor an allocation of its own: what lies beyond one belongs to no other.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(tool, script if dry else checked + script, limit, needs=kernels, environment=alone, **fields)

    emulate = (python, "-m", "bench.gpu.outputs", "--out", str(scratch / "emulator.pt"))
    emulate += ("--backend", "cpu", "--few") if dry else ("--backend", "emu")
    backend = "cpu" if dry else "cuda"
    return [
        Step("build", (python, "-m", "bench.gpu.build", *flag), 170),
        Step("emulator outputs", emulate, 240, background=True, environment={} if dry else {"T2L_DISABLE_NATIVE": "1"}),
        own("environment", 30, needs=()),
        tests("tests of ops", 75, "-m", "not slow", "-k", "not instruction_sets", "--backend", backend, "tests/test_ops.py"),
        own("checks", 45, least=15),
        own("decode", 85, least=20),
        own("generation", 85, least=20),
        own("model", 55, least=25),
        sanitized("memcheck", 50, least=20),
        own("emulator", 40),
        own("prefill", 35, least=15),
        own("linear", 30, least=15),
        own("ceilings", 25, needs=()),
        own("energy", 30, least=15, required=False),
        sanitized("racecheck", 45, least=20, required=False),
        tests("tests of cuda", 45, "-m", "cuda", "tests", required=False),
        own("compiled", 70, least=30, required=False),
        sanitized("synccheck", 30, least=20, required=False),
        sanitized("initcheck", 30, least=20, required=False),
    ]
