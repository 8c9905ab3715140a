"""The loop: exact resume from anything that can end a run, schedule, clipping, accumulation, validation, bad losses."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import loop, lora, reconstruction, sft
from t2l_engine.research.training.runs import read_log
from t2l_engine.research.training.sampling import seeded
from t2l_engine.research.training.settings import Settings
from t2l_engine.testing import numerics
from tests.research.training import small_runs


class Toy(loop.Job):
    """A linear layer that learns a sum; ``at[step]()`` is called in that step, ``val_losses[step]`` is its validation."""

    def __init__(self, val_losses=(), points="a", at=(), worse=lambda loss, step: loss, **changes):
        super().__init__()
        self.settings = Settings(**{"steps": 8, "save_every": 3, "validate_every": 0, "warmup_steps": 2} | changes)
        torch.manual_seed(self.settings.seed)
        self.model = nn.Linear(4, 1)
        self.worse, self.written = worse, []
        self._val_losses, self._points, self._at = dict(val_losses), points, dict(at)

    def batches(self, step, shard):
        if step in self._at:
            self._at[step]()
        self._step = step
        return [step * self.settings.accumulation + i for i in range(self.settings.accumulation)]

    def loss(self, model, batch):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seeded(self._points, batch)))
        dropped = nn.functional.dropout(x, 0.1)
        error = (model(dropped) - x.sum(dim=1, keepdim=True)).square().mean()
        return self.worse(error, self._step) / self.settings.accumulation

    def validate(self, shard):
        return {"toy": self._val_losses[self._step + 1]} if self._val_losses else {}

    def write(self, folder, step, *, best):
        folder.mkdir(exist_ok=True)
        (folder / "toy.json").write_text(json.dumps([step, self.model.bias.tolist()]))
        self.written.append((folder.name, step))

    def data(self):
        return {"points": self._points}


def train(folder, **kwargs):
    """A run of a toy; the job."""
    job = Toy(**kwargs)
    assert loop.run(job, folder, loop.accelerator("cpu")) == folder
    return job


def fail():
    raise RuntimeError("for the test")


# --- schedule, clipping, accumulation --------------------------------------------------------------------------------


def test_the_device_and_its_precision(monkeypatch):
    """Accelerate's own precision is not taken."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert loop.accelerator("cpu").mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="--device: expected 'cpu' or 'cuda', got 'tpu'"):
        loop.accelerator("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device: got 'cuda', but torch finds no CUDA device"):
            loop.accelerator("cuda")


def test_learning_rates():
    linear = Settings(steps=10, warmup_steps=4, learning_rate=8.0)
    rates = [loop.learning_rate(linear, step) for step in range(10)]
    assert rates == pytest.approx(
        [2, 4, 6, 8, 8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6], rel=8 * numerics.u(torch.float64)
    )
    constant = Settings(steps=10, warmup_steps=2, learning_rate=8.0, schedule="constant")
    assert [loop.learning_rate(constant, step) for step in range(4)] == [4, 8, 8, 8]
    decaying = Settings(steps=8, warmup_steps=2, learning_rate=8.0, schedule="constant", decay_steps=4)
    assert [loop.learning_rate(decaying, step) for step in range(8)] == [4, 8, 8, 8, 8, 6, 4, 2]
    assert loop.learning_rate(Settings(steps=3, warmup_steps=0, learning_rate=8.0), 0) == 8
    assert loop.learning_rate(Settings(steps=3, warmup_steps=6, learning_rate=6.0), 2) == 3  # a warm-up that does not end


def test_a_run_may_get_longer_until_it_decays(tmp_path):
    """The longer run is, bit for bit, one that was to be so long from the start."""
    constant = {"schedule": "constant", "decay_steps": 2}
    stopped = pytest.raises(RuntimeError, match="for the test")
    with stopped:
        train(tmp_path / "resumed", steps=8, at={5: fail}, **constant)  # saved after step 3
    resumed = train(tmp_path / "resumed", steps=12, **constant)
    whole = train(tmp_path / "whole", steps=12, **constant)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    with stopped:
        train(tmp_path / "decaying", steps=8, save_every=7, at={7: fail}, **constant)
    with pytest.raises(ConfigError, match="steps: 8 then, 12 now"):
        train(tmp_path / "decaying", steps=12, save_every=7, **constant)


