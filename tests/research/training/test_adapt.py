"""An adapter that is generated and then tuned: where it starts, when it stops, what is kept."""

import dataclasses
import json

import pytest

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import adapt, lora
from t2l_engine.research.training.runs import settings_of
from tests.research.training import small_runs
from tests.research.training.conftest import WORDS, reading_engine

EXAMPLES = [(f"{a} {b}", b) for a in WORDS for b in WORDS if a != b]
QUICK = {"dtype": "float32", "learning_rate": 5e-3, "validate_every": 5, "steps": 60}


@pytest.fixture
def engine(base_model):
    return reading_engine(base_model)


def same(*folders):
    return small_runs.same(*map(t2l.AdapterStack.from_peft, folders))


def test_an_adapter_that_no_run_wrote_is_kept(engine, base_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds adapter_config.json, but no start/ of a run to go on with; choose"):
        adapt.adapt(engine, str(base_model), "Say the last word.", EXAMPLES, tmp_path, **QUICK)
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_tunes_what_it_generates(engine, base_model, tmp_path):
    out = tmp_path / "out"
    report = adapt.adapt(engine, str(base_model), "Say the last word.", EXAMPLES, out, **QUICK)
    assert (report.examples, report.held_out, report.read) == (23, 7, 2)
    assert report.loss_after < 0.7 * report.loss_before and report.best_step > 0
    assert json.loads((out / adapt.REPORT).read_text()) == vars(report)
    trained, _ = adapt.split(EXAMPLES)
    stack = engine.generate(["Say the last word."], [trained[:2]])
    start = t2l.AdapterStack.from_peft(out / adapt.START)
    assert small_runs.same(start, stack)
    assert not same(out, out / adapt.START) and same(out, out / adapt.RUN / lora.ADAPTERS / adapt.NAME)
    assert t2l.AdapterStack.from_peft(out).scaling.tolist() == start.scaling.tolist()


def test_long_examples_are_learnt_too(base_model, tmp_path, recwarn):
    """Of several hundred tokens, where runs of ``t2l train`` leave out those of more than 192."""
    long = [(" ".join(["one two"] * 150), answer) for _, answer in EXAMPLES]
    long = [(f"{x} {i}", answer) for i, (x, answer) in enumerate(long)]
    engine = reading_engine(base_model, 0)  # which would not read so many tokens
    report = adapt.adapt(engine, str(base_model), "Say the last word.", long, tmp_path / "out", **QUICK | {"steps": 1})
    assert report.steps == 1 and not [w for w in recwarn if "max_tokens" in str(w.message)]


def test_stops_where_nothing_improves_and_keeps_the_best(engine, base_model, tmp_path, monkeypatch):
    """Steps uphill leave the adapter as it was generated."""
    downhill = lora.LoRA.loss
    monkeypatch.setattr(lora.LoRA, "loss", lambda *arguments: -downhill(*arguments))
    harm = QUICK | {"patience": 2, "validate_every": 3}
    report = adapt.adapt(engine, str(base_model), "Say the last word.", EXAMPLES, tmp_path / "out", **harm)
    assert (report.best_step, report.steps, report.loss_after) == (0, 6, report.loss_before)
    assert same(tmp_path / "out", tmp_path / "out" / adapt.START)


def test_the_same_call_goes_on_and_another_is_refused(engine, base_model, tmp_path, monkeypatch):
    """Another description, other examples or settings change nothing in the folder."""
    changes, out = QUICK | {"steps": 12, "save_every": 2}, tmp_path / "again"
    whole = adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(lora.LoRA, "loss", small_runs.failing(lora.LoRA.loss, 7))
        with pytest.raises(OSError, match="for the test"):
            adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, out, **changes)
    assert not (out / "adapter_config.json").exists()
    for _ in ("resumed", "finished"):
        again = adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, out, **changes)
        assert vars(again) | {"seconds": 0} == vars(whole) | {"seconds": 0} and same(tmp_path / "whole", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = f"{out}: has an adapter of another description, other examples or another"
    for text, examples, more, message in (
        ("Say the first word.", EXAMPLES, {}, other), ("Say it.", EXAMPLES[1:], {}, other),
        ("Say it.", EXAMPLES, {"seed": 3}, "other settings"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            adapt.adapt(engine, str(base_model), text, examples, out, **changes | more)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_prompts_are_those_of_the_checkpoint(engine, base_model, tmp_path):
    engine.prompt_form = "raw"
    for described in (False, True):
        engine.description_in_prompt, out = described, tmp_path / str(described)
        adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, out, **QUICK | {"steps": 1})
        made = settings_of(out / adapt.RUN)
        assert (made["prompt"], made["prompt_form"]) == ("description" if described else "input", "raw")


def test_a_scaling_that_float32_rounds(engine, base_model, tmp_path):
    """As rsLoRA's 16 / sqrt(8) of the paper; here 8 / sqrt(3)."""
    config = dataclasses.replace(engine.hypernetwork.config, rank=3, scaling="rslora")
    engine = t2l.DocToLoRA(engine.encoder, t2l.PointerHyperNetwork(config))
    report = adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, tmp_path / "out", **QUICK | {"steps": 5})
    assert report.steps == 5
    scaling = t2l.AdapterStack.from_peft(tmp_path / "out").scaling
    assert scaling.item() == pytest.approx(8 / 3**0.5, rel=1e-6) and scaling.item() != 8 / 3**0.5


def test_settings_that_do_not_fit(engine, base_model, tmp_path):
    """What the adapter decides; and the start is always validated."""
    (tmp_path / adapt.START).mkdir()  # as a run leaves it that was killed before its start was written
    decided = {"mode": "multi-task", "initial": "elsewhere", "rank": 2, "base_model": "x"}
    expected = {name: f"{name}: expected no value, for the generated adapter decides it, got " for name in decided}
    expected["patience"] = "patience: expected at least 1 to tune an adapter, .* got 0"
    for name, value in (decided | {"patience": 0}).items():
        with pytest.raises(ConfigError, match=expected[name]):
            adapt.adapt(engine, str(base_model), "Say it.", EXAMPLES, tmp_path, **QUICK | {name: value})


def test_split():
    trained, held_out = adapt.split(EXAMPLES)
    assert sorted(trained + held_out) == sorted(EXAMPLES) and len(held_out) == 7
    assert adapt.split(EXAMPLES[::-1]) == (trained, held_out)
    assert adapt.split([*EXAMPLES, (f" {EXAMPLES[0][0].upper()}", "another")]) == (trained, held_out)
    assert [len(part) for part in adapt.split(EXAMPLES[:4])] == [3, 1]
    with pytest.raises(ConfigError, match="examples: expected at least 4 different inputs, got 3"):
        adapt.split(EXAMPLES[:3] * 2)
