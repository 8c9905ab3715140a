"""The study of unseen sentences: what is held out, what is trained, what is asked, and what its tables say."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from bench import judging, plans, specs, training
from bench.harness import BenchError
from bench.plans import Run
from bench.records import Result, read
from bench.report import tables_specs
from bench.report.tables import TABLES
from bench.source import ROOT, SPECS, bundled
from bench.specs import costs, plan, robustness, runs
from bench.study.runs import WORDINGS
from t2l_engine.cli import demo
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Example, Task, load_tasks, read_descriptions
from t2l_engine.research.tasks.specs import suite
from t2l_engine.research.training.settings import SFTSettings, to_yaml

SETTINGS = SFTSettings(base_model="smollm2-135m", target_modules=("q_proj",), steps=3)


@pytest.fixture
def small(monkeypatch):
    """A suite of 200 specifications instead of thousands, 150 of them in the manifest, 12 for development."""
    monkeypatch.setattr(suite, "SPECIFICATIONS", 150)
    monkeypatch.setattr(suite, "_MOST_NOVEL", 1)
    small = {"specifications": 200, "development": 12, "more": 260, "further": 2}
    small |= {"second": {"siblings": 3, "novel_seeds": [1, 2]}, "third": {"siblings": 4, "novel_seeds": [5, 6]}}
    for name, value in small.items():
        monkeypatch.setitem(plan.PLAN, name, value)
    monkeypatch.setitem(plan.PLAN["adapted"], "siblings", 2)


def test_parts_are_apart(small, tmp_path):
    found = runs.specifications()
    runs.tasks(tmp_path, found)
    made = suite.suite(200)
    suites = [part for part in plan.PARTS if part != plan.OTHER]
    parts = {part: {task.name for task in load_tasks(runs.folder_of(tmp_path, part), "train")} for part in suites}
    assert len(parts["development"]) == 12 and not parts["development"] & parts["trained"]
    assert parts["development"] | parts["trained"] == {placed.spec.name for placed in made if placed.tier == "train"}
    more, further = (read_descriptions(runs.folder_of(tmp_path, part)) for part in (plan.MORE, plan.FURTHER))
    assert more.keys() > parts["trained"] and not more.keys() & parts["development"] and further.keys() == more.keys()
    later = suite.suite(260)[200:]
    assert more.keys() - parts["trained"] <= {placed.spec.name for placed in later if placed.tier == "train"}
    assert {name: (len(of) - 2, of[-suite.HELD_OUT :]) for name, of in further.items()} == {
        name: (len(of), of[-suite.HELD_OUT :]) for name, of in more.items()
    }
    earlier = [placed for placed in made[:150] if placed.tier != "train"]  # which have had their evaluations
    earlier = {placed.spec.name for placed in [*earlier, *runs.held_out_set("second", made[150:], made)]}
    for tier in plan.HELD_OUT:
        held_out, tuned = ({p.spec.name for p in of if p.tier == tier} for of in (found.held_out, found.tuned))
        assert parts[tier] == held_out and held_out and tuned and not held_out & earlier and not tuned & (held_out | earlier)


def test_a_later_set_is_new(small):
    made = suite.suite(200)
    found = runs.held_out_set("second", made[150:], made)
    siblings = [placed for placed in found if placed.tier == "sibling"]
    assert len(siblings) == 3 and all(placed in made[150:] for placed in siblings)
    novel = [placed.spec for placed in found if placed.tier == "novel"]
    known = {(placed.spec.family.name, placed.spec.values) for placed in made}
    new = {(spec.family.name, spec.values) for spec in novel}
    assert new and not new & known and len(new) == len(novel)
    assert len({placed.spec.name for placed in found}) == len(found)


def test_runs_train_on_the_trained_part(monkeypatch, tmp_path):
    seen = []
    tasks = [Task(f"f-{i:03}", ("Do it.",), (Example("a", ("b",), "train"),)) for i in range(9)]
    training.write(runs.folder_of(tmp_path, "trained"), tasks)
    monkeypatch.setattr(training, "train", lambda run, source, output, names: seen.append((source.name, output.name, names)))
    monkeypatch.setitem(plan.RUNS, "few", Run("sft", SETTINGS, "", {"tasks": 4}))
    runs.train("few", tmp_path)
    assert seen == [("trained", "few", plan.drawn([task.name for task in tasks], 4, "trained"))]


def test_runs_train_on_more_and_on_those_with_two_answers(tmp_path):
    answers = {"a": "xy", "b": "xyz", "c": "x", "d": "xy"}
    tasks = {
        name: Task(name, ("Do it.",), tuple(Example(f"{i}", (text,), "train") for i, text in enumerate(of)))
        for name, of in answers.items()
    }
    training.write(runs.folder_of(tmp_path, plan.TRAINED), [tasks["a"], tasks["b"], tasks["c"]])
    training.write(runs.folder_of(tmp_path, plan.MORE), [*tasks.values()])
    more = runs.folder_of(tmp_path, plan.MORE)
    assert runs.learnt(Run("sft", SETTINGS, "", {"more": True}), tmp_path) == (more, ["a", "b", "c", "d"])
    assert runs.learnt(Run("sft", SETTINGS, "", {"more": True, "two_answers": True}), tmp_path) == (more, ["a", "d"])
    training.write(runs.folder_of(tmp_path, plan.FURTHER), [tasks["a"]])
    assert runs.learnt(Run("sft", SETTINGS, "", {"further": True}), tmp_path) == (
        runs.folder_of(tmp_path, plan.FURTHER),
        ["a"],
    )
    trained = runs.folder_of(tmp_path, plan.TRAINED)
    assert runs.learnt(Run("sft", SETTINGS, "", {"two_answers": True}), tmp_path) == (trained, ["a"])


def test_a_reconstruction_is_of_the_library(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        training, "train", lambda run, source, output, names: seen.append((source, output.name, list(names)))
    )
    monkeypatch.setattr(runs, "read_descriptions", lambda source: {"a-000": ["Do it."], "b-000": ["Do that."]})
    runs.train("small-warm", tmp_path)
    trained = runs.folder_of(tmp_path, "trained")
    both = ["a-000", "b-000"]
    adapters = tmp_path / plan.LIBRARY / "adapters"
    expected = [(trained, plan.LIBRARY, both), (adapters, "reconstruction", both), (trained, "small-warm", both)]
    assert seen == expected


def test_runs_of_the_plan():
    assert {plan.T2L, plan.RIVAL, plan.LIBRARY} <= plan.RUNS.keys()
    for name, run in plan.RUNS.items():
        assert run.settings.held_out_descriptions == suite.HELD_OUT, name
    chain = [plan.T2L, "t2l-further", "t2l-fourth", "t2l-more", "t2l-labels-more", "t2l-labels", "t2l-third", "t2l-dropout"]
    chain += ["t2l-second", "t2l-first", "t2l-constant"]
    assert [plan.RUNS[name].initial for name in chain] == [*chain[1:], ""]
    chain = [plan.RIVAL, "multi-task-constant"]
    assert [plan.RUNS[name].initial for name in chain] == [*chain[1:], ""] and plan.RUNS[plan.DESCRIBED].initial == plan.EVEN


@pytest.mark.parametrize("kind, start", [("sft", None), ("sft", "lora"), ("lora", "sft"), ("reconstruction", "sft")])
def test_a_run_starts_from_one_that_it_can_start_from(kind, start):
    made = {"x": {"kind": kind, "initial": "y"}} | ({"y": {"kind": start}} if start else {})
    with pytest.raises(
        ConfigError, match=f"plan.yaml: x: initial: expected a run of the plan that {kind} can start from, got 'y'"
    ):
        plans._run({"model": "m", "settings": {}, "runs": made}, "x", "plan.yaml: x", ())


def test_evaluations_of_a_set_are_at_most_three():
    counts = Counter(text.partition(":")[0] for text in plan.PLAN["held_out_evaluations"])
    assert counts.keys() == {"set 1", "set 2", "set 3"} and max(counts.values()) <= 3


def test_committed_results_are_what_the_page_says_of_them():
    """As many tokens means within a fortieth; learning rates are those with the lowest loss."""
    made = read(ROOT / "bench" / "results" / "specs.jsonl")
    tokens = {line["run"]: line["million tokens"] for line in TABLES["specs-tokens"].lines([made])}
    assert tokens[plan.RIVAL] == pytest.approx(tokens[plan.EVEN], rel=1 / 40)
    for of in made.records("rates"):
        best = min(of["lowest"], key=of["lowest"].get)
        assert float(best) == plan.PLAN["adapted"]["learning_rates"][of["start"]]


def test_a_run_starts_from_another(monkeypatch, tmp_path):
    run = Run("sft", SETTINGS, "first", {})
    found = []
    monkeypatch.setattr("t2l_engine.research.training.sft.train", lambda made, *_, **__: found.append(made))
    training.train(run, tmp_path, tmp_path / "second", [])
    made = run.settings.model_copy(update={"initial": str(tmp_path / "first")})
    assert found == [made]
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "settings.yaml").write_text(to_yaml(made))
    (tmp_path / "second" / "config.json").touch()
    for last, of, calls in ((2, ["a"], 2), (3, ["a", "b"], 3), (3, ["a"], 3)):  # the finished run of these tasks is read
        done = {"training": {"steps_done": last, "tasks": of}}
        monkeypatch.setattr(training.checkpoint, "describe", lambda _: done)  # noqa: B023
        training.train(run, tmp_path, tmp_path / "second", ["a"])
        assert len(found) == calls


def test_a_lora_run_starts_from_the_adapter_of_another(tmp_path):
    run = plan.RUNS[plan.RIVAL]
    made = training.settings_of(run, tmp_path / plan.RIVAL)
    assert made == run.settings.model_copy(update={"initial": str(tmp_path / "multi-task-constant" / "adapters")})
    folder = tmp_path / plan.RIVAL / "waves" / "000"
    folder.mkdir(parents=True)
    training.write(runs.folder_of(tmp_path, plan.TRAINED), [Task("f", ("Do it.",), (Example("a", ("b",), "train"),))])
    for initial, there in (("", False), (made.initial, True)):  # as they are written by the run
        settings = made.model_dump(mode="json") | {"initial": initial}
        (folder / "done.json").write_text(json.dumps({"settings": settings, "adapters": ["multi-task"]}))
        assert runs._is_there(tmp_path / plan.RIVAL, run) == there


def test_a_run_that_went_on_is_rounded_anew(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("rounded")

    monkeypatch.setattr(runs.t2l.TextToLoRA, "from_pretrained", fail)
    weights = tmp_path / "t2l" / runs.WEIGHTS_NAME
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    with pytest.raises(RuntimeError, match="rounded"):
        runs.rounded("t2l", tmp_path)
    made = tmp_path / f"t2l-{hashlib.sha256(b'first').hexdigest()[:12]}-bfloat16"
    made.mkdir()
    (made / runs.WEIGHTS_NAME).touch()
    assert runs.rounded("t2l", tmp_path) == made
    weights.write_bytes(b"second")
    with pytest.raises(RuntimeError, match="rounded"):
        runs.rounded("t2l", tmp_path)


def test_a_library_is_there_with_all_its_adapters(tmp_path):
    tasks = [Task(f"f-{i:03}", ("Do it.",), (Example("a", ("b",), "train"),)) for i in range(3)]
    training.write(runs.folder_of(tmp_path, plan.TRAINED), tasks)
    run, folder = plan.RUNS[plan.LIBRARY], tmp_path / plan.LIBRARY
    assert not runs._is_there(folder, run)
    for wave, names, there in ((0, ["f-000", "f-001"], False), (1, ["f-002"], True)):
        (folder / "waves" / f"{wave:03}").mkdir(parents=True)
        record = {"settings": run.settings.model_dump(mode="json"), "adapters": names}
        (folder / "waves" / f"{wave:03}" / "done.json").write_text(json.dumps(record))
        assert runs._is_there(folder, run) == there
    other = dataclasses.replace(run, settings=run.settings.model_copy(update={"steps": 51}))
    assert not runs._is_there(folder, other)


def test_without_t2l_nothing_is_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "lacking", lambda work: [plan.T2L])
    with pytest.raises(BenchError, match="--work: expected the finished run t2l in .*, found none"):
        list(specs.records(tmp_path, []))


def test_evaluations_use_held_out_descriptions(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(runs, "rounded", lambda name, work: work / name)
    monkeypatch.setattr(judging, "evaluate", lambda *given, **options: asked.append((given, options)))
    tasks = [Task(f"f-{i:03}", ("Do it.",), (Example("a", ("b",), "test"),)) for i in range(3)]
    for part in plan.PARTS:
        training.write(runs.folder_of(tmp_path, part), tasks)
        runs.judged(part, tmp_path, arms=plan.ARMS if part != plan.OTHER else plan.OWN_ARMS)
    for part, ((out, name, names, arms), options) in zip(plan.PARTS, asked, strict=True):
        assert (out, name) == (tmp_path / "judged", f"t2l-{part}") and names == [task.name for task in tasks]
        assert options["max_items"] == plan.PLAN["items"][part] and options["shots"] == "3,6"
        beside = {option: options.get(option) for option in ("multi_task", "also", "manifest")}
        if part == plan.OTHER:  # its descriptions are held out as they are
            assert arms == plan.OWN_ARMS and options["held_out_descriptions"] == 0
            assert beside == {"multi_task": None, "also": None, "manifest": "skills"}
        else:
            assert set(arms) == set(plan.ARMS) and options["held_out_descriptions"] == suite.HELD_OUT
            also = f"{plan.DESCRIBED}={tmp_path / plan.DESCRIBED}"
            assert beside == {"multi_task": tmp_path / plan.RIVAL, "also": also, "manifest": None}


def test_a_rank_is_judged_without_a_checkpoint_of_its_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(judging, "evaluate", lambda *given, **options: asked.append((given, options)))
    tasks = [Task("f-000", ("Do it.",), (Example("a", ("b",), "test"),))]
    training.write(runs.folder_of(tmp_path, plan.DEVELOPMENT), tasks)
    runs.judged(plan.DEVELOPMENT, tmp_path, "multi-task-2", [plan.RIVAL])
    (((_, name, _, arms), options),) = asked
    assert (name, arms) == ("multi-task-2-development", [plan.RIVAL])
    assert (options["multi_task"], options["checkpoint"]) == (tmp_path / "multi-task-2", SPECS)


@pytest.mark.parametrize("lacking", [[], [plan.AGAIN], ["multi-task-2", "t2l"]])
def test_seeds_are_judged_on_all_tiers_and_ranks_on_development_tasks(monkeypatch, tmp_path, lacking):
    asked = []

    def judged(part, work, name, arms):
        asked.append((name, part))
        return {"tasks": {"f-000": {arm: len(name) + 0.125 for arm in arms}}}

    monkeypatch.setattr(runs, "judged", judged)
    monkeypatch.setattr(runs, "lacking", lambda work: lacking)
    monkeypatch.setattr(robustness, "trained", lambda work, names: [{"record": "training", "run": name} for name in names])
    about, *found = robustness.records(tmp_path)
    assert about["lacking"] == [name for name in lacking if name in plan.ROBUSTNESS]
    ranks = [(rank, plan.DEVELOPMENT) for rank in plan.RANKS if rank not in lacking]
    again = [(plan.AGAIN, part) for part in plan.SUITE_PARTS if plan.AGAIN not in lacking]
    assert sorted(asked) == sorted(ranks + again)
    scores = {of["part"]: of["scores"] for of in found if of["record"] == "scores"}
    assert [*scores] == ([plan.DEVELOPMENT] if plan.AGAIN in lacking else [*plan.SUITE_PARTS])
    expected = dict.fromkeys((plan.AGAIN, f"{plan.AGAIN}-shuffled"), 15.12) if plan.AGAIN not in lacking else {}
    assert all(of == expected for part, of in scores.items() if part != plan.DEVELOPMENT)
    assert scores[plan.DEVELOPMENT] == {rank: round(len(rank) + 0.125, 2) for rank, _ in ranks} | expected
    assert [of["run"] for of in found if of["record"] == "training"] == [n for n in plan.ROBUSTNESS if n not in lacking]


def test_oracles_are_asked_what_they_were_trained_on(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(runs, "rounded", lambda name, work: work / name)
    monkeypatch.setattr(judging, "evaluate", lambda *given, **options: asked.append((given, options)))
    tasks = [Task(f"f-{i:03}", ("Do it.",), (Example("a", ("b",), "test"),)) for i in range(3)]
    training.write(runs.folder_of(tmp_path, plan.TRAINED), tasks)
    monkeypatch.setitem(plan.RUNS[plan.LIBRARY].other, "tasks", 2)
    for split, wordings in (plan.UNSEEN, ("train", "trained")):
        runs.stored(tmp_path, split, wordings, plan.STORED_ARMS)
    (_, name, names, _), options = asked[0]
    assert name == "t2l-stored-test-held-out" and names == plan.drawn([task.name for task in tasks], 2, plan.TRAINED)
    assert (options["oracle"], options["multi_task"]) == (tmp_path / plan.LIBRARY / "adapters", tmp_path / plan.RIVAL)
    splits = [(options["split"], options["held_out_descriptions"]) for _, options in asked]
    assert splits == [("test", suite.HELD_OUT), ("train", 0)]
    assert options["tasks"] == runs.folder_of(tmp_path, plan.TRAINED)


def test_what_later_runs_are_trained_on_is_left_out(small, tmp_path):
    runs.tasks(tmp_path / "all", runs.specifications())
    runs.tasks(tmp_path / "some", runs.specifications(), later=False)
    some = {part: load_tasks(runs.folder_of(tmp_path / "some", part), None) for part in plan.SUITE_PARTS}
    assert some == {part: load_tasks(runs.folder_of(tmp_path / "all", part), None) for part in plan.SUITE_PARTS}
    made = {path.name for path in (tmp_path / "some" / "tasks").iterdir()}
    assert made == set(plan.SUITE_PARTS)


def test_tasks_of_other_origin_have_descriptions_that_no_study_trains_on(small, tmp_path, monkeypatch):
    wanted = [name for tier in plan.HELD_OUT for name in manifests.read("skills").names(tier)]
    found = []
    tasks = [Task(name, ("Own.",), (Example("a", ("b",), "test"),)) for name in wanted]
    monkeypatch.setattr(runs, "checked", lambda source, names: found.append((source, names)) or tasks)
    runs.tasks(tmp_path, runs.specifications(), Path("skills"))
    assert found == [(Path("skills"), wanted)]
    other = load_tasks(runs.folder_of(tmp_path, plan.OTHER), "test")
    assert {task.name: list(task.descriptions) for task in other} == {name: WORDINGS["held-out"][name] for name in wanted}


@pytest.mark.slow
def test_the_demo_says_what_its_sentences_are():
    found = runs.specifications()
    texts = lambda of, *more: [suite.task(placed.spec, 1, 0, *more).descriptions for placed in of]  # noqa: E731
    trained = texts((*found.trained, *found.more), plan.PLAN["further"])
    known = {normalise(text) for of in trained for text in of}
    apart = {text for of in texts(found.development) for text in of[-suite.HELD_OUT :]}
    tiers = {text: tier for text, (tier, _) in demo.TASKS.items()}
    assert not {normalise(text) for text in tiers} & known
    assert {text for text, tier in tiers.items() if tier == demo.SIBLING} <= apart


@pytest.mark.slow
def test_what_a_task_costs(monkeypatch):
    monkeypatch.setattr(costs, "TASKS", 2)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    empty = dict.fromkeys((field.name for field in dataclasses.fields(runs.Specifications)), ())
    about, *found = costs.records(runs.Specifications(**empty | {"held_out": suite.suite(200)}))
    assert about["checkpoint"] == bundled(SPECS)
    assert [(one["examples"], one["tasks"]) for one in found] == [(count, 2) for count in (0, *plan.SHOTS)]
    for one in found:
        tokens = one["tokens"]
        assert 0 < tokens["question"] < tokens["prompt"] and 0 < tokens["prefix"] < tokens["prompt"]
        assert all(value > 0 for name, value in one.items() if name.endswith("_us"))
    lengths = [one["tokens"]["read"] for one in found]
    assert lengths == sorted(set(lengths)) and len({one["tokens"]["question"] for one in found}) == 1


# --- what is shown of it --------------------------------------------------------------------------------------------------

SCORES = {"t2l": 60.0, "t2l-shuffled": 10.0, "t2l-examples": 70.0, "icl": 50.0, plan.RIVAL: 62.0}


def result(scores=SCORES):
    """A result with two tasks a part, all with the same scores."""
    names = {part: ["wrap-000", "add-001"] for part in plan.PARTS}
    of = [
        {"part": part, "task": task, "groups": ["all"], "scores": dict(scores)}
        for part, tasks in names.items()
        for task in tasks
    ]
    arms = [{"part": part, "arm": arm, "groups": {"all": {"prompt_tokens": 9.0}}} for part in names for arm in scores]
    siblings = [{"new": "value", "tasks": ["wrap-000"]}, {"new": "combination", "tasks": ["add-001"]}]
    two = [{"part": part, "tasks": ["add-001"]} for part in plan.PARTS]
    return Result(Path("specs.jsonl"), {}, (), {"scores": of, "arm": arms, "siblings": siblings, "two_answers": two})


def test_claims_are_differences_of_arms():
    lines = {line["claim"]: line for line in TABLES["specs-claims"].lines([result()])}
    line = lines["unseen siblings: right less another task's description"]
    assert (line["measured"], line["met"]) == (50.0, True)
    line = lines["unseen siblings: T2L less multi-task LoRA, description in the prompt"]
    assert (line["measured"], line["met"]) == (-2.0, True)
    line = lines["trained tasks: right, %"]
    assert (line["measured"], line["met"]) == (60.0, False)
    without = {line["claim"] for line in TABLES["specs-claims"].lines([result({"t2l": 60.0, "icl": 50.0})])}
    assert without < set(lines)  # what was not measured is not shown


def test_the_first_set_has_a_table_of_its_own():
    made = result()
    made.others["scores"] += [{"part": "sibling", "task": "wrap-001", "groups": ["all"], "scores": {"t2l": 0.0}}]
    lines = {line["arm"]: line for line in TABLES["specs-first"].lines([made])}
    ours, rival = (lines[tables_specs.ARMS[arm]] for arm in ("t2l", plan.RIVAL))
    assert (ours["unseen siblings, %"], ours["unseen families, %"]) == (40.0, 60.0)
    assert rival["T2L less the arm, unseen siblings"] == -2.0 and rival["unseen families, %"] == 62.0
    assert ours["T2L less the arm, unseen siblings"] is None


def test_tasks_with_two_answers_stand_apart():
    made = result()
    for of in made.others["scores"]:
        if of["task"] == "add-001":
            of["scores"] = {"t2l": 48.0, "t2l-shuffled": 0.0}
    two, more = TABLES["specs-answers"].lines([made])[-2:]
    assert [(of["different answers"], of["tasks"], of["T2L, from the description, %"]) for of in (two, more)] == [
        ("two", 1, 48.0),
        ("more", 1, 60.0),
    ]
    claims = {line["claim"]: line["measured"] for line in TABLES["specs-claims"].lines([made])}
    claim = "unseen families, tasks with more than two answers: right less another task's description"
    assert claims[claim] == 50.0 == more["right less another task's description"]


def test_costs_are_in_milliseconds():
    tokens = {"read": 20.0, "question": 10.0, "prompt": 90.0, "prefix": 78.5}
    us = {"make_us": 30000.0, "adapted_us": 20000.0, "prompt_us": 50000.0, "fill_us": 45000.0, "warm_us": 21000.0}
    cost = {"examples": 3, "tokens": tokens, **us}
    lines = TABLES["specs-costs"].lines([Result(Path("costs.jsonl"), {}, (), {"cost": [cost, cost | {"examples": 0}]})])
    rows = [[line[head] for head in list(line)[1:]] for line in lines]
    assert rows[:3] == [["T2L", 20.0, 30.0, 10.0, 20.0], ["in the prompt", 0, 0, 90.0, 50.0],
                        ["in the prompt, cached", 78.5, 45.0, 11.5, 21.0]]  # fmt: skip
    assert rows[3:] == rows[:3] and lines[0]["shown"] == "description and 3 examples" and lines[-1]["shown"] == "description"


def test_small_runs_are_compared_by_loss():
    of = lambda run, last: {  # noqa: E731
        "run": run, "tasks": 310, "steps": 250, "curve": [[0.1 * i, last + 20 - i] for i in range(1, 21)],
    }  # fmt: skip
    made = Result(Path("small.jsonl"), {}, (), {"training": [of("small-adamw", 2.0), of("small", 1.0), of("t2l", 0.5)]})
    small, adamw = TABLES["specs-small"].lines([made])
    assert (small["changed"], adamw["changed"]) == (tables_specs.CHANGED["small"], "AdamW")
    losses = [value for head, value in small.items() if head.startswith("loss")]
    assert losses == [16.0, 11.0, 1.0] and "loss, 25 % of 250 steps" in small
    assert {*tables_specs.CHANGED, "reconstruction"} == {*plan.SMALL} <= plan.RUNS.keys()


def test_another_seed_is_compared_task_by_task():
    specs = result(SCORES | {plan.EVEN: 40.0})
    scores = {plan.AGAIN: 45.0, f"{plan.AGAIN}-shuffled": 5.0}
    own = [{"part": "sibling", "task": "wrap-000", "groups": ["all"], "scores": scores}]
    (line,) = TABLES["specs-seeds"].lines([specs, Result(Path("robustness.jsonl"), {}, (), {"scores": own})])
    assert (line["tier"], line["tasks"], line["t2l-first, %"], line["t2l-first-again, %"]) == (
        "unseen siblings",
        1,
        40.0,
        45.0,
    )
    gaps = [f"{plan.AGAIN} less {plan.EVEN}", f"{plan.AGAIN} less another task's description"]
    gaps += [f"{run} less multi-task LoRA" for run in (plan.EVEN, plan.AGAIN)]
    assert [line[gap] for gap in gaps] == [5.0, 40.0, -22.0, -17.0]


def test_ranks_are_compared_by_development_tasks():
    rank = lambda run, rank: {  # noqa: E731
        "run": run, "settings": {"rank": rank}, "steps": 250, "tokens": 400_000, "curve": [[0.2, 2.0], [0.4, 1.5]],
    }  # fmt: skip
    own = [
        {"part": plan.DEVELOPMENT, "task": "wrap-000", "groups": ["all"], "scores": {"multi-task-2": 30, "multi-task-8": 40}}
    ]
    training = [rank("again-constant", 8), rank("multi-task-2", 2), rank("multi-task-8", 8)]
    made = Result(Path("robustness.jsonl"), {}, (), {"scores": own, "training": training})
    two, eight = TABLES["specs-ranks"].lines([made])
    assert [two[head] for head in ("rank", "million tokens", "right, %", "less rank 8")] == [2, 0.4, 30.0, -10.0]
    assert (eight["loss of the last twentieth"], eight["right, %"], eight["less rank 8"]) == (1.5, 40.0, 0.0)


def test_tokens_are_those_of_a_run_and_all_before():
    runs_of = [
        {"run": "t2l-constant", "tokens": 2_000_000},
        {"run": "t2l-first", "tokens": 500_000, "initial": "t2l-constant"},
        {"run": "t2l", "tokens": 3_000_000, "initial": "t2l-first"},
    ]
    made = result(SCORES | {"t2l-first": 42.0})
    made.others.update(training=runs_of)
    first, last = TABLES["specs-tokens"].lines([made])
    assert (first["million tokens"], last["million tokens"]) == (2.5, 5.5)
    tiers = [f"{tables_specs.TIERS[part]}, %" for part in ("trained", "sibling")]
    assert [[line[tier] for tier in tiers] for line in (first, last)] == [[42.0, 42.0], [60.0, 60.0]]


def test_what_an_adapter_can_do():
    """On the tasks of the library alone; an arm without answers is not shown."""
    others = {
        "scores": [
            {"part": plan.STORED, "task": task, "groups": ["all"], "scores": {"oracle": 80.0, "t2l": right}}
            for task, right in (("wrap-000", 40.0), ("add-001", 60.0))
        ],
        "stored": [{"split": "val", "wordings": "held out", "scores": {"t2l": 55.0, "oracle": 90.0}}],
    }
    made = Result(Path("specs.jsonl"), {}, (), others)
    ours, oracle = TABLES["specs-stored"].lines([made])
    assert (ours["arm"], ours["right, %"], ours["less the oracle"]) == (tables_specs.ARMS["t2l"], 50.0, -30.0)
    assert (oracle["right, %"], oracle["less the oracle"]) == (80.0, None)
    (lost,) = TABLES["specs-lost"].lines([made])
    assert list(lost.values()) == ["new, in trained layouts", "held out", 55.0, 90.0]


def test_tables_of_arms_and_families():
    lines = TABLES["specs-arms"].lines([result()])
    assert [line["arm"] for line in lines] == [tables_specs.ARMS[arm] for arm in tables_specs.ARMS if arm in SCORES]
    assert [line["new"] for line in TABLES["specs-new"].lines([result()])] == ["a value", "a combination"]
    families = TABLES["specs-families"].lines([result()])
    assert {(line["tier"], line["family"]) for line in families} >= {("unseen siblings", "wrap"), ("unseen families", "add")}
