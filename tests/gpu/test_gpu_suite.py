"""The GPU suite without a GPU: its plan and deadline, its bookkeeping, its timing."""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from card import RATES, Card, timed

from bench.gpu import (
    build,
    ceilings,
    lora,
    steps,
    suite,
    timing,
)
from bench.gpu.context import Context, Lost, Part, Skip
from bench.gpu.step import status
from bench.gpu.steps import EXIT_SKIPPED, FAILED, PASSED, SKIPPED, TIMED_OUT, Outcome, Step, allowance, plan
from bench.gpu.timing import Candidate, Dry, NotCaptured, Timing, measure, tolerant
from bench.harness import OURS
from t2l_engine import ops
from t2l_engine.ops import native

# --- plan and deadline -----------------------------------------------------------------------------------------------


def step(name="one", code="pass", limit=3600.0, **fields):
    return Step(name, (sys.executable, "-c", code), limit, **fields)


def test_allowance():
    one = step(limit=40.0, least=10.0, needs=("build",))
    done = [Outcome("build", PASSED, 60.0, True)]
    assert allowance(one, 300.0, done) == (40.0, "")
    assert allowance(one, 25.0, done) == (25.0, ""), "shortened"
    assert allowance(one, 9.0, done) == (0.0, "9 s left, 10 s needed")
    assert allowance(one, -3.0, done)[1] == "0 s left, 10 s needed"
    assert allowance(one, 300.0, [Outcome("build", FAILED, 1.0, True)]) == (0.0, "needs build, which failed")
    assert allowance(one, 300.0, []) == (40.0, ""), "a step that is not part of this run is not waited for"


@pytest.mark.parametrize("dry", [True, False])
def test_plan(tmp_path, dry):
    made = {one.name: one for one in plan(tmp_path, dry)}
    names, own = list(made), [one for one in made.values() if one.part]
    assert len(names) == len(plan(tmp_path, dry)) and names[0] == "build" and len(own) == len(names) - 3
    assert max(map(names.index, ("memcheck", "racecheck", "energy", "compiled"))) < names.index("prefill")
    assert not made["synccheck"].required and not made["initcheck"].required
    assert names.index("icl") == names.index("model") + 1 and made["icl"].required
    assert all(one.least <= one.limit for one in made.values())
    assert sum(one.least for one in made.values() if one.required) < 530, "a slow build must leave something"
    for one in own:
        module, _, function = one.command[3].partition(":")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))
        assert ("--dry" in one.command) == dry and one.command[4:8] == ("--part", str(one.part), "--until", "{until}")
    tests = made["tests of ops"]
    assert ("--collect-only" in tests.command) == dry and tests.environment == {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert "not instruction_sets and not gradcheck and not opcheck" in tests.command
    training = made["tests of training"]
    assert (
        not training.required and ("--collect-only" in training.command) == dry and training.command[-1] == "tests/training"
    )


def test_training_without_its_packages_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None if name == "pydantic" else name)
    one = suite.Suite(tmp_path, tmp_path, dry=True)
    (ended,) = one.run([step for step in plan(tmp_path, True) if step.name == "tests of training"])
    assert (ended.status, ended.why) == (SKIPPED, "no pydantic") and ended.fine


