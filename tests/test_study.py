"""The plan of the study: what it trains on, and that nothing held out is among it."""

import dataclasses
import json

import pytest

from bench.study import judge, plan, runs, tables
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation.bootstrap import Interval
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import Example, Task, write_tasks
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings

MANIFEST = manifests.read(plan.MANIFEST)
TRAINED = manifests.select(MANIFEST.tasks, MANIFEST, "train", permissive=True)
HELD_OUT = [*MANIFEST.names("sibling"), *MANIFEST.names("novel")]


def test_more_tasks_hold_the_fewer():
    found = [plan.chosen(TRAINED, count) for count in (*plan.COUNTS, None)]
    assert [len(names) for names in found] == [*plan.COUNTS, 90] and found[-1] == TRAINED
    assert set(found[2]) < set(plan.LEARNABLE) == set(plan.chosen(TRAINED, len(plan.LEARNABLE))) < set(found[3])
    assert all(set(fewer) < set(more) for fewer, more in zip(found, found[1:], strict=False))


def test_descriptions_that_are_judged_by_are_not_trained_on():
    wordings = json.loads(runs.WORDINGS.read_text(encoding="utf-8"))
    assert sorted(wordings["held-out"]) == sorted([*TRAINED, *HELD_OUT])
    assert set(wordings["train"]) < set(TRAINED)  # nothing was written to train on of a task that is held out
    assert {len(set(texts)) for texts in wordings["held-out"].values()} == {3}
    task = Task(TRAINED[0], ("Own.", wordings["held-out"][TRAINED[0]][0]), ())
    assert runs._worded(task, wordings).descriptions == ("Own.", *wordings["train"].get(TRAINED[0], ()))


def test_what_is_compared_is_trained_alike():
    compared = {name: plan.RUNS[name] for name in ("t2l", *judge.CONTROLLED, *judge.MULTI_TASK)}
    assert all(run.learnable and run.count is None and run.tier == "train" for run in compared.values())
    assert set(plan.LEARNABLE) < set(TRAINED)
    for name, run in compared.items():
        assert (run.settings.prompt == "description") == name.endswith("description")
        examples = 16 * plan.STEPS_DESCRIPTION if run.settings.prompt == "description" else 32 * plan.STEPS
        assert run.settings.steps * run.settings.tasks_per_step == examples  # as many
    assert len({run.settings.prompt_form for run in compared.values()}) == 1
    assert set(judge.VARIED) == {name for name in plan.RUNS if name.startswith("short")} | {"reconstruction-64"}


def test_shorter_pairs_have_the_same_part_of_their_training():
    examples = lambda name: plan.RUNS[name].settings.steps * plan.RUNS[name].settings.tasks_per_step  # noqa: E731
    whole = [examples(name) for name in plan.LENGTHS[-1]]
    parts = [[examples(name) / of for name, of in zip(pair, whole, strict=True)] for pair in plan.LENGTHS]
    assert parts[0] == pytest.approx([0.1875, 0.1875], rel=0.01) and parts[1:] == [[0.5, 0.5], [1, 1]]
    tasks = [set(plan.chosen(plan.LEARNABLE, plan.RUNS[name].count)) for pair in plan.LENGTHS for name in pair]
    assert all(names == set(plan.LEARNABLE) for names in tasks)


@pytest.mark.parametrize("name", ["library-train", "t2l", "reconstruction-8"])
def test_a_run_has_ended_when_its_last_step_was_saved(tmp_path, name):
    settings, folder = plan.RUNS[name].settings, tmp_path / name
    assert not runs.finished(name, tmp_path)
    if isinstance(settings, LoRASettings):
        waves = [folder / "waves" / number for number in ("000", "001")]
        for wave in waves:
            wave.mkdir(parents=True)
        (waves[0] / "done.json").write_text("{}")
        assert not runs.finished(name, tmp_path)
        (waves[1] / "done.json").write_text("{}")
    else:
        assert isinstance(settings, ReconstructionSettings) == name.startswith("reconstruction")
        folder.mkdir()
        for steps in (settings.steps - 1, settings.steps):
            assert not runs.finished(name, tmp_path)
            (folder / "config.json").write_text(json.dumps({"training": {"steps_done": steps}}))
    assert runs.finished(name, tmp_path)


def test_other_tasks_are_refused(tmp_path):
    write_tasks(tmp_path / "tasks", [Task("fv_antonym", ("Opposite.",), (Example("a", ("b",), "train"),))])
    with pytest.raises(ConfigError, match="differs from manifest skills"):
        runs.tasks(tmp_path / "tasks", tmp_path / "work")


def test_tasks_of_another_study_are_not_gone_on_with(tmp_path):
    made = [Task(name, ("Do it.",), (Example("a", ("b",), "train"),)) for name in ("b", "a")]
    for _ in range(2):  # the second time they are there
        runs._write(tmp_path / "tasks", made)
    changed = [dataclasses.replace(made[0], descriptions=("Do that.",)), made[1]]
    with pytest.raises(ConfigError, match="tasks: expected the study's tasks, examples and descriptions, found others"):
        runs._write(tmp_path / "tasks", changed)


# --- what is shown of it -------------------------------------------------------------------------------------------------


def part(scores, groups):
    """A part of the result as ``collect`` writes it: ``scores``: task -> arm -> score."""
    arms = sorted({arm for of in scores.values() for arm in of})
    about = {"form": "raw", "groups": {group: {"prompt_tokens": 14.0, "containment": 60.0} for group in groups}}
    return {"tasks": scores, "items": dict.fromkeys(scores, 20), "groups": groups, "arms": dict.fromkeys(arms, about)}


