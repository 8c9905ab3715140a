"""What all commands share: exit statuses, messages, ``t2l info``; files of tasks that commands do not overwrite."""

import json
import os
import subprocess
import sys
import warnings

import pytest

import t2l_engine as t2l
from t2l_engine import ops
from t2l_engine.cli.common import json_text

BOOLQ = {"question": "can fish swim", "passage": "Fish -- They swim.", "answer": True}


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert f"t2l_engine {t2l.__version__}" in out and ("instruction set: " in out) == ops.NATIVE
    for name in ops.SCHEMAS:
        assert name in out
    assert ("native library: loaded" in out) == ops.NATIVE
    code, out, _ = run("info", "--json")
    about = json.loads(out)
    assert (code, about["native_library"]) == (0, ops.NATIVE)
    assert about["bundled_checkpoints"] == ["smollm2-135m", "smollm2-135m-specs"]
    assert about["ops"].keys() == ops.SCHEMAS.keys()


def test_version_and_help(run):
    assert run("--version") == (0, f"t2l_engine {t2l.__version__}\n", "")
    for arguments in (["--help"], ["chat", "--help"], ["generate", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "Exit status: 0 done; 1 an expected error" in out


def test_errors_of_training_and_evaluation(expect_error, tmp_path):
    sft = ("train", "sft", "--tasks", tmp_path, "-o", tmp_path / "out", "--config")
    expect_error("no.yaml: no such file", *sft, tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    expect_error("bad.yaml: not plain YAML", *sft, tmp_path / "bad.yaml")
    expect_error("--json: ", "evaluate", "--tasks", tmp_path, "--json", tmp_path / "no" / "result.json")
    expect_error("expected a file, got a folder", "evaluate", "--tasks", tmp_path, "--json", tmp_path)
    expect_error("descriptions.json: not found", "evaluate", "--tasks", tmp_path, "--json", tmp_path / "result.json")


def test_evaluation_names_the_methods_there_are(expect_error, checkpoint, tmp_path):
    (tmp_path / "descriptions.json").write_text('{"copy": ["Repeat the input."]}')
    (tmp_path / "copy.jsonl").write_text('{"input": "a", "output": ["a"], "split": "test"}\n')
    command = ("evaluate", "--checkpoint", checkpoint, "--tasks", tmp_path)
    known = "['t2l', 't2l-junk', 't2l-constant', 'base', 'base-description']"
    expect_error(f"--methods: expected some of {known}, got 'nonsense'", *command, "--methods", "nonsense")
    expect_error("--base-model: the checkpoint does not name one", *command, "--methods", "t2l")


def test_statuses(run, monkeypatch):
    def raising(error):
        def bundled_checkpoints():
            warnings.warn("of\ntwo lines", stacklevel=2)
            raise error

        monkeypatch.setattr("t2l_engine.hypernetwork.folder.bundled_checkpoints", bundled_checkpoints)

    raising(ValueError("of\n  two lines"))
    assert run("info") == (1, "", "t2l: warning: of two lines\nt2l: of two lines\n")
    raising(FloatingPointError("loss is nan at step 3"))
    assert run("info")[0] == 1
    raising(KeyboardInterrupt())
    assert run("info")[0] == 130
    assert run("info", "--nonsense")[0] == 2
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # keeps its traceback
        run("info")


def test_a_closed_pipe_is_quiet():
    command = [sys.executable, "-c", "from t2l_engine.cli import main; main()", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


def test_files_that_importers_keep(run, expect_error, tmp_path):
    """Downloads, and without --force a file of a task's name."""
    downloads, out = tmp_path / "downloads", tmp_path / "out"
    for folder, text in ((downloads, json.dumps(BOOLQ)), (out, "mine")):
        folder.mkdir()
        (folder / "boolq.jsonl").write_text(text)
    for force in ((), ("--force",)):
        message = f"--output: expected another folder than SOURCE, whose files it would replace, got {downloads}"
        expect_error(message, "tasks", "import-benchmarks", downloads, "-o", downloads, *force)
    assert json.loads((downloads / "boolq.jsonl").read_text()) == BOOLQ
    command, file = ("tasks", "import-benchmarks", downloads, "-o", out), out / "boolq.jsonl"
    expect_error(f"{file}: exists; expected no file of a task's name, or overwrite=True (--force)", *command)
    assert file.read_text() == "mine" and not (out / "descriptions.json").exists()
    assert run(*command, "--force")[0] == 0 and file.read_text() != "mine"


def test_a_checkpoint_trained_on_inputs(expect_error, checkpoint, tmp_path):
    net = t2l.HyperNetwork.from_pretrained(checkpoint)
    net.save_pretrained(tmp_path / "inputs", metadata={"training": {"condition": "input"}})
    message = f"--checkpoint: expected one trained on descriptions, got {tmp_path / 'inputs'}, which was trained on inputs"
    expect_error(message, "chat", "--task", "Count.", "-c", tmp_path / "inputs")


def test_names_that_no_text_can_hold():
    assert json.loads(json_text({"checkpoint": "a\udcff", "name": "ä"})) == {"checkpoint": "a\udcff", "name": "ä"}
    assert "ä" in json_text({"name": "ä"}) and "\\u" in json_text({"checkpoint": "a\udcff"})


def test_what_a_killed_command_left_is_no_obstacle(run, tmp_path):
    """Of a folder of tasks descriptions.json comes last."""
    command = ("tasks", "synthetic", "-o", tmp_path / "out")
    assert run(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "descriptions.json").unlink()
    assert run(*command)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
