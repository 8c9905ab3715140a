"""Reconstruction: the losses against plain torch, what is learnt, what is refused."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.research.training import reconstruction
from t2l_engine.research.training import runs as lora_runs
from t2l_engine.research.training.reconstruction import DELTA_W_SCALING, Library, Reconstruction, delta_l1, z_scores
from t2l_engine.research.training.sampling import Shard
from t2l_engine.testing import numerics
from t2l_engine.text import base_model, packaged
from tests.research.training import small_runs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_base_model(monkeypatch):
    """A library of adapters is all that reconstruction reads."""

    def load(*args, **kwargs):
        raise AssertionError("a base model was loaded")

    monkeypatch.setattr(base_model, "load", load)


def job(folder, names=None, **changes):
    return Reconstruction(small_runs.reconstruction(**changes), Library(folder, names), CPU)


def distance(target, generated, stack, statistics=None):
    """Loss of every adapter ``[N]`` in float64, as the module says it in words."""
    total = 0.0
    for name in stack.lora_A:
        A, B, A0, B0 = (s[name].double() for x in (generated, stack) for s in (x.lora_A, x.lora_B))
        if target == "delta-w":
            total = total + DELTA_W_SCALING * (B @ A - B0 @ A0).abs().mean(dim=(1, 2, 3))
            continue
        if target == "z-score":
            A, B, A0, B0 = ((x - x0.mean(dim=0)) / x0.std(dim=0) for x, x0 in ((A, A0), (B, B0), (A0, A0), (B0, B0)))
        total = total + ((A - A0).abs().mean(dim=(1, 2, 3)) + (B - B0).abs().mean(dim=(1, 2, 3))) / 2
    return total / len(stack.lora_A)


def test_prompt_form_is_the_librarys(tmp_path):
    """What the run around the adapters says; the checkpoint hands it on to whoever asks the adapted model."""
    for form, prompt in ((None, "input"), ("raw", "input"), ("raw", "description")):
        folder = tmp_path / f"{form}-{prompt}" / lora_runs.ADAPTERS
        small_runs.library(folder)
        if form:
            wave = folder.parent / lora_runs.WAVES / "000"
            wave.mkdir(parents=True)
            (wave / lora_runs.RECORD).write_text(json.dumps({"settings": {"prompt_form": form, "prompt": prompt}}))
        out = reconstruction.train(small_runs.reconstruction(steps=1, validate_every=0), folder, folder.parent / "out")
        engine = t2l.TextToLoRA.from_pretrained(out)
        assert engine.prompt_form == checkpoint.read(out).prompt_form == (form or "chat")
        assert engine.description_in_prompt == (prompt == "description")


def test_a_library_that_names_the_packaged_model_as_others_find_it(tmp_path):
    """As files of this package do; what reads the library loads it."""
    stack = small_runs.library(tmp_path / "library")
    for i, name in enumerate((packaged.LANGUAGE_MODEL, packaged.BASE_MODEL, packaged.BASE_MODEL)):
        stack.save_pretrained(tmp_path / "library" / f"task{i}", adapter=i, base_model_name_or_path=name)
    settings = small_runs.reconstruction(steps=1, validate_every=0)
    out = reconstruction.train(settings, tmp_path / "library", tmp_path / "out")
    assert checkpoint.describe(out)["base_model"] == packaged.LANGUAGE_MODEL
    assert packaged.hub_name(packaged.LANGUAGE_MODEL) == packaged.BASE_MODEL and packaged.own_name("other") == "other"


# --- losses ----------------------------------------------------------------------------------------------------------


def operands(n=3, layers=4, r=2, n_in=5, n_out=7):
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, layers, r, n_in), (n, layers, n_out, r)) * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_delta_l1_is_what_it_says():
    """Value and gradients, with a weight for every adapter, against autograd through the whole difference."""
    A, B, A0, B0 = operands()
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = []
    for loss in (delta_l1, lambda A, B, A0, B0: (B @ A - B0 @ A0).abs().mean(dim=(1, 2, 3))):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        value = loss(a, b, A0, B0)
        found.append((value, *torch.autograd.grad((value * weight).sum(), (a, b))))
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() <= 64 * numerics.u(torch.float64) * plain.abs().max()


def test_z_scores():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(5, 3, 4, generator=generator) * 1e-3 + 7
    targets[:, 1] = 0.1  # equal for all tasks, and no sum of powers of two
    z, mean, std = z_scores(targets)
    assert z.dtype == mean.dtype == std.dtype == torch.float32
    assert not z[:, 1].any() and (mean[1] == targets[0, 1]).all() and not std[1].any()
    moving = [0, 2]
    assert torch.allclose(z[:, moving].double().mean(dim=0), torch.zeros(2, 4).double(), atol=numerics.u(torch.float32) * 5)
    assert torch.allclose(z[:, moving].std(dim=0), torch.ones(2, 4), rtol=numerics.GRADIENT_RTOL)  # unbiased
    back = z.double() * std + mean
    assert (back - targets).abs().max() <= 4 * numerics.u(torch.float32) * targets.abs().max()


@pytest.mark.parametrize("target", ["z-score", "raw", "delta-w"])
def test_the_loss_is_the_distance_in_words(tmp_path, target):
    """Of what the saved hypernetwork generates: with statistics folded in, and from the settings' batch."""
    stack = small_runs.library(tmp_path / "library")
    made = job(tmp_path / "library", target=target, tasks_per_batch=3)
    made.write(tmp_path / "out", 0, best=False)
    generated = t2l.TextToLoRA.from_pretrained(tmp_path / "out").generate(["task0", "task1", "task2"])
    expected = distance(target, generated, stack)
    with torch.no_grad():
        found = torch.tensor(list(made.validate(Shard()).values()))
        loss = sum(float(made.loss(made.model, batch)) for batch in made.batches(0, Shard()))
    assert torch.allclose(found.double(), expected, rtol=numerics.GRADIENT_RTOL)
    # A step has each of the three tasks.
    assert loss * made.unit == pytest.approx(float(expected.mean()), rel=numerics.GRADIENT_RTOL)
    net = made.model.config
    saved = t2l.HyperNetwork.from_pretrained(tmp_path / "out").config
    assert saved.output_scale == (0.01 if target == "delta-w" else 1.0) and (net.output_scale != 1.0) == (
        target != "z-score"
    )


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, variant, steps", [("z-score", "L", 150), ("raw", "M", 150), ("delta-w", "L", 300)])
def test_learns_a_library(tmp_path, target, variant, steps):
    """The loss falls by nine tenths, and what is generated nears the library."""
    stack = small_runs.library(tmp_path / "library")
    settings = small_runs.reconstruction(
        target=target, variant=variant, steps=steps, tasks_per_batch=3, learning_rate=0.02, warmup_steps=10,
        latent_size=64, head_in_size=64, weight_decay=0.0, save_every=steps, validate_every=steps,
    )  # fmt: skip
    out = reconstruction.train(settings, tmp_path / "library", tmp_path / "out")
    curve = [row["loss"] for row in small_runs.rows(out) if "loss" in row]
    assert max(curve[-5:]) <= 0.1 * curve[0]
    engine = t2l.TextToLoRA.from_pretrained(out)
    generated = engine.generate(["task0", "task1", "task2"])
    assert generated.scaling.tolist() == [2.0] * 3 and generated.paths == stack.paths
    for name in stack.lora_A:
        for adapter in range(3):
            A, B, A0, B0 = (s[name][adapter] for x in (generated, stack) for s in (x.lora_A, x.lora_B))
            pairs = [(B @ A, B0 @ A0)] if target == "delta-w" else [(A, A0), (B, B0)]
            for got, wanted in pairs:
                assert numerics.relative_frobenius(got, wanted) <= numerics.RECONSTRUCTED_FROBENIUS, name
    about = json.loads((out / "config.json").read_text())
    assert about["base_model"] == "base" and about["encoder"]["tasks"] == ["task0", "task1", "task2"]
    training = about["training"]
    assert (training["method"], training["steps_done"], training["target"]) == ("reconstruction", steps, target)
    assert training["tasks"] == Library(tmp_path / "library").digests


