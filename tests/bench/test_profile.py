"""Counters of a card: what ncu is asked for, how its page is read, what it may say instead.  ncu itself needs a card."""

import csv
import io
import stat
import sys

import pytest

from bench import kernels
from bench.harness import BenchError, Context
from bench.suites import profile
from bench.timing import Dry

#: Of every counter, in base units.
VALUES = {
    "gpu__time_duration.sum": "12,345",
    "dram__bytes_read.sum": "8,000,000",
    "dram__bytes_write.sum": "500,000",
    "sm__cycles_elapsed.max": "20,000",
    "sm__cycles_active.avg": "15,000",
    profile.STALL.format("long_scoreboard"): "7.25",
    profile.STALL.format("barrier"): "2.5",
    profile.STALL.format("wait"): "0.5",
}
COUNTERS = [*(name for name, _ in profile.COUNTERS.values()), *map(profile.STALL.format, profile.REASONS)]
UNITS = {"gpu__time_duration.sum": "nsecond"} | dict.fromkeys(
    ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum"), "byte"
)
LORA = "void t2l::device::lora_kernel<t2l::device::bf16, 1, 1, true>(t2l::device::LoraLaunch)"
GRAD = "lora_grad_kernel"


def page(*names, values=VALUES, units=UNITS):
    """As ncu prints it: a line of its own, headings, units, and a row for each launch."""
    out = io.StringIO()
    rows = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    rows.writerow(["ID", "Kernel Name", *COUNTERS])
    rows.writerow(["", "", *(units.get(name, "%") for name in COUNTERS)])
    for i, name in enumerate(names):
        rows.writerow([i, name, *(values.get(counter, "0.1") for counter in COUNTERS)])
    return "==PROF== Connected to process 7\n" + out.getvalue()


def test_a_page_is_read():
    first, second = profile.launches_of(page(LORA, GRAD), ("lora_kernel", "lora_grad_kernel"))
    assert (first["us"], first["dram_read_mb"], first["dram_written_mb"], first["active_percent"]) == (
        12.345,
        8.0,
        0.5,
        75.0,
    )
    assert first["stalls"] == {"long_scoreboard": 7.25, "barrier": 2.5, "wait": 0.5} and first == second
    assert first.keys() - {"stalls", "active_percent"} == profile.COUNTERS.keys() - {"cycles", "active_cycles"}


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "expected launches of lora_kernel, got none"),
        (page(GRAD), "expected launches of lora_kernel, got lora_grad_kernel"),
        (page(LORA, LORA), "expected launches of lora_kernel, got lora_kernel, lora_kernel"),
        (page(LORA, units=UNITS | {"lts__t_bytes.sum": "Kbyte"}), "lts__t_bytes.sum: expected the unit byte, got 'Kbyte'"),
        (page(LORA, values=VALUES | {"lts__t_bytes.sum": "n/a"}), "lts__t_bytes.sum: expected a number, got 'n/a'"),
    ],
)
def test_what_is_no_such_page_is_refused(text, says):
    with pytest.raises(BenchError, match=says):
        profile.launches_of(text, ("lora_kernel",))


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Factory: a program in place of ncu, of which ``shell`` is what it does where it profiles, with $report and $log."""

    def make(shell):
        (tmp_path / "page.csv").write_text(page(LORA))
        program = tmp_path / "ncu"
        program.write_text(
            f"""#!{sys.executable}
import os, pathlib, subprocess, sys
words = sys.argv[1:]
if words[0] == "--import":
    print(pathlib.Path("{tmp_path}/page.csv").read_text())
    sys.exit(0)
pathlib.Path("{tmp_path}/asked").write_text("\\n".join(words))
report, log = (words[words.index(option) + 1] for option in ("--export", "--log-file"))
sys.exit(subprocess.run({shell!r}, shell=True, env=os.environ | {{"report": report, "log": log}}).returncode)
"""
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
        monkeypatch.setattr(kernels, "NSIGHT_COMPUTE", "")
        return tmp_path / "asked"

    return make


@pytest.fixture
def case():
    return next(case for case in profile.profiled(True) if case.kernels == ("lora_kernel",))


def test_a_case_runs_under_ncu(ncu, case):
    asked = ncu("/bin/touch $report")
    (launch,) = profile._launches(case, "full")
    assert launch["us"] == 12.345
    words = asked.read_text().splitlines()
    assert words[-5:] == [sys.executable, "-m", "bench.suites.profile", case.name, "full"]
    assert words[words.index("--metrics") + 1].split(",") == COUNTERS
    options = dict(zip(words, words[1:], strict=False))
    assert options["--profile-from-start"] == "off" and options["--clock-control"] == "none"
    assert options["--kernel-name"] == "regex:^(lora_grad|lora|trunk|head)_kernel$"


@pytest.mark.parametrize(
    "shell, says",
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission' > $log", "exit status 0: ==ERROR== ERR_NVGPUCTRPERM"),
        ("echo 'no such module' >&2; exit 1", "exit status 1: no such module"),
    ],
)
def test_no_report_is_an_error(ncu, case, shell, says):
    ncu(shell)
    with pytest.raises(BenchError, match=says):
        profile._launches(case, "full")


def test_it_needs_a_card_or_the_emulator():
    with pytest.raises(BenchError, match="expected --device cuda, or emulator"):
        profile.plan(Context.of("tiny", 1))


@pytest.mark.parametrize("full", [True, False])
def test_names_tell_cases_apart(full):
    names = [case.name for case in profile.profiled(full)]
    assert len(set(names)) == len(names)
    assert all(kernels.parts(f"{kernel}<bf16, 1, 1, 0>") for case in profile.profiled(full) for kernel in case.kernels)
    assert {kernel for case in profile.profiled(full) for kernel in case.kernels} == {
        "lora_kernel",
        "lora_grad_kernel",
        "trunk_kernel",
        "head_kernel",
    }


def test_a_record_has_every_launch(monkeypatch, case):
    context = Context.of("tiny", 1, Dry("dry"))
    monkeypatch.setattr(Dry, "timed", True)
    monkeypatch.setattr(profile, "_launches", lambda case, size: [{"us": 1.0}])
    (made,) = profile.measured(context, case)
    assert made == {"record": "profile", "case": case.name, "kernel": "lora_kernel", "us": 1.0}
