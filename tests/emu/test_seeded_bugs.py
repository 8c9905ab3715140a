"""The emulator finds what it is there to find: kernels with one bug each fail, their correct twins pass; and it computes,
counts and orders as documented."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.emu

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread", "-DT2L_EMULATOR", "-fno-strict-aliasing", "-ffp-contract=off")
SANITIZERS = {
    "plain": (),
    "address": ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-g", "-fsanitize=thread"),
}
PROGRAMS = (("seeded_bugs", "plain"), ("seeded_bugs", "address"), ("seeded_bugs", "thread"), ("checks", "address"))
PROGRAMS += (("cuts", "address"),)

LATE = ("forward", "reverse", "seed=1", "seed=2")
EAGER = tuple(f"{order}+eager" for order in LATE)
ALL = LATE + EAGER

# Exit codes: of seeded_bugs.cpp, and of the sanitizers.
PASSES, FAILS, WRONG, RACE = 0, 1, 3, 66

# name, build, schedules, exit code, text
BUGS = [
    ("missing_barrier", "plain", ALL, WRONG, r"= -?nan"),
    ("missing_barrier", "thread", LATE, RACE, r"data race \S*seeded_blocks.cpp"),
    ("missing_barrier_after", "plain", ALL, WRONG, r"wrong"),
    ("missing_barrier_after", "thread", LATE, RACE, r"data race \S*seeded_blocks.cpp"),
    ("missing_wait", "plain", LATE, WRONG, r"= -?nan"),
    ("missing_wait", "plain", EAGER, PASSES, r"^ok$"),  # copies landed when they were issued: only late ones tell
    ("abandoned_copies", "plain", LATE, FAILS, r"exits with 1 copies in flight"),
    ("early_overwrite", "plain", ALL, WRONG, r"wrong"),
    ("early_overwrite", "thread", ("forward", "forward+eager"), RACE, r"data race"),
    ("shared_overrun", "plain", ALL, FAILS, r"block \(\d, 0\) wrote outside its allocation 1 of shared memory, at byte 256"),
    ("shared_overrun", "address", ("forward",), FAILS, r"use-after-poison \S*seeded_blocks.cpp"),
    ("global_overrun", "address", ("forward",), FAILS, r"heap-buffer-overflow"),
    ("misaligned_load", "plain", ALL, FAILS, r"load of 16 bytes at an address that is not a multiple of 16"),
    ("misaligned_copy", "plain", ALL, FAILS, r"asynchronous copy of 16 bytes at an address that is not a multiple of 16"),
    ("copy_to_global", "plain", ALL, FAILS, r"asynchronous copy to an address outside the allocations"),
    ("divergent_exchange", "plain", ALL, FAILS, r"divergent exchange: deposits (4|8) bytes where other lanes .* (4|8)"),
    ("divergent_barrier", "plain", ALL, FAILS, r"deadlock: 48 threads at a barrier, 16 lanes of warp 1 at an exchange"),
    ("missing_turn", "plain", ("reverse", "reverse+eager"), WRONG, r"= -?nan"),
    ("missing_turn", "plain", ("forward",), PASSES, r"^ok$"),  # the first warp ran first
    ("missing_turn", "thread", LATE, RACE, r"data race \S*seeded_blocks.cpp"),
    ("barrier_of_others", "plain", ALL, FAILS, r"32 lanes of warp 1 at barrier 3|(32|64) threads, which others .* (32|64)"),
    ("part_of_a_warp", "plain", ALL, FAILS, r"16 lanes of warp \d arrived, not all|deadlock: 16 lanes of warp"),
    ("arrives_once_more", "plain", ALL, FAILS, r"32 of 64 threads have arrived at barrier 3 at the end of block \(\d, 0\)"),
    ("exited_lane", "plain", ("forward",), FAILS, r"warp exchange: 1 lanes of the warp have exited"),
    ("exited_lane", "plain", ("reverse",), FAILS, r"exits while 31 lanes of its warp wait at an exchange"),
    ("missing_cluster_barrier", "plain", ("forward", "reverse"), WRONG, r"= -?nan"),
    ("missing_cluster_barrier", "thread", LATE, RACE, r"data race \S*seeded_clusters.cpp"),
    ("block_not_begun", "plain", ("forward", "reverse"), FAILS, r"block \d of the cluster, which has not allocated it yet"),
    ("block_exited", "plain", ("forward",), FAILS, r"memory of block 0 of the cluster, which has exited \(block 1, 0, thr"),
    ("sent_after_arriving", "thread", LATE, RACE, r"data race \S*seeded_clusters.cpp"),
    ("abandoned_cluster_barrier", "plain", ALL, FAILS, r"exits without having waited at a cluster barrier"),
    ("read_before_waiting", "plain", ALL, FAILS, r"accesses memory without having waited for earlier launches"),
    ("never_waits", "plain", ALL, FAILS, r"exits without having waited for earlier launches"),
    ("trusts_a_guess", "plain", ("reverse", "seed=1", "seed=2+eager"), WRONG, r"wrong"),
    ("trusts_a_guess", "plain", ("forward",), PASSES, r"^ok$"),  # nothing has changed there
    ("divergent_cluster_barrier", "plain", ALL, FAILS, r"deadlock: 96 threads at a cluster barrier, 16 lanes of warp 1 at"),
    ("outside_the_cluster", "plain", ALL, FAILS, r"shared memory of block 1 of a cluster of 1"),
    ("wrong_stream", "plain", ("forward",), FAILS, r"launched on stream 0x1000, the current one is 0x"),
    ("wrong_device", "plain", ("forward",), FAILS, r"launched on device 1 with memory of device 0"),
    ("too_much_shared", "plain", ALL, FAILS, r"takes 272 bytes of shared memory, launched with 260"),
    ("more_shared_than_there_is", "plain", ("forward",), FAILS, r"launch with 232464 bytes of shared memory"),
    ("different_allocations", "plain", ALL, FAILS, r"takes (128|256) bytes .* where another thread .* (128|256)"),
    ("int32_offset", "address", ("forward",), FAILS, r"signed integer overflow: 65536 \* 32768"),
    ("failed_requirement", "plain", ALL, FAILS, r"an id out of range \(block 1, 0, thread 6\)"),
    # After a failure the same machine runs on, in the eyes of the sanitizers too.
    ("divergent_barrier", "address", ("seed=1",), FAILS, r"deadlock"),
    ("divergent_barrier", "thread", ("seed=1",), FAILS, r"deadlock"),
    ("failed_requirement", "address", ("seed=1",), FAILS, r"an id out of range"),
    ("failed_requirement", "thread", ("seed=1",), FAILS, r"an id out of range"),
]

CHECKS = {
    "checks": "bf16_product f16_product tf32_product bf16_conversions f16_conversions tf32_conversions exchanges copies "
    "counters grid refused_launches streams schedules cut_sums clusters groups",
    "cuts": "lora_cut lora_clusters trunk_cut head_blocks",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """(program, build) -> its file, or why this machine cannot build such programs."""
    compiler = shutil.which("g++")
    if not compiler or platform.machine() != "x86_64":
        pytest.skip("the emulator needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("emu")

    def unusable(build, program):
        empty = program.with_suffix(".cpp")
        empty.write_text("int main() {}\n")
        built = subprocess.run([compiler, *SANITIZERS[build], empty, "-o", program], capture_output=True, text=True)
        if built.returncode == 0:
            built = subprocess.run([program], capture_output=True, text=True)
        return f"g++ cannot build {build} programs here: {built.stderr[-300:]}" if built.returncode else None

    def compile_one(key):
        name, build = key
        program = folder / f"{name}-{build}"
        if reason := unusable(build, program):
            return reason
        emulator = ROOT / "csrc" / "emu"
        own = sorted(SOURCES.glob("seeded_*.cpp")) if name == "seeded_bugs" else [SOURCES / f"{name}.cpp"]
        sources = (*own, *(emulator / f"{part}.cpp" for part in ("emulator", "products", "settings", "waiting")))
        command = [compiler, *FLAGS, *SANITIZERS[build], "-I", ROOT / "csrc", *sources, "-o", program]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        return program

    with ThreadPoolExecutor(min(len(PROGRAMS), os.cpu_count() or 1)) as pool:
        return dict(zip(PROGRAMS, pool.map(compile_one, PROGRAMS), strict=True))


@pytest.fixture
def run(programs):
    """Factory: a program's exit code and output under a schedule."""

    def call(name, build, argument, schedule="forward"):
        program = programs[name, build]
        if isinstance(program, str):
            pytest.skip(program)
        environment = os.environ | {"T2L_EMU_SCHEDULE": schedule}
        for variable in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"):
            environment.pop(variable, None)
        finished = subprocess.run([program, argument], capture_output=True, text=True, env=environment, timeout=120)
        return finished.returncode, finished.stdout + finished.stderr

    return call


