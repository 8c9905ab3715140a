"""Methods: what they show the model and whose adapter they use, and what a repeat draws again."""

import json
import re
import shutil
import string
from pathlib import Path

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation.methods import (
    CONSTANT,
    SHOTS,
    Generated,
    Routed,
    Stored,
    base_methods,
    description_of,
    generated_methods,
    junk,
    library_methods,
    multi_task_method,
    nearest_method,
    partners,
    per_task_method,
    shots_of,
)
from t2l_engine.research.tasks import synthetic
from t2l_engine.research.tasks.folder import Example
from t2l_engine.research.training import lora
from t2l_engine.research.training import runs as lora_runs
from t2l_engine.research.training.runs import Prompt
from t2l_engine.text.config import LLMEncoderConfig
from t2l_engine.text.llm_encoder import AttentionPooling, LLMEncoder, condition_text
from tests.research.evaluation.conftest import DESCRIPTIONS, random_stack, task
from tests.research.training import runs

RED = Example("red", ("red",), "test")
TASKS = [task(f"task{i}", RED, descriptions=[f"Do {i}.", f"Do {i}, please."][: 1 + i % 2]) for i in range(5)]
ASKED = [task(name, RED) for name in DESCRIPTIONS]


@pytest.fixture
def reading(loaded):
    """An engine whose encoder reads three examples."""
    model, tokenizer = loaded
    config = LLMEncoderConfig("tiny", layers=(0, 1), queries=4, width=16, max_examples=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = LLMEncoder(model.get_decoder(), tokenizer, config, AttentionPooling(config, 64))
        network = t2l.HyperNetwork(
            t2l.HyperNetworkConfig(
                variant="L", modules=("q_proj",), in_features=(64,), out_features=(64,), num_layers=2, rank=2, embed_dim=64,
                latent_size=16, head_in_size=8, lora_alpha=4,
            )
        )  # fmt: skip
    return t2l.TextToLoRA(reader, network)


def shown(methods):
    return {a.name: (a.templates, a.description, a.shots, a.repeats) for a in methods}


def keys(method, tasks, repeat=0, example=RED):
    return [method.key(t, example, repeat) for t in tasks]


# --- methods ------------------------------------------------------------------------------------------------------------


def test_base_methods():
    methods = base_methods()
    both = ("raw", "chat")
    assert shown(methods) == {
        "base": (both, False, 0, False), "base-description": (both, True, 0, True), "icl": (both, True, SHOTS, True),
    }  # fmt: skip
    assert all(method.adapters is None and keys(method, ASKED) == [""] * 3 for method in methods)
    assert {method.name: method.shots for method in base_methods((6, 3))[2:]} == {"icl-6": 6, "icl": 3}


@pytest.mark.parametrize("in_prompt", [False, True])
def test_methods_of_a_checkpoint(engine, in_prompt):
    """With the description in the prompt there are repeats even where the adapter is the same."""
    methods = generated_methods("mine", engine, TASKS, in_prompt=in_prompt)
    assert shown(methods) == {
        "mine": (("chat",), in_prompt, 0, True),
        "mine-shuffled": (("chat",), in_prompt, 0, True),
        "mine-junk": (("chat",), in_prompt, 0, True),
        "mine-constant": (("chat",), in_prompt, 0, in_prompt),
    }
    assert len({method.adapters.identity for method in methods}) == 1
    matched, shuffled, nonsense, constant = methods
    for repeat in range(4):
        texts = keys(matched, TASKS, repeat)
        assert texts == [description_of(t, repeat) for t in TASKS] == [t.descriptions[repeat % (1 + i % 2)] for i, t in
                                                                       enumerate(TASKS)]  # fmt: skip
        drawn = partners([t.name for t in TASKS], repeat)
        by_name = dict(zip([t.name for t in TASKS], texts, strict=True))
        others = keys(shuffled, TASKS, repeat)
        assert others == [by_name[drawn[t.name]] for t in TASKS] and sorted(others) == sorted(texts)
        assert not any(a == b for a, b in zip(texts, others, strict=True))
        assert keys(nonsense, TASKS, repeat) == [junk(t, repeat) for t in TASKS]
        assert keys(constant, TASKS, repeat) == [CONSTANT] * 5


def test_a_checkpoint_that_reads_examples(engine, reading):
    """Its methods are generated from what few-shot prompts show, and from another task's."""
    pools = {t.name: [Example(f"{t.name} {i}", (str(i),), "train") for i in range(5)] for t in TASKS}
    methods = generated_methods("mine", reading, TASKS, pools=pools)
    assert [method.name for method in methods[:2] + methods[-2:]] == [
        "mine",
        "mine-shuffled",
        "mine-examples",
        "mine-examples-shuffled",
    ]
    own, other = methods[-2:]
    for repeat in range(3):
        texts = keys(own, TASKS, repeat)
        shots = [shots_of(t, pools[t.name], repeat, SHOTS, RED.input) for t in TASKS]
        assert texts == [condition_text(description_of(t, repeat), s) for t, s in zip(TASKS, shots, strict=True)]
        drawn, by_name = partners([t.name for t in TASKS], repeat), dict(zip([t.name for t in TASKS], texts, strict=True))
        assert keys(other, TASKS, repeat) == [by_name[drawn[t.name]] for t in TASKS]
    (text,) = reading.encoder.prepare([description_of(TASKS[0], 0)], [shots_of(TASKS[0], pools["task0"], 0)])
    assert keys(own, TASKS[:1]) == [text]
    fewer = generated_methods("mine", reading, TASKS, pools=pools, shots=(2, reading.encoder.max_examples + 1))[4:]
    assert [method.name for method in fewer] == ["mine-examples-2", "mine-examples-2-shuffled"]
    text = condition_text(description_of(TASKS[0], 0), shots_of(TASKS[0], pools["task0"], 0, 2, RED.input))
    assert keys(fewer[0], TASKS[:1]) == [text]
    without = [method.name for method in generated_methods("mine", reading, TASKS)]
    assert without == [method.name for method in generated_methods("mine", engine, TASKS, pools=pools)] and len(without) == 4


def test_a_checkpoint_of_names_answers_those_it_knows(one_hot):
    known = t2l.TextToLoRA.from_pretrained(one_hot)
    methods = generated_methods("names", known, ASKED)
    assert shown(methods) == {"names": (("chat",), False, 0, False), "names-shuffled": (("chat",), False, 0, True)}
    assert keys(methods[0], ASKED, 1) == [None, "first", "last"]
    assert keys(methods[1], ASKED, 1) == [None, "last", "first"]
    (alone, shuffled) = generated_methods("names", known, ASKED[:2])
    assert keys(alone, ASKED[:2]) == [None, "first"]
    with pytest.raises(ValueError, match="^methods: the shuffled-description baseline needs at least two tasks, got 1"):
        keys(shuffled, ASKED[:2])


def test_an_oracle_has_the_adapter_of_the_task_or_none():
    method = per_task_method(random_stack(2), ["last", "first"])
    assert (method.name, method.repeats, method.templates, method.description) == ("oracle", False, ("chat",), False)
    assert keys(method, ASKED, 2) == [None, "first", "last"]


def test_the_nearest_adapter_has_the_nearest_descriptions(monkeypatch):
    """Nearest to the mean of an adapter's descriptions, by direction."""
    places = {"up": [0.0, 1.0], "up too": [0.2, 1.0], "right": [3.0, 0.0]}
    places |= {task.descriptions[r]: [1.0, 9.0] if i else [5.0, 1.0] for i, task in enumerate(ASKED) for r in (0, 1)}

    class Encoder:
        def encode(self, texts):
            return torch.tensor([places[text] for text in texts])

    texts = {"a": ["up", "up too"], "b": ["right"], "c": ["unread"]}
    method = nearest_method(random_stack(2), ["a", "b"], texts, Prompt("raw"), encoder=Encoder())
    assert (method.name, method.repeats, method.templates, method.description) == ("nearest", True, ("raw",), False)
    assert keys(method, ASKED, 1) == ["b", "a", "a"]
    with pytest.raises(ConfigError, match="descriptions: expected some of every adapter, got none of d"):
        nearest_method(random_stack(2), ["a", "d"], texts)


def test_library_methods(loaded):
    """A library may be smaller than what Arrow routes a token to."""
    stack = random_stack(3)
    methods = library_methods(stack)
    assert shown(methods) == {name: (("chat",), False, 0, False) for name in ("average", "arrow")}
    assert all(keys(method, ASKED) == [""] * 3 for method in methods)
    ids, outputs = torch.tensor([[3, 9, 10, 4]]), []
    for method in methods:
        with torch.no_grad(), method.adapters.on(loaded[0]) as use, use([""]):
            outputs.append(loaded[0](ids).logits)
    with torch.no_grad():
        base = loaded[0](ids).logits
    assert not torch.equal(outputs[0], base) and not torch.equal(outputs[1], base) and not torch.equal(*outputs)


# --- what a repeat draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 40])
def test_partners_are_a_derangement(count):
    names = [f"task{i}" for i in range(count)]
    drawn = [partners(names, repeat) for repeat in range(6)]
    for found in drawn:
        assert list(sorted(found)) == sorted(found.values()) == sorted(names)
        assert all(name != other for name, other in found.items())
    assert drawn[0] == partners(list(names), 0)
    if count > 3:
        assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    for few in ([], ["a"]):
        with pytest.raises(ValueError, match=f"needs at least two tasks, got {len(few)}"):
            partners(few, 0)


def test_junk_says_nothing():
    made = {(t.name, repeat): junk(t, repeat) for t in TASKS for repeat in range(20)}
    assert len(set(made.values())) == len(made) == 100
    assert all(junk(t, 3) == made[t.name, 3] for t in TASKS)
    assert junk(task("task0", descriptions=["Other."]), 3) == made["task0", 3]  # by name, not by what is said of it
    assert all(re.fullmatch(r"[A-Z][a-z]{1,8}( [a-z]{2,9}){7}\.", text) for text in made.values())
    english = {w for t in synthetic.suite(20) for d in t.descriptions for w in re.findall("[a-z]{4,}", d.lower())}
    words = [w for text in made.values() for w in re.findall("[a-z]{4,}", text.lower())]
    assert len(english) > 100 and len(words) > 400 and english.isdisjoint(words)
    assert set("".join(words)) == set(string.ascii_lowercase)


def test_worked_examples_are_drawn_by_task_and_repeat():
    pool = [Example(f"in {i}", (f"out {i}", "other"), "train") for i in range(30)]
    drawn = [tuple(shots_of(t, pool, repeat)) for t in TASKS for repeat in range(3)]
    assert len(set(drawn)) == 15 and drawn[0] == tuple(shots_of(TASKS[0], pool, 0))
    for shots in drawn:
        assert len(set(shots)) == SHOTS and all(x.replace("in", "out") == y for x, y in shots)
    assert shots_of(TASKS[0], pool, 0, 1) == list(drawn[0][:1])
    assert len(shots_of(TASKS[0], pool[:2], 0)) == 2


def test_what_is_asked_is_no_worked_example():
    pool = [Example(f"in {i}", ("out",), "train") for i in range(5)]
    first = shots_of(TASKS[0], pool, 0)
    assert shots_of(TASKS[0], pool, 0, asked="elsewhere") == first
    for example in pool:
        found = shots_of(TASKS[0], pool, 0, asked=example.input)
        assert len(found) == SHOTS and example.input not in dict(found)
        assert [s for s in found if s in first] == [s for s in first if s[0] != example.input]
        assert shots_of(TASKS[0], pool, 0, asked=f" {example.input.upper()}") == found
    assert shots_of(TASKS[0], pool[:1], 0, asked="in 0") == []


# --- one adapter for all tasks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shared, base_model, tasks):
    """Folders that ``t2l train lora`` wrote, by mode and prompt."""
    found = {}
    for mode, prompt in (("multi-task", "input"), ("multi-task", "description"), ("per-task", "input")):
        settings = runs.lora(base_model, mode=mode, prompt=prompt, steps=2, validate_every=0, tasks_per_batch=4)
        found[mode, prompt] = lora.train(settings, tasks, shared / f"{mode}-{prompt}")
    return found


@pytest.mark.parametrize("prompt, name", [("input", "multi-task"), ("description", "multi-task-description")])
def test_what_training_wrote_is_a_method(trained, loaded, prompt, name):
    folder = trained["multi-task", prompt]
    method = multi_task_method(folder)
    in_prompt = prompt == "description"
    assert (method.name, method.templates, method.description, method.repeats) == (name, ("chat",), in_prompt, in_prompt)
    assert keys(method, ASKED, 2) == [""] * 3
    stack = t2l.AdapterStack.from_peft(folder / "adapters" / "multi-task")
    ids = torch.tensor([[3, 9, 10, 4]])
    with torch.no_grad():
        with method.adapters.on(loaded[0]) as use, use([""]):
            found = loaded[0](ids).logits
        with t2l.attach(loaded[0], stack).use(0) as handle:
            expected = loaded[0](ids).logits
        handle.detach()
        assert torch.equal(found, expected) and not torch.equal(found, loaded[0](ids).logits)


def test_runs_that_are_no_such_method(trained, tmp_path):
    path = tmp_path / "waves" / "000" / "done.json"
    with pytest.raises(FileNotFoundError, match="expected the folder of a finished run of t2l train lora, found none"):
        multi_task_method(tmp_path)
    with pytest.raises(ConfigError, match="expected a run with mode multi-task, got 'per-task'"):
        multi_task_method(trained["per-task", "input"])
    path.parent.mkdir(parents=True)
    for content, expected in (
        ("[]", "done.json: expected an object with settings"),
        ("{}", "done.json: expected an object with settings"),
        ('{"settings": 1}', "done.json: expected an object with settings"),
        ('{"settings": {"mode": "other"}}', "expected a run with mode multi-task, got 'other'"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=expected):
            multi_task_method(tmp_path)
    path.write_text(json.dumps({"settings": {"mode": "multi-task"}}))
    with pytest.raises(FileNotFoundError, match="multi-task"):  # the adapter
        multi_task_method(tmp_path)
    shutil.copytree(trained["multi-task", "input"] / "adapters", tmp_path / "adapters")
    assert multi_task_method(tmp_path).name == "multi-task"
    path.write_text(json.dumps({"settings": {"mode": "multi-task", "prompt_form": "loud"}}))
    with pytest.raises(ConfigError, match="prompt_form: expected one of chat, raw, got 'loud'"):
        multi_task_method(tmp_path)


def test_methods_are_asked_in_the_form_of_their_training(engine, base_model, tasks, tmp_path):
    engine = t2l.TextToLoRA(engine.encoder, engine.hypernetwork, "raw")
    stack = random_stack(2)
    made = [*generated_methods("mine", engine, TASKS), per_task_method(stack, ["task0", "task1"], Prompt("raw")),
            *library_methods(stack, Prompt("raw"))]  # fmt: skip
    assert {method.templates for method in made} == {("raw",)}
    settings = runs.lora(base_model, mode="multi-task", prompt_form="raw", steps=1, validate_every=0)
    assert multi_task_method(lora.train(settings, tasks, tmp_path / "run")).templates == ("raw",)


@pytest.mark.parametrize("form, prompt", [("raw", "input"), ("chat", "description")])
def test_adapters_of_a_run_that_has_not_finished_say_how_they_are_asked(
    base_model, tasks, tmp_path, monkeypatch, form, prompt
):
    settings = runs.lora(base_model, prompt_form=form, prompt=prompt, steps=9, validate_every=1, held_out_descriptions=1)
    monkeypatch.setattr(lora.LoRA, "loss", runs.failing(lora.LoRA.loss, 3))
    with pytest.raises(OSError, match="for the test"):
        lora.train(settings, tasks, tmp_path / "run")
    adapters = tmp_path / "run" / lora.ADAPTERS
    assert not (tmp_path / "run" / lora_runs.WAVES / "000" / lora_runs.RECORD).exists()
    assert lora_runs.prompt_of_run(adapters) == (form, prompt == "description")
    monkeypatch.chdir(adapters)
    assert lora_runs.prompt_of_run(Path(".")).form == form


def test_descriptions_without_those_held_out(tmp_path):
    """Those of the run, and those that an evaluation asks with."""
    record, adapters = tmp_path / lora_runs.WAVES / "000" / lora_runs.RECORD, tmp_path / lora.ADAPTERS
    for folder in (record.parent, adapters):
        folder.mkdir(parents=True)
    (adapters / "descriptions.json").write_text(json.dumps({"few": ["1", "2"], "many": ["1", "2", "3", "4"]}))
    record.write_text(json.dumps({"settings": {"held_out_descriptions": 1}}))
    assert lora_runs.descriptions_of(adapters) == {"few": ["1"], "many": ["1", "2", "3"]}
    assert lora_runs.descriptions_of(adapters, 3) == {"few": ["1"], "many": ["1"]}


def test_adapters_with_a_run_each_are_asked_as_these_were(tmp_path):
    """As those of t2l adapt, side by side in a folder."""
    for name, form in (("plural", "raw"), ("past", "raw"), ("other", "chat")):
        path = tmp_path / name / lora_runs.RUN / lora_runs.WAVES / "000" / lora_runs.RECORD
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"settings": {"prompt_form": form, "prompt": "description"}}))
        if name != "other":
            assert lora_runs.prompt_of_run(tmp_path) == ("raw", True)
    with pytest.raises(ConfigError, match="expected adapters of one prompt_form and prompt, got .*'other': .'chat'"):
        lora_runs.prompt_of_run(tmp_path)


