"""Training the attention pooling of an LLM encoder with its hypernetwork; starting from a checkpoint."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.training import hypernetwork, loop, lora, reconstruction, sft
from t2l_engine.research.training.context import TrainingContext
from t2l_engine.research.training.sampling import Shard
from t2l_engine.text import base_model as base_model_loader
from t2l_engine.text.llm_encoder import LLMEncoder, condition_text
from tests.research.training import plain_torch, small_runs

CPU = torch.device("cpu")
SMALL = {"encoder": "llm", "llm_layers": [0, 1], "llm_queries": 2, "llm_width": 8, "llm_heads": 2}


def reading(base_model, **changes):
    examples = {"example_share": 0.5, "example_sets": 3, "max_examples": 2, "tasks_per_batch": 4}
    return small_runs.sft(base_model, **SMALL | examples | changes)


@pytest.fixture
def made(base_model, tasks, tmp_path):
    """Factory: a job on the two tasks."""
    fits = []

    def make(**changes):
        settings = reading(base_model, **changes)
        fits.append(TrainingContext(settings, tasks, CPU))
        return sft.SFT(settings, fits[-1], tmp_path / f"states{len(fits)}")

    yield make
    for fit in fits:
        fit.close()


def groups_of(job, steps):
    return [group for step in range(steps) for batch in job.batches(step, Shard()) for group in batch.groups]


def test_trains_and_the_checkpoint_reads_examples(base_model, tasks, tmp_path):
    """The loss falls, and validation is of what the checkpoint generates from the held-out descriptions."""
    settings = reading(base_model, steps=24, validate_every=24, held_out_descriptions=1)
    out = sft.train(settings, tasks, tmp_path / "out")
    small_runs.assert_learns(out)
    assert all(row["examples"] == 4 for row in small_runs.rows(out) if "loss" in row)

    engine = t2l.TextToLoRA.from_pretrained(out)
    assert isinstance(engine.encoder, LLMEncoder) and engine.encoder.config.max_examples == 2
    plain_torch.assert_validated(settings, tasks, out, lambda task, i: engine.generate([task.descriptions[-1]]))
    both = engine.generate(["Say the first word."] * 2, [None, [("red cat", "red")]])
    assert not torch.equal(both.lora_B["q_proj"][0], both.lora_B["q_proj"][1])
    assert not (out / loop.STATES).exists()


# --- what is read ----------------------------------------------------------------------------------------------------


def test_example_sets(made, tasks):
    """Of training examples and training descriptions, one to max_examples; the same in every run."""
    job = made(example_sets=64, held_out_descriptions=1)
    examples = {
        t.name: {condition_text("", [(e.input, e.outputs[0])]): e for e in t.examples} for t in load_tasks(tasks, "train")
    }
    counts, described = set(), 0
    for task, sets in zip(job._context.tasks, job._conditions._sets, strict=True):
        assert len(sets) == 64
        for text, inputs in sets:
            head, *shots = text.split("Input: ")
            shots = [f"Input: {shot}".strip() for shot in shots]
            assert head.strip() in (task.descriptions[0], "") and all(shot in examples[task.name] for shot in shots)
            assert {examples[task.name][shot].input for shot in shots} == inputs and len(inputs) == len(shots)
            counts.add(len(shots))
            described += bool(head.strip())
    assert counts == {1, 2} and 100 < described < 128
    assert made(example_sets=64, held_out_descriptions=1)._conditions._sets == job._conditions._sets


def test_a_group_never_learns_from_an_example_that_it_reads(made):
    job = made(example_share=1.0, samples_per_task=2)
    reads, read = job._conditions, []
    for group in groups_of(job, 40):
        if (number := reads._drawn(group)) < 0:
            assert not reads._sets[group.task][~number][1] & {s.input for s in group.samples}
            read.append(~number)
    assert set(read) == {0, 1, 2} and len(read) > 120  # all sets; few groups have an example of each


@pytest.mark.parametrize("share, low, high", [(0.0, 0, 0), (0.5, 50, 110)])
def test_share_of_example_sets(made, share, low, high):
    reads = (job := made(example_share=share))._conditions
    found = sum(reads._drawn(g) < 0 for g in groups_of(job, 40))
    assert low <= found <= high
    assert reads.encoder_config.max_examples == (2 if share else 0)


def test_dropped_tokens(made):
    """A share of each text, by the group's key alone, whatever its batch; validation reads all."""
    plain, job = (made(example_share=0.0, token_dropout=share)._conditions for share in (0.0, 0.3))
    groups = groups_of(made(example_share=0.0), 40)
    states, seen = plain.augmented(groups)
    same, kept = job.augmented(groups)
    assert torch.equal(states, same) and torch.equal(job.clean(groups)[1], seen)
    assert not (kept & ~seen).any() and 0.25 < 1 - kept.sum() / seen.sum() < 0.35
    for i in (0, 7):
        alone = job.augmented(groups[i : i + 1])[1][0]
        assert torch.equal(alone, kept[i, : len(alone)])


