"""The suite ``train``: its ways compute one thing, a child tells its memory, tables say what the numbers do."""

import dataclasses
import json

import pytest
import torch
import train_result

from bench import rows, train, train_memory, train_tables, train_ways
from bench.harness import OURS, Context, VerificationError, admit
from bench.rows import BASE, ResultError
from bench.timing import threads
from bench.train_tables import HOOKS
from bench.train_ways import BMM, HOOKS_PEFT, SAMPLES, WAYS, Batch, Case

TINY = dataclasses.replace(Context.of("tiny", 1), rounds=(2, 2), seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    """As TINY says: threads that share small products wait for each other on a busy machine."""
    with threads(1):
        yield


# --- ways ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", train_ways.cases(TINY), ids=lambda case: case.name)
def test_ways_agree(case):
    frozen, single = train.models(TINY, case.dtype)
    stack = train_ways.adapters(frozen.model, case)
    ways = {way: train_ways.BUILDERS[way](frozen.model, stack) for way in WAYS}
    errors = train.step_errors(ways, frozen, single, stack, case)
    assert set(errors) == set(WAYS) - {BASE} >= {OURS, HOOKS, BMM}
    assert admit(case.name, dict.fromkeys(errors), errors)[1] == {}
    own = train_ways.step(ways[OURS], stack, Batch.of(frozen, SAMPLES, case.tokens, seed=1))()
    assert len(own) == 2 * len(stack.lora_A) + 1 and all(grad.abs().max() > 0 for grad in own)


def test_a_wrong_way_is_not_timed():
    case = train_ways.cases(TINY)[0]
    frozen, single = train.models(TINY, case.dtype)
    stack = train_ways.adapters(frozen.model, case)
    shifted = [*range(1, SAMPLES), 0]  # another sample's adapter
    ways = {OURS: train_ways.ours(frozen.model, stack, shifted), BMM: train_ways.plain_bmm(frozen.model, stack)}
    errors = train.step_errors(ways, frozen, single, stack, case)
    with pytest.raises(VerificationError, match="q,v, 16 tokens, float32: error"):
        admit(case.name, dict.fromkeys(errors), errors)


def test_hooks_repeat_a_token(monkeypatch):
    rows, tokens, rank, features, out = 2, 3, 4, 5, 6
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(rows, *size, generator=generator) for size in ((tokens, features), (rank, features), (out, rank)))
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(tuple(a.shape)) or bmm(a, b))
    repeated = train_ways.repeated(x, A, B, 2.0)
    assert shapes == [(rows * tokens, rank, features), (rows * tokens, out, rank)]
    shapes.clear()
    batched = train_ways.batched(x, A, B, 2.0)
    assert shapes == [(rows, tokens, features), (rows, tokens, rank)]
    expected = torch.stack([2 * row @ a.mT @ b.mT for row, a, b in zip(x, A, B, strict=True)])
    assert torch.allclose(repeated, expected, atol=1e-5) and torch.allclose(batched, expected, atol=1e-5)


def test_hooks_leave_no_adapter_behind():
    frozen = train_ways.load(TINY, "float32")
    case = train_ways.cases(TINY)[0]
    stack, batch = train_ways.adapters(frozen.model, case), Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    way = train_ways.hooks(frozen.model, stack)
    with way.applied(stack):
        adapted = train_ways.loss_of(way.model, batch)
    assert not torch.equal(adapted, train_ways.loss_of(frozen.model, batch))
    with pytest.raises(KeyError):
        train_ways.loss_of(way.model, batch)


@pytest.mark.skipif(HOOKS_PEFT in train_ways.ABSENT, reason="peft is not installed")
def test_peft_base_multiplies_zeros():
    from peft.tuners.lora import Linear

    frozen = train_ways.load(TINY, "bfloat16")
    stack = train_ways.adapters(frozen.model, train_ways.cases(TINY)[0])
    way = train_ways.hooks_peft(frozen.model, stack)
    found = [layer for layer in way.model.modules() if isinstance(layer, Linear)]
    assert len(found) == sum(a.shape[1] for a in stack.lora_A.values())
    assert all(layer.lora_A["default"].weight.any() and not layer.lora_B["default"].weight.any() for layer in found)
    assert not any(p.requires_grad for p in way.model.parameters())
    assert not any(isinstance(layer, Linear) for layer in frozen.model.modules())