@pytest.mark.parametrize("held_out", [0, 1])
def test_validation_reads_held_out_descriptions(tmp_path, held_out):
    """Training none of them; each with its own, or the first of all where none is held out."""
    stack = small_runs.library(tmp_path / "library", texts=3)
    settings = small_runs.reconstruction(
        encoder="minilm", held_out_descriptions=held_out, target="raw", steps=2, validate_every=2
    )
    out = reconstruction.train(settings, tmp_path / "library", tmp_path / "out")
    logged = [row for row in small_runs.rows(out) if "val_loss" in row][-1]
    texts = json.loads((tmp_path / "library" / "descriptions.json").read_text())
    engine = t2l.TextToLoRA.from_pretrained(out)
    generated = engine.generate([about[2 if held_out else 0] for about in texts.values()])
    expected = distance("raw", generated, stack)
    assert list(logged["tasks"]) == list(texts)
    assert torch.allclose(torch.tensor(list(logged["tasks"].values())).double(), expected, rtol=numerics.GRADIENT_RTOL)
    assert logged["val_loss"] == pytest.approx(float(expected.mean()), rel=numerics.GRADIENT_RTOL)
    made = job(tmp_path / "library", encoder="minilm", held_out_descriptions=held_out)
    read = {group.description for step in range(40) for batch in made.batches(step, Shard()) for group in batch}
    assert read == set(range(3 - held_out))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_one_task_has_no_z_scores(tmp_path):
    small_runs.library(tmp_path / "library")
    with pytest.raises(ConfigError, match="target: z-score needs at least two adapters"):
        job(tmp_path / "library", names=["task1"])
    only = job(tmp_path / "library", names=["task1"], target="raw")
    assert list(only.validate(Shard())) == ["task1"]


