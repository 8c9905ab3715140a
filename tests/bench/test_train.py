"""The suite ``train``: its ways compute one thing, a child tells its memory, tables say what the numbers do."""

import dataclasses
import json

import pytest
import torch

from bench import records
from bench.harness import Context, VerificationError, verify
from bench.records import BASE, HOOKS, OURS, ResultError
from bench.report.pages import TABLES
from bench.suites import train
from bench.suites.train import BMM, HOOKS_PEFT, SAMPLES, Batch, Case
from bench.timing import threads

TINY = dataclasses.replace(Context.of("tiny", 1), rounds=(2, 2), seconds=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    """As TINY says: threads that share small products wait for each other on a busy machine."""
    with threads(1):
        yield


# --- ways ------------------------------------------------------------------------------------------------------------


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
    expected = torch.stack([2 * row @ a.mT @ b.mT for row, a, b in zip(x, A, B, strict=True)])
    assert torch.allclose(repeated, expected, atol=1e-5) and torch.allclose(batched, expected, atol=1e-5)


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


@pytest.mark.skipif(HOOKS_PEFT in train.SKIPPED, reason="peft is not installed")
def test_peft_base_multiplies_zeros():
    from peft.tuners.lora import Linear

    frozen = train.load(TINY, "bfloat16")
    stack = train.adapters(frozen.model, train.cases(TINY)[0])
    way = train.hooked(frozen.model, stack, peft_base=True)
    found = [layer for layer in way.model.modules() if isinstance(layer, Linear)]
    assert len(found) == sum(a.shape[1] for a in stack.lora_A.values())
    assert all(layer.lora_A["default"].weight.any() and not layer.lora_B["default"].weight.any() for layer in found)
    assert not any(p.requires_grad for p in way.model.parameters())
    assert not any(isinstance(layer, Linear) for layer in frozen.model.modules())


@pytest.mark.slow
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
    found = [entry for entry in made if entry["record"] == "row"]
    assert {row["group"] for row in found} == {group}
    assert all(row["error"]["value"] <= row["error"]["bound"] and row["times"].keys() > {OURS} for row in found)
    parts = [entry["case"] for entry in made if entry["record"] == "train_parts"]
    assert parts == ([row["case"] for row in found] if group == "sft step" else [])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_child_tells_its_memory():
    tokens = 256
    found = train.peak(TINY, Case("q,v", tokens, "float32"), HOOKS)
    stack = train.adapters(train.load(TINY, "float32").model, Case("q,v", tokens, "float32"))
    once_a_token = tokens * sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values()) / 2**20
    added = found["peak_mib"] - found["loaded_mib"]
    assert once_a_token > 10 and once_a_token <= added <= once_a_token + 500
    assert 50 < found["loaded_mib"] < 2000


# --- tables ----------------------------------------------------------------------------------------------------------

CASES = ("q,v, 48 tokens, float32", "all linears, 128 tokens, bfloat16")
#: Milliseconds of a step, and MiB at most, by way.
TIMES = {BASE: 100.0, OURS: 108.0, HOOKS: 216.0, HOOKS_PEFT: 240.0, BMM: 104.0}
PEAKS = {BASE: 900.0, OURS: 1000.0, HOOKS: 1600.0, HOOKS_PEFT: 1700.0, BMM: 1050.0}


def timings(**ms):
    return {name: {"median_us": 1e3 * of, "iqr_us": 50 * of, "rounds": 10} for name, of in ms.items()}


def row(case, group, shape, times, target=None):
    fields = {"threads": 2, "cache": None, "skipped": {}, "roofline": None, "target": target}
    error = {"value": 1e-6, "bound": 1e-4, "measure": "gradient"}
    return {"record": "row", "case": case, "group": group, "shape": shape, "times": times, "error": error, **fields}


