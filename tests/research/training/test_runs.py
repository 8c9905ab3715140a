"""What runs leave: logs, read whatever the end of their run; how adapters are asked, with which descriptions."""

import json
from pathlib import Path

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import lora
from t2l_engine.research.training import runs as training_runs
from t2l_engine.research.training.runs import LOG, append, read_log, rewind
from tests.research.training import small_runs


@pytest.mark.parametrize("form, prompt", [("raw", "input"), ("chat", "description")])
def test_adapters_of_a_run_that_has_not_finished_say_how_they_are_asked(
    base_model, tasks, tmp_path, monkeypatch, form, prompt
):
    settings = small_runs.lora(
        base_model, prompt_form=form, prompt=prompt, steps=9, validate_every=1, held_out_descriptions=1
    )
    monkeypatch.setattr(lora.LoRA, "loss", small_runs.failing(lora.LoRA.loss, 3))
    with pytest.raises(OSError, match="for the test"):
        lora.train(settings, tasks, tmp_path / "run")
    adapters = tmp_path / "run" / lora.ADAPTERS
    assert not (tmp_path / "run" / training_runs.WAVES / "000" / training_runs.RECORD).exists()
    assert training_runs.prompt_of_run(adapters) == (form, prompt == "description")
    monkeypatch.chdir(adapters)
    assert training_runs.prompt_of_run(Path(".")).form == form


def test_descriptions_without_those_held_out(tmp_path):
    """Those of the run, and those that an evaluation asks with."""
    record, adapters = tmp_path / training_runs.WAVES / "000" / training_runs.RECORD, tmp_path / lora.ADAPTERS
    for folder in (record.parent, adapters):
        folder.mkdir(parents=True)
    (adapters / "descriptions.json").write_text(json.dumps({"few": ["1", "2"], "many": ["1", "2", "3", "4"]}))
    record.write_text(json.dumps({"settings": {"held_out_descriptions": 1}}))
    assert training_runs.descriptions_of(adapters) == {"few": ["1"], "many": ["1", "2", "3"]}
    assert training_runs.descriptions_of(adapters, 3) == {"few": ["1"], "many": ["1"]}


def test_adapters_with_a_run_each_are_asked_as_these_were(tmp_path):
    """As those of t2l adapt, side by side in a folder."""
    for name, form in (("plural", "raw"), ("past", "raw"), ("other", "chat")):
        path = tmp_path / name / training_runs.RUN / training_runs.WAVES / "000" / training_runs.RECORD
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"settings": {"prompt_form": form, "prompt": "description"}}))
        if name != "other":
            assert training_runs.prompt_of_run(tmp_path) == ("raw", True)
    with pytest.raises(ConfigError, match="expected adapters of one prompt_form and prompt, got .*'other': .'chat'"):
        training_runs.prompt_of_run(tmp_path)


# --- logs ----------------------------------------------------------------------------------------------------


def write(folder, *lines, end="\n"):
    (folder / LOG).write_text("\n".join(map(str, lines)) + end)


def step(number, **values):
    return json.dumps({"step": number, **values})


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [{"step": i, "loss": 1 / (3 + i), "tokens": i} for i in range(4)] + [{"step": 3, "val_loss": 0.1, "best": True}]
    rewind(tmp_path, 0)
    for number, row in enumerate(rows, 1):
        append(tmp_path, row)
        assert read_log(tmp_path) == rows[:number]  # while the run goes on


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 3, "loss": 0.1}', "", "\0\0"])
def test_a_last_line_without_its_end_is_left_out(tmp_path, torn):
    write(tmp_path, step(1, loss=2.0), step(2, loss=1.0), torn, end="")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    rewind(tmp_path, 2)
    append(tmp_path, {"step": 3, "loss": 0.5})
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]
    assert (tmp_path / LOG).read_text().count("\n") == 3


def test_rows_after_the_state_are_dropped(tmp_path):
    write(tmp_path, step(1, loss=1.0), step(2, loss=1.0), step(2, val_loss=3.0), step(3, loss=1.0), step(3, val_loss=2.0))
    rewind(tmp_path, 2)
    assert [(row["step"], "loss" in row) for row in read_log(tmp_path)] == [(1, True), (2, True), (2, False)]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "[1]", "3", '{"loss": 1}', '{"step": null}', '{"step": "x"}', '{"step": NaN}', '{"step": 1e999}'],
)
def test_lines_that_are_no_rows_are_named(tmp_path, line):
    write(tmp_path, step(1, loss=1.0), line, step(2, loss=1.0))
    with pytest.raises(ConfigError, match=r"log.jsonl:2: expected a JSON object with a step"):
        read_log(tmp_path)


def test_no_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="log.jsonl: "):
        read_log(tmp_path)
