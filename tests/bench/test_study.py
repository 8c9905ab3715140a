"""The plan of the study: what it trains on, and that nothing held out is among it."""

import dataclasses
from pathlib import Path

import pytest

from bench import judging, training
from bench.records import Result, ResultError, load
from bench.report import tables_study
from bench.report.pages import TABLES
from bench.source import ROOT
from bench.study import judge, plan, runs
from bench.study.scores import Part, mean_over
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation.bootstrap import Interval
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import Example, Task, write_tasks

MANIFEST = manifests.read(plan.MANIFEST)
TRAINED = manifests.select(MANIFEST.tasks, MANIFEST, "train", permissive=True)
HELD_OUT = [*MANIFEST.names("sibling"), *MANIFEST.names("novel")]


def test_more_tasks_hold_the_fewer():
    found = [plan.chosen(TRAINED, count) for count in (*plan.COUNTS, None)]
    assert [len(names) for names in found] == [*plan.COUNTS, 90] and found[-1] == TRAINED
    assert set(found[2]) < set(plan.LEARNABLE) == set(plan.chosen(TRAINED, len(plan.LEARNABLE))) < set(found[3])
    assert all(set(fewer) < set(more) for fewer, more in zip(found, found[1:], strict=False))


def test_descriptions_that_are_judged_by_are_not_trained_on():
    wordings = runs.WORDINGS
    assert sorted(wordings["held-out"]) == sorted([*TRAINED, *HELD_OUT])
    assert set(wordings["train"]) < set(TRAINED)  # nothing was written to train on of a task that is held out
    assert {len(set(texts)) for texts in wordings["held-out"].values()} == {3}
    task = Task(TRAINED[0], ("Own.", wordings["held-out"][TRAINED[0]][0]), ())
    assert runs.worded(task).descriptions == ("Own.", *wordings["train"].get(TRAINED[0], ()))


def test_what_is_compared_is_trained_alike():
    compared = {name: plan.RUNS[name] for name in ("t2l", *judge.CONTROLLED, *judge.MULTI_TASK)}
    assert all(plan.count(run) == len(plan.LEARNABLE) and "tier" not in run.other for run in compared.values())
    assert set(plan.LEARNABLE) < set(TRAINED)
    for name, run in compared.items():
        assert (run.settings.prompt == "description") == name.endswith("description")
        examples = 16 * 1800 if run.settings.prompt == "description" else 32 * 1600
        assert run.settings.steps * run.settings.tasks_per_step == examples  # as many
    assert len({run.settings.prompt_form for run in compared.values()}) == 1


def test_every_evaluation_asks_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "read_descriptions", lambda library: TRAINED)
    parts = {part: (set(names), set(arms), options) for part, names, arms, options in judge.parts(tmp_path, ["fv_antonym"])}
    lengths = {f"lengths/{ours}" for ours, _ in plan.LENGTHS[:-1]}
    reconstruction = {f"reconstruction/{count}/{tasks}" for count in plan.COUNTS for tasks in ("train", "evaluation")}
    beside = {"seen", "unseen", "learned", "shipped/seen", "shipped/unseen", "varied/train", "varied/sibling"}
    assert parts.keys() == beside | lengths | reconstruction
    seen, unseen = parts["seen"], parts["unseen"]
    assert seen[1] == unseen[1] and unseen[0] == set(HELD_OUT)
    controlled = {run + control for run in ("t2l", *judge.CONTROLLED) for control in ("", *judge.CONTROLS)}
    assert seen[1] == controlled | {*judge.MULTI_TASK, "oracle", "average", "arrow", *judge.BASE}
    varied = {name for name in plan.RUNS if name.startswith("short")} | {"reconstruction-64"}
    assert parts["varied/train"][1] == varied | {"t2l"}
    matched = varied - {judge.BY_NAME} | {"t2l"}  # one by name knows no sibling; one by input reads no description
    assert parts["varied/sibling"][1] == matched | {f"{run}-shuffled" for run in matched - {judge.BY_INPUT}}
    trained = {path for _, _, options in parts.values() for path in [options.get("checkpoint")] if path != plan.MODEL}
    assert {path.name for path in trained - {None}} <= set(plan.RUNS)


def test_an_evaluation_is_a_command(tmp_path, monkeypatch):
    def command(words, **_):
        given.extend(words[4:])
        (tmp_path / "judged" / "varied-train.json").write_text("{}")

    given = []
    monkeypatch.setattr(judging.subprocess, "run", command)
    judge.evaluate(tmp_path, "varied/train", ["a", "b"], ["t2l"], also=["x=1", "y=2"], run_code=True, answers="kept")
    text = " ".join(given)
    assert "--also x=1 --also y=2" in text and "--run-code --names a,b --methods t2l" in text
    assert f"--resume {tmp_path}/judged/kept.answers.jsonl" in text and f"--tasks {tmp_path}/tasks/evaluation" in text
    assert f"--checkpoint {tmp_path}/t2l" in text


