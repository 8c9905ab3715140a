"""Possible methods: what they show the model and whose adapter they use; why others are left out."""

import json
import shutil

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation.methods import (
    CONSTANT,
    SHOTS,
    Candidates,
    description_of,
    junk,
    partners,
    shots_of,
    without_chat,
)
from t2l_engine.research.tasks.folder import Example, family_of
from t2l_engine.research.training import lora
from t2l_engine.text.documents import condition_text
from tests.research.evaluation.conftest import DESCRIPTIONS, random_stack, task
from tests.research.training import small_runs

RED = Example("red", ("red",), "test")
TASKS = [task(f"task{i}", RED, descriptions=[f"Do {i}.", f"Do {i}, please."][: 1 + i % 2]) for i in range(5)]
ASKED = [task(name, RED) for name in DESCRIPTIONS]
NO_FAMILY = "it needs at least two tasks of one family"
POOLS = {t.name: [Example(f"{t.name} {i}", (str(i),), "train") for i in range(5)] for t in TASKS}


def shown(made):
    return {m.name: (m.templates, m.description, m.shots, m.repeats) for m in made.methods}


def keys(method, tasks, repeat=0, example=RED):
    return [method.key(t, example, repeat) for t in tasks]


def shuffled_texts(texts, repeat):
    """``texts`` of TASKS, each that of the task's partner."""
    names = [t.name for t in TASKS]
    drawn, by_name = partners(names, repeat), dict(zip(names, texts, strict=True))
    return [by_name[drawn[name]] for name in names]


def of_checkpoint(engine, folder, tasks=TASKS, pools=None, **options):
    made = Candidates(tasks, pools or {}, **options)
    made.add_checkpoint("mine", engine, folder)
    return made


