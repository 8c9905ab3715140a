"""Tuning on a user's examples from several starts: tasks, settings, records, and what the tables say of them."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.records import Result, read
from bench.report import tables_adapt
from bench.report.tables import TABLES
from bench.source import ROOT, SPECS, bundled
from bench.specs import adapting, plan, rates, runs
from t2l_engine.research.tasks.folder import Example, Task
from t2l_engine.research.tasks.specs import suite
from t2l_engine.research.training import adapt


def test_budgets_share_validation_and_test():
    splits = [("train", 9), ("val", 30), ("test", 30)]
    examples = [Example(f"{split} {i}", ("x",), split) for split, count in splits for i in range(count)]
    few, more = (adapting.limited(Task("a", ("Do it.",), tuple(examples)), budget) for budget in (2, 5))
    assert [e for e in few.examples if e.split == "train"] == [e for e in more.examples if e.split == "train"][:2]
    assert [e for e in few.examples if e.split != "train"] == [e for e in more.examples if e.split != "train"]
    assert len(few.examples) == 2 + adapting.ADAPTED["validation"] + adapting.ADAPTED["items"]


def test_tuned_tasks_have_many_inputs_and_a_held_out_description():
    specifications = [placed.spec for placed in suite.suite(200) if placed.tier == "novel"]
    tasks = adapting.chosen(specifications, 2)
    assert len(tasks) == 2 and {task.name for task in tasks} <= {spec.name for spec in specifications}
    for task in tasks:
        whole = suite.task(next(spec for spec in specifications if spec.name == task.name), adapting.ADAPTED["inputs"], 0)
        assert task.examples == whole.examples and len(task.examples) == adapting.ADAPTED["inputs"]
        assert task.descriptions == (whole.descriptions[-suite.HELD_OUT],)
        shown, last = whole.examples[0], whole.descriptions[-1]
        assert shown.input in last and shown.outputs[0] in last  # which gives an example away
        assert f'"{shown.input}"' not in task.descriptions[0]


@pytest.mark.parametrize("start", adapting.STARTS)
def test_starts_share_their_settings(start):
    made, other = (adapting._settings(which, Path("/x"), 1e-3, seed) for which, seed in ((start, 1), ("peft", 0)))
    assert made == other.model_copy(update={"prompt": made.prompt, "seed": 1})
    assert (made.prompt == "description") == (start == plan.RIVAL) and made.initial == "/x"
    assert set(adapting.ADAPTED["learning_rates"]) == set(adapting.STARTS)
    assert made.patience * made.validate_every > made.steps  # the start is validated, too, and no run ends early


def test_starts_are_made_once(monkeypatch, tmp_path):
    task = Task("f-000", ("Do it.",), (Example("a", ("b",), "train"),))
    made = []
    stack = SimpleNamespace(save_pretrained=lambda folder, **_: folder.mkdir(parents=True))
    engine = SimpleNamespace(
        encoder=SimpleNamespace(max_examples=6), generate=lambda texts, shown: made.append((texts, shown)) or stack
    )
    monkeypatch.setattr(adapting.t2l.TextToLoRA, "from_pretrained", lambda checkpoint: engine)
    folders = [adapting._start("generated-examples", tmp_path, [task]) for _ in range(2)]
    assert made == [(["Do it."], [[("a", "b")]])] and folders[0] == folders[1] and (folders[0] / "f-000").is_dir()
    adapting._start("generated", tmp_path, [dataclasses.replace(task, descriptions=("Do that.",))])
    assert made[1:] == [(["Do that."], None)]
    monkeypatch.setattr(adapting, "bundled", lambda _: "other weights")
    adapting._start("generated-examples", tmp_path, [task])
    assert len(made) == 3


def brief(run):
    return dataclasses.replace(
        run, settings=run.settings.model_copy(update={"steps": 1, "warmup_steps": 0, "validate_every": 0})
    )


@pytest.mark.slow
@pytest.mark.release
def test_tuning_from_several_starts(tmp_path, monkeypatch):
    """With the real model: losses by step, and answers; a second call trains nothing."""
    few = {"tasks_a_tier": 1, "budgets": [8], "rates": [1e-3], "chosen_by": 1, "chosen_at": 8, "validation": 2, "items": 2}
    few |= {"seeds": dict.fromkeys(adapting.STARTS, [0])}
    monkeypatch.setitem(plan.RUNS, plan.LIBRARY, brief(plan.RUNS[plan.LIBRARY]))
    shorter = {"steps": 2, "validate_every": 1, "patience": 3, "warmup_steps": 0, "validation_samples": 2}
    for name, value in (few | {"settings": adapting.ADAPTED["settings"] | shorter}).items():
        monkeypatch.setitem(adapting.ADAPTED, name, value)
    monkeypatch.setattr(adapting, "STARTS", ("generated", "nearest", plan.RIVAL))
    made = suite.suite(200)
    trained = [placed for placed in made if placed.tier == "train"][:20]
    specifications = runs.Specifications(trained, trained, [], [], made)
    rates = list(adapting.rates(tmp_path, specifications))
    assert [(of["start"], list(of["lowest"])) for of in rates] == [("peft", ["0.001"]), ("generated", ["0.001"])]
    about, *found = adapting.records(tmp_path, specifications)
    assert about["lacking"] == [plan.RIVAL] and about["adapted"] is adapting.ADAPTED
    wanted = [(tier, start) for start in ("generated", "nearest") for tier in plan.HELD_OUT]
    assert [(of["tier"], of["start"]) for of in found] == wanted
    assert all([step for step, _ in of["losses"]] == [0, 1, 2] for of in found)
    assert all(0 <= of[when] <= 100 for of in found[:2] for when in ("before", "right")) and "before" not in found[2]
    stored = {path.name for path in (tmp_path / "stored" / "adapters").iterdir() if path.is_dir()}
    assert 1 <= len(stored) <= 2 and stored <= {placed.spec.name for placed in trained}
    # One of what was tuned serves as multi-task LoRA, of which the suite of this test has none.
    tuned = tmp_path / "rates-0.001" / "8" / "peft"
    one = min(path for path in (tuned / "adapters").iterdir() if path.is_dir())
    shutil.copytree(one, tmp_path / plan.RIVAL / "adapters" / "multi-task")
    monkeypatch.setattr(runs, "lacking", lambda work: [])
    monkeypatch.setattr(adapting, "trained", lambda work, names: [])  # it was not
    _, *more = adapting.records(tmp_path, specifications)
    assert more[:4] == found and [of["start"] for of in more[4:]] == [plan.RIVAL, plan.RIVAL]
    monkeypatch.setattr(adapting.lora.loop, "run", lambda *_: pytest.fail("trained again"))
    assert [*adapting.records(tmp_path, specifications)][1:] == more


@pytest.mark.slow
@pytest.mark.release
def test_rates_of_adapt(tmp_path, monkeypatch):
    """With the real model, at the settings of ``t2l adapt`` but for the number of steps; a second call tunes nothing."""
    monkeypatch.setitem(adapt.DEFAULTS, "steps", 2)
    for name, value in {
        "tasks": 1,
        "examples": 8,
        "tried": {"low": {"learning_rate": 1e-3}, "high": {"learning_rate": 4e-3}},
    }.items():
        monkeypatch.setitem(rates.RATES, name, value)
    monkeypatch.setitem(adapting.ADAPTED, "items", 2)
    development = [placed for placed in suite.suite(200) if placed.tier == "train"][:20]
    specifications = runs.Specifications([], development, [], [], [])
    about, *found = rates.records(tmp_path, specifications)
    assert (about["checkpoint"], about["rates"]) == (bundled(SPECS), rates.RATES)
    assert [of["settings"] for of in found] == ["low", "high"] and len({of["task"] for of in found}) == 1
    assert {(of["examples"], of["held_out"], of["steps"]) for of in found} == {(6, 2, 2)}
    assert all(of["right"] in (0, 50, 100) for of in found) and found[0]["loss_before"] == found[1]["loss_before"]
    monkeypatch.setattr(adapt.lora.loop, "run", lambda *_: pytest.fail("trained again"))
    assert list(rates.records(tmp_path, specifications))[1:] == found


# --- what is shown of it --------------------------------------------------------------------------------------------------


def adapted(task, start, right, *losses, seed=0):
    of = {"tier": "novel" if task == "c" else "sibling", "task": task, "budget": 8, "start": start, "right": right}
    return of | {"seed": seed, "losses": [[4 * i, loss] for i, loss in enumerate(losses)]}


def lines(name, *records):
    return [*TABLES[name].lines([Result(Path("adapt.jsonl"), {}, (), {"adapted": records})])]


PEFTS = (
    adapted("a", "peft", 50.0, 3.0, 2.0, 1.0, 1.5),
    adapted("b", "peft", 20.0, 3.0, 2.5, 2.0, 1.0),
    adapted("c", "peft", 0.0, 2.0, 2.0, 2.0, 2.0),
)


def test_a_start_is_compared_with_pefts_loss():
    """On siblings it needs 4 and 8 of PEFT's 8 and 12 steps to 1.1, near 1.0; one that never gets there counts with all."""
    others = (
        adapted("a", "generated", 75.0, 2.0, 0.9, 1.0, 1.0), adapted("b", "generated", 25.0, 2.0, 1.2, 1.1, 0.5),
        adapted("c", "generated", 9.0, 3.0, 3.0, 3.0, 3.0),
        adapted("a", "nearest", 0.0, 3.0, 3.0, 3.0, 3.0), adapted("b", "nearest", 0.0, 3.0, 3.0, 3.0, 1.0),
        adapted("c", "nearest", 0.0, 2.0, 2.0, 2.0, 2.0),
    )  # fmt: skip
    peft, generated, nearest = [of for of in lines("adapt", *PEFTS, *others) if of["tier"] == "unseen siblings"]
    assert [of["start"] for of in (peft, generated)] == [tables_adapt.STARTS[start] for start in ("peft", "generated")]
    assert (peft["steps, within 5 %"], generated["steps, within 5 %"], peft["loss, within 5 %"]) == (10, 6, 1.1)
    assert (peft["steps, lowest"], generated["steps, lowest"], peft["loss, lowest"]) == (10, 8, 1.0)
    assert [of["tasks that reach it, within 5 %, %"] for of in (peft, generated, nearest)] == [100, 100, 50]
    assert (generated["of PEFT's steps, within 5 %"], generated["right, less PEFT's start"]) == (0.6, 15.0)
    assert generated["of PEFT's steps, lowest"] == 0.8 and peft["PEFT's other seed, lowest"] is None
    assert generated["lowest loss"] == pytest.approx(0.7) and generated["loss before"] == 2.0
    assert nearest["steps, within 5 %"] == 12 and peft["of PEFT's steps, within 5 %"] is None
    both = [of for of in lines("adapt", *PEFTS, *others) if of["tier"] == "both"]
    assert [of["tasks"] for of in both] == [3, 3, 3] and both[1]["right, less PEFT's start"] == pytest.approx(13)


