"""``docs/training.md``: its walkthrough runs (with a tiny model and few steps here), and the fields it names are real."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from t2l_engine.cli import app
from t2l_engine.research.training import settings as kinds

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "training.md").read_text(encoding="utf-8")
KINDS = {"lora": kinds.LoRASettings, "reconstruction": kinds.ReconstructionSettings, "sft": kinds.SFTSettings}


def test_walkthrough_runs(base_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"<!-- walkthrough -->\n```\n(.*?)```", TEXT, re.S)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [c[:2] for c in commands[1:4]] == [["train", kind] for kind in KINDS]
    for command in commands:
        more = []
        if command[0] == "train":
            more = ["--set", "steps=2", "--set", "validate_every=2"]
            if command[1] != "reconstruction":
                more += ["--set", f"base_model={base_model}", "--set", "dtype=float32", "--set", "validation_samples=1"]
        if command[0] == "evaluate":
            more = ["--max-items", "1", "--max-new-tokens", "1"]
        run = CliRunner().invoke(app, command + more)
        assert run.exit_code == 0, (command, run.output, run.exception)


def test_fields_are_real():
    packaged = {f"mini-{name}": kind for name, kind in KINDS.items()}
    packaged |= dict.fromkeys(("needle", "pointer"), kinds.SFTSettings)
    assert packaged.keys() == {path.stem for path in kinds.PACKAGED.iterdir()}
    for name, kind in packaged.items():
        kinds.read(kind, Path(name))
    known = set().union(*(model.model_fields for model in KINDS.values()))
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", TEXT))
    assert named - known <= {"lora_delta", "task_emb"}
