"""How the adapters of a run are asked, and with which descriptions, from what the run left."""

import json
from pathlib import Path

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import lora
from t2l_engine.research.training import runs as training_runs
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
