"""Instruction sets beside each other: each in its own process, verified."""

import pytest
import torch

from bench import harness
from bench.harness import OURS, BenchError, Context, VerificationError
from bench.suites import generate, levels
from bench.timing import Dry
from t2l_engine import ops
from t2l_engine.ops import native

pytestmark = pytest.mark.skipif(not ops.NATIVE, reason="no native library")
ISAS = [isa for isa in native.about()["instruction_sets"]["available"] if isa != levels.MODEL] if ops.NATIVE else []


@pytest.fixture
def context():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Context("tiny", 1, harness.Cpu(), None, (2, 2), 0.0, 0)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_level_is_verified_and_timed_beside_torch(context, monkeypatch):
    monkeypatch.setattr(levels, "SETTLE_S", 0.0)
    some = [ISAS[0], ISAS[-1]]
    adapters, lora = levels.generations(False)[1], levels.loras(False)[1]
    found = levels.measured(context, some, some[-1], "group", [adapters, lora])
    others = {"eager", "reference", generate.BATCHED}, {"reference", "mm loop", "gather bmm"}
    for row, ways in zip(found, others, strict=True):
        assert row["times"].keys() == {OURS, *some, *ways} and not row["skipped"]
        assert row["times"][OURS] == row["times"][some[-1]] and row["group"] == "group"
        assert all(time["median_us"] > 0 for time in row["times"].values())
        assert row["error"]["value"] <= row["error"]["bound"]


def test_a_process_runs_the_instruction_set_that_it_is_for():
    with pytest.raises(BenchError, match="expected mmx, got"):
        levels._begin("mmx", torch.get_num_threads())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What _begin sets is of a process that ends."""
    monkeypatch.delenv("T2L_ISA", raising=False)
    monkeypatch.setattr(levels.os, "environ", dict(levels.os.environ))
    monkeypatch.setattr(levels.gc, "disable", lambda: None)


@pytest.mark.parametrize("work", [levels.generations(False)[1], levels.loras(False)[0]], ids=["generate", "lora"])
def test_a_wrong_level_ends_the_run(work):
    right = work.result()
    of = work.beside({"right": right, "wrong": [tensor + 1 for tensor in right]})
    harness.verify("case", {OURS: None}, {OURS: of.errors["right"]})
    with pytest.raises(VerificationError):
        harness.verify("case", {OURS: None}, {OURS: of.errors["wrong"]})
    assert not harness.verify("case", of.torches, of.errors)[1]


def test_the_plan_names_what_the_cpu_has(context, monkeypatch):
    about, *tasks = levels.plan(context)
    chosen = native.about()["instruction_sets"]["chosen"]  # tests may run with T2L_ISA
    assert list(about.run()) == [{"record": "levels", "available": ISAS, "chosen": chosen}]
    assert [task.name for task in tasks] == ["generate", "lora"]
    monkeypatch.setitem(levels.os.environ, "T2L_ISA", ISAS[0])
    with pytest.raises(BenchError, match=f"no T2L_ISA, got {ISAS[0]}"):
        levels.plan(context)
    with pytest.raises(BenchError, match="expected the device cpu, got dry"):
        levels.plan(Context("tiny", 1, Dry(), None, (2, 2), 0.0, 0))


def test_full_size_is_what_was_asked_for():
    assert len(levels.generations(True)) == 3 * 2 * 2 and len(levels.loras(True)) == 2 * 3
    shapes = {(w.shape.name, w.shape.variant, w.dtype, w.count) for w in levels.generations(True)}
    assert len(shapes) == 12 and {name for name, *_ in shapes} == {generate.TARGETED}
    assert {(w.case.tokens, w.case.adapters) for w in levels.loras(True)} == {(64, 1), (8, 8), (64, 64)}
