"""``t2l adapt`` and ``t2l generate --examples`` as a user types them."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.research.evaluation.answers import Answerer
from tests.research.training import conftest as shared
from tests.research.training.conftest import WORDS
from tests.research.training.test_adapt import engine  # noqa: F401  # a fixture

save_model, base_model, one_thread = shared.save_model, shared.base_model, shared.one_thread


@pytest.fixture
def checkpoint(engine, base_model, tmp_path):  # noqa: F811
    """The folder of a checkpoint that reads two examples, and a file of 30."""
    engine.save_pretrained(tmp_path / "checkpoint", base_model=str(base_model))
    rows = [{"input": f"{a} {b}", "output": [b]} for a in WORDS for b in WORDS if a != b]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    return tmp_path / "checkpoint"


def test_adapt(run, checkpoint, tmp_path):
    call = ["adapt", "Say the last word.", "--examples", tmp_path / "shots.jsonl", "-c", checkpoint]
    quick = ["--set", "steps=20", "--set", "learning_rate=5e-3", "--set", "validate_every=5"]
    code, printed, err = run(*call, "-o", str(tmp_path / "out"), *quick)
    assert code == 0, err
    assert printed.startswith(f"{tmp_path / 'out'}: on 7 held-out examples ") and "23 examples, 20 steps, step" in printed
    assert len(t2l.AdapterStack.from_peft(tmp_path / "out")) == 1
    code, printed, err = run(*call, "-o", str(tmp_path / "out"), *quick, "--json")  # done already
    report = json.loads(printed)
    assert code == 0 and report["examples"] == 23 and report["loss_after"] < report["loss_before"]
    assert 0 <= report["right_before"] <= 7 and 0 <= report["right_after"] <= 7


@pytest.mark.parametrize("changed, described", [({}, False), ({"prompt": "description", "prompt_form": "raw"}, True)])
def test_answers_are_counted_as_it_was_tuned(run, checkpoint, tmp_path, monkeypatch, changed, described):
    asked = []
    ask = Answerer.ask
    monkeypatch.setattr(Answerer, "ask", lambda self, queries, *more: asked.extend(queries) or ask(self, queries, *more))
    call = ["adapt", "Say the last word.", "--examples", str(tmp_path / "shots.jsonl"), "-c", str(checkpoint)]
    call += ["--set", "steps=1"]
    more = [text for name, value in changed.items() for text in ("--set", f"{name}={value}")]
    assert run(*call, "-o", str(tmp_path / "out"), *more)[0] == 0
    assert len(asked) == 14 and all(("Say the last word." in query.prompt) == described for query in asked)
    assert all(query.prompt.endswith("Output:") == described for query in asked)


def test_answers_of_several_lines(run, checkpoint, tmp_path, monkeypatch):
    """They count as a whole where an accepted answer has several; nothing tells a base model to stop behind them."""
    said = "one\ntwo"
    answers = lambda self, queries, *_: [("one" if q.one_line else said) + "\n\nInput: 3" for q in queries]  # noqa: E731
    monkeypatch.setattr(Answerer, "_generate", answers)
    rows = [{"input": f"{i}", "output": [said if i % 2 else "one"]} for i in range(20)]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = ["adapt", "Say it.", "--examples", str(tmp_path / "shots.jsonl"), "-c", str(checkpoint), "--set", "steps=1"]
    code, printed, err = run(*call, "--set", "prompt_form=raw", "-o", str(tmp_path / "out"), "--json")
    assert code == 0, err
    assert json.loads(printed)["right_before"] == 5


@pytest.mark.parametrize("changes, expected", [
    (["--examples", "two.jsonl"], "t2l: --examples: expected at least 4 different inputs, got 2\n"),
    (["--examples", "none.jsonl"], "none.jsonl: not found\n"),
    (["--set", "steps"], "t2l: --set: expected name=value, got 'steps'\n"),
    (["--set", "steps=0"], "t2l: --set: steps: Input should be greater than 0, got 0\n"),
])  # fmt: skip
def test_errors_are_a_line(run, checkpoint, tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    given = ("adapt", "Say it.", "-c", checkpoint, "-o", "out", "--examples", "shots.jsonl")
    code, printed, err = run(*given, *changes)  # the last --examples counts
    assert (code, printed) == (1, "") and err.endswith(expected)


def test_generate_from_examples(run, checkpoint, tmp_path):
    for name, more in (("plain", []), ("shown", ["--examples", str(tmp_path / "two.jsonl")])):
        code, _, err = run("generate", "Say the last word.", "-c", str(checkpoint), "-o", str(tmp_path / name), *more)
        assert code == 0, err
    made = t2l.TextToLoRA.from_pretrained(checkpoint)
    shots = [("red blue", "blue"), ("red green", "green")]
    expected = made.generate(["Say the last word."] * 2, [None, shots])
    for i, name in enumerate(("plain", "shown")):
        got = t2l.AdapterStack.from_peft(tmp_path / name)
        torch.testing.assert_close(got.lora_B["down_proj"][0], expected.lora_B["down_proj"][i])
    assert not torch.equal(*expected.lora_B["down_proj"])
    more = ["-c", "smollm2-135m-paper", "--examples", str(tmp_path / "two.jsonl")]
    code, _, err = run("generate", "Say it.", "-o", str(tmp_path / "x"), *more)
    assert code == 1 and err.startswith("t2l: --examples: expected none, since the encoder of this checkpoint, 'minilm', ")
