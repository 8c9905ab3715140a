"""Training that starts from a checkpoint: what it keeps, what it names, what it refuses."""

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.training import lora, reconstruction, sft
from tests.research.training import small_runs


def settings(base_model, **changes):
    return small_runs.sft(base_model, **{"encoder": "minilm", "steps": 1} | changes)


def assert_same_adapters(tasks, *folders):
    """Within rounding, for all descriptions."""
    texts = [text for task in load_tasks(tasks, None) for text in task.descriptions]
    one, two = (t2l.TextToLoRA.from_pretrained(folder).generate(texts) for folder in folders)
    for name, A in one.lora_A.items():
        torch.testing.assert_close(two.lora_A[name], A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two.lora_B[name], one.lora_B[name], rtol=1e-4, atol=1e-5)


def test_starts_from_a_checkpoint(base_model, tasks, tmp_path):
    first = sft.train(settings(base_model, steps=4), tasks, tmp_path / "first")
    more = settings(base_model, learning_rate=1e-9, initial=str(first), seed=3)
    assert_same_adapters(tasks, first, sft.train(more, tasks, tmp_path / "second"))


def test_starts_from_a_reconstruction(base_model, tasks, tmp_path):
    library = lora.train(small_runs.lora(base_model, steps=2, validate_every=0), tasks, tmp_path / "oracles") / lora.ADAPTERS
    made = small_runs.reconstruction(encoder="minilm", target="raw", steps=20, validate_every=0)
    first = reconstruction.train(made, library, tmp_path / "reconstruction")
    more = settings(base_model, learning_rate=1e-9, initial=str(first))
    assert_same_adapters(tasks, first, sft.train(more, tasks, tmp_path / "more"))


def test_a_start_is_part_of_a_run(base_model, tasks, tmp_path):
    """With other weights there the run is refused; the checkpoint names the tasks of the start as trained on, too."""
    first = sft.train(settings(base_model), tasks, tmp_path / "first")
    more = settings(base_model, initial=str(first), seed=3)
    second = sft.train(more, tasks, tmp_path / "second", names=["last"])
    about = checkpoint.describe(second)
    assert list(about["training"]["tasks"]) == ["last"] and about["training"]["tasks_before"] == ["first"]
    assert checkpoint.trained_tasks(about) == {"first", "last"}
    assert checkpoint.trained_tasks({"training": {"tasks": ["first", ["last"], 3], "tasks_before": 4}}) == {"first"}
    third = sft.train(settings(base_model, initial=str(second)), tasks, tmp_path / "third", names=["last"])
    assert checkpoint.trained_tasks(checkpoint.describe(third)) == {"first", "last"}
    sft.train(settings(base_model, seed=5), tasks, tmp_path / "other")
    (first / "hypernet.safetensors").write_bytes((tmp_path / "other" / "hypernet.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"other settings or data \(initial\); choose another"):
        sft.train(more, tasks, tmp_path / "second", names=["last"])


def test_a_start_in_bfloat16_goes_on_in_float32(base_model, tasks, tmp_path):
    """Small steps change what was published rounded, and are not lost in bfloat16."""
    first = sft.train(settings(base_model), tasks, tmp_path / "first")
    rounded = t2l.HyperNetwork.from_pretrained(first).set_dtype(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "rounded", checkpoint.describe(first))
    more = settings(base_model, steps=2, learning_rate=1e-6, initial=str(tmp_path / "rounded"))
    second = t2l.HyperNetwork.from_pretrained(sft.train(more, tasks, tmp_path / "second"))
    start = dict(rounded.named_parameters())
    for name, weights in second.named_parameters():
        assert weights.dtype == torch.float32 and not torch.equal(weights, start[name].float()), name


def test_a_start_of_other_shape_is_refused(base_model, tasks, tmp_path):
    """A scaling is the same by another name: 16 / sqrt(4), as rank 4 has it by rslora, is 32 / 4."""
    by_model = {"encoder": "base-model"}
    first = sft.train(settings(base_model, **by_model, scaling="rslora", lora_alpha=16.0), tasks, tmp_path / "first")
    same = by_model | {"initial": str(first), "lora_alpha": 32.0}
    sft.train(settings(base_model, **same), tasks, tmp_path / "second")
    got = r"got {{'{}': {}}}$"  # what is alike is not told
    for field, value, what, told in (
        ("lora_alpha", 16.0, "hypernetwork", ""), ("head_in_size", 4, "hypernetwork", got.format("head_in_size", "8")),
        ("dtype", "bfloat16", "encoder", got.format("dtype", "'float32'")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"initial: expected a checkpoint with the {what} .*{told}"):
            sft.train(settings(base_model, **same | {field: value}), tasks, tmp_path / "third")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sft.train(settings(base_model, initial="none"), tasks, tmp_path / "third")
