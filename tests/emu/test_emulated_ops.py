"""The op tests over the CUDA kernels in the emulator: under several schedules, and under sanitizers on the small cases.

Each run is a process of its own, since the emulator's library stands in for the CPU kernels.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import backends
from tests.ops.kernel_cases import LARGE, at_least

pytestmark = pytest.mark.emu

TESTS = Path(__file__).parents[1]
OPS = TESTS / "ops"
HERE = [TESTS / "emu" / name for name in ("emulated_lora_traffic.py", "emulated_hypernet_traffic.py", "emulated_host.py")]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a run of pytest takes: marker expression, names that are left out; how many tests must pass at least."""

    marked: str
    without: tuple[str, ...]
    least: int


KERNELS = Selection("kernel_case", (), at_least())
SMALL = Selection("kernel_case", (*LARGE, "do_not_depend"), at_least(*LARGE))
REST = Selection("not slow and not cuda and not kernel_case", (), 100)  # registration, errors, counts and the host side


@dataclasses.dataclass(frozen=True)
class Run:
    """A process of pytest: schedule, files, tests, sanitizer, and a device: with few SMs, blocks have long runs of work,
    and LoRA takes its large token tiles; with little shared memory, tiles of the trunk and of latents are smaller."""

    name: str
    tests: Selection
    schedule: str = "forward"
    files: tuple = (OPS,)
    sanitize: str = ""
    num_sms: int = 132
    max_cluster: int = 8  # 1: a card without clusters and PDL launches
    shared_kib: int = 227  # of a block
    release: bool = False  # whether .ci/release runs it alone: what it adds is another order or device


RUNS = (
    Run("forward", KERNELS),
    Run("rest", REST, files=(OPS, *HERE)),
    Run("reverse", KERNELS, "reverse", num_sms=1, release=True),
    Run("few_sms", KERNELS, num_sms=1, release=True),
    Run("eager_copies", KERNELS, "forward+eager", num_sms=2, release=True),
    Run("shuffled", KERNELS, "seed=1", release=True),
    Run("compute_8_6", SMALL, max_cluster=1, shared_kib=99),
    Run("shuffled_few", SMALL, "seed=2+eager", num_sms=1, release=True),
    Run("address", SMALL, sanitize="address"),
    Run("address_few", SMALL, "seed=3", sanitize="address", num_sms=1, release=True),
    Run("thread", SMALL, sanitize="thread", release=True),
    Run("thread_few", SMALL, "reverse+eager", sanitize="thread", num_sms=1),
)


def preloaded(sanitize: str) -> dict[str, str]:
    """Environment of a process that was built without the sanitizer: its run-time library has to come first there."""
    command = [backends.emulator_compiler(sanitize), f"-print-file-name={RUNTIMES[sanitize]}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):  # what a compiler says of a file that it does not have
        pytest.skip(f"{command[0]} has no {found} to preload")
    return {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}


def start(run: Run, library: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"T2L_DISABLE_NATIVE": "1", "T2L_EMU_SCHEDULE": run.schedule, "OMP_NUM_THREADS": "1"}
    environment |= {"T2L_EMU_NUM_SMS": str(run.num_sms), "T2L_EMU_MAX_CLUSTER": str(run.max_cluster)}
    environment |= {"T2L_EMU_SHARED_BYTES": str(run.shared_kib * 1024)}
    environment |= preloaded(run.sanitize) if run.sanitize else {}
    # Sanitizers write to the file of standard error, which pytest would capture and show for failed tests alone.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-m", run.tests.marked]
    command += ["-k", " and ".join(f"not {word}" for word in run.tests.without)] if run.tests.without else []
    command += ["--backend", "emu", "--library", str(library), *map(str, run.files)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)


@pytest.fixture(scope="module")
def results(request):
    """Run by name: its process, or why there is none.  Those of the tests that were chosen, two at a time; every library
    they need is built once, in the order in which they need it."""
    chosen = [item.callspec.params["run"] for item in request.session.items if getattr(item, "function", None) is test_ops]
    unusable = functools.cache(backends.no_emulator)
    with ThreadPoolExecutor(1) as builder, ThreadPoolExecutor(2) as pool:
        kinds = [kind for kind in dict.fromkeys(run.sanitize for run in chosen) if not unusable(kind)]
        libraries = {kind: builder.submit(backends.build_emulator, kind) for kind in kinds}
        process = lambda run: start(run, libraries[run.sanitize].result())  # noqa: E731
        yield {run.name: unusable(run.sanitize) or pool.submit(process, run) for run in chosen}
        builder.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.release if run.release else ()) for run in RUNS], ids=lambda run: run.name
)
def test_ops(results, run):
    if isinstance(results[run.name], str):
        pytest.skip(results[run.name])
    done = results[run.name].result()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert "Sanitizer" not in output, output[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= run.tests.least, output[-2000:]
