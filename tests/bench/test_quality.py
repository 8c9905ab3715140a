"""The training study of the bundled checkpoints: what is trained, what is held out, what is asked."""

import dataclasses
import hashlib
import json
from unittest import mock

import pytest

from bench.harness import BenchError
from bench.quality import plan, runs, tasks
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks import manifest
from t2l_engine.research.tasks.folder import Example, Task, load_tasks, read_descriptions, write_tasks
from t2l_engine.research.training.settings import to_yaml
from t2l_specs import suite

HELD_SKILLS = [*manifest.read("skills").names("in-family"), *manifest.read("skills").names("out-of-family")]


def task(name, answers="b", split="train", texts=("Do it.",)):
    return Task(name, texts, tuple(Example(f"{i}", (text,), split) for i, text in enumerate(answers)))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """200 specifications instead of thousands, 150 of them in the manifest, 12 for development, and two natural tasks."""
    monkeypatch.setattr(suite, "SPECIFICATIONS", 150)
    monkeypatch.setattr(suite, "_MOST_OUT_OF_FAMILY", 1)
    changed = {"specifications": 200, "development": {"tasks": 12, "seed": 5}, "further": 2, "natural": ["few", "many"]}
    for name, value in changed.items():
        monkeypatch.setitem(plan.PLAN, name, value)
    long = Example("x" * 300, ("y",), "train")
    many, few = (
        task(name, "b" * 24, texts=texts) for name, texts in (("many", [f"Say {i}." for i in range(60)]), ("few", ["Go."]))
    )
    many = dataclasses.replace(many, examples=(*many.examples, long))
    write_tasks(tmp_path / "natural", [many, few, *(task(name) for name in HELD_SKILLS)])
    return tmp_path / "natural"


def test_parts_are_apart(small, tmp_path):
    for _ in range(2):  # the second time they are there
        tasks.write(tmp_path, small)
    made, made_parts = suite.suite(200), {*plan.PARTS} - {"combination"}  # so few have none
    parts = {part: {of.name for of in load_tasks(tasks.folder_of(tmp_path, part), "train")} for part in made_parts}
    natural = {f"{name}-nat{i}" for name in ("few", "many") for i in range(5)}
    assert len(parts["development"]) == 12 and not parts["development"] & parts["trained"]
    trained = {placed.spec.name for placed in made if placed.task_split == "train"}
    assert parts["development"] | parts["trained"] == trained | natural
    held = {"value": "value", "out-of-family": ""}
    assert {part: parts[part] for part in held} == {
        part: {p.spec.name for p in made[:150] if p.task_split != "train" and p.new == new} for part, new in held.items()
    }
    assert parts["natural"] == {*HELD_SKILLS}
    of = read_descriptions(tasks.folder_of(tmp_path, "trained"))
    assert sorted(text for i in range(5) for text in of[f"many-nat{i}"]) == sorted(f"Say {i}." for i in range(60))
    assert (
        of["few-nat0"]
        == of["few-nat4"]
        == ["Go.", "Task: Go.", "Please do this: Go.", "Instructions: Go.", "What to do: Go."]
    )
    assert len(load_tasks(tasks.folder_of(tmp_path, "trained"), "train", names=["many-nat0"])[0].examples) == 24
    write_tasks(tasks.folder_of(tmp_path, "value"), [task("b")], overwrite=True)
    with pytest.raises(ConfigError, match="expected the tasks of the study, got others; --work"):
        tasks.write(tmp_path, small)


def test_what_must_not_be_trained_on_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "leaks", lambda splits: ["a leak"])
    with pytest.raises(BenchError, match="expected no held-out description among those trained on, got a leak"):
        tasks.write(tmp_path, small)
    write_tasks(tmp_path / "short", [task("few"), task("many")])
    with pytest.raises(ConfigError, match="few: expected 24 short examples of split train or more"):
        list(tasks.natural_tasks(tmp_path / "short"))


def test_all_runs_hold_out_the_same_descriptions_and_no_natural_skill():
    assert {run.settings.held_out_descriptions for run in plan.RUNS.values()} == {suite.HELD_OUT}
    assert not {*plan.PLAN["natural"]} & {*HELD_SKILLS} and plan.RUNS[plan.T2L].settings.variant == "pointer"


def test_the_second_run_of_t2l_differs_in_its_seed():
    first, second = (plan.RUNS[name].settings for name in (plan.T2L, plan.SECOND))
    assert first.seed != second.seed and first == second.model_copy(update={"seed": first.seed})