@pytest.mark.parametrize("changes, message", [
    ({"rank": 3}, r"task1: q_proj: .*rank 2.*\[3, 3\]"), ({"scaling": 4.0}, "task1: .*scaling 2 .*4"),
    ({"modules": {"q_proj": (6, 8), "k_proj": (6, 5)}}, r"task0: k_proj: .*rank 2.*\[0, 0\]"),
    ({"layers": 3}, "task1.*2 layers"), ({"modules": {"q_proj": (6, 9)}}, "q_proj: .*6/8"),
])  # fmt: skip
def test_adapters_that_are_not_alike(tmp_path, changes, message):
    small_runs.library(tmp_path / "other", count=2, **{"modules": {"q_proj": (6, 8)}} | changes)
    small_runs.library(tmp_path / "library", count=3, modules={"q_proj": (6, 8)})
    (tmp_path / "library" / "task1").rename(tmp_path / "away")
    (tmp_path / "other" / "task1").rename(tmp_path / "library" / "task1")
    with pytest.raises(ValueError, match=message):
        Library(tmp_path / "library")


def test_names(tmp_path):
    stack = small_runs.library(tmp_path / "library")
    chosen = Library(tmp_path / "library", ["task2", "task0", "task2"])
    assert chosen.names == ["task0", "task2"] and torch.equal(chosen.stack.lora_A["q_proj"], stack.lora_A["q_proj"][[0, 2]])
    with pytest.raises(ConfigError, match=r"names: expected some of .*descriptions.json, got \['task9'\]"):
        Library(tmp_path / "library", ["task1", "task9"])
    with pytest.raises(FileNotFoundError, match="descriptions.json: not found"):
        Library(tmp_path)
    (tmp_path / "library" / "task1" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="task1"):
        Library(tmp_path / "library")