def test_suite(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    lost = f"import os, pathlib, sys; p = pathlib.Path({str(scratch / 'tries')!r}); p.open('a').write('x'); "
    rows_of = {"energy": [{"case": "a", "unit": "adapter", "count": 1}], "info": {"n": 1}, "machine": {"gpu": "card"}}
    rows_of["left_out"] = [{"case": "b", "why": "no time"}]
    leave = f"import json; open({str(scratch / 'fine.json')!r}, 'w').write({json.dumps(rows_of)!r}); print('fine')"
    child = f"import subprocess as s; open({str(scratch / 'pid')!r}, 'w').write(str(s.Popen(['sleep', '60']).pid))"
    once = f"import os; open({str(scratch / 'once')!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    until = "import sys, time; sys.exit(not 0 < float(sys.argv[1]) - time.monotonic() <= 497.1)"
    one = suite.Suite(out, scratch, dry=True, commit="abc")
    planned = [
        step("fine", leave, part=scratch / "fine.json"),
        step("child", child),
        Step("until", (sys.executable, "-c", until, "{until}"), 500.0),
        step("wrong", "import sys; print('this is why'); sys.exit(3)"),
        step("after wrong", needs=("wrong",)),
        step("nothing to do", "import sys; print('no peft'); sys.exit(77)", required=False),
        step("slow", "import time; time.sleep(600)", limit=0.5, least=0.1, required=False),
        step("lost", f"{lost} sys.exit(0 if p.stat().st_size > 2 else 75)", least=1.0, part=scratch / "lost.json"),
        step("killed", once, least=1.0, required=False),
        Step("no program", (str(tmp_path / "absent"),), 5.0, least=1.0),
    ]
    ended = {outcome.name: outcome for outcome in one.run(planned)}
    assert {name: (o.status, o.why) for name, o in ended.items()} == {
        "fine": (PASSED, "1 left out"),
        "child": (PASSED, ""),
        "until": (PASSED, ""),
        "wrong": (FAILED, "this is why"),
        "after wrong": (SKIPPED, "needs wrong, which failed"),
        "nothing to do": (SKIPPED, "no peft"),
        "slow": (TIMED_OUT, ended["slow"].why),
        "lost": (PASSED, ""),
        "killed": (FAILED, "signal 9"),
        "no program": (SKIPPED, f"{tmp_path / 'absent'}: No such file or directory"),
    }
    assert [o.name for o in ended.values() if not o.fine] == ["wrong", "after wrong", "no program"]
    assert len((scratch / "tries").read_text()) == 3, "a lost device is given up after three processes"
    assert (scratch / "once").read_text() == "x", "what keeps no results would begin anew"
    left = Path("/proc", (scratch / "pid").read_text(), "stat")
    assert not left.exists() or left.read_text().split()[2] == "Z", "what a step leaves behind is ended"
    result = json.loads((out / "gpu.json").read_text())
    assert result["energy"] == [{"step": "fine", **rows_of["energy"][0]}] and result["info"] == {"fine": {"n": 1}}
    assert result["machine"] == {"gpu": "card"} and len(result["steps"]) == len(planned) and result["size"] == "dry"
    assert {"date", "commit", "dirty", "sources"} <= result.keys()
    log = (out / "log.txt").read_text()
    assert "this is why" in log
    assert (out / "gpu.md").read_text().startswith("# GPU suite") and (out / "steps.json").exists()


def test_what_a_step_has_found_is_saved_while_it_runs(tmp_path, monkeypatch):
    """A run that is killed has it: parts themselves are not among its results."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir(), scratch.mkdir()
    monkeypatch.setattr(suite, "SAVED", 0.05)
    code = f"""
import json, pathlib, sys, time
new = pathlib.Path({str(scratch / "one.new")!r})
new.write_text(json.dumps({{"rows": [{{"case": "a"}}]}}))
new.replace({str(scratch / "one.json")!r})
while not [r for r in json.loads(pathlib.Path({str(out / "gpu.json")!r}).read_text())["rows"] if r["case"] == "a"]:
    time.sleep(0.05)
"""
    one = suite.Suite(out, scratch, dry=True)
    one.close()  # an empty result
    (ended,) = one.run([step("one", code, limit=300.0, part=scratch / "one.json")])
    assert ended.status == PASSED, "it ends once the result shows what it has found"


@pytest.mark.parametrize(
    ("built", "card", "runs"),
    [
        ("none", "9.0", False),
        ("nvcc 13.0.88, 80-real 90a-real 90-virtual", "9.0", True),
        ("nvcc 13.0.88, 80-real 90a-real 90-virtual", "8.0", True),
        ("nvcc 13.0.88, 80-real 90a-real 90-virtual", "8.6", True),
        ("nvcc 13.0.88, 80-real 90a-real 90-virtual", "10.0", True),
        ("nvcc 13.0.88, 90a-real", "9.0", True),
        ("nvcc 13.0.88, 90a-real", "10.0", False),
        ("nvcc 13.0.88, 90a-real", "8.0", False),
        ("nvcc 13.0.88, 80-real", "9.0", False),
        ("nvcc 13.0.88, 80", "9.0", True),
        ("nvcc 13.0.88, 90a-real", None, False),
    ],
)
def test_which_card_kernels_are_for(built, card, runs):
    assert build.covers(built, card) == runs


def test_a_library_that_came_with_the_tree_is_used(monkeypatch, capsys, tmp_path):
    """Nothing is built then, whatever is missing here."""
    if not ops.NATIVE or not build.covers(native.about()["build"]["cuda"], "9.0"):
        pytest.skip("this build has no CUDA kernels for the card of this test")
    monkeypatch.setattr(build, "missing", lambda: pytest.fail("it builds"))
    monkeypatch.setattr(sys, "argv", ["build"])
    monkeypatch.setattr(build, "compute_capability", lambda: "9.0")
    assert build.unusable() is None, "where the library is older than the sources: make setup"
    assert build.main() == 0
    assert "came with the tree and is used: nothing is built" in capsys.readouterr().out
    monkeypatch.setattr(build, "DIGEST", (sys.executable, "-c", "print('0123')"))
    assert build.unusable() == "it is of other sources"
    monkeypatch.undo()
    monkeypatch.setattr(build, "compute_capability", lambda: "7.5")
    assert "not for this card (7.5)" in build.unusable()
    monkeypatch.setattr(build, "PROBE", (sys.executable, "-c", "raise ImportError('t2l_engine: _C.so: why')"))
    assert build.unusable() == "ImportError: t2l_engine: _C.so: why"
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.unusable() == "no t2l_engine/_C.so"


def test_build_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(build, "unusable", lambda: "no t2l_engine/_C.so")
    monkeypatch.setattr(build, "find", lambda *names: None)
    monkeypatch.setattr(build, "find_cuda_tool", lambda name: None)
    monkeypatch.setattr(build, "compute_capability", lambda: "9.0")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.main() == 1
    told = capsys.readouterr().out
    assert "cmake (program), a C++ compiler, nvcc (program, CUDA toolkit) missing; steps that need kernels" in told
    assert build.environment()["T2L_CMAKE_ARGS"] == "-DT2L_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real"


@pytest.mark.parametrize("code", [0, 3])
def test_a_failed_build_is_not_waited_with(monkeypatch, capfd, code):
    monkeypatch.setattr(build, "unusable", lambda: "no t2l_engine/_C.so")
    monkeypatch.setattr(build, "missing", list)
    monkeypatch.setattr(build, "EMULATOR", (sys.executable, "-c", f"import time; time.sleep({3600 * code}); 1 / 0"))
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: type("Ended", (), {"returncode": code}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.main() == code
    told = capfd.readouterr().out
    assert "90a-real" in told and ("the emulator did not build" in told) == (code == 0)


def test_a_suite_that_is_ended_ends_its_steps(tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    one = suite.Suite(tmp_path, scratch, dry=True)
    one.current = running = suite.Running(step(code="import time; time.sleep(60)"), 60.0, scratch)
    one.close()
    (ended,) = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert running.process.poll() in (-15, -9) and (ended["status"], ended["why"]) == (FAILED, "the run was ended")


def test_a_run_leaves_only_its_results(tmp_path, monkeypatch):
    out, seen = tmp_path / "out", tmp_path / "seen"
    caches = "os.environ['TRITON_CACHE_DIR'] + os.environ['TORCHINDUCTOR_CACHE_DIR']"
    code = f"import os; open({str(seen)!r}, 'w').write({caches})"
    monkeypatch.setattr(suite, "plan", lambda scratch, dry: [step("one", code)])
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["suite", str(out), "0123abc", "--dry"])
    assert suite.main() == 0
    assert sorted(os.listdir(out)) == ["gpu.json", "gpu.md", "log.txt", "steps.json"]
    assert seen.read_text() and str(out) not in seen.read_text(), "caches and parts are not results"
    assert json.loads((out / "gpu.json").read_text())["commit"] == "0123abc", "what is said goes before what git says"


def test_what_a_step_exits_with(tmp_path):
    def code(**lists):
        part = Part(tmp_path / "none.json")
        part.data |= lists
        return status(part)

    late = [{"case": "a", "why": "no time"}]
    assert code() == code(rows=[{}], left_out=late) == 0
    assert code(left_out=late) == EXIT_SKIPPED, "a step that measured nothing has not passed"
    assert code(rows=[{}], failed=[{"case": "a", "error": "why"}]) == 1
    assert code(checks=[{"check": "a", "passed": False, "detail": "why"}]) == 1


# --- bookkeeping -----------------------------------------------------------------------------------------------------


def test_attempt(context):
    def fails():
        yield "rows", {"kept": 1}
        raise ValueError("why\nmore")

    def skips():
        raise Skip("no peft")

    context.attempt("fails", fails)
    context.attempt("skips", skips)
    context.attempt("late", fails, needs=1e9)
    context.attempt("fine", lambda: [("rows", {"kept": 2})])
    context.attempt("fine", lambda: pytest.fail("twice"))
    data = json.loads(context.part.path.read_text())
    assert data["rows"] == [{"kept": 1}, {"kept": 2}] and data["done"] == ["fails", "skips", "fine"]
    assert data["failed"] == [{"case": "fails", "error": "ValueError: why"}]
    assert [entry["case"] for entry in data["left_out"]] == ["skips", "late"]


def test_a_lost_device_goes_on_in_a_new_process(tmp_path):
    path = tmp_path / "part.json"

    def breaks():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(Lost):
        Context(Card(), Part(path), 60.0).attempt("breaks", breaks)
    part = Part(path)
    part.add("left_out", {"case": "late", "why": "no time"})
    part.set(running="dies")  # as a process leaves it that is killed
    again = Context(Dry(), Part(path), 60.0)
    again.attempt("breaks", lambda: pytest.fail("tried again"))
    again.attempt("dies", lambda: pytest.fail("tried again"))
    assert again.part.data["left_out"] == [], "the new process may have time for it"
    errors = {entry["case"]: entry["error"] for entry in again.part.data["failed"]}
    assert errors["dies"] == "the process ended" and "illegal memory access" in errors["breaks"]


def test_kernels_are_needed_on_a_card(tmp_path, monkeypatch, on_card):
    monkeypatch.setattr(lora.ops, "has_kernel", lambda name, backend: name != "lora_add_")
    lora.need_kernels(Context(Dry(), Part(tmp_path / "p.json"), 1.0), "lora_add_")
    with pytest.raises(Skip, match="no CUDA kernel of lora_add_: nothing to measure"):
        lora.need_kernels(on_card, "lora_add_", "lora_delta")


def test_a_rival_that_throws_costs_only_itself():
    absent = {}
    with tolerant("rival", absent):
        raise ValueError("why\nmore")
    with tolerant("graph", absent):
        raise NotCaptured("CUDA error: operation not permitted when stream is capturing")
    assert absent["rival"] == "ValueError: why" and absent["graph"].startswith("NotCaptured: CUDA error: operation")
    for name, text, where in ((OURS, "why", {}), ("rival", "CUDA error: unspecified", {}), ("rival", "why", None)):
        with pytest.raises(RuntimeError), tolerant(name, where):
            raise RuntimeError(text)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_timing():
    one = Timing.of([100.0 * i for i in range(1, 102)], calls=10, graph=True)
    assert (one.median_us, one.iqr_us, one.p5_us, one.p95_us) == pytest.approx((510.0, 500.0, 60.0, 960.0))
    assert one.rounds == 101 and one.to_json()["graph"] is True and "note" not in one.to_json()


def test_number_of_sets_exceeds_the_cache():
    device = Dry()
    for size in (1, 1000, device.l2_bytes, 3 * device.l2_bytes, 3 * device.l2_bytes + 1, 1 << 30):
        assert timing.num_sets(device, size) * size > 3 * device.l2_bytes
    assert timing.num_sets(device, 1 << 30) == 1


def test_measure_takes_every_set_and_interleaves():
    seen = []
    device = Dry()
    device.capture = lambda run: run
    device.elapsed_us = lambda run, covered: (run(), 10.0 if "slow" not in seen[-1] else 1e6)[1]
    calls = {name: [lambda name=name, i=i: seen.append(f"{name} {i}") for i in range(3)] for name in ("a", "slow")}
    timings = measure(device, {name: Candidate(c) for name, c in calls.items()}, seconds=0.1)
    assert timings["a"].median_us == pytest.approx(10.0 / timings["a"].calls) and timings["a"].calls % 3 == 0
    assert timings["slow"].rounds == timing.LEAST_REPLAYS and {one[-1] for one in seen} == {"0", "1", "2"}
    assert not timings["a"].graph, "no graph but on a card"


class FakeGraph:
    """Records in order what is done to it."""

    seen: list = []

    def capture_begin(self, capture_error_mode):
        self.seen.append("begin")

    def capture_end(self):
        self.seen.append("end")

    def replay(self):
        self.seen.append("replay")


@pytest.fixture
def fake_card(monkeypatch):
    """The class that drives a card, over stand-ins for torch's."""

    class Stream:
        def wait_stream(self, other):
            FakeGraph.seen.append("wait")

        def synchronize(self):
            pass

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            FakeGraph.seen.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.25  # ms

    monkeypatch.setattr(FakeGraph, "seen", [])
    stands_in = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 50 << 20}),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": FakeGraph,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return timing.Cuda()


