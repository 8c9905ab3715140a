"""Two trees beside each other: whether a change makes something slower.

Each is timed in a process of its own (:mod:`bench.worker`).  A round takes four samples of a case, old, new, new, old;
judged is the median of the ratios of neighbours.  Where operands lie can make a process slow for its whole life, so both are
started anew a few times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import worker
from bench.harness import BenchError
from bench.records import ROOT

#: What the native libraries are built from: a revision that differs in none of it runs with those of this tree.
BUILT_FROM = ("csrc", "cmake", "CMakeLists.txt", "setup.py")
LIMIT, ROUNDS = 1.15, 4
#: Pairs of processes, each of ROUNDS rounds.
STARTS = 4
Sample = Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Medians in us; ``ratio``: the median of new over old in neighbouring samples, between its quartiles."""

    old_us: float
    new_us: float
    ratio: float
    low: float
    high: float

    @staticmethod
    def of(pairs: Sequence[tuple[float, float]]) -> Compared:
        """``pairs``: (old, new)."""
        low, ratio, high = statistics.quantiles([new / old for old, new in pairs], n=4, method="inclusive")
        old, new = map(statistics.median, zip(*pairs, strict=True))
        return Compared(old, new, ratio, low, high)


def compare(old: Sample, new: Sample, cases: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Pairs (old, new) of us of every case over all rounds; the first round is discarded, since both prepare there."""
    pairs: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    for i in range(ROUNDS + 1):
        for case in cases:
            first = old(case), new(case)
            other, mine = new(case), old(case)
            if i:
                pairs[case] += [first, (mine, other)]
    return pairs


def slower(found: Mapping[str, Compared], limit: float) -> list[str]:
    """The cases in which new is beyond ``limit`` times old."""
    return [case for case, one in found.items() if not one.ratio <= limit]


def confirmed(measure: Callable[[Sequence[str]], dict[str, Compared]], cases: Sequence[str], limit: float):
    """``measure(cases)``; what is beyond ``limit`` is measured once more, which counts: the machine may have been busy."""
    found = measure(cases)
    return found | (measure(again) if (again := slower(found, limit)) else {})


@contextlib.contextmanager
def tree(where: str) -> Iterator[Path]:
    """A folder as it is, or a revision of this history, exported and built elsewhere.  Raises BenchError for neither."""
    if Path(where).is_dir():
        if not list(Path(where, "t2l_engine").glob("_C*.so")):
            raise BenchError(f"{where}: expected a checkout with a built t2l_engine, found no t2l_engine/_C.so")
        yield Path(where).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="t2l-compare-") as scratch:
        archive, folder = f"{scratch}/tree.tar", Path(scratch, "tree")
        _run(["git", "archive", "--output", archive, where], ROOT, f"{where}: neither a folder nor a revision")
        shutil.unpack_archive(archive, folder)
        libraries = [*Path(ROOT, "t2l_engine").glob("_C*.so"), *Path(ROOT, "t2l_engine").glob("_core*.so")]
        if libraries and not subprocess.run(["git", "diff", "--quiet", where, "--", *BUILT_FROM], cwd=ROOT).returncode:
            for library in libraries:  # of the same sources
                shutil.copy2(library, folder / "t2l_engine")
        else:
            os.environ.setdefault("T2L_CMAKE_ARGS", "-DT2L_CUDA=OFF")  # what is timed runs on a CPU
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # pip's cmake, ninja
            _run([sys.executable, "setup.py", "build_ext", "--inplace"], folder, f"{where}: does not build")
        yield folder


def _run(command: Sequence[str], folder: Path, why: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{why}:\n{(done.stdout + done.stderr)[-2000:]}")


class Process:
    """Runs ``command`` in ``folder``, which answers a line of JSON with a line; ``name``: what an error calls it."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self.name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

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


class Worker(Process):
    """A process that times the engine of ``folder`` on ``threads`` threads; ``isa``: its T2L_ISA if it is given."""

    def __init__(self, folder: Path, threads: int, isa: str):
        command = [sys.executable, "-c", Path(worker.__file__).read_text(encoding="utf-8"), str(threads)]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        environment |= {"T2L_ISA": isa} if isa else {}
        super().__init__(str(folder), command, folder, environment)
        about = self.answer()
        if Path(about["package"]).resolve() != (folder / "t2l_engine").resolve() or not about["native"]:
            raise BenchError(f"{folder}: expected its own t2l_engine with native kernels to be imported, got {about}")


def trees(old: tuple[str, str], new: tuple[str, str], threads: int, only: str, limit: float) -> dict[str, Compared]:
    """``old``, ``new``: a folder or revision, and its T2L_ISA; ``only``: cases whose name contains it."""
    if not (cases := [case for case in worker.CASES if only in case]):
        raise BenchError(f"only: expected part of one of these names: {', '.join(worker.CASES)}; got {only!r}")
    with tree(old[0]) as first, tree(new[0]) as second:

        def measure(cases: Sequence[str]) -> dict[str, Compared]:
            pairs: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
            for _ in range(STARTS):
                sides = (Worker(first, threads, old[1]), Worker(second, threads, new[1]))
                with contextlib.closing(sides[0]) as one, contextlib.closing(sides[1]) as other:
                    for case, found in compare(one.ask, other.ask, cases).items():
                        pairs[case] += found
            return {case: Compared.of(found) for case, found in pairs.items()}

        return confirmed(measure, cases, limit)