def test_claims_of_tuning():
    """PEFT's start needs 8, 12 and 0 steps, the generated one 4, 8 and 12, which is more in all than half."""
    ours = (
        adapted("a", "generated-examples", 51.0, 2.0, 0.9, 1.0, 1.0),
        adapted("b", "generated-examples", 25.0, 2.0, 1.2, 1.1, 0.5),
        adapted("c", "generated-examples", 9.0, 3.0, 3.0, 3.0, 3.0),
    )
    better, sooner, nearer, lowest = lines("adapt-claims", *PEFTS, *ours)
    assert better["claim"].startswith("8 examples: right") and better["measured"] == pytest.approx(5) and better["met"]
    assert sooner["measured"] == pytest.approx(100 - 100 * 24 / 20) and sooner["target"] == ">= 50" and not sooner["met"]
    assert sooner["measured, low"] <= sooner["measured"] <= sooner["measured, high"]
    assert sooner["claim"].endswith("PEFT's lowest loss, within 5 %, %") and lowest["claim"].endswith("lowest loss, %")
    assert nearer["measured"] == lowest["measured"] == pytest.approx(100 - 100 * 28 / 20)


def test_a_task_is_the_mean_of_its_seeds():
    """Each seed beside PEFT's start of the same seed."""
    more = (
        adapted("a", "peft", 70.0, 3.0, 1.0, seed=1), adapted("a", "generated-examples", 60.0, 1.0, 1.0, seed=1),
        adapted("a", "generated-examples", 80.0, 3.0, 3.0, 1.0, 1.0),
    )  # fmt: skip
    peft, ours = [of for of in lines("adapt", PEFTS[0], *more) if of["tier"] == "both"]
    assert (peft["seeds"], ours["seeds"]) == (2, 2)
    assert (peft["right, %"], ours["right, %"], ours["right, less PEFT's start"]) == (60, 70, 10)
    assert (peft["steps, within 5 %"], ours["steps, within 5 %"], ours["tasks"]) == (6, 4, 1)
    assert (
        peft["PEFT's other seed, lowest"] == (4 + 8) / 2
    )  # seed 1 comes to seed 0's 1.0 at step 4, seed 0 to seed 1's at 8


