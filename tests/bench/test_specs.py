"""The training study of smollm2-135m-specs: what is trained, what is held out, what is asked."""

import dataclasses
import hashlib
import json
from unittest import mock

import pytest

from bench.harness import BenchError
from bench.specs import plan, runs
from examples import demo
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Example, Task, load_tasks, read_descriptions, write_tasks
from t2l_engine.research.training.settings import to_yaml
from t2l_specs import suite


def task(name, answers="b", split="train"):
    return Task(name, ("Do it.",), tuple(Example(f"{i}", (text,), split) for i, text in enumerate(answers)))


@pytest.fixture
def small(monkeypatch):
    """A suite of 200 specifications instead of thousands, 150 of them in the manifest, 12 for development."""
    monkeypatch.setattr(suite, "SPECIFICATIONS", 150)
    monkeypatch.setattr(suite, "_MOST_OUT_OF_FAMILY", 1)
    small = {"specifications": 200, "development": 12, "more": 260, "further": 2}
    small |= {"second": {"siblings": 3, "novel_seeds": [1, 2]}, "third": {"siblings": 4, "novel_seeds": [5, 6]}}
    for name, value in (small | {"adapted": {"siblings": 2, "novel_seeds": [3, 4]}}).items():
        monkeypatch.setitem(plan.PLAN, name, value)


def test_parts_are_apart(small, tmp_path):
    found = runs.specifications()
    runs.tasks(tmp_path, found)
    made = suite.suite(200)
    parts = {part: {of.name for of in load_tasks(runs.folder_of(tmp_path, part), "train")} for part in plan.PARTS}
    assert len(parts["development"]) == 12 and not parts["development"] & parts["trained"]
    assert parts["development"] | parts["trained"] == {placed.spec.name for placed in made if placed.task_split == "train"}
    more, further = (read_descriptions(runs.folder_of(tmp_path, part)) for part in (plan.MORE, plan.FURTHER))
    assert more.keys() > parts["trained"] and not more.keys() & parts["development"] and further.keys() == more.keys()
    assert {name: (len(of) - 2, of[-suite.HELD_OUT :]) for name, of in further.items()} == {
        name: (len(of), of[-suite.HELD_OUT :]) for name, of in more.items()
    }
    earlier = [placed for placed in made[:150] if placed.task_split != "train"]  # which have had their evaluations
    earlier = {placed.spec.name for placed in [*earlier, *runs.held_out_set("second", made[150:], made)]}
    for part, split in plan.HELD_OUT.items():
        assert {placed.task_split for placed in found[part]} == {split} and not parts[part] & earlier


def test_held_out_descriptions_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "leaks", lambda splits: ["a leak"])
    with pytest.raises(BenchError, match="expected no held-out description among those trained on, got a leak"):
        runs.tasks(tmp_path, dict.fromkeys((*plan.PARTS, plan.MORE), []))


def test_tasks_of_another_study_are_refused(tmp_path):
    for _ in range(2):  # the second time they are there
        runs.write(tmp_path, [task("b"), task("a")])
    with pytest.raises(ConfigError, match="expected the tasks of the study, got others; --work"):
        runs.write(tmp_path, [task("b"), task("a", "c")])


def test_the_published_run_is_a_chain_of_runs():
    chain = [plan.T2L, "t2l-further", "t2l-fourth", "t2l-more", "t2l-labels-more", "t2l-labels", "t2l-third", "t2l-dropout"]
    chain += ["t2l-second", plan.EVEN, "t2l-constant"]
    assert [plan.RUNS[name].initial for name in chain] == [*chain[1:], ""]
    assert all(run.settings.held_out_descriptions == suite.HELD_OUT for run in plan.RUNS.values())
    with pytest.raises(ConfigError, match="x: initial: expected a run of the plan, got 'y'"):
        plan._run({"model": "m", "settings": {}, "runs": {"x": {"kind": "sft", "initial": "y"}}}, "x", "x")


def test_runs_are_trained_on_their_tasks(tmp_path):
    folders = {part: runs.folder_of(tmp_path, part) for part in (plan.TRAINED, plan.MORE, plan.FURTHER)}
    made = {name: task(name, answers) for name, answers in {"a": "xy", "b": "xyz", "c": "x", "d": "xy"}.items()}
    write_tasks(folders[plan.TRAINED], [made["a"], made["b"], made["c"]])
    write_tasks(folders[plan.MORE], [*made.values()])
    write_tasks(folders[plan.FURTHER], [made["a"]])
    of = plan.RUNS["t2l-first"]
    for other, part, names in (
        ({"more": True}, plan.MORE, ["a", "b", "c", "d"]),
        ({"more": True, "two_answers": True}, plan.MORE, ["a", "d"]),
        ({"two_answers": True}, plan.TRAINED, ["a"]),
        ({"further": True}, plan.FURTHER, ["a"]),
        ({"tasks": 2}, plan.TRAINED, plan.drawn("abc", 2, plan.TRAINED)),
    ):
        assert runs.learnt(dataclasses.replace(of, other=other), tmp_path) == (folders[part], names)


