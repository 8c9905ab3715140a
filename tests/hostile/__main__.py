"""``python tests/hostile DIR`` writes the corpus, ``python tests/hostile --judge`` judges every case and keeps nothing."""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import faulthandler
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile import HANG_SECONDS, MARKER, Case, corpus, judge


def status(field: str) -> int:
    """A memory figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def reset_peak() -> bool:
    """Set VmHWM to the memory now in use; False where the kernel does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is cached on the heap would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _judged(case: Case) -> dict:
    measured = reset_peak()
    before = status("VmRSS") if measured else 0
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    with cProfile.Profile() as work:
        wrong = judge(case)
    faulthandler.cancel_dump_traceback_later()
    return {
        "name": case.name,
        "wrong": wrong,
        "calls": sum(entry.callcount for entry in work.getstats()),
        "peak": status("VmHWM") - before if measured else None,
        "bytes": case.size(),
        "memory": case.memory(),
        "digest": case.digest(),
        "executed": os.path.exists(MARKER),
    }


def _steady_heap() -> None:
    """Large blocks go back to the kernel when freed, however large others were before: peaks of cases stay comparable."""
    M_MMAP_THRESHOLD = -3
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    except AttributeError:  # not glibc
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", help="where to keep the corpus")
    parser.add_argument("--judge", action="store_true", help="print one JSON line a case and keep nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="judge the cases whose name contains this text")
    parser.add_argument("--after", default="", help="judge the cases after the one of this name")
    parser.add_argument("--part", default="0/1", help="judge every n-th case from the i-th on: i/n")
    arguments = parser.parse_args()
    if arguments.directory is None and not arguments.judge:
        parser.error("either DIR or --judge is needed")
    warnings.simplefilter("ignore")
    if not arguments.judge:
        total = sum(1 for _ in corpus(arguments.directory, arguments.seed, keep=True))
        print(f"{total} cases in {arguments.directory}")
        return
    _steady_heap()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        os.chdir(directory)
        waiting = bool(arguments.after)
        first, step = map(int, arguments.part.split("/"))
        for number, case in enumerate(corpus(directory, arguments.seed)):
            if not waiting and arguments.only in case.name and number % step == first:
                print(json.dumps({"name": case.name}), flush=True)  # a crash is thereby a crash of this case
                print(json.dumps(_judged(case)), flush=True)
                if os.path.exists(MARKER):
                    os.remove(MARKER)
            waiting = waiting and case.name != arguments.after


if __name__ == "__main__":
    main()