def test_a_start_with_fewer_seeds_is_beside_the_same_seeds_of_others():
    more = (
        adapted("a", "peft", 70.0, 3.0, 2.0, 1.0, seed=1),
        adapted("a", "generated-examples", 90.0, 2.0, 1.0, 1.0), adapted("a", "generated-examples", 10.0, 2.0, 1.0, seed=1),
        adapted("a", "nearest", 60.0, 3.0, 1.0),
    )  # fmt: skip
    peft, ours, nearest = [of for of in lines("adapt", PEFTS[0], *more) if of["tier"] == "both"]
    assert (ours["right, less PEFT's start"], nearest["right, less PEFT's start"]) == (-10, 10)  # of PEFT's 50 and 70
    assert (nearest["seeds"], nearest["of PEFT's steps, lowest"]) == (
        1,
        0.5,
    )  # 4 of seed 0's 8, whatever those of seed 1 are
    assert nearest["right, generated start less this"] == 30
    assert peft["right, generated start less this"] == -10 and ours["right, generated start less this"] is None


def test_the_committed_result_is_of_this_plan():
    made = read(ROOT / "bench" / "results" / "adapt.jsonl")
    (about,) = made.records("plan")
    assert about["adapted"] == adapting.ADAPTED
    starts = [start for start in adapting.STARTS if start not in about["lacking"]]
    found = [(of["seed"], of["budget"], of["start"]) for of in made.records("adapted")]
    assert list(dict.fromkeys(found)) == adapting.planned(starts)