def test_the_log_says_what_a_step_did(tmp_path):
    job = train(tmp_path, learning_rate=0.5)
    assert [row["learning_rate"] for row in small_runs.rows(tmp_path)] == [
        loop.learning_rate(job.settings, s) for s in range(8)
    ]
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 9))
    assert all(row["seconds"] >= 0 and row["grad_norm"] > 0 for row in read_log(tmp_path))
    assert "tokens" not in read_log(tmp_path)[0]  # a toy has none


def test_clipping():
    job = Toy()
    for limit in (0.0, 1e-3, 1e6):
        job.model.zero_grad()
        job.worse(job.model(torch.ones(1, 4)).square().sum(), 0).backward()
        before = [p.grad.clone() for p in job.model.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in before))
        assert float(job.clip(limit)) == pytest.approx(norm, rel=numerics.GRADIENT_RTOL)
        factor = limit / norm if 0 < limit < norm else 1.0
        for p, g in zip(job.model.parameters(), before, strict=True):
            if factor == 1.0:
                assert torch.equal(p.grad, g), limit
            assert (p.grad - factor * g).norm() <= numerics.GRADIENT_RTOL * factor * g.norm()


def test_muon_is_for_the_weights_of_linears(base_model):
    """Their update is the gradient with equal singular values and the RMS 0.2 of AdamW's; all else has AdamW's."""
    torch.manual_seed(0)
    job = Toy()
    job.settings = small_runs.sft(base_model, optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    job.model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    for parameter in job.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in loop._optimizers(job):
        optimizer.step()
    for name, parameter in job.model.named_parameters():
        update = (before[name] - parameter.detach()) / 0.01
        if name in ("1.weight", "3.weight"):
            left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
            aligned = left.T @ update @ right.T / (0.2 * max(update.shape) ** 0.5)
            assert aligned.diagonal().min() > 0.6 and aligned.diagonal().max() < 1.3, name  # five Newton-Schulz steps
            assert (aligned - aligned.diagonal().diag()).abs().max() < 0.1, name
        else:
            torch.testing.assert_close(update, parameter.grad.sign(), rtol=1e-3, atol=1e-3)  # AdamW's first step


# --- resume ----------------------------------------------------------------------------------------------------------


def lora_waves(base_model, tasks, folder):
    """Two waves."""
    small = {"steps": 3, "save_every": 2, "validate_every": 2, "tasks_per_batch": 1, "lora_dropout": 0.1}
    return lora.train(small_runs.lora(base_model, **small), tasks, folder)


def reconstructed(base_model, tasks, folder):
    adapters = folder.parent / "library"
    return reconstruction.train(small_runs.reconstruction(steps=5, save_every=2, validate_every=3), adapters, folder)


def sft_noisy(base_model, tasks, folder):
    return sft.train(small_runs.sft(base_model, **small_runs.NOISE | {"encoder": "minilm", "steps": 5}), tasks, folder)


def other_conditions(**changes):
    """Runs of SFT with the noise that there is with these settings."""
    noise = small_runs.NOISE | {"bucket_steps": 1, "steps": 5} | changes
    return lambda base_model, tasks, folder: sft.train(small_runs.sft(base_model, **noise), tasks, folder)


by_input = other_conditions(condition="input", encoder="base-model")
by_tokens = other_conditions(
    encoder="llm", variant="pointer", llm_layers=[0, 1], head_in_size=256, example_share=0.5, max_examples=2,
    optimizer="muon",
)  # fmt: skip


def counting(function, counts, name):
    def run(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return run


#: Of the places where a run can fail, those tried; every one with 1, in five times the time.
EVERY = {"replaced": 7, "saved": 2, "stepped": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lora_waves, reconstructed])
def test_a_run_that_failed_anywhere_goes_on_bit_for_bit(base_model, tasks, tmp_path, monkeypatch, kind):
    """At files that are put in their place, at states that are written, in steps."""
    small_runs.library(tmp_path / "library")
    places = {"replaced": (os, "replace"), "saved": (torch, "save"), "stepped": (loop._Run, "step")}
    counts = dict.fromkeys(places, 0)
    with monkeypatch.context() as patch:
        for name, (owner, attribute) in places.items():
            patch.setattr(owner, attribute, counting(getattr(owner, attribute), counts, name))
        whole = small_runs.left(kind(base_model, tasks, tmp_path / "whole"))
    assert min(counts.values()) >= 3
    for name, (owner, attribute) in places.items():
        for number in range(0, counts[name], EVERY[name]):
            out = tmp_path / f"{name}-{number}"
            with monkeypatch.context() as patch:
                function = small_runs.failing(getattr(owner, attribute), number)
                patch.setattr(owner, attribute, function)
                with pytest.raises(OSError, match="for the test"):
                    kind(base_model, tasks, out)
            kind(base_model, tasks, out)
            assert small_runs.differing(whole, small_runs.left(out)) == [], out.name


@pytest.mark.parametrize("kind", [lora_waves, reconstructed, sft_noisy, by_input, by_tokens])
def test_a_state_half_written_is_not_the_state(base_model, tasks, tmp_path, monkeypatch, kind):
    small_runs.library(tmp_path / "library")
    whole = small_runs.left(kind(base_model, tasks, tmp_path / "whole"))
    save, saved = torch.save, []

    def half(content, path):
        saved.append(path)
        if len(saved) < 2:
            return save(content, path)
        path.write_bytes(b"half a state")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        kind(base_model, tasks, tmp_path / "part")
    monkeypatch.undo()
    kind(base_model, tasks, tmp_path / "part")
    assert small_runs.differing(whole, small_runs.left(tmp_path / "part")) == []


def test_what_a_kill_left_is_removed(base_model, tasks, tmp_path):
    left = tmp_path / "waves" / "000" / ".writing-1" / "training_state.pt"
    left.parent.mkdir(parents=True)
    left.touch()
    settings = small_runs.lora(base_model, steps=1, validate_every=0)
    lora.train(settings, tasks, tmp_path)
    state = left.parents[1] / loop.STATE
    assert not left.parent.exists() and not state.exists()
    state.touch()  # killed after the wave's record was written
    lora.train(settings, tasks, tmp_path)
    assert not state.exists()


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(tmp_path)
    before = small_runs.left(tmp_path)
    message = "other settings or data \\(learning_rate: 0.001 then, 0.01 now; steps: 8 then, 9 now\\); choose another"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, steps=9, learning_rate=0.01)
    with pytest.raises(ConfigError, match=r"training_state.pt: .* other settings or data \(points\)"):
        train(tmp_path, points="b")
    assert small_runs.differing(before, small_runs.left(tmp_path)) == []