def test_states_are_those_of_the_checkpoints_encoder(made, base_model, tasks):
    """Of each group, those that the checkpoint's encoder would read, whatever else is read."""
    job = made(held_out_descriptions=1)
    model, tokenizer = base_model_loader.load(str(base_model), torch.float32)
    reads = job._conditions
    encoder = LLMEncoder(model.get_decoder(), tokenizer, reads.encoder_config, job.model.pooling)
    for group in groups_of(job, 5):
        states, mask = reads.augmented([group])
        number, task = reads._drawn(group), job._context.tasks[group.task]
        text = reads._sets[group.task][~number][0] if number < 0 else condition_text(task.descriptions[group.description])
        assert group.description == 0
        (expected,) = encoder.states([text])
        assert mask.all() and (states[0].float() - expected.float()).abs().max() <= 2**-5


def test_some_descriptions_are_read(made):
    job = made(llm_descriptions=1, validate_every=0)
    chosen = [list(job._conditions.train[i]) for i in range(2)]
    assert all(len(indices) == 1 for indices in chosen) and {g.description for g in groups_of(job, 9)} <= {0, 1}
    for group in groups_of(job, 9):
        assert [group.description] == chosen[group.task]


# --- resume ----------------------------------------------------------------------------------------------------------


def test_reading_goes_on_where_it_stopped(base_model, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(hypernetwork, "CHUNK", 1)
    monkeypatch.setattr(hypernetwork, "BATCH", 4)
    settings = reading(base_model, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(LLMEncoder, "states", small_runs.failing(LLMEncoder.states, 2))
        with pytest.raises(OSError, match="for the test"):
            sft.train(settings, tasks, tmp_path / "out")
    assert len([*(tmp_path / "out" / loop.STATES / "0").glob("*.safetensors")]) == 1  # of the first task
    calls = []
    plain_states = LLMEncoder.states
    monkeypatch.setattr(LLMEncoder, "states", lambda self, texts: calls.append(texts) or plain_states(self, texts))
    sft.train(settings, tasks, tmp_path / "out")
    assert len(calls) == 2  # two descriptions and three example sets of the second task
    sft.train(settings, tasks, tmp_path / "whole")
    assert small_runs.differing(small_runs.left(tmp_path / "whole"), small_runs.left(tmp_path / "out")) == []


def test_layers_that_the_model_does_not_have(base_model, tasks, tmp_path):
    with pytest.raises(ConfigError, match="^llm_layers: expected at most the 2 layers of '.*', got .0, 3"):
        sft.train(reading(base_model, llm_layers=[0, 3]), tasks, tmp_path / "out")


# --- a checkpoint as the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["llm", "minilm"])
def test_starts_from_a_checkpoint(base_model, tasks, tmp_path, encoder):
    changes = SMALL if encoder == "llm" else {"encoder": encoder}
    first = sft.train(small_runs.sft(base_model, **changes, steps=4), tasks, tmp_path / "first")
    more = small_runs.sft(base_model, **changes, steps=1, learning_rate=1e-9, initial=str(first), seed=3)
    second = sft.train(more, tasks, tmp_path / "second")
    texts = [text for task in load_tasks(tasks, None) for text in task.descriptions]
    one, two = (t2l.TextToLoRA.from_pretrained(folder).generate(texts) for folder in (first, second))
    for name, A in one.lora_A.items():
        torch.testing.assert_close(two.lora_A[name], A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two.lora_B[name], one.lora_B[name], rtol=1e-4, atol=1e-5)


def test_a_start_is_part_of_a_run(base_model, tasks, tmp_path):
    """With other weights there the run is refused; the checkpoint names the tasks of the start as trained on, too."""
    first = sft.train(reading(base_model, steps=1), tasks, tmp_path / "first")
    more = reading(base_model, steps=1, initial=str(first), seed=3)
    second = sft.train(more, tasks, tmp_path / "second", names=["last"])
    about = checkpoint.describe(second)
    assert list(about["training"]["tasks"]) == ["last"] and about["training"]["tasks_before"] == ["first"]
    assert checkpoint.trained_tasks(about) == {"first", "last"}
    assert checkpoint.trained_tasks({"training": {"tasks": ["first", ["last"], 3], "tasks_before": 4}}) == {"first"}
    third = sft.train(reading(base_model, steps=1, initial=str(second)), tasks, tmp_path / "third", names=["last"])
    assert checkpoint.trained_tasks(checkpoint.describe(third)) == {"first", "last"}
    sft.train(reading(base_model, steps=1, seed=5), tasks, tmp_path / "other")
    (first / "hypernet.safetensors").write_bytes((tmp_path / "other" / "hypernet.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"other settings or data \(initial\); choose another"):
        sft.train(more, tasks, tmp_path / "second", names=["last"])


def test_a_start_in_bfloat16_goes_on_in_float32(base_model, tasks, tmp_path):
    """Small steps change what was published rounded, and are not lost in bfloat16."""
    first = sft.train(reading(base_model, steps=1), tasks, tmp_path / "first")
    engine = t2l.TextToLoRA.from_pretrained(first)
    rounded = engine.hypernetwork.set_dtype(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "rounded", checkpoint.describe(first), engine.encoder.pooling.bfloat16())
    more = reading(base_model, steps=2, learning_rate=1e-6, initial=str(tmp_path / "rounded"))
    second = t2l.HyperNetwork.from_pretrained(sft.train(more, tasks, tmp_path / "second"))
    start = dict(rounded.named_parameters())
    for name, weights in second.named_parameters():
        assert weights.dtype == torch.float32 and not torch.equal(weights, start[name].float()), name


def test_a_start_of_other_shape_is_refused(base_model, tasks, tmp_path):
    """A scaling is the same by another name: 16 / sqrt(4), as rank 4 has it by rslora, is 32 / 4."""
    first = sft.train(reading(base_model, steps=1, scaling="rslora", lora_alpha=16.0), tasks, tmp_path / "first")
    same = {"steps": 1, "initial": str(first), "lora_alpha": 32.0}
    sft.train(reading(base_model, **same), tasks, tmp_path / "second")
    got = r"got {{'{}': \d+(\.0)?}}$"  # what is alike is not told
    for field, value, what, told in (
        ("lora_alpha", 16.0, "hypernetwork", ""), ("head_in_size", 4, "hypernetwork", got.format("head_in_size")),
        ("llm_heads", 4, "encoder", got.format("heads")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"initial: expected a checkpoint with the {what} .*{told}"):
            sft.train(reading(base_model, **same | {field: value}), tasks, tmp_path / "third")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sft.train(reading(base_model, initial="none"), tasks, tmp_path / "third")


# --- reconstruction --------------------------------------------------------------------------------------------------


@pytest.fixture
def library(base_model, tasks, tmp_path):
    return lora.train(small_runs.lora(base_model, steps=2, validate_every=0), tasks, tmp_path / "oracles") / lora.ADAPTERS


def test_reconstruction_reads_and_is_a_start(base_model, tasks, library, tmp_path):
    """The checkpoint generates about the library from descriptions; an SFT run that reads examples too goes on from it."""
    size = {"latent_size": 64, "head_in_size": 64}
    settings = small_runs.reconstruction(
        **SMALL, **size, target="raw", steps=150, learning_rate=1e-2, save_every=150, validate_every=0
    )
    out = reconstruction.train(settings, library, tmp_path / "reconstruction")
    small_runs.assert_learns(out, 0.5)
    assert not (out / loop.STATES).exists()
    engine = t2l.TextToLoRA.from_pretrained(out)
    assert isinstance(engine.encoder, LLMEncoder) and engine.encoder.config.max_examples == 0
    known = load_tasks(tasks, "train")
    stack, stored = engine.generate([task.descriptions[0] for task in known]), reconstruction.Library(library).stack
    for name, B in stored.lora_B.items():
        apart = (B[0] - B[1]).abs().mean()
        assert (stack.lora_B[name] - B).abs().mean() < 0.5 * apart

    more = reading(base_model, steps=1, learning_rate=1e-9, initial=str(out), dtype="bfloat16", **size)
    again = t2l.TextToLoRA.from_pretrained(sft.train(more, tasks, tmp_path / "more"))
    assert again.encoder.max_examples == 2
    for name, B in again.generate([task.descriptions[0] for task in known]).lora_B.items():
        torch.testing.assert_close(B, stack.lora_B[name], rtol=1e-4, atol=1e-5)


def test_reconstruction_reads_with_the_adapters_base_model(library):
    for folder in library.glob("*/"):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": folder.name}))
    with pytest.raises(ConfigError, match="encoder: 'llm' needs the adapters' base model: expected one base_model_"):
        reconstruction.Reconstruction(small_runs.reconstruction(**SMALL), reconstruction.Library(library), CPU)


# --- initialisation --------------------------------------------------------------------------------------------------


def test_texts_differ_from_the_start(made):
    """Queries pool at random, and LDA finds what is not common to all texts: tasks are apart before the first step."""
    shares = []
    for kind in ("random", "discriminant"):
        job = made(task_init=kind, example_share=0.0, latent_size=32)
        reads = job._conditions
        with torch.no_grad():
            rows = [torch.cat([job.model.pooling(*reads._padded([(t, i)])) for i in reads.train[t]]) for t in range(2)]
            z = torch.stack([job._net.task_encoder.linear(of_task) for of_task in rows])  # [tasks, descriptions, t]
        apart = (z.mean(dim=1) - z.mean(dim=(0, 1))).square().mean()
        shares.append(float(apart / z.square().mean()))
    assert shares[0] < 0.5 < shares[1], shares