@pytest.fixture
def result():
    scores = {
        "a": {"t2l": 80.0, "t2l-shuffled": 20.0, "base": 0.0, "base-description": 10.0, "icl": 50.0, "oracle": 100.0},
        "b": {"t2l": 60.0, "t2l-shuffled": 20.0, "base": 20.0, "base-description": 10.0, "icl": 50.0, "oracle": 80.0},
    }
    groups = {"all": ["a", "b"], "sibling": ["a"], "novel": ["b"]}
    return {
        "command": "make it", "seen": part(scores, {"all": ["a", "b"], "train": ["a", "b"]}), "unseen": part(scores, groups),
        "varied": {}, "lengths": {}, "reconstruction": {}, "distances": {}, "benchmarks": {}, "runs": {},
        "date": "2026-01-02", "commit": "0123abc", "dirty": False, "versions": {"torch": "2.13"},
        "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "isa": "avx2", "memory_gib": 8.0},
    }  # fmt: skip


def test_share_and_gap_are_of_the_tasks_both_answered(result):
    seen = result["seen"]
    assert tables.share(seen, "t2l", "base") == Interval(100 * (70 - 10) / (90 - 10), 100 * 40 / 60, 80.0)
    assert tables.share(seen, "none", "base") is None
    assert tables.gap(seen, "t2l", "icl").mean == 20 and tables.gap(seen, "t2l", "none") is None
    del seen["tasks"]["b"]["t2l-shuffled"]
    assert tables.gap(seen, "t2l", "t2l-shuffled").mean == 60  # of task a alone
    assert tables.share(seen, "t2l-shuffled", "base") is None  # not of the same tasks


def test_bars_are_met_or_missed_by_what_was_measured(result):
    rows = {line.split("|")[1].strip(): line for line in tables.claims(result).splitlines()}
    assert rows["siblings: matched less shuffled"].split("|")[2:5] == [" >= 20 ", " +60.0 [+60.0, +60.0] ", " met "]
    kept = rows["seen tasks with headroom: share of the oracle's gain over base model, input only"]
    assert "75.0 % [66.7, 80.0] | **missed**" in kept
    assert not any("another seed" in title or "multi-task" in title for title in rows)  # not measured
    over = rows["siblings: T2L less base model, description and 3 examples"]
    assert "> 0, interval too | +30.0 [+30.0, +30.0] | met" in over
    result["unseen"]["tasks"]["a"]["t2l"] = 45.0
    assert "-5.0 [-5.0, -5.0] | **missed**" in tables.claims(result)


def test_what_was_not_run_is_left_out(result):
    assert "multi-task" not in tables.arms(result) and "| icl" not in tables.arms(result)
    shown = tables.arms(result).splitlines()
    assert [line.split("|")[1].strip() for line in shown if line.startswith("|")][2:] == [
        tables.ARMS[arm] for arm in tables.ARMS if arm in result["unseen"]["arms"]
    ]
    for table in (tables.short, tables.reconstruction, tables.benchmarks):
        assert table(result) == tables.NOT_YET


def test_lengths_are_pairs_that_were_measured(result):
    scores = {"a": {"t2l": 30.0, "multi-task-description": 50.0}}
    result["lengths"] = {"half-t2l": part(scores, {"all": ["a"], "sibling": ["a"]})}
    result["runs"] = {name: {"tokens": 6e5, "curve": [[0.3, 2.0], [0.6, 0.5]]} for pair in plan.LENGTHS for name in pair}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.lengths(result).splitlines()[2:]]
    assert lines == [["0.60 / 0.60", "0.50 / 0.50", "30.0", "50.0", "-20.0 [-20.0, -20.0]"]]  # unseen has no such rival
    result["unseen"]["tasks"]["a"]["multi-task-description"] = 70.0
    result["unseen"]["arms"]["multi-task-description"] = {}
    table = tables.lengths(result)
    assert len(table.splitlines()) == 4 and "| 80.0 | 70.0 | +10.0 [+10.0, +10.0] |" in table


def test_shorter_runs_are_compared_on_what_both_were_trained_on(result):
    few, more = plan.chosen(plan.LEARNABLE, 16)[0], (set(plan.LEARNABLE) - set(plan.chosen(plan.LEARNABLE, 16))).pop()
    seen = {few: {"short-L": 60.0, "short-L-16": 90.0}, more: {"short-L": 40.0, "short-L-16": 0.0, "short-one-hot": 70.0}}
    scores = {"short-L": 50.0, "short-L-shuffled": 10.0, "short-L-16": 40.0, "short-M": 40.0}
    result["varied"] = {"train": part(seen, {"all": sorted(seen)}), "sibling": part({"a": scores}, {"all": ["a"]})}
    result["runs"] = {name: {"seconds": 120} for name in ("short-L", "short-L-16", "short-M", "short-one-hot")}
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in tables.short(result).splitlines()[2:]]
    assert lines[0] == ["50.0 (2)", "", "50.0", "", "10.0", "2"]
    assert lines[1] == ["90.0 (1)", "+30.0 [+30.0, +30.0]", "40.0", "-10.0 [-10.0, -10.0]", "–", "2"]
    assert lines[2] == ["–", "", "40.0", "-10.0 [-10.0, -10.0]", "–", "2"]
    assert lines[3] == ["70.0 (1)", "+30.0 [+30.0, +30.0]", "–", "", "–", "2"]
