"""The plan of the study: what it trains on, and that nothing held out is among it."""

import json

import pytest

from bench.study import judge, plan, runs
from t2l_engine.config import ConfigError
from t2l_engine.data import manifest as manifests
from t2l_engine.tasks import Example, Task, write_tasks
from t2l_engine.training.settings import LoRASettings, ReconstructionSettings

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
        steps = plan.STEPS_DESCRIPTION if run.settings.prompt == "description" else plan.STEPS
        assert run.settings.steps * run.settings.tasks_per_step == 32 * steps  # as many examples
    assert len({run.settings.prompt_form for run in compared.values()}) == 1
    assert {*judge.VARIED, judge.BY_INPUT, judge.BY_NAME} <= set(plan.RUNS)


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