def test_changed_data_are_refused(base_model, tasks, tmp_path):
    """Descriptions, examples of any split, adapters, weights of the base model; what changed is named."""
    model = shutil.copytree(base_model, tmp_path / "model")
    settings, out = small_runs.sft(model, steps=1), tmp_path / "out"
    sft.train(settings, tasks, out)
    texts = json.loads((tasks / "descriptions.json").read_text())
    changed = texts | {"last": [texts["last"][0], "Other words."]}
    (tasks / "descriptions.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"other settings or data \(tasks: \['last'\]\)"):
        sft.train(settings, tasks, out)
    (tasks / "descriptions.json").write_text(json.dumps(texts))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"other settings or data \(base_model_sha256\)"):
        sft.train(settings, tasks, out)
    for path in tasks.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"val"', '"test"', 1))
    with pytest.raises(ConfigError, match=r"other settings or data \(.*tasks: \['first', 'last'\]"):
        sft.train(settings, tasks, out)
    stack = small_runs.library(tmp_path / "library")
    reconstructed(None, None, tmp_path / "made")
    stack.lora_B["v_proj"][1, 0, 0, 0] += 1
    stack.save_pretrained(tmp_path / "library" / "task1", adapter=1, base_model_name_or_path="base")
    with pytest.raises(ConfigError, match=r"other settings or data \(adapters: \['task1'\]\)"):
        reconstructed(None, None, tmp_path / "made")