# --- identities ------------------------------------------------------------------------------------------------------


def test_the_pooling_is_part_of_the_identity(reading):
    before = Generated(reading).identity
    assert Generated(reading).identity == before
    with torch.no_grad():
        reading.encoder.pooling.queries += 1
    assert Generated(reading).identity != before


def test_equal_identities_are_equal_adapters(engine, checkpoint, one_hot, by_input):
    stack, names = random_stack(3), ["a", "b", "c"]
    alike = [Stored(stack, names), Stored(random_stack(3), list(names))]
    others = [
        Stored(random_stack(3, seed=1), names), Stored(stack, ["a", "c", "b"]), Stored(stack[[0, 1]], names[:2]),
        Stored(stack.to(dtype=torch.bfloat16), names), Routed(stack), Routed(random_stack(3, seed=1)),
        Stored(t2l.AdapterStack(stack.lora_A, stack.lora_B, stack.scaling * 2), names),
    ]  # fmt: skip
    load = t2l.TextToLoRA.from_pretrained
    generated = [Generated(e) for e in (engine, load(checkpoint, scaling=3.0), load(one_hot), load(by_input))]
    assert len({a.identity for a in alike}) == 1 and Generated(load(checkpoint)).identity == generated[0].identity
    found = [a.identity for a in (alike[0], *others, *generated[:3])]
    assert len(set(found)) == len(found)
    assert generated[3].identity == generated[0].identity  # the same weights: what they are asked is no part of them
