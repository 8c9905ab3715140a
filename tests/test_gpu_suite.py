"""The GPU suite without a GPU: its plan and deadline, its bookkeeping, its arithmetic, its tables, and tiny dry rows."""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import (
    build,
    cases,
    ceilings,
    checks,
    energy,
    environment,
    generation,
    linear,
    lora,
    model,
    outputs,
    results,
    sanitizers,
    suite,
    tables,
    timing,
)
from bench.gpu.cases import LAYERS, Case, even, ragged, rows, zipf
from bench.gpu.ceilings import Ceilings
from bench.gpu.context import Context, Lost, Part, Skip
from bench.gpu.step import status
from bench.gpu.steps import EXIT_SKIPPED, FAILED, PASSED, SKIPPED, TIMED_OUT, Outcome, Step, allowance, plan
from bench.gpu.timing import Candidate, Dry, NotCaptured, Timing, measure, tolerant
from bench.harness import OURS, Bar, Error
from bench.rows import BASE
from t2l_engine.testing import backends

RATES = Ceilings(3350.0, 3000.0, {"bfloat16": 989e3, "float32": 50e3, "tf32": 420e3})
H100_L2 = 50 << 20


@pytest.fixture
def context(tmp_path):
    """A dry step; small products on one thread, which does not wait for others."""
    with_one = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Context(Dry(), Part(tmp_path / "part.json"), 60.0)
    torch.set_num_threads(with_one)


class Card(Dry):
    """This CPU as a card: what rows and errors then mean."""

    on_card = True


@pytest.fixture
def on_card(tmp_path):
    """A step that believes to be on a card."""
    return Context(Card(), Part(tmp_path / "card.json"), 60.0)


# --- plan and deadline -----------------------------------------------------------------------------------------------