@pytest.mark.parametrize(
    "name, group",
    [
        ("library float32", "library"),
        ("sft step q,v, 16 tokens, bfloat16", "sft step"),
        ("step q,v, 16 tokens, float32", "train"),
    ],
)
def test_tasks(name, group):
    (task,) = (task for task in train.plan(TINY) if task.name == name)
    made = list(task.run())
    found = [entry for kind, entry in made if kind == "rows"]
    assert {row["group"] for row in found} == {group}
    assert all(row["error"]["value"] <= row["error"]["bound"] and row["baselines"] for row in found)
    parts = [entry["case"] for kind, entry in made if kind == "train_parts"]
    assert parts == ([row["case"] for row in found] if group == "sft step" else [])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_child_tells_its_memory():
    tokens = 128
    found = train_memory.in_a_process(TINY, Case("q,v", tokens, "float32"), HOOKS)
    stack = train_ways.adapters(train_ways.load(TINY, "float32").model, Case("q,v", tokens, "float32"))
    once_a_token = tokens * sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values()) / 2**20
    added = found["peak_mib"] - found["loaded_mib"]
    assert once_a_token > 10 and once_a_token <= added <= once_a_token + 500
    assert 50 < found["loaded_mib"] < 2000 and found["reset"] in (True, False)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path):
    """Factory: the result, with ``change`` made to its lists, as the report reads it."""

    def make(change=lambda made: None):
        made = train_result.lists()
        change(made)
        about = {"date": "2026-01-02", "commit": "0123abc", "dirty": False, "command": "python -m bench train"}
        machine = {"cpu": "Some CPU", "cores": 2, "memory_gib": 8.0, "isa": "avx512"}
        whole = {"suite": "train", "size": "full", "machine": machine, "versions": {"torch": "2.11"}, **about, **made}
        (tmp_path / "train.json").write_text(json.dumps(whole))
        return rows.load(tmp_path / "train.json")

    return make


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def test_step_table(load):
    text = train_tables.steps(load())
    assert "| 108 (5.40) | 1.08 | 1.12 x base | yes | 216 (2.16 x) | 240 (2.40 x) | 104 (1.04 x) |" in text
    assert "| 120 (6.00) | 1.20 | 1.12 x base | **no** |" in text


def test_memory_table(load):
    result = load(lambda made: made["train_memory"][1]["ways"]["ours"].update(peak_mib=1500.0))
    text = train_tables.memory(result)
    assert line(text, "| q,v").endswith("| 1.60 x (4.00 x) | hooks at least 1.25 x ours | yes |")
    assert line(text, "| all").endswith("| 1.07 x (1.14 x) | hooks at least 1.25 x ours | **no** |")
    assert "| 900 (100) | 1,000 (200) | 1,600 (800) |" in text and "begin anew" not in text
    kept = load(lambda made: made["train_memory"][0]["ways"]["ours"].update(reset=False))
    assert "The system did not let peaks begin anew" in train_tables.memory(kept)


def test_absent_way_says_why(load):
    def without(made):
        for entry in made["train_memory"]:
            del entry["ways"][HOOKS_PEFT]
            entry["absent"] = {HOOKS_PEFT: "peft is not installed"}

    text = train_tables.memory(load(without))
    assert HOOKS_PEFT not in text.partition("\n")[0] and "\n– hooks, PEFT base (peft is not installed)." in text


def test_hypernetwork_and_library_tables(load):
    result = load()
    assert "| 100 | 125 (6.25) | 1.25 | 108 (86%) | 12.5 (10%) | 4.00 (3%) |" in train_tables.hypernetworks(result)
    text = train_tables.library(result)
    assert "| 600 (30.0) | 75.0 | 1.10 x |" in text and "| 79.0 (3.95) | 79.0 | 1.01 x |" in text


def test_summary_counts_and_loses(load):
    text = train_tables.summary(load())
    assert "| 100 ms | 108 ms | 1.08 | 1.12 x base | yes | 2.00 x | 1.60 x | 1.25 x | yes |" in text
    assert "- Of 4 bars 1 are missed.  Farthest from its bar: train, all linears, 128 tokens, bfloat16, 2 threads" in text
    assert "- Faster than ours: train, plain bmm, in 2 of 2 cases, at most 1.15 times" in text
    assert "the hypernetwork takes 10% (sft step L) to 10% (sft step L)" in text
    assert "over one task at a time: 1.10 x (8 tasks x 8 samples)." in text


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda made: made.pop("train_memory"), "nothing under 'train_memory'"),
        (lambda made: made["train_memory"].pop(), "nothing of all linears, 128 tokens, bfloat16"),
        (lambda made: made["train_memory"][0]["ways"].pop("hooks"), "no 'hooks'"),
        (
            lambda made: made["train_memory"][0]["ways"]["hooks"].update(peak_mib=700.0),
            "above the 800 MiB .*, got 700",
        ),
        (lambda made: made["train_parts"][0]["parts"].pop("hypernetwork"), "'hypernetwork' was not timed"),
        (lambda made: made["rows"][1]["bar"].update(met=True), "the file says met = True"),
    ],
    ids=["no memory", "a case", "a way", "a peak", "a part", "verdict"],
)
def test_results_are_not_just_believed(load, change, says):
    with pytest.raises(ResultError, match=says):
        train_tables.summary(load(change))