def test_replays_are_timed_behind_an_untimed_one(fake_card):
    timings = measure(fake_card, {"one": Candidate([lambda: FakeGraph.seen.append("call")])}, 0.1)
    one = timings["one"]
    assert one.graph and one.rounds == fake_card.replays and one.calls == 2, "two calls fill a pass of 500 us"
    assert one.median_us == 125.0 and FakeGraph.seen[:5] == ["wait", "call", "begin", "call", "end"]
    assert FakeGraph.seen[-4:] == ["replay", "event", "replay", "event"]


def test_what_cannot_be_captured_is_called_from_the_host(fake_card):
    def call():
        if FakeGraph.seen.count("begin") > FakeGraph.seen.count("end"):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert not fake_card.spoiled
    timings = measure(fake_card, {OURS: Candidate([call]), "two": Candidate([call], graph=False)}, 0.1)
    assert FakeGraph.seen.count("begin") == FakeGraph.seen.count("end") == 1, "the capture is ended"
    assert not timings[OURS].graph and timings[OURS].note == "operation not permitted when stream is capturing"
    assert not timings["two"].graph and timings["two"].note is None
    assert fake_card.spoiled and not fake_card.uncaptured, "ours is tried again in the next case"


def test_after_a_failed_capture_a_new_process_goes_on(fake_card, tmp_path):
    def fails():
        if FakeGraph.seen.count("begin") > FakeGraph.seen.count("end"):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def entries(device):
        absent = {}
        timings = measure(device, {OURS: Candidate([lambda: None]), "rival": Candidate([fails])}, 0.1, absent)
        yield "rows", {"timed": list(timings), "absent": absent}

    why = "NotCaptured: CUDA error: operation not permitted when stream is capturing"
    with pytest.raises(Lost):
        Context(fake_card, Part(tmp_path / "p.json"), 60.0).attempt("first", lambda: entries(fake_card))
    again = timing.Cuda()
    context = Context(again, Part(tmp_path / "p.json"), 60.0)
    context.attempt("first", lambda: pytest.fail("twice"))
    context.attempt("second", lambda: entries(again))
    assert context.part.data["rows"] == [{"timed": [OURS], "absent": {"rival": why}}] * 2 and not again.spoiled
    assert context.part.data["done"] == ["first", "second"] and "failed" not in context.part.data


def test_ceilings(context):
    """Floors take the faster way, whatever it is."""
    timed_ways = {"sum": 10.0, "matrix times vector": 20.0, "copy": 40.0, "copy kernel": 16.0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ceilings, "memory_timings", lambda *_: {name: timed(us) for name, us in timed_ways.items()})
        made = ceilings.probe(context.device, 0.01)
    assert made.copy_gbps == pytest.approx(2 * (1 << 20) / 16.0 / 1e3) == pytest.approx(made.gbps)
    assert made.gemm_gflops.keys() == {"bfloat16", "float32", "tf32"} and torch.get_float32_matmul_precision() == "highest"
    assert RATES.gflops(torch.bfloat16) == 989e3 and RATES.gflops(torch.float32) == 140e3, "three products in TF32"