def test_a_run_starts_from_another_and_a_finished_one_is_kept(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr("t2l_engine.research.training.sft.train", lambda made, *_, **__: trained.append(made))
    write_tasks(runs.folder_of(tmp_path, plan.TRAINED), [task("a")])
    runs.train("t2l-first", tmp_path)
    second = plan.RUNS["t2l-first"].settings.model_copy(update={"initial": str(tmp_path / "t2l-constant")})
    assert trained == [plan.RUNS["t2l-constant"].settings, second]
    folder = tmp_path / "t2l-constant"
    folder.mkdir()
    (folder / "settings.yaml").write_text(to_yaml(trained[0]))
    (folder / "config.json").touch()
    for steps, names, done in ((3399, ["a"], False), (3400, ["a", "b"], False), (3400, ["a"], True)):
        monkeypatch.setattr(runs.checkpoint, "describe", lambda _: {"training": {"steps_done": steps, "tasks": names}})  # noqa: B023
        assert runs.finished("t2l-constant", tmp_path) == done


def test_lora_runs_are_finished_with_all_their_adapters(tmp_path, monkeypatch):
    write_tasks(runs.folder_of(tmp_path, plan.TRAINED), [task(f"f-{i:03}") for i in range(3)])
    folder, settings = tmp_path / plan.LIBRARY / "waves", plan.RUNS[plan.LIBRARY].settings.model_dump(mode="json")
    for wave, names, done in ((0, ["f-000", "f-001"], False), (1, ["f-002"], True)):
        (folder / f"{wave:03}").mkdir(parents=True)
        (folder / f"{wave:03}" / "done.json").write_text(json.dumps({"settings": settings, "adapters": names}))
        assert runs.finished(plan.LIBRARY, tmp_path) == done
    other = plan.RUNS[plan.LIBRARY].settings.model_copy(update={"steps": 51})
    monkeypatch.setitem(plan.RUNS, plan.LIBRARY, dataclasses.replace(plan.RUNS[plan.LIBRARY], settings=other))
    assert not runs.finished(plan.LIBRARY, tmp_path)


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


def test_unfinished_runs_are_not_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "finished", lambda name, work: name != plan.T2L)
    with pytest.raises(BenchError, match="--work: expected finished runs of the plan in .*, got none of t2l$"):
        list(runs.records(tmp_path))


def test_evaluations_are_commands(monkeypatch, tmp_path):
    def command(words, **_):
        given.append(" ".join(words[4:]))
        open(words[words.index("--json") + 1], "w").write("{}")

    given = []
    monkeypatch.setattr(runs, "rounded", lambda name, work: work / name)
    monkeypatch.setattr(runs.subprocess, "run", command)
    for part in (plan.TRAINED, "novel"):
        write_tasks(runs.folder_of(tmp_path, part), [task("f-000", split="test")])
        runs.judged(part, tmp_path)
    runs.stored(tmp_path)
    for text, part, items in zip(given, ("trained", "novel", "trained"), (2, 3, 2), strict=True):
        assert f"--tasks {tmp_path}/tasks/{part}" in text and f"--max-items {items}" in text
        assert f"--held-out-descriptions {suite.HELD_OUT}" in text and f"--checkpoint {tmp_path}/t2l" in text
    assert "--shots 3,6" in given[0] and f"--multi-task {tmp_path}/{plan.RIVAL}" in given[0]
    assert "--oracle" not in given[0] and f"--oracle {tmp_path}/library/adapters" in given[2]


def test_records_of_an_evaluation():
    details = {"t2l": {"tasks": {"a": {"score": 50.0, "prompt_tokens": 14.0}}}}
    found = {"tasks": {"a": {"t2l": 50.004}}, "items": {"a": 4}, "details": details, "forms": {"t2l": {"form": "raw"}}}
    of_task, of_method = runs.part_records("novel", found)
    assert (of_task["record"], of_task["items"], of_task["scores"]) == ("scores", 4, {"t2l": 50.0})
    assert of_method["groups"] == {"all": {"prompt_tokens": 14.0}} and of_method["form"] == "raw"


@pytest.mark.slow
def test_training_never_had_the_sentences_of_the_demo():
    found = runs.specifications()
    texts = lambda of, *more: [suite.task(placed.spec, 1, 0, *more).descriptions for placed in of]  # noqa: E731
    known = {normalise(text) for of in texts(found[plan.MORE], plan.PLAN["further"]) for text in of}
    assert not {normalise(text) for text in demo.TASKS} & known
