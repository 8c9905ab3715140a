"""``t2l show`` and ``t2l convert``."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import t2l_engine as t2l
from t2l_engine.hypernetwork import convert
from t2l_engine.hypernetwork.folder import BUNDLED, resolve_checkpoint


def test_show_bundled_checkpoint(run):
    code, out, err = run("show", "smollm2-135m-paper", "--json")
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert about["modules"] == [
        {"name": "q_proj", "in_features": 576, "out_features": 576},
        {"name": "v_proj", "in_features": 576, "out_features": 192},
    ]
    net = t2l.HyperNetwork.from_pretrained("smollm2-135m-paper")
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    total, values = sum(sizes.values()), net.generate(torch.zeros(1, 384)).num_parameters
    assert about["parameters"].pop("total") == total == sum(about["parameters"].values())
    assert about["parameters"]["heads"] == sum(size for name, size in sizes.items() if name.startswith("heads."))
    expected = {
        "kind": "checkpoint", "form": "native", "variant": "L", "task_encoder": "linear", "num_layers": 30, "rank": 8,
        "lora_alpha": 16.0, "scaling": {"mode": "plain", "value": 2.0}, "latent_size": 128, "head_in_size": 112,
        "embed_dim": 384, "dtype": "bfloat16", "values_per_adapter": values,
        "base_model": "smollm2-135m", "prompt": {"form": "raw", "description": False},
        "training": {"steps": 5150, "num_tasks": 5049},
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    assert about["encoder"]["name"] == "minilm"
    assert about["file_bytes"] > 2 * total

    code, out, _ = run("show", "smollm2-135m-paper")
    assert code == 0
    for text in ("total 2,281,008", "q_proj", "mode plain, value 2", "steps 5,150", "modules in row order"):
        assert text in out


def test_show_the_default_checkpoint(run):
    about = json.loads(run("show", "smollm2-135m", "--json")[1])
    expected = {
        "variant": "pointer", "num_layers": 30, "rank": 8, "latent_size": 192, "feature_size": 3 * 576, "first_layer": 16,
        "copied": ["o_proj", "down_proj"], "base_model": "smollm2-135m", "prompt": {"form": "raw", "description": False},
        "values_per_adapter": 14 * 8 * (576 + 576 + 576 + 192 + 576 + 576 + 1536 + 576),
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    assert about["encoder"]["name"] == "smollm2-135m" and about["encoder"]["max_examples"] == 4
    assert about["parameters"].pop("total") == sum(about["parameters"].values()) == 2_951_456


def test_show_sakana_checkpoint(run, golden, edit):
    code, out, _ = run("show", golden / "M-recon-z", "--json")
    about = json.loads(out)
    assert code == 0 and (about["form"], about["variant"], about["scaling"]["mode"]) == ("sakana", "M", "rslora")
    assert about["parameters"]["offsets"] > 0 and about["training"] is None
    assert about["file_bytes"] == (golden / "M-recon-z" / "hypermod.pt").stat().st_size
    about = json.loads(run("show", golden / "L-sft", "--json")[1])
    assert about["encoder"] == {"name": "tiny-encoder", "pooling": None}
    assert "name tiny-encoder, pooling not stated" in run("show", golden / "L-sft")[1]
    assert "x" * 100 in run("show", edit("L-sft", args={"emb_model": "x" * 100}))[1], "nothing is cut off a terminal"


def test_show_adapter(run, make_stack, tmp_path):
    ranks = {"q_proj": torch.tensor([[4, 2]], dtype=torch.int32), "v_proj": torch.tensor([[4, 0]], dtype=torch.int32)}
    stack = make_stack({"q_proj": (6, 10), "v_proj": (6, 8)}, num_adapters=1, ranks=ranks)
    stack.save_pretrained(tmp_path / "a", base_model_name_or_path="[red]\x1b[31mbase")
    code, out, _ = run("show", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out) == {
        "kind": "adapter", "folder": str(tmp_path / "a"), "base_model": "[red]\x1b[31mbase",
        "modules": [
            {"name": "q_proj", "in_features": 6, "out_features": 10, "ranks": [2, 4], "layers": 2},
            {"name": "v_proj", "in_features": 6, "out_features": 8, "ranks": [4], "layers": 1},
        ],
        "num_layers": 2, "partial": True,  # v_proj has the first layer only
        "scaling": 0.5, "lora_alpha": 2.0, "use_rslora": False, "parameters": 6 * (6 + 10) + 4 * (6 + 8), "dtype": "float32",
        "file_bytes": (tmp_path / "a" / "adapter_model.safetensors").stat().st_size,
    }  # fmt: skip
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
    path = checkpoint / "config.json"  # blocks that are not checked
    deep = json.loads('{"a": ' * 600 + "1" + "}" * 600)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": {"steps_done": deep, "tasks": []}}))
    assert run("show", checkpoint)[0] == run("show", checkpoint, "--json")[0] == 0
    path.write_text(path.read_text().replace('"training"', '"base_model": "\\ud800", "training"'))
    assert run("show", checkpoint, "--json")[1].count(r"\ud800") == 1


def test_show_errors(expect_error, checkpoint, tmp_path):
    expect_error("no such folder", "show", tmp_path / "none")
    expect_error("expected a checkpoint (config.json and hypernet.safetensors, or hypermod.pt", "show", tmp_path)
    (tmp_path / "hypermod.pt").write_bytes(b"")
    expect_error("args.yaml", "show", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"encoder": {"name": 5, "pooling": "max"}}))
    expect_error("encoder.name: expected", "show", checkpoint)
    expect_error("encoder.name: expected", "convert", checkpoint, tmp_path / "new")
    (checkpoint / "config.json").write_text(json.dumps(config))
    path = checkpoint / "hypernet.safetensors"
    save_file(load_file(path) | {"pooling.queries": torch.zeros(3)}, path)  # of a format that is gone
    expect_error("missing keys [], unexpected keys ['pooling.queries']", "show", checkpoint)
    expect_error("missing keys [], unexpected keys ['pooling.queries']", "convert", checkpoint, tmp_path / "new")


@pytest.mark.parametrize("given", ['{"a": ' * 600 + "1" + "}" * 600, "NaN", "[]"])
def test_show_of_what_no_name_is(expect_error, make_stack, tmp_path, given):
    make_stack({"q_proj": (6, 10)}, num_adapters=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": {given}'))
    for option in ((), ("--json",)):
        expect_error("base_model_name_or_path: expected a string or null, got", "show", tmp_path, *option)


def test_convert_there_and_back(run, golden, tmp_path):
    """test_convert.py has that nothing is lost."""
    source, native, back = golden / "L-sft", tmp_path / "native", tmp_path / "back"
    assert run("convert", source, native) == (0, f"{native}: native format\n", "")
    assert run("convert", native, back) == (0, f"{back}: Sakana format\n", "")
    assert [json.loads(run("show", folder, "--json")[1])["form"] for folder in (native, back)] == ["native", "sakana"]
    order = ("--module-order", "v_proj,q_proj")
    code, out, _ = run("convert", source, tmp_path / "swapped", "--to", "native", *order, "--json")
    assert code == 0 and json.loads(out) == {"source": str(source), "target": str(tmp_path / "swapped"), "form": "native"}
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
    expect_error("holds none of config.json", "convert", tmp_path / "adapter", tmp_path / "new")
    assert run("convert", checkpoint, tmp_path / "new", "--to", "gguf")[0] == 2


def test_a_disk_that_is_full(expect_error, checkpoint, tmp_path, monkeypatch):
    """As torch says it."""

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(convert.torch, "save", full)
    expect_error(f"{tmp_path / 'out'}: cannot be written: [enforce", "convert", checkpoint, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_bundled_checkpoint_of_a_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert resolve_checkpoint("smollm2-135m") == BUNDLED / "smollm2-135m"  # no checkpoint there
    shutil.copytree(BUNDLED / "smollm2-135m-paper", tmp_path / "smollm2-135m", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="'smollm2-135m': the bundled checkpoint is used, not the folder ./smollm2-135m"):
        assert resolve_checkpoint("smollm2-135m") == BUNDLED / "smollm2-135m"
    assert resolve_checkpoint("./smollm2-135m") == type(tmp_path)("smollm2-135m")
