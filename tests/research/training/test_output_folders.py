"""What the output folder of a run may hold before it: nothing that no run there has written."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import lora, reconstruction, sft
from tests.research.training import runs


@pytest.mark.parametrize("train", [sft.train, reconstruction.train])
def test_the_folder_of_a_model_is_no_output(tmp_path, train):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="holds model.safetensors, whose config.json a checkpoint's would replace"):
        train(None, "elsewhere", tmp_path)


@pytest.mark.parametrize("name", ["hypernet.safetensors", "hypermod.pt"])
@pytest.mark.parametrize("train", [sft.train, reconstruction.train])
def test_a_checkpoint_that_no_run_wrote_is_no_output(tmp_path, train, name):
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=f"holds {name}, but no training_state.pt of a run to go on with; choose"):
        train(None, "elsewhere", tmp_path)


@pytest.mark.parametrize("name, changes", [("add", {}), (lora.MULTI_TASK, {"mode": "multi-task"})])
def test_an_adapter_that_no_run_wrote_is_kept(base_model, tasks, tmp_path, name, changes):
    name = name if changes else sorted(path.stem for path in tasks.glob("*.jsonl"))[-1]
    (tmp_path / "adapters" / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=f"adapters: holds {name}, but no run to go on with; choose another folder"):
        lora.train(runs.lora(base_model, steps=1, **changes), tasks, tmp_path)


@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_other_weights_of_the_base_model_are_refused(base_model, tasks, tmp_path, kind):
    """In the folder of the same name."""
    model = shutil.copytree(base_model, tmp_path / "model")
    train, settings = {"sft": sft, "lora": lora}[kind].train, getattr(runs, kind)(model, steps=1)
    train(settings, tasks, tmp_path / "out")
    train(settings, tasks, tmp_path / "out")  # nothing to do
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other (settings or )?data \(base_model_sha256\)"):
        train(settings, tasks, tmp_path / "out")