def test_shorter_pairs_have_the_same_part_of_their_training():
    examples = lambda name: plan.RUNS[name].settings.steps * plan.RUNS[name].settings.tasks_per_step  # noqa: E731
    whole = [examples(name) for name in plan.LENGTHS[-1]]
    parts = [[examples(name) / of for name, of in zip(pair, whole, strict=True)] for pair in plan.LENGTHS]
    assert parts[0] == pytest.approx([0.1875, 0.1875], rel=0.01) and parts[1:] == [[0.5, 0.5], [1, 1]]
    tasks = [set(plan.chosen(plan.LEARNABLE, plan.count(plan.RUNS[name]))) for pair in plan.LENGTHS for name in pair]
    assert all(names == set(plan.LEARNABLE) for names in tasks)


def test_other_tasks_are_refused(tmp_path):
    write_tasks(tmp_path / "tasks", [Task("fv_antonym", ("Opposite.",), (Example("a", ("b",), "train"),))])
    with pytest.raises(ConfigError, match="differs from manifest skills"):
        runs.tasks(tmp_path / "tasks", tmp_path / "work")


def test_tasks_of_another_study_are_not_gone_on_with(tmp_path):
    made = [Task(name, ("Do it.",), (Example("a", ("b",), "train"),)) for name in ("b", "a")]
    for _ in range(2):  # the second time they are there
        training.write(tmp_path / "tasks", made)
    changed = [dataclasses.replace(made[0], descriptions=("Do that.",)), made[1]]
    with pytest.raises(ConfigError, match="tasks: expected the study's tasks, examples and descriptions, found others"):
        training.write(tmp_path / "tasks", changed)


# --- what is shown of it -------------------------------------------------------------------------------------------------

STUDY = [name for name in TABLES if name.startswith("study-")]


def part(name, scores, groups):
    """A part of the result as ``collect`` writes it: ``scores``: task -> arm -> score."""
    where = {task: [group for group, names in groups.items() if task in names] for task in scores}
    about = {"groups": {group: {"prompt_tokens": 14.0, "containment": 60.0, "rouge_l": 60.0} for group in groups}}
    made = [
        {"record": "scores", "part": name, "task": task, "items": 20, "groups": where[task], "scores": of}
        for task, of in scores.items()
    ]
    arms = dict.fromkeys(arm for of in scores.values() for arm in of)
    return made, [{"record": "arm", "part": name, "arm": arm, "form": "raw", **about} for arm in arms]


def result(parts, **others):
    scores, arms = zip(*(part(name, *of) for name, of in parts.items()), strict=True)
    records = {"scores": [r for one in scores for r in one], "arm": [r for one in arms for r in one], **others}
    return Result(Path("study.jsonl"), {}, (), records)


def scores():
    return {
        "a": {"t2l": 80.0, "t2l-shuffled": 20.0, "base": 0.0, "base-description": 10.0, "icl": 50.0, "oracle": 100.0},
        "b": {"t2l": 60.0, "t2l-shuffled": 20.0, "base": 20.0, "base-description": 10.0, "icl": 50.0, "oracle": 80.0},
    }


GROUPS = {"all": ["a", "b"], "sibling": ["a"], "novel": ["b"]}


def study(known):
    return result({"seen": (known, {"all": ["a", "b"], "train": ["a", "b"]}), "unseen": (known, GROUPS)})


def test_intervals_over_families():
    """Of two families, drawn twice: one alone gives 0, the other 90."""
    values = {"a-1": 0.0, "a-2": 0.0, "b-1": 90.0}
    over = mean_over(lambda task: task[0], values)
    assert (over.mean, over.low, over.high) == (30, 0, 90)
    assert mean_over(None, {}) is None and mean_over(None, values).mean == 30


def test_share_and_gap_are_of_the_tasks_both_answered():
    known = scores()
    seen = Part.of(study(known).others, "seen")
    assert seen.share("t2l", "base") == Interval(100 * (70 - 10) / (90 - 10), 100 * 40 / 60, 80.0)
    assert seen.share("none", "base") is None
    assert seen.gap("t2l", "icl").mean == 20 and seen.gap("t2l", "none") is None
    del known["b"]["t2l-shuffled"]
    assert seen.gap("t2l", "t2l-shuffled").mean == 60  # of task a alone
    assert seen.share("t2l-shuffled", "base") is None  # not of the same tasks
    assert seen.only(["b"]).column("t2l") == [60.0]