def test_rates_are_compared_task_by_task():
    of = lambda settings, task, right: {  # noqa: E731
        "settings": settings, "task": task, "right": right, "examples": 30, "held_out": 10, "loss_before": 1.0,
        "loss_after": 0.5, "steps": 60, "best_step": 30,
    }  # fmt: skip
    own = [of("high", "a", 70.0), of("high", "b", 50.0), of("low", "b", 40.0), of("low", "a", 60.0)]
    tried = {"low": {"learning_rate": 1e-3, "min_delta": 0}, "high": {"learning_rate": 4e-3, "min_delta": 2e-3}}
    about = {"rates": {"tried": tried}}
    low, high = TABLES["adapt-rates"].lines([Result(Path("rates.jsonl"), {}, (), {"rate": own, "plan": [about]})])
    assert (high["learning rate"], high["tasks"], high["examples"], high["right, %"]) == (4e-3, 2, 40, 60.0)
    assert high["right, less the first row"] == 10.0 and low["right, less the first row"] is None
    assert (low["right, %"], low["loss after"], low["best step"]) == (50.0, 0.5, 30)
    assert (low["min_delta"], high["min_delta"]) == (0, 2e-3)


def test_adapt_has_the_settings_that_were_right_most_often():
    made = read(ROOT / "bench" / "results" / "rates.jsonl")
    tried = made.records("plan")[0]["rates"]["tried"]
    right = [line["right, %"] for line in TABLES["adapt-rates"].lines([made])]
    best = [*tried.values()][right.index(max(right))]
    assert best.items() <= adapt.DEFAULTS.items() and best == [*tried.values()][1]  # the row that the page names