def folder_of(path, names, seed=0, **settings):
    """A folder of random PEFT adapters, in that of a run with ``settings`` if there are any."""
    folder, stack = path / "adapters", random_stack(len(names), seed)
    for i, name in enumerate(names):
        stack.save_pretrained(folder / name, adapter=i)
    if settings:
        (path / "waves" / "000").mkdir(parents=True)
        (path / "waves" / "000" / "done.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_the_base_model():
    made = Candidates(TASKS, POOLS, (6, 3))
    made.add_base()
    both = ("raw", "chat")
    assert shown(made) == {
        "base": (both, False, 0, False), "base-description": (both, True, 0, True), "icl": (both, True, SHOTS, True),
    }  # fmt: skip
    assert made.left_out == {"icl-6": "fewer than 6 examples of split 'train' of task task0"}
    assert all(method.adapters is None and keys(method, ASKED) == [""] * 3 for method in made.methods)
    assert {method.templates for method in without_chat(made.methods)} == {("raw",)}
    of_pool = Candidates(TASKS, POOLS, (5,), pool_asked=True)
    of_pool.add_base()
    assert of_pool.left_out == {"icl-5": "fewer than 6 examples of split 'train' of task task0"}


@pytest.mark.parametrize("in_prompt", [False, True])
def test_a_checkpoint(engine, checkpoint, in_prompt):
    """With the description in the prompt there are repeats even where the adapter is the same."""
    engine = t2l.TextToLoRA(engine.encoder, engine.hypernetwork, "raw", description_in_prompt=in_prompt)
    made = of_checkpoint(engine, checkpoint)
    assert shown(made) == {
        "mine": (("raw",), in_prompt, 0, True),
        "mine-shuffled": (("raw",), in_prompt, 0, True),
        "mine-junk": (("raw",), in_prompt, 0, True),
        "mine-constant": (("raw",), in_prompt, 0, in_prompt),
    }
    matched, shuffled, nonsense, constant = made.methods
    assert len({method.adapters.identity for method in made.methods}) == 1
    for repeat in range(4):
        texts = keys(matched, TASKS, repeat)
        assert texts == [t.descriptions[repeat % (1 + i % 2)] for i, t in enumerate(TASKS)]
        others = keys(shuffled, TASKS, repeat)
        assert others == shuffled_texts(texts, repeat)
        assert not any(a == b for a, b in zip(texts, others, strict=True))
        assert keys(nonsense, TASKS, repeat) == [junk(t, repeat) for t in TASKS]
        assert keys(constant, TASKS, repeat) == [CONSTANT] * 5


def test_a_checkpoint_that_reads_examples(engine, checkpoint, reading):
    """Its adapters are also generated from what few-shot prompts show, and from another task's examples."""
    made = of_checkpoint(reading, checkpoint, pools=POOLS, shots=(3, 2, 4))
    assert [m.name for m in made.methods[4:]] == [
        "mine-examples", "mine-examples-shuffled", "mine-examples-2", "mine-examples-2-shuffled",
    ]  # fmt: skip
    assert made.left_out == {"mine-examples-4": "the checkpoint reads at most 3 examples"} | {
        f"mine{ending}-same-family": NO_FAMILY for ending in ("", "-examples", "-examples-2")
    }
    for (own, other), count in ((made.methods[4:6], 3), (made.methods[6:], 2)):
        for repeat in range(2):
            texts = keys(own, TASKS, repeat)
            shots = [shots_of(t, POOLS[t.name], repeat, count, RED.input) for t in TASKS]
            assert texts == [condition_text(description_of(t, repeat), s) for t, s in zip(TASKS, shots, strict=True)]
            assert keys(other, TASKS, repeat) == shuffled_texts(texts, repeat)
    (text,) = reading.encoder.prepare([description_of(TASKS[0], 0)], [shots_of(TASKS[0], POOLS["task0"], 0)])
    assert keys(made.methods[4], TASKS[:1]) == [text]
    assert len(of_checkpoint(engine, checkpoint, pools=POOLS).methods) == 4
    without = of_checkpoint(reading, checkpoint)
    assert without.left_out["mine-examples"] == "fewer than 3 examples of split 'train' of task task0"


def test_another_description_of_the_same_family(engine, checkpoint, reading):
    """Of another specification, with its examples where the checkpoint reads any; none of a task alone in its family."""
    names = ["a-000", "a-001", "b-000", "a-002"]
    tasks = [task(name, RED, descriptions=[f"{name}, {r}." for r in range(2)]) for name in names]
    pools = {t.name: [Example(f"{t.name} {i}", (str(i),), "train") for i in range(5)] for t in tasks}
    made = of_checkpoint(engine, checkpoint, tasks)
    assert [m.name for m in made.methods[1:3]] == ["mine-shuffled", "mine-same-family"] and made.left_out == {}
    examples = of_checkpoint(reading, checkpoint, tasks, pools).methods[-1]
    assert examples.name == "mine-examples-same-family" and examples.repeats and made.methods[2].repeats
    for repeat in range(2):
        drawn = partners(["a-000", "a-001", "a-002"], repeat, family_of)
        others = [drawn.get(name) for name in names]
        assert others[2] is None
        assert keys(made.methods[2], tasks, repeat) == [of and f"{of}, {repeat}." for of in others]
        for of, text in zip(others, keys(examples, tasks, repeat), strict=True):
            assert (text or "").count(of or "none") == (1 + 3 if of else 0)


def test_checkpoints_of_names_and_of_inputs(one_hot, by_input):
    known = t2l.TextToLoRA.from_pretrained(one_hot)
    made = of_checkpoint(known, one_hot, ASKED)
    assert shown(made) == {"mine": (("chat",), False, 0, False), "mine-shuffled": (("chat",), False, 0, True)}
    assert [keys(method, ASKED, 1) for method in made.methods] == [[None, "first", "last"], [None, "last", "first"]]
    assert of_checkpoint(known, one_hot, ASKED[:2]).left_out == {
        "mine-shuffled": "it needs at least two tasks", "mine-same-family": NO_FAMILY,
    }  # fmt: skip
    with pytest.raises(ValueError, match="its one-hot encoder knows none of the tasks"):
        of_checkpoint(known, one_hot, ASKED[:1])
    (method,) = of_checkpoint(t2l.TextToLoRA.from_pretrained(by_input), by_input, ASKED).methods
    assert (method.name, method.repeats, method.description) == ("mine", False, False)
    assert keys(method, ASKED, 0, Example("red cat", ("red",), "test")) == ["red cat"] * 3


def test_per_task_loras(tmp_path):
    """Of the tasks that have one, asked as their run was trained."""
    made = Candidates(ASKED, {})
    made.add_per_task([folder_of(tmp_path / "run", ["last", "first", "x"], prompt_form="raw", prompt="description")])
    assert shown(made) == {"oracle": (("raw",), True, 0, True)}
    assert keys(made.methods[0], ASKED, 2) == [None, "first", "last"]
    others = folder_of(tmp_path / "other", ["again"])
    message = "^oracle: expected adapters trained with one .*/other/adapters chat, .*/run/adapters raw"
    with pytest.raises(ValueError, match=message):
        made.add_per_task([others, tmp_path / "run" / "adapters"])


def test_a_library(loaded, tmp_path):
    """Average, routing, and the adapter whose descriptions are nearest by direction to the task's."""
    places = {"up": [0.0, 1.0], "up too": [0.2, 1.0], "right": [3.0, 0.0]}
    places |= {task.descriptions[r]: [1.0, 9.0] if i else [5.0, 1.0] for i, task in enumerate(ASKED) for r in (0, 1)}

    class Encoder:
        def encode(self, texts):
            return torch.tensor([places[text] for text in texts])

    folder, made = folder_of(tmp_path, ["a", "b"]), Candidates(ASKED, {})
    made.add_library(folder)
    assert made.left_out == {"nearest": f"no descriptions.json in {folder}"} and len(made.methods) == 2
    about = {"a": ["up", "up too"], "b": ["right"]}
    (folder / "descriptions.json").write_text(json.dumps(about))
    made = Candidates(ASKED, {})
    made.add_library(folder, Encoder())
    once = (("chat",), False, 0, False)
    assert shown(made) == {"average": once, "arrow": once, "nearest": (("chat",), False, 0, True)}
    *both, nearest = made.methods
    assert keys(nearest, ASKED, 1) == ["b", "a", "a"] and all(keys(method, ASKED) == [""] * 3 for method in both)
    ids, outputs = torch.tensor([[3, 9, 10, 4]]), []
    with torch.no_grad():
        for method in both:  # two adapters are fewer than Arrow's four experts
            with method.adapters.on(loaded[0]) as use, use([""]):
                outputs.append(loaded[0](ids).logits)
        base = loaded[0](ids).logits
    assert not torch.equal(outputs[0], base) and not torch.equal(outputs[1], base) and not torch.equal(*outputs)
    (folder / "descriptions.json").write_text(json.dumps({"a": about["a"]}))
    with pytest.raises(ConfigError, match="descriptions: expected some of every adapter, got none of b"):
        Candidates(ASKED, {}).add_library(folder)


def test_one_adapter_for_all_tasks(base_model, tasks, loaded, tmp_path):
    """What ``t2l train lora`` wrote with mode multi-task, and nothing else."""
    small, made = {"steps": 2, "validate_every": 0, "tasks_per_batch": 4}, Candidates(ASKED, {})
    folders = {}
    for name, changes in {
        "multi-task": {"mode": "multi-task", "prompt_form": "raw"},
        "multi-task-description": {"mode": "multi-task", "prompt": "description"},
        "per-task": {},
    }.items():
        folders[name] = lora.train(small_runs.lora(base_model, **small | changes), tasks, tmp_path / name)
    for name in ("multi-task", "multi-task-description"):
        made.add_multi_task(folders[name])
    assert shown(made) == {"multi-task": (("raw",), False, 0, False), "multi-task-description": (("chat",), True, 0, True)}
    stack, ids = t2l.AdapterStack.from_peft(folders["multi-task"] / "adapters" / "multi-task"), torch.tensor([[3, 9, 10, 4]])
    with torch.no_grad():
        with made.methods[0].adapters.on(loaded[0]) as use, use([""]):
            found = loaded[0](ids).logits
        with t2l.attach(loaded[0], stack).use(0) as handle:
            expected = loaded[0](ids).logits
        handle.detach()
    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match="expected a run with mode multi-task, got 'per-task'"):
        made.add_multi_task(folders["per-task"])
    with pytest.raises(FileNotFoundError, match="expected the folder of a finished run of t2l train lora, found none"):
        made.add_multi_task(tmp_path / "none")
    folder = shutil.copytree(folders["multi-task"], tmp_path / "other")
    unlike = {"mode": "multi-task", "prompt_form": "loud"}
    for content, expected in (
        ([], "done.json: expected an object with settings"),
        ({"settings": 1}, "done.json: expected an object with settings"),
        ({"settings": unlike}, r"prompt_form: expected one of \('chat', 'raw'\), got 'loud'"),
    ):
        (folder / "waves" / "000" / "done.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=expected):
            made.add_multi_task(folder)
