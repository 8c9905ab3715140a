"""Runs every step in a process of its own and puts what they leave into one result: ``python -m bench.gpu.suite OUT``.

Writes into OUT: ``gpu.json`` (what becomes ``bench/results/gpu.json``), ``gpu.md`` (the same to be read), ``steps.json`` and
``log.txt`` (what every step printed), and nothing else.  All are written anew after every step, and ``gpu.json`` every
SAVED seconds, so that a run that is cut short or killed has what it had.  The build is in place: it writes
``t2l_engine/*.so`` and ``build``.  Exit status 0 only where every required step passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.gpu import tables
from bench.gpu.steps import (
    DEADLINE,
    DRY_PATIENCE,
    EXIT_AGAIN,
    EXIT_SKIPPED,
    FAILED,
    LISTS,
    PASSED,
    SKIPPED,
    TIMED_OUT,
    Outcome,
    Step,
    allowance,
    plan,
)
from bench.source import ROOT, source

#: How often a step may go on in a new process, after it has lost its device or its life.
TRIES = 3
#: Of what a step prints, bytes that are kept: its beginning and its end.
KEPT = 200_000
#: Seconds that a step has to end by itself.
MARGIN = 3.0
#: Seconds between two writings of what a step that runs has found.
SAVED = 10.0
#: What no step may reach for, and what makes logs whole.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


class Running:
    """A step that was started; ``seconds``: what it may take."""

    def __init__(self, step: Step, seconds: float, scratch: Path):
        self.step, self.end = step, time.monotonic() + seconds
        self.start = time.monotonic()
        self.log = log_of(step.name, scratch)
        self._caches = {f"{name}_CACHE_DIR": str(scratch / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
        self._file: TextIO = self.log.open("a", encoding="utf-8")
        self.process = self._open()

    def _open(self) -> subprocess.Popen:
        command = [word.replace("{until}", f"{self.end - MARGIN:.1f}") for word in self.step.command]
        environment = os.environ | ENVIRONMENT | self._caches | dict(self.step.environment)
        streams = {"stdin": subprocess.DEVNULL, "stdout": self._file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)

    def wait(self, save: Callable[[], None]) -> Outcome:
        """How it ended, once it has.  A step that keeps its results goes on in a new process where it must."""
        for attempt in range(TRIES):
            code = self._ended(save)
            if code is None:
                return self.stop(TIMED_OUT, f"after {time.monotonic() - self.start:.0f} s")
            self._kill()  # what it has left behind would run beside the next step
            last = attempt == TRIES - 1 or self.end - time.monotonic() < self.step.least
            if last or self.step.part is None or not (code == EXIT_AGAIN or code < 0):
                break
            self.process = self._open()
        if code == 0:
            return self._outcome(PASSED, self._left_out())
        status = SKIPPED if code == EXIT_SKIPPED else FAILED
        return self._outcome(status, self._last_line() if code > 0 else f"signal {-code}")

    def _ended(self, save: Callable[[], None]) -> int | None:
        """Exit status of its process, None where the time is up before; ``save`` is called while it runs."""
        while (left := self.end - time.monotonic()) > 0:
            try:
                return self.process.wait(min(left, SAVED))
            except subprocess.TimeoutExpired:
                save()
        return self.process.poll()

    def stop(self, status: str, why: str) -> Outcome:
        """End it now."""
        self._kill()
        return self._outcome(status, why)

    def _kill(self) -> None:
        """It and what it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        self.process.poll()

    def _outcome(self, status: str, why: str = "") -> Outcome:
        self._file.close()
        return Outcome(self.step.name, status, round(time.monotonic() - self.start, 1), self.step.required, why)

    def _left_out(self) -> str:
        part = self.step.part
        count = len(_read(part).get("left_out", [])) if part and part.exists() else 0
        return f"{count} left out" if count else ""

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if line), "")


def _start(step: Step, seconds: float, scratch: Path) -> Running | Outcome:
    try:
        return Running(step, seconds, scratch)
    except OSError as error:  # no such program
        return Outcome(step.name, SKIPPED, 0.0, step.required, f"{step.command[0]}: {error.strerror}")


