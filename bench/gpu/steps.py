"""The steps of the suite, in order of worth, and how long each may take: a plan that fits a deadline whatever fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds of the whole run, its end included.
DEADLINE = 530.0
#: A dry run measures nothing, and may take so many times as long.
DRY_PATIENCE = 10.0
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
#: Lists that steps leave in their parts.
LISTS = ("rows", "checks", "ceilings", "energy", "failed", "left_out")
#: Packages that training needs; without one of them its tests are skipped.
TRAINING = ("accelerate", "matplotlib", "pydantic")
#: Exit status of a step that cannot be done here (its last line says why), and of one that must go on in a new process.
EXIT_SKIPPED, EXIT_AGAIN = 77, 75


@dataclasses.dataclass(frozen=True)
class Step:
    """``limit``: seconds; ``least``: with fewer left it is not worth a start.  ``needs``: steps that must have passed.

    ``part``: the file that it keeps its results in, entry by entry; it can go on with one.  In ``command`` ``{until}`` is
    when it should have ended, on time.monotonic(), which all processes share.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 10.0
    required: bool = True
    needs: tuple[str, ...] = ()
    part: Path | None = None
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


def plan(scratch: Path, dry: bool) -> list[Step]:
    """``scratch``: where steps leave their parts."""
    python = sys.executable
    kernels = () if dry else ("build",)
    flag = ("--dry",) if dry else ()

    def own(name: str, run: str, limit: float, **fields) -> Step:
        part = scratch / f"{name}.json"
        command = (python, "-m", "bench.gpu.step", run, "--part", str(part), "--until", "{until}", *flag)
        return Step(name, command, limit, part=part, **{"needs": kernels, **fields})

    # Gradients and registration are the same on every device, and take minutes.
    chosen = ("-m", "not slow", "-k", "not instruction_sets and not gradcheck and not opcheck", "tests/ops")
    tests = (python, "-m", "pytest", "-q", "--maxfail=25", "--backend", *(("cpu", "--collect-only") if dry else ("cuda",)))
    training = (python, "-m", "pytest", "-q", "-m", "cuda", *(("--collect-only",) if dry else ()), "tests/training")
    lacking = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if lacking:
        training = (python, "-c", f"print('no {', '.join(lacking)}'); raise SystemExit({EXIT_SKIPPED})")
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    steps = [
        Step("build", (python, "-m", "bench.gpu.build", *flag), 170),
        own("environment", "environment:run", 20, needs=()),
        Step("tests of ops", (*tests, *chosen), 45, needs=kernels, environment=alone),
        own("checks", "checks:run", 30, least=15),
        own("decode", "lora:decode", 65, least=20),
        own("generation", "generation:run", 70, least=20),
        own("model", "model:run", 50, least=25),
        own("icl", "icl:run", 55, least=25),
        own("memcheck", "sanitizers:memcheck", 60, least=25),
        own("racecheck", "sanitizers:racecheck", 60, least=25),
        own("emulator", "outputs:run", 40),
        own("energy", "energy:run", 30, least=15, required=False),
        own("compiled", "generation:compiled", 45, least=30, required=False),
        own("prefill", "lora:prefill", 35, least=15),
        own("linear", "linear:run", 45, least=15),
        own("ceilings", "ceilings:run", 15, needs=()),
        own("synccheck", "sanitizers:synccheck", 60, least=25, required=False),
        own("initcheck", "sanitizers:initcheck", 60, least=25, required=False),
        Step("tests of training", training, 60, needs=kernels, least=30, required=False),
    ]
    return [dataclasses.replace(step, limit=DRY_PATIENCE * step.limit) for step in steps] if dry else steps
