"""The suite ``train``: its ways compute one thing, a child tells its memory, tables say what the numbers do."""

import dataclasses

import pytest
import torch

from bench.harness import Context, VerificationError, verify
from bench.records import BASE, HOOKS, OURS
from bench.suites import train
from bench.suites.train import BMM, SAMPLES, Batch, Case
from bench.timing import threads

TINY = dataclasses.replace(Context.of("tiny", 1), rounds=(2, 2), seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    """As TINY says: threads that share small products wait for each other on a busy machine."""
    with threads(1):
        yield


@pytest.mark.parametrize("case", train.cases(TINY), ids=lambda case: case.name)
def test_ways_agree(case):
    frozen, single = train.both(TINY, case.dtype)
    stack = train.adapters(frozen.model, case)
    made = {way: train.BUILDERS[way](frozen.model, stack) for way in train.WAYS}
    errors = train.step_errors(made, frozen, single, stack, case)
    assert set(errors) == set(train.WAYS) - {BASE} >= {OURS, HOOKS, BMM}
    assert verify(case.name, dict.fromkeys(errors), errors)[1] == {}
    own = train.step(made[OURS], stack, Batch.of(frozen, SAMPLES, case.tokens, seed=1))()
    assert len(own) == 2 * len(stack.lora_A) + 1 and all(grad.abs().max() > 0 for grad in own)


def test_a_wrong_way_is_not_timed():
    case = train.cases(TINY)[0]
    frozen, single = train.both(TINY, case.dtype)
    stack = train.adapters(frozen.model, case)
    shifted = [*range(1, SAMPLES), 0]  # another sample's adapter
    made = {OURS: train.ours(frozen.model, stack, shifted), BMM: train.BUILDERS[BMM](frozen.model, stack)}
    errors = train.step_errors(made, frozen, single, stack, case)
    with pytest.raises(VerificationError, match="q,v, 16 tokens, float32: error"):
        verify(case.name, dict.fromkeys(errors), errors)


def test_hooks_repeat_a_token(monkeypatch):
    rows, tokens, rank, features, out = 2, 3, 4, 5, 6
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(rows, *size, generator=generator) for size in ((tokens, features), (rank, features), (out, rank)))
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(tuple(a.shape)) or bmm(a, b))
    repeated = train.repeated(x, A, B, 2.0)
    assert shapes == [(rows * tokens, rank, features), (rows * tokens, out, rank)]
    shapes.clear()
    batched = train.batched(x, A, B, 2.0)
    assert shapes == [(rows, tokens, features), (rows, tokens, rank)]
    assert torch.allclose(repeated, batched, atol=1e-5)


def test_hooks_leave_no_adapter_behind():
    frozen = train.load(TINY, "float32")
    case = train.cases(TINY)[0]
    stack, batch = train.adapters(frozen.model, case), Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    way = train.hooked(frozen.model, stack)
    with way.applied(stack):
        adapted = train.loss_of(way.model, batch)
    assert not torch.equal(adapted, train.loss_of(frozen.model, batch))
    with pytest.raises(KeyError):
        train.loss_of(way.model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name, group", [("library float32", "library"), ("step q,v, 16 tokens, float32", "train")])
def test_tasks(name, group):
    (task,) = (task for task in train.plan(TINY) if task.name == name)
    found = [entry for entry in task.run() if entry["record"] == "row"]
    assert {row["group"] for row in found} == {group}
    assert all(row["error"]["value"] <= row["error"]["bound"] and row["times"].keys() > {OURS} for row in found)


@pytest.mark.slow
def test_a_child_tells_its_memory():
    case = Case("q,v", 256, "float32")
    found, stack = train.peak(TINY, case, HOOKS), train.adapters(train.load(TINY, "float32").model, case)
    once_a_token = case.tokens * sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values()) / 2**20
    added = found["peak_mib"] - found["loaded_mib"]
    assert once_a_token > 10 and once_a_token <= added <= once_a_token + 500
    assert 50 < found["loaded_mib"] < 2000