def test_a_finished_run_is_kept(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(
        "t2l_engine.research.training.sft.train", lambda made, source, folder: trained.append((made, source))
    )
    write_tasks(tasks.folder_of(tmp_path, plan.TRAINED), [task("a")])
    runs.train(plan.T2L, tmp_path)
    settings = plan.RUNS[plan.T2L].settings
    assert trained == [(settings, tmp_path / "tasks" / "trained")]
    folder = tmp_path / plan.T2L
    folder.mkdir()
    (folder / "settings.yaml").write_text(to_yaml(settings))
    (folder / "config.json").touch()
    steps = settings.steps
    for done, names, expected in ((steps - 1, ["a"], False), (steps, ["a", "b"], False), (steps, ["a"], True)):
        monkeypatch.setattr(runs.checkpoint, "describe", lambda _: {"training": {"steps_done": done, "tasks": names}})  # noqa: B023
        assert runs.finished(plan.T2L, tmp_path) == expected
    folder, lora = tmp_path / plan.RIVAL / "waves" / "000", plan.RUNS[plan.RIVAL].settings.model_dump(mode="json")
    folder.mkdir(parents=True)
    for rank, expected in ((32, True), (4, False)):
        (folder / "done.json").write_text(json.dumps({"settings": lora | {"rank": rank}, "adapters": ["multi-task"]}))
        assert runs.finished(plan.RIVAL, tmp_path) == expected


def test_a_run_that_went_on_is_rounded_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.t2l.TextToLoRA, "from_pretrained", mock.Mock(side_effect=RuntimeError("rounded")))
    weights = tmp_path / "t2l" / runs.WEIGHTS_NAME
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    made = tmp_path / f"t2l-{hashlib.sha256(b'first').hexdigest()[:12]}-bfloat16"
    made.mkdir()
    (made / runs.WEIGHTS_NAME).touch()
    assert runs.rounded("t2l", tmp_path) == made
    weights.write_bytes(b"second")
    with pytest.raises(RuntimeError, match="rounded"):
        runs.rounded("t2l", tmp_path)


def test_what_cannot_be_judged_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "finished", lambda name, work: name == plan.PAPER)
    with pytest.raises(BenchError, match=r"--work: expected the finished run t2l of the plan in .*, got \['paper'\]$"):
        list(runs.records(tmp_path, plan.PARTS, plan.METHODS))
    with pytest.raises(BenchError, match="--parts: expected some of trained, development, .* got other$"):
        list(runs.records(tmp_path, ["other"], plan.METHODS))


def test_evaluations_are_commands_with_the_runs_that_finished(monkeypatch, tmp_path):
    def command(words, **_):
        given.append(" ".join(words[4:]))
        open(words[words.index("--json") + 1], "w").write(json.dumps(result))

    details = {method: {"tasks": {"f-0": {"score": 50.0, "prompt_tokens": 14.0}}} for method in ("t2l", plan.MULTI_TASK)}
    form = dict.fromkeys(details, {"form": "raw"})
    result = {
        "tasks": {"f-0": {"t2l": 50.004, plan.MULTI_TASK: 1.0}},
        "items": {"f-0": 4},
        "details": details,
        "forms": form,
    }
    monkeypatch.setattr(runs, "rounded", lambda name, work: work / name)
    monkeypatch.setattr(runs, "trained", lambda name, work: {"record": "training", "run": name})
    monkeypatch.setattr(runs.subprocess, "run", command)
    for run in (plan.T2L, plan.PAPER):
        (tmp_path / run).mkdir()
        (tmp_path / run / runs.WEIGHTS_NAME).write_text(run)
    for part in ("value", "natural", "trained"):
        write_tasks(tasks.folder_of(tmp_path, part), [task("f-0", "ab", split="test")])
    for done, parts, count in ((plan.RUNS, ["value", "natural"], 2), ([plan.T2L], ["trained"], 1)):
        given = []
        monkeypatch.setattr(runs, "finished", lambda name, work: name in done)  # noqa: B023
        found = list(runs.records(tmp_path, parts, plan.METHODS))
        assert len(given) == count and [of["run"] for of in found if of["record"] == "training"] == [*done]
        if count == 2:
            first, second = given
            digests = [hashlib.sha256(run.encode()).hexdigest() for run in (plan.T2L, plan.PAPER)]
            assert found[0] == {"record": "plan", "checkpoint": digests[0], "paper": digests[1]}
            assert f"--held-out-descriptions {suite.HELD_OUT}" in first and "--held-out" not in second
            assert ",t2l-same-family," in first and ",t2l-second-same-family," in first and "same-family" not in second
            assert f"--also t2l-second={tmp_path}/t2l-second --also paper={tmp_path}/paper" in first
            assert f"--multi-task {tmp_path}/{plan.RIVAL}" in first
            scores = [of["scores"] for of in found if of["record"] == "scores" and of["part"] == "value"]
            assert scores == [{"t2l": 50.0, plan.MULTI_TASK: 1.0}]
        else:
            assert "--also" not in given[0] and plan.MULTI_TASK not in given[0] and "--names f-0" in given[0]
            assert plan.SECOND not in given[0]
            assert {"record": "two_answers", "part": "trained", "tasks": ["f-0"]} in found