@pytest.fixture
def lines(tmp_path):
    """Factory: the lines of a table of a result with made-up times, to which ``change`` was made."""

    def make(table, change=lambda made: None):
        target = {"ratio": 1.12, "of": BASE}
        steps = [
            row(case, "train", {}, timings(**TIMES | {OURS: ms}), target)
            for case, ms in zip(CASES, (108.0, 120.0), strict=True)
        ]
        held = {way: {"loaded_mib": 800.0, "peak_mib": peak} for way, peak in PEAKS.items()}
        kind = {"record": "train_memory", "skipped": {}, "target": {"ratio": 1.25, "of": HOOKS}}
        memory = [kind | {"case": case, "ways": {way: dict(of) for way, of in held.items()}} for case in CASES]
        parts = {"record": "train_parts", "case": "L", "parts": timings(model=108.0, hypernetwork=12.5, update=4.0)}
        library = row("8 tasks", "library", {"tasks": 8}, timings(**{OURS: 600.0, train.SEPARATE: 660.0}))
        made = {"rows": [*steps, row("L", "sft step", {}, timings(base=100.0, ours=125.0)), library]}
        made |= {"memory": memory, "parts": [parts]}
        change(made)
        file = tmp_path / "train.jsonl"
        head = {"record": "run", "suite": "train", "size": "full", "device": "cpu", "command": "", "dirty": False}
        file.write_text("".join(json.dumps(one) + "\n" for one in [head, *made["rows"], *made["memory"], *made["parts"]]))
        return TABLES[table].lines([records.load(file)])

    return make


def test_steps_and_memory(lines):
    few, many = lines("train")
    assert (few["x base"], few["met"], many["x base"], many["met"]) == (1.08, True, 1.2, False)
    assert (few["hooks / ours, time"], few["hooks / ours, peak memory"], few["memory met"]) == (2.0, 1.6, True)
    assert (few["hooks ms"], few["hooks x base"], few["plain bmm x base"]) == (216.0, 2.16, 1.04)


def test_memory(lines):
    few, many = lines("train", lambda made: made["memory"][1]["ways"][OURS].update(peak_mib=1500.0))
    assert (few["ours peak MiB"], few["ours of the step MiB"], few["hooks of the step MiB"]) == (1000.0, 200.0, 800.0)
    assert (few["hooks / ours, peak memory"], few["hooks / ours, memory of the step"], few["memory met"]) == (1.6, 4.0, True)
    assert many["hooks / ours, peak memory"] == 1600 / 1500 and not many["memory met"]


def test_a_skipped_way_says_why(lines):
    def without(made):
        for entry in made["memory"]:
            del entry["ways"][HOOKS_PEFT]
            entry["skipped"] = {HOOKS_PEFT: "peft is not installed"}

    found = lines("train", without)
    assert f"{HOOKS_PEFT} peak MiB" not in found[0] and found[0]["memory skipped"] == f"{HOOKS_PEFT}: peft is not installed"


def test_hypernetworks_and_libraries(lines):
    (whole,) = lines("train-hypernetworks")
    assert (whole["base ms"], whole["ms"], whole["x base"], whole["hypernetwork ms"]) == (100.0, 125.0, 1.25, 12.5)
    assert whole["model %"] == pytest.approx(86.4) and whole["update %"] == pytest.approx(3.2)
    (library,) = lines("train-library")
    assert library["ms a task"] == 75.0 and library["over one task at a time"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    "table, change, says",
    [
        ("train", lambda made: made["memory"].clear(), "'train_memory'"),
        ("train", lambda made: made["memory"].pop(), CASES[1]),
        ("train", lambda made: made["memory"][0]["ways"].pop(HOOKS), "'hooks'"),
        ("train", lambda made: made["memory"][0]["ways"][HOOKS].update(peak_mib=700.0), "above the 800 .*, got 700"),
        ("train-hypernetworks", lambda made: made["parts"][0]["parts"].pop("hypernetwork"), "'hypernetwork'"),
    ],
    ids=["no memory", "a case", "a way", "a peak", "a part"],
)
def test_results_are_not_just_believed(lines, table, change, says):
    with pytest.raises(ResultError, match=says):
        lines(table, change)


def test_shares_of_the_gain(tmp_path):
    scores = {"base model": (10.0, 5.0), "an adapter a task": (90.0, 1.0), "reconstruction, raw": (70.0, 2.0)}
    made = [{"record": "run", "suite": "learn"}]
    made += [{"record": "arm", "arm": arm, "exact_match": match, "loss": loss} for arm, (match, loss) in scores.items()]
    (tmp_path / "learn.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    found = TABLES["learn"].lines([records.read(tmp_path / "learn.jsonl")])
    assert [line["exact match, % of the gain"] for line in found] == [None, None, 75.0] and found[2][
        "loss, % of the gain"
    ] == 75.0