class Suite:
    """One run into ``out``, of steps whose name contains ``only``.  ``commit``: of the tree, else git's word is taken."""

    def __init__(self, out: Path, scratch: Path, dry: bool = False, commit: str | None = None, only: str = ""):
        self.out, self.scratch, self.dry, self.only = out, scratch, dry, only
        self.end = time.monotonic() + DEADLINE * (DRY_PATIENCE if dry else 1)
        self.outcomes: list[Outcome] = []
        self.current: Running | None = None
        self.source = measured(commit)

    def run(self, steps: list[Step]) -> list[Outcome]:
        for step in steps:
            seconds, why = allowance(step, self.end - time.monotonic(), self.outcomes)
            if why:
                self._done(Outcome(step.name, SKIPPED, 0.0, step.required, why))
                continue
            started = _start(step, seconds, self.scratch)
            if isinstance(started, Outcome):
                self._done(started)
                continue
            self.current = started
            outcome = started.wait(self._save)
            self.current = None
            self._done(outcome)
        return self.outcomes

    def close(self) -> None:
        """Stop what still runs, and keep what it has left."""
        if self.current:
            self._done(self.current.stop(FAILED, "the run was ended"))
        else:
            self._save()

    def _done(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(line(outcome), flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"===== {line(outcome)}\n{clipped(log_of(outcome.name, self.scratch))}\n")
        self._save()

    def _save(self) -> None:
        result = self.result()
        _write(self.out / "steps.json", result["steps"])
        _write(self.out / "gpu.json", result)
        try:
            (self.out / "gpu.md").write_text(tables.whole(result), encoding="utf-8")
        except (KeyError, TypeError) as error:  # the numbers are safe; a table must not end the run
            print(f"gpu.md: {type(error).__name__}: {error}", flush=True)

    def result(self) -> dict[str, Any]:
        """Everything so far, in the form of ``bench/results``."""
        made: dict[str, Any] = {
            "suite": "gpu",
            "size": "dry" if self.dry else "full",
            "command": "bash bench/gpu_suite.sh OUT" + (f" --only {self.only}" if self.only else ""),
            **self.source,
            "steps": [asdict(outcome) for outcome in self.outcomes],
            "info": {},
            **{name: [] for name in LISTS},
        }
        for path in sorted(self.scratch.glob("*.json")):
            part = _read(path)
            for name in LISTS:
                made[name] += [{"step": path.stem, **entry} for entry in part.get(name, [])]
            made |= {name: part[name] for name in ("machine", "versions", "kernels", "expected") if name in part}
            if "info" in part:
                made["info"][path.stem] = part["info"]
        return made


def line(outcome: Outcome) -> str:
    """An outcome for the terminal."""
    mark = "" if outcome.required else " (optional)"
    return f"{outcome.name:18} {outcome.status:9} {outcome.seconds:6.1f} s{mark}{'  ' if outcome.why else ''}{outcome.why}"


def log_of(name: str, scratch: Path) -> Path:
    """What the step of this name prints goes here."""
    return scratch / f"{name.replace(' ', '-')}.log"


def clipped(log: Path) -> str:
    """The beginning and the end of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text if len(text) <= KEPT else f"{text[: KEPT // 2]}\n[...]\n{text[-KEPT // 2 :]}"


def measured(commit: str | None) -> dict[str, Any]:
    """Date, commit (the one given goes first), and a digest of the sources that are measured."""
    tree = source()
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*"), *ROOT.glob("t2l_engine/**/*.py"), ROOT / "CMakeLists.txt"]):
        if path.is_file() and path.suffix != ".so":
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return tree | {"commit": commit or tree["commit"], "sources": digest.hexdigest()[:16]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.suite", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write into; made where it is not there")
    parser.add_argument("commit", nargs="?", help="of the tree, where it comes without its history")
    parser.add_argument("--dry", action="store_true", help="every step's code, tiny, on this CPU: nothing is measured")
    parser.add_argument("--only", default="", help="only steps whose name contains this; a result that is not whole")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # steps have sessions of their own: end them
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="t2l-gpu-"))
    (out / "log.txt").unlink(missing_ok=True)
    suite = Suite(out, scratch, arguments.dry, arguments.commit, arguments.only)
    try:
        suite.run([step for step in plan(scratch, arguments.dry) if arguments.only in step.name])
    finally:
        suite.close()
        result = suite.result()
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(["", *map(line, suite.outcomes), "", tables.bars(result)]))
    return 0 if all(outcome.fine for outcome in suite.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