def step(name="one", code="pass", limit=20.0, **fields):
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
    assert len(names) == len(plan(tmp_path, dry)) and names[0] == "build" and len(own) == len(names) - 2
    assert max(map(names.index, ("sanitizers", "energy", "compiled"))) < names.index("prefill")
    assert all(one.least <= one.limit for one in made.values())
    assert sum(one.least for one in made.values() if one.required) < 530, "a slow build must leave something"
    for one in own:
        module, _, function = one.command[3].partition(":")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))
        assert ("--dry" in one.command) == dry and one.command[4:8] == ("--part", str(one.part), "--until", "{until}")
    tests = made["tests of ops"]
    assert ("--collect-only" in tests.command) == dry and tests.environment == {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert "not instruction_sets and not gradcheck and not opcheck" in tests.command


def test_suite(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    lost = f"import os, pathlib, sys; p = pathlib.Path({str(scratch / 'tries')!r}); p.open('a').write('x'); "
    rows_of = {"energy": [{"case": "a", "adapters": 1}], "info": {"n": 1}, "machine": {"gpu": "card"}}
    rows_of["left_out"] = [{"case": "b", "why": "no time"}]
    leave = f"import json; open({str(scratch / 'fine.json')!r}, 'w').write({json.dumps(rows_of)!r}); print('fine')"
    child = f"import subprocess as s; open({str(scratch / 'pid')!r}, 'w').write(str(s.Popen(['sleep', '60']).pid))"
    once = f"import os; open({str(scratch / 'once')!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    until = "import sys, time; sys.exit(not 15 < float(sys.argv[1]) - time.monotonic() <= 17.1)"
    one = suite.Suite(out, scratch, dry=True, commit="abc")
    steps = [
        step("fine", leave, part=scratch / "fine.json"),
        step("child", child),
        Step("until", (sys.executable, "-c", until, "{until}"), 20.0),
        step("wrong", "import sys; print('this is why'); sys.exit(3)"),
        step("after wrong", needs=("wrong",)),
        step("nothing to do", "import sys; print('no peft'); sys.exit(77)", required=False),
        step("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=2.0, least=0.1, required=False),
        step("lost", f"{lost} sys.exit(0 if p.stat().st_size > 2 else 75)", least=1.0, part=scratch / "lost.json"),
        step("killed", once, least=1.0, required=False),
        Step("no program", (str(tmp_path / "absent"),), 5.0, least=1.0),
    ]
    start = time.monotonic()
    ended = {outcome.name: outcome for outcome in one.run(steps)}
    assert time.monotonic() - start < 12
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
    assert result["energy"] == [{"step": "fine", "case": "a", "adapters": 1}] and result["info"] == {"fine": {"n": 1}}
    assert result["machine"] == {"gpu": "card"} and len(result["steps"]) == len(steps) and result["size"] == "dry"
    assert {"date", "commit", "dirty", "sources"} <= result.keys()
    log = (out / "log.txt").read_text()
    assert "this is why" in log and "begun" in log
    assert (out / "gpu.md").read_text().startswith("# GPU suite") and (out / "steps.json").exists()


def test_build_names_what_is_missing(monkeypatch, capsys):
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
    monkeypatch.setattr(build, "missing", list)
    monkeypatch.setattr(build, "EMULATOR", (sys.executable, "-c", f"import time; time.sleep({20 * code}); 1 / 0"))
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: type("Ended", (), {"returncode": code}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["build"])
    start = time.monotonic()
    assert build.main() == code and time.monotonic() - start < 10
    told = capfd.readouterr().out
    assert "90a-real" in told and ("the emulator did not build" in told) == (code == 0)


def test_a_suite_that_is_ended_ends_its_steps(tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    one = suite.Suite(tmp_path, scratch, dry=True)
    one.current = running = suite.Running(step(code="import time; time.sleep(60)"), 60.0, scratch)
    one.close()
    (ended,) = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert running.process.poll() == -15 and (ended["status"], ended["why"]) == (FAILED, "the run was ended")


def test_a_run_leaves_only_its_results(tmp_path, monkeypatch):
    out, seen = tmp_path / "out", tmp_path / "seen"
    caches = "os.environ['TRITON_CACHE_DIR'] + os.environ['TORCHINDUCTOR_CACHE_DIR']"
    code = f"import os; open({str(seen)!r}, 'w').write({caches})"
    (out / suite.PARTS).mkdir(parents=True)
    (out / suite.PARTS / "old.json").write_text("{of a run that was killed")
    monkeypatch.setattr(suite, "plan", lambda scratch, dry: [step("one", code)])
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["suite", str(out), "0123abc", "--dry"])
    assert suite.main() == 0
    assert sorted(os.listdir(out)) == ["gpu.json", "gpu.md", "log.txt", "steps.json"]
    assert seen.read_text().count(str(out / suite.PARTS)) == 2
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


# --- bytes and FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, tokens, adapters, weights, activations, floor_us, mflop, step_ms",
    [
        ("7b", 1, 1, "0.21", "0.03", "0.07", "0.2", "0.002"),
        ("7b", 8, 8, "1.7", "0.23", "0.58", "1.7", "0.018"),
        ("7b", 64, 64, "13.6", "1.8", "4.6", "13.6", "0.148"),
        ("7b", 64, 1, "0.21", "1.8", "0.61", "13.6", "0.020"),
        ("7b", 2048, 4, "0.85", "58.7", "17.8", "436", "0.57"),
        ("7b", 8192, 8, "1.7", "235", "70.6", "1745", "2.26"),
        ("7b-all", 1, 1, "1.3", "0.2", "0.46", "1.3", "0.015"),
        ("7b-all", 64, 64, "83.9", "14.4", "29.3", "84", "0.94"),
        ("7b-all", 8192, 8, "10.5", "1845", "554", "10737", "17.7"),
        ("2b", 64, 64, "7.9", "1.1", "2.7", "7.9", "0.069"),
        ("1b", 64, 64, "6.8", "0.9", "2.3", "6.8", "0.037"),
    ],
)
def test_bytes_and_flops(layer, tokens, adapters, weights, activations, floor_us, mflop, step_ms):
    """Closed forms as they were worked out by hand, at 3.35 TB/s."""
    segments = rows(*(i % adapters for i in range(tokens))) if tokens < 100 else even(tokens, adapters)
    case = Case(LAYERS[layer], segments, "")
    us = case.bytes / 3.35e6
    values = {
        weights: case.layer.weight_bytes(adapters) / 1e6,
        activations: case.layer.activation_bytes(tokens) / 1e6,
        floor_us: us,
        mflop: case.flops / 1e6,
        step_ms: us * case.layer.layers / 1e3,
    }
    for text, value in values.items():
        unit = 10.0 ** -len(text.partition(".")[2])
        assert value == pytest.approx(float(text), abs=0.52 * unit), text
    assert (case.tokens, case.adapters) == (tokens, adapters)


def test_rows_of_the_base_model_are_no_work():
    half = Case(LAYERS["7b"], rows(0, -1, 1, -1), "half base")
    assert half.bytes == Case(LAYERS["7b"], rows(0, 1), "").bytes and half.flops == half.layer.flops(2)
    assert half.shape()["tokens"] == 4 and half.shape()["adapters"] == 2


def test_patterns():
    assert sum(n for n, _ in ragged(8192, 8)) == 8192 and len(ragged(8192, 8)) == 8
    counts = [i for _, i in zipf(64)]
    assert len(counts) == 64 and max(counts) + 1 == len(set(counts)) < 64
    for full in (True, False):
        chosen = lora.decode_cases(full) + lora.prefill_cases(full)
        assert len({case.name for case in chosen}) == len(chosen)


# --- dry rows --------------------------------------------------------------------------------------------------------


def test_decode_and_prefill_rows(context):
    for group, chosen in (("decode", lora.decode_cases(False)), ("prefill", lora.prefill_cases(False))):
        for case in chosen:
            made = {row["cache"]: row for _, row in lora.compare(context, case, group, ("cold", "hot"), RATES, 0.01)}
            assert ("hot" in made) == (case.working_set <= context.device.l2_bytes), "what exceeds the cache is never hot"
            assert made["cold"]["floor"]["bytes"] == case.bytes and made["cold"]["floor"]["us"] > 0
            for row in made.values():
                assert (row["floor"] is None) == (row["floor_ratio"] is None) == (row["cache"] == "hot")
                assert row["bar"] is None and row["lost"] == [], "a dry run claims nothing"
                assert {"cuBLAS per adapter", "gather bmm", "copy", tables.APART} <= row["baselines"].keys()
                assert ("absent" in row["baselines"]["gather bmm"]) == (case.pattern == "half base")


def test_rivals_that_throw_are_absent(context, monkeypatch):
    def throws(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(lora.BUILDERS, "cuBLAS per adapter", lambda operands: throws)
    monkeypatch.setitem(generation.WAYS, "cuBLAS", throws)
    monkeypatch.setattr(linear, "PEFT_ABSENT", None)
    monkeypatch.setattr(linear, "peft_linear", lambda base, member: throws)
    (_, first), *_ = lora.compare(context, lora.decode_cases(False)[0], "decode", ("cold",), RATES, 0.01)
    (_, second), *_ = generation.rows_of(context, RATES, "tiny", "float32", (1,))
    ((_, third),) = linear.compare(context, Case(linear.TINY, rows(0), ""))
    for row, name in ((first, "cuBLAS per adapter"), (second, "cuBLAS"), (third, "PEFT mixed"), (third, "PEFT single")):
        assert row["baselines"][name] == {"absent": "RuntimeError: no such kernel"}
    assert "median_us" in first["baselines"]["gather bmm"] and "median_us" in second["baselines"]["eager"]


def test_what_the_compiler_makes_is_verified(context, monkeypatch):
    def broken(generate, dynamic):
        return lambda task_emb: {name: (a + 1, b) for name, (a, b) in generate(task_emb).items()}

    for compiler, words in ((broken, "wrong: error"), (lambda f, dynamic: lambda _: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(torch, "compile", compiler)
        ((_, row),) = generation._compiled(context)
        assert row["baselines"]["torch.compile"]["absent"].startswith(words)
    monkeypatch.setattr(torch, "compile", lambda generate, dynamic: generate)
    ((_, row),) = generation._compiled(context)
    assert "median_us" in row["baselines"]["torch.compile"]


def test_a_wrong_kernel_is_not_timed(context, monkeypatch):
    monkeypatch.setattr(cases.ops, "lora_add_group_", lambda y, *rest: y)
    monkeypatch.setattr(cases.ops, "lora_add_", lambda y, *rest: y)
    context.attempt("wrong", lambda: lora.compare(context, lora.decode_cases(False)[0], "decode", ("hot",), RATES, 0.01))
    assert "VerificationError" in context.part.data["failed"][0]["error"] and "rows" not in context.part.data


def test_generation_rows(context):
    for dtype in ("float32", "bfloat16"):
        for _, row in generation.rows_of(context, RATES, "tiny", dtype, (1, 2)):
            ways = {"cuBLAS", "reference", "eager", "eager, captured", tables.OPS, tables.EAGER, "copy"}
            assert row["baselines"].keys() == ways and not any("absent" in b for b in row["baselines"].values())
            assert row["error"]["value"] <= row["error"]["bound"]


def test_linear_and_model_rows(context):
    linear.run(context)
    shape = dataclasses.replace(model.TINY, layers=1)
    assert model.llama.make(shape, 2, 4, torch.device("cpu"), torch.bfloat16)(torch.tensor([0, 1])).shape == (2, 61)
    context.part.data["rows"].extend(row for _, row in model.steps(context, RATES, "all linears", 4, (1, 4)))
    one, *steps = context.part.data["rows"]
    assert {BASE, tables.EAGER, "PEFT single"} <= one["baselines"].keys() and "failed" not in context.part.data
    assert [row["shape"]["adapters"] for row in steps] == [1, 4] and all(BASE in row["baselines"] for row in steps)
    assert steps[1]["floor"]["bytes"] > steps[0]["floor"]["bytes"]


def test_graph_checks(context):
    for index, name in enumerate(("lora_add_group_", "lora_add_")):
        ((_, entry),) = checks.lora_graph(context, name, index, torch.bfloat16)
        assert entry["passed"], entry
    context.device.capture = lambda run: lambda: None  # a graph that has kept what it read
    ((_, entry),) = checks.lora_graph(context, "baked", 0, torch.bfloat16)
    assert not entry["passed"] and "other ids" in entry["detail"] and "the base model alone" not in entry["detail"]


def test_energy(context):
    energy.run(context)
    idle, *others = context.part.data["energy"]
    assert all(entry["watts"] == pytest.approx(1.0, abs=0.2) for entry in (idle, *others))
    assert all(entry["sm_mhz"] == 1 for entry in others) and "one layer" in others[-1]["case"]


def test_outputs_keep_the_strides_of_their_operands(monkeypatch):
    case = next(c for c in outputs.HYPER_CASES if c.name == "L")
    right = case.make_heads(outputs.SEED)["latent"]

    def call(arguments):
        there = backends.placed(arguments, torch.device("meta"))["latent"]
        assert (there.stride(), there.storage_offset()) == (right.stride(), right.storage_offset())
        return []

    monkeypatch.setattr(outputs, "table", lambda few: {"case": (lambda device: case.make_heads(outputs.SEED), call)})
    assert not right.is_contiguous() and outputs.compute(torch.device("cpu")) == {"case": []}


FAKE_SANITIZER = """#!/bin/sh
case "$2 $*" in
racecheck*) echo "========= Error: Device not supported. See the documentation"; exit 1 ;;
synccheck*) echo "========= ERROR SUMMARY: 3 errors"; exit 9 ;;
initcheck*) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
memcheck*--report-api-errors\\ no*) ;;
*) exit 2 ;;
esac
for word; do [ "$last" = --out ] && : > "$word"; last=$word; done
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizers(on_card, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER.replace("\\\\", "\\"))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizers, "find_cuda_tool", lambda name: str(tool))
    sanitizers.run(on_card)
    verdicts = {entry["check"]: (entry["passed"], entry["detail"]) for entry in on_card.part.data["checks"]}
    assert verdicts == {
        "memcheck": (True, "ERROR SUMMARY: 0 errors"),
        "synccheck": (False, "ERROR SUMMARY: 3 errors; the cases gave no outputs"),
        "initcheck": (False, "ERROR SUMMARY: 0 errors; the cases gave no outputs"),
    }
    assert on_card.part.data["left_out"] == [{"case": "racecheck", "why": "racecheck: Device not supported"}]
    monkeypatch.setattr(sanitizers, "find_cuda_tool", lambda name: None)
    with pytest.raises(Skip, match="no compute-sanitizer"):
        sanitizers.run(on_card)


def test_outputs_beside_an_emulator():
    few = outputs.compute(torch.device("cpu"), few=True)
    assert {name.split(", ")[0] for name in few} >= {"lora_add_", "lora_delta", "lora_add_group_", "hypernet_heads"}
    other = {name: [t.clone() for t in tensors] for name, tensors in few.items()}
    assert all(entry["passed"] for _, entry in outputs.compare(few, other))
    broken = ("lora_add_, mixed_rows", "lora_add_group_, qkv", "hypernet_trunk, L", "hypernet_heads, L")
    for name in broken:
        other[name][0][..., 1] += 1
    verdicts = {entry["check"].split()[0]: entry["passed"] for _, entry in outputs.compare(few, other)}
    assert verdicts == {op: op == "lora_delta" for op in verdicts}


# --- rows and tables -------------------------------------------------------------------------------------------------


def timed(us, graph=True):
    return Timing.of([us * 0.9, us, us * 1.1], 1, graph)


def made_row(context, bar=None, unit=None, **others):
    timings = {OURS: timed(10.0), **others}
    least = results.floor(RATES, 1000, 20_000_000, torch.bfloat16)
    error, given = Error(1e-3, 4e-3), {"cache": "cold", "absent": {"PEFT mixed": "peft is not installed"}}
    shape = {"tokens": 64, "adapters": 64}
    return results.row(context, "case", "decode", shape, timings, error, least=least, bar=bar, unit_us=unit, **given)[1]


def as_result(*made, **fields):
    given = {"suite": "gpu", "size": "full", "date": "2026-01-02", "commit": "0123abc", "dirty": False, "steps": []}
    machine, versions = {"gpu": "Some Card"}, {"torch": "2.11", "driver": "580", "triton": None}
    return {**given, "machine": machine, "versions": versions, "rows": list(made), **fields}


def test_rows_say_what_is_met_and_what_is_lost(on_card):
    context = on_card
    rivals = {"cuBLAS": timed(30.0), "gather bmm": timed(8.0), tables.REFERENCE: timed(1.0)}
    row = made_row(context, Bar(1.35, of="copy"), 8.0, copy=timed(8.0), **rivals)
    assert row["bar"]["met"] and row["copy_ratio"] == 1.25 and row["lost"] == ["gather bmm"]
    assert row["floor_ratio"] == pytest.approx(10 / (20 / 3.35), rel=1e-3) and row["baselines"]["cuBLAS"]["speedup"] == 3.0
    late = made_row(context, Bar(0.0, plus_us=5.0), None, **{tables.EAGER: timed(40.0, False), "PEFT": timed(60.0, False)})
    assert not late["bar"]["met"] and late["baselines"]["PEFT"]["speedup"] == 1.5, "both from the host"
    text = tables.group_table(as_result(row, late), "decode")
    for words in (
        "1.35 x copy",
        "met; **lost** to gather bmm",
        "5 us",
        "**not met**",
        "peft is not installed",
        "1.50 x (host)",
    ):
        assert words in text
    whole = tables.whole(as_result(row, late, failed=[{"step": "decode", "case": "c", "error": "E: why"}]))
    assert "Some Card, torch 2.11, driver 580; 2026-01-02, commit 0123abc." in whole and "- decode: c: E: why" in whole


def test_nothing_is_claimed_without_a_card(context, tmp_path):
    row = made_row(context, Bar(1.35, of="copy"), 100.0, copy=timed(8.0), cuBLAS=timed(1.0))
    assert row["bar"] is None and row["lost"] == []
    dry = as_result(row, size="dry")
    assert tables.bars(dry) == tables.NOT_MEASURED and tables.DRY in tables.whole(dry)
    path = tmp_path / "gpu.json"
    nothing = tables.committed(path)
    assert tables.summary(nothing) == tables.everything(nothing) == tables.NOT_MEASURED
    path.write_text(json.dumps(dry))
    with pytest.raises(ValueError, match=r"gpu.json: expected the result of a card, got one of size 'dry'"):
        tables.committed(path)


def test_bars_without_a_row_are_named(on_card):
    on_card.device.l2_bytes = H100_L2
    expected = environment._expected(on_card)
    names = {(bar["group"], bar["case"], bar["cache"]) for bar in expected}
    assert len(names) == len(expected) == 20
    assert ("decode", "Mistral-7B / Llama-8B q,v, 64 x 64", "hot") in names
    assert ("decode", "Llama-8B all linears, 64 x 64", "cold") in names
    assert ("decode", "Llama-8B all linears, 64 x 64", "hot") not in names, "98 MB are never hot"
    assert ("model", "decode step, 64 rows, q,v, 64 adapters", "as it comes") in names
    row = made_row(on_card, lora.MANY, 8.0, copy=timed(8.0))
    expected = [
        results.expected("decode", "case", "cold", lora.MANY),
        results.expected("decode", "other", "hot", lora.SINGLE),
    ]
    text = tables.bars(as_result(row, expected=expected))
    assert "| other | hot | – | – | 5 us | not measured |" in text and text.count("not measured") == 1
    assert "not measured" in tables.summary(as_result(expected=expected))


def test_load(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(as_result()))
    assert tables.load(path)["suite"] == "gpu"
    path.write_text(json.dumps({"suite": "apply"}))
    with pytest.raises(ValueError, match=r"gpu.json: expected a result of bench/gpu_suite.sh"):
        tables.load(path)