# --- what the output folder may hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [sft.train, reconstruction.train])
def test_a_checkpoint_that_no_run_wrote_is_no_output(tmp_path, train):
    for name, message in (
        ("hypernet.safetensors", "holds hypernet.safetensors, but no training_state.pt of a run to go on with; choose"),
        ("hypermod.pt", "holds hypermod.pt, but no training_state.pt of a run to go on with; choose"),
        ("model.safetensors", "holds model.safetensors, whose config.json a checkpoint's would replace"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match=message):
            train(None, "elsewhere", tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name, mode", [("last", "per-task"), (lora.MULTI_TASK, "multi-task")])
def test_an_adapter_that_no_run_wrote_is_kept(base_model, tasks, tmp_path, name, mode):
    (tmp_path / "adapters" / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=f"adapters: holds {name}, but no run to go on with; choose another folder"):
        lora.train(small_runs.lora(base_model, steps=1, mode=mode), tasks, tmp_path)


# --- losses that are not finite --------------------------------------------------------------------------------------


def bad_loss(value):
    return lambda loss, step: loss * value if step == 5 else loss


def bad_gradient(loss, step):
    """The loss is a number; 0 * inf is its gradient."""
    return loss + (loss * 0).sqrt() if step == 5 else loss


@pytest.mark.parametrize("case", ["nan", "inf", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, case):
    whole = tmp_path / "whole"
    train(whole)
    worse = bad_gradient if case == "gradient" else bad_loss(float(case))
    what = "the gradient's norm is nan" if case == "gradient" else f"loss is {case}"
    job = Toy(worse=worse)
    with pytest.raises(FloatingPointError, match=f"{what} at step 6; last good state: .*training_state.pt, step 3"):
        loop.run(job, tmp_path / "part", loop.accelerator("cpu"))
    assert all(p.isfinite().all() for p in job.model.parameters())  # the bad step changed none
    with pytest.raises(FloatingPointError, match="step 6; no state was saved before"):
        train(tmp_path / "unsaved", worse=worse, save_every=100)
    state = torch.load(tmp_path / "part" / loop.STATE, weights_only=True)
    assert state["step"] == 3 and all(t.isfinite().all() for t in state["trained"].values())
    train(tmp_path / "part")
    assert small_runs.differing(small_runs.left(whole), small_runs.left(tmp_path / "part")) == []


def test_a_validation_that_is_no_number_ends_the_run(tmp_path):
    """It would never be the best, and with patience end the run as if nothing had happened."""
    with pytest.raises(FloatingPointError, match=r"validation loss of task toy is nan at step 4; .*step 3$"):
        train(tmp_path, val_losses={2: 1.0, 4: math.nan}, validate_every=2)


# --- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_saves(tmp_path, number):
    train(tmp_path / "whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=r"saved at step 5 in .*part; the same command goes on from there"):
        train(tmp_path / "part", at={4: lambda: signal.raise_signal(number)})
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load(tmp_path / "part" / loop.STATE, weights_only=True)["step"] == 5  # no multiple of save_every
    assert json.loads((tmp_path / "part" / "toy.json").read_text())[0] == 5
    train(tmp_path / "part")
    assert small_runs.differing(small_runs.left(tmp_path / "whole"), small_runs.left(tmp_path / "part")) == []


def test_the_second_interrupt_acts_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        train(tmp_path, at={4: twice})
    assert "saved" not in str(stop.value)
    assert torch.load(tmp_path / loop.STATE, weights_only=True)["step"] == 3


def test_an_interrupt_between_waves_is_not_lost(base_model, tasks, tmp_path, monkeypatch):
    """In the last step of a wave: the next one does not begin."""
    step, calls = loop._Run.step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(loop._Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_waves(base_model, tasks, tmp_path)
    assert len(calls) == 3


# --- validation ------------------------------------------------------------------------------------------------------


def test_the_best_validation_is_kept(tmp_path):
    val_losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 9: 1.5}
    job = train(tmp_path, val_losses=val_losses, validate_every=2, steps=9)
    found = [(row["step"], row["val_loss"], row["best"]) for row in small_runs.rows(tmp_path) if "val_loss" in row]
    assert found == [(2, 3.0, True), (4, 1.0, True), (6, 2.0, False), (8, 1.0, False), (9, 1.5, False)]
    assert [written for written in job.written if written[0] == loop.BEST] == [("best", 2), ("best", 4)]
    assert json.loads((tmp_path / loop.BEST / "toy.json").read_text())[0] == 4
    assert json.loads((tmp_path / "toy.json").read_text())[0] == 9