def test_targets_are_met_or_missed_by_what_was_measured():
    known = scores()
    lines = {line["claim"]: line for line in TABLES["study-claims"].lines([study(known)])}
    shuffled = lines["siblings: matched less shuffled"]
    assert [shuffled[head] for head in ("measured", "measured, low", "measured, high", "met")] == [60, 60, 60, True]
    kept = lines["seen tasks with headroom: share of the oracle's gain over base model, input only, %"]
    assert (kept["measured"], kept["met"]) == (75.0, False)
    assert not any("another seed" in claim or "multi-task" in claim for claim in lines)  # not measured
    name = "siblings: T2L less base model, description and 3 examples"
    assert (lines[name]["measured"], lines[name]["met"]) == (30.0, True)
    known["a"]["t2l"] = 45.0
    (line,) = (line for line in TABLES["study-claims"].lines([study(known)]) if line["claim"] == name)
    assert (line["measured"], line["met"]) == (-5.0, False)


def test_what_was_not_run_is_left_out():
    found = study(scores())
    shown = [line["arm"] for line in TABLES["study-arms"].lines([found])]
    assert shown == [name for arm, name in tables_study.ARMS.items() if arm in scores()["a"]]
    for name in ("study-reconstruction", "study-benchmarks", "study-runs"):
        with pytest.raises(ResultError, match="no record of kind"):
            TABLES[name].lines([found])


def test_lengths_are_pairs_that_were_measured():
    pair = {"a": {"t2l": 30.0, "multi-task-description": 50.0}}
    runs = [{"run": name, "tokens": 6e5, "curve": [[0.3, 2.0], [0.6, 0.5]]} for pair in plan.LENGTHS for name in pair]
    known = scores()
    parts = {"unseen": (known, GROUPS), "lengths/half-t2l": (pair, {"all": ["a"], "sibling": ["a"]})}
    (line,) = TABLES["study-lengths"].lines([result(parts, training=runs)])  # unseen has no such rival
    assert list(line.values()) == [0.6, 0.6, 0.5, 0.5, 30.0, 50.0, -20.0, -20.0, -20.0]
    known["a"]["multi-task-description"] = 70.0
    *_, line = TABLES["study-lengths"].lines([result(parts, training=runs)])
    assert (line["T2L, siblings, %"], line["T2L less the rival"]) == (80.0, 10.0)


def test_shorter_runs_are_compared_on_what_both_were_trained_on():
    few, more = plan.chosen(plan.LEARNABLE, 16)[0], (set(plan.LEARNABLE) - set(plan.chosen(plan.LEARNABLE, 16))).pop()
    seen = {few: {"short-L": 60.0, "short-L-16": 90.0}, more: {"short-L": 40.0, "short-L-16": 0.0, "short-one-hot": 70.0}}
    of = {"short-L": 50.0, "short-L-shuffled": 10.0, "short-L-16": 40.0, "short-M": 40.0}
    parts = {"varied/train": (seen, {"all": sorted(seen)}), "varied/sibling": ({"a": of}, {"all": ["a"]})}
    runs = [{"run": name, "seconds": 120} for name in ("short-L", "short-L-16", "short-M", "short-one-hot")]
    lines = TABLES["study-short"].lines([result(parts, training=runs)])
    heads = ("seen tasks", "seen, %", "seen, less the first row", "siblings, %", "siblings, less the first row", "minutes")
    assert [[line[head] for head in heads] for line in lines] == [
        [2, 50.0, None, 50.0, None, 2.0],
        [1, 90.0, 30.0, 40.0, -10.0, 2.0],
        [0, None, None, 40.0, -10.0, 2.0],
        [1, 70.0, 30.0, None, None, 2.0],
    ]
    assert [line["another sibling's description, %"] for line in lines] == [10.0, None, None, None]


@pytest.mark.parametrize("name", STUDY)
def test_the_committed_result_has_every_table(name):
    lines = TABLES[name].lines([load(ROOT / "bench" / "results" / "study.jsonl")])
    assert lines and all(line.keys() == lines[0].keys() for line in lines)


def test_records_of_an_evaluation():
    details = {"t2l": {"tasks": {"a": {"score": 50.0, "containment": 75.0}}}}
    groups, forms = {"all": ["a"], "sibling": []}, {"t2l": {"form": "raw"}}
    found = {"tasks": {"a": {"t2l": 50.004}}, "items": {"a": 4}, "groups": groups, "details": details, "forms": forms}
    task, arm = judging.part_records("unseen", found)
    assert (task["record"], task["groups"], task["scores"]) == ("scores", ["all"], {"t2l": 50.0})
    assert arm["groups"] == {"all": {"score": 50.0, "containment": 75.0}} and arm["form"] == "raw"
