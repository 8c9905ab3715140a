"""The op tests over the CUDA kernels in the emulator: under several schedules, and under sanitizers on the small cases.

Each run is a process of its own, since the emulator's library stands in for the CPU kernels.
"""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t2l_engine.testing import backends

pytestmark = pytest.mark.emu

TESTS = Path(__file__).parents[1]
OPS = TESTS / "test_ops.py"
HERE = [TESTS / "emu" / name for name in ("emulated_counts.py", "emulated_host.py")]
CASES = (
    "(test_lora_add or test_lora_delta or test_hypernet_trunk or test_hypernet_head or do_not_depend) "
    "and not errors and not grad and not opcheck and not backward"
)
SMALL = f"{CASES} and not serve and not smollm2 and not depend"
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A process of pytest: schedule, files, tests chosen by -k, sanitizer, and multiprocessors: with few of them, blocks
    have long runs of work, and LoRA takes its large chunks."""

    name: str
    schedule: str = "forward"
    files: tuple = (OPS,)
    chosen: str = ""
    sanitize: str = ""
    multiprocessors: int = 132


RUNS = (
    Run("all", files=(OPS, *HERE)),
    Run("few_multiprocessors", chosen=CASES, multiprocessors=1),
    Run("reverse", "reverse", chosen=CASES),
    Run("eager_copies", "forward+eager", chosen=CASES, multiprocessors=2),
    Run("shuffled", "seed=1", chosen=CASES),
    Run("shuffled_few", "seed=2+eager", chosen=SMALL, multiprocessors=1),
    Run("address", chosen=SMALL, sanitize="address"),
    Run("address_few", "seed=3", chosen=SMALL, sanitize="address", multiprocessors=1),
    Run("thread", chosen=SMALL, sanitize="thread"),
    Run("thread_few", "reverse+eager", chosen=SMALL, sanitize="thread", multiprocessors=1),
)


def start(run: Run, libraries: dict[str, Path]) -> subprocess.CompletedProcess:
    environment = os.environ | {"T2L_DISABLE_NATIVE": "1", "T2L_EMU_SCHEDULE": run.schedule, "OMP_NUM_THREADS": "1"}
    environment["T2L_EMU_MULTIPROCESSORS"] = str(run.multiprocessors)
    if run.sanitize:  # its run-time library has to come first in a process that was built without
        compiler = os.environ.get("CXX", "g++")
        found = subprocess.run([compiler, f"-print-file-name={RUNTIMES[run.sanitize]}"], capture_output=True, text=True)
        environment |= {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not cuda",
        "-k",
        run.chosen,
    ]
    command += ["--backend", "emu", "--emulator", str(libraries[run.sanitize]), *map(str, run.files)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)


@pytest.fixture(scope="module")
def results():
    """All runs, two at a time; each result when it is asked for."""
    libraries = {sanitize: backends.build_emulator(sanitize) for sanitize in ("", *RUNTIMES)}
    with ThreadPoolExecutor(2) as pool:
        yield {run.name: pool.submit(start, run, libraries) for run in RUNS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_ops(results, run):
    done = results[run.name].result()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert "Sanitizer" not in output and " passed" in output, output[-6000:]