def bug_names():
    found = r'^    (?:\{|\w*kernel\(\s*)"(\w+)",'
    return [name for path in sorted(SOURCES.glob("seeded_*.cpp")) for name in re.findall(found, path.read_text(), re.M)]


def test_every_seeded_bug_is_expected_somewhere():
    assert {name for name, *_ in BUGS} == set(bug_names())


@pytest.mark.parametrize(
    "name, build, schedules, code, text", BUGS, ids=[f"{name}-{build}-{'-'.join(s)}"[:60] for name, build, s, *_ in BUGS]
)
def test_a_bug_is_found(run, name, build, schedules, code, text):
    for schedule in schedules:
        found, output = run("seeded_bugs", build, name, schedule)
        assert found == code, (schedule, output)
        assert re.search(text, output), (schedule, output)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("build", SANITIZERS)
def test_correct_twins_pass(run, build, schedule):
    code, output = run("seeded_bugs", build, "--fixed", schedule)
    assert code == 0, output
    # Alone, and on two OS threads at once.
    assert sorted(output.splitlines()) == sorted(3 * [f"{name}: ok" for name in bug_names()])


@pytest.mark.parametrize("program, name", [(program, name) for program, names in CHECKS.items() for name in names.split()])
def test_check(run, program, name):
    assert run(program, "address", name) == (0, "ok\n")


def test_a_schedule_it_does_not_know_fails_every_launch(run):
    code, output = run("seeded_bugs", "plain", "--fixed", "sideways")
    assert code == 1
    assert output.count("T2L_EMU_SCHEDULE is not a schedule: sideways") == len(output.splitlines())
