"""What adapters are generated from besides descriptions by a text encoder: each example's input, the base model's states."""

import dataclasses
import json

import pytest
import torch
import yaml

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork import convert
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.training import sft
from t2l_engine.research.training.context import TrainingContext
from t2l_engine.research.training.sampling import Shard
from t2l_engine.testing.numerics import EMBEDDING_FROBENIUS, relative_frobenius
from t2l_engine.text import base_model as base_model_loader
from t2l_engine.text.encoder import EncoderConfig, normalise_description
from tests.research.training import plain_torch, small_runs

CPU = torch.device("cpu")


def by_input(base_model, **changes):
    return small_runs.sft(base_model, **{"condition": "input", "encoder": "base-model", "tasks_per_batch": 4} | changes)


@pytest.fixture
def long_and_short(tasks):
    """The tasks with inputs of two to seven words, so that what is embedded together would be padded."""
    for path in tasks.glob("*.jsonl"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(found):
            row["input"] += " cow" * (i % 6)
        path.write_text("\n".join(map(json.dumps, found)))
    return tasks


@pytest.fixture
def made(base_model, tasks):
    """Factory: a job whose adapters are not zero, as they are before the first step."""
    fits = []

    def make(**changes):
        settings = small_runs.sft(base_model, **{"encoder": "base-model", "tasks_per_batch": 4} | changes)
        fits.append(TrainingContext(settings, tasks, CPU))
        job = sft.SFT(settings, fits[-1])
        generator = torch.Generator().manual_seed(0)
        for parameter in job.model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        return job

    yield make
    for fit in fits:
        fit.close()


@pytest.mark.parametrize("prompt", ["input", "description"])
def test_trains_and_validates_with_an_adapter_a_sample(base_model, tasks, tmp_path, prompt):
    """What the checkpoint generates from an input is what its validation loss is of."""
    settings = by_input(base_model, prompt=prompt, steps=16, validate_every=16)
    out = sft.train(settings, tasks, tmp_path / "out")
    small_runs.assert_learns(out)
    assert json.loads((out / "config.json").read_text())["training"]["condition"] == "input"

    engine = t2l.TextToLoRA.from_pretrained(out)
    inputs = {task.name: [example.input for example in task.examples] for task in load_tasks(tasks, "val")}
    of_input = lambda task, i: engine.generate([inputs[task.name][i]])  # noqa: E731
    plain_torch.assert_validated(settings, tasks, out, of_input, lambda turn: turn % 2)


@pytest.mark.parametrize("condition", ["input", "description"])
def test_an_adapter_depends_on_its_own_input_alone(made, condition):
    job = made(condition=condition, encoder="minilm")
    (batch,) = job.batches(0, Shard())
    other = batch.groups[2]
    other = dataclasses.replace(other, samples=(dataclasses.replace(other.samples[0], input="cow cow"),))
    changed = dataclasses.replace(batch, groups=[*batch.groups[:2], other, *batch.groups[3:]])
    with torch.no_grad():
        before, after = (job._context.losses(b, job.model(job._conditions.augmented(b.groups))) for b in (batch, changed))
        stack = job.model(job._conditions.augmented(batch.groups))
    assert (before != after).tolist() == [False, False, condition == "input", False]
    if condition == "input":
        assert len({tuple(B.tolist()) for B in stack.lora_B["q_proj"].flatten(1)}) == len({g.samples for g in batch.groups})


def test_an_input_is_embedded_by_itself(long_and_short, made):
    """The same bits whatever is embedded with it or before it, as a run that goes on in the middle needs."""
    job, again = made(condition="input"), made(condition="input")
    groups = [group for step in range(4) for batch in job.batches(step, Shard()) for group in batch.groups]
    assert len({len(g.samples[0].input.split()) for g in groups}) > 2
    together = job._conditions.clean(groups)
    alone = torch.cat([again._conditions.clean([group]) for group in reversed(groups)]).flip(0)
    assert torch.equal(together, alone) and torch.equal(job._conditions.augmented(groups), together)
    assert (together.square().mean(dim=1).sqrt() - 1).abs().max() <= EMBEDDING_FROBENIUS


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_input_without_text(base_model, tasks, tmp_path, split):
    row = {"input": " ", "output": ["red"], "split": split}
    path = tasks / "last.jsonl"
    path.write_text("\n".join([json.dumps(row), path.read_text()]))
    with pytest.raises(ConfigError, match="^condition: expected inputs with text .* got an empty one in task last"):
        sft.train(by_input(base_model), tasks, tmp_path / "out")
    sft.train(by_input(base_model, steps=1, condition="description"), tasks, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_as_encoder(base_model, tasks, tmp_path, made, dtype):
    """Embeddings are the last token's state after the final norm, of RMS 1, in training and of the checkpoint."""
    changes = {"encoder": "base-model", "dtype": dtype, "variant": "M"}
    out = sft.train(small_runs.sft(f"{base_model}/", steps=12, validate_every=0, **changes), tasks, tmp_path / "out")
    curve = small_runs.losses(out)
    assert sum(curve[-3:]) < sum(curve[:3])
    engine = t2l.TextToLoRA.from_pretrained(out)
    assert engine.encoder.config == EncoderConfig(str(base_model), "last", 8192, dtype=dtype)
    job = made(**changes)
    texts = load_tasks(tasks, None)[0].descriptions
    groups = [g for step in range(8) for batch in job.batches(step, Shard()) for g in batch.groups if g.task == 0]
    assert {g.description for g in groups} == set(range(len(texts)))
    assert torch.equal(engine.encoder.encode(texts)[[g.description for g in groups]], job._conditions.augmented(groups))

    model, tokenizer = base_model_loader.load(str(base_model), torch.float32)
    for text, found in zip(texts, engine.encoder.encode(texts), strict=True):
        ids = tokenizer([normalise_description(text)], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert abs(found.square().mean().sqrt() - 1) <= EMBEDDING_FROBENIUS
        if dtype == "float32":
            assert relative_frobenius(found, last / last.square().mean().sqrt()) <= EMBEDDING_FROBENIUS
    convert.convert(out, tmp_path / "sakana", to="sakana")
    assert yaml.safe_load((tmp_path / "sakana" / "args.yaml").read_text())["emb_model"] == ""  # the base model, to it
    again = t2l.TextToLoRA.from_pretrained(tmp_path / "sakana")
    assert torch.equal(again.generate(texts).lora_B["q_proj"], engine.generate(texts).lora_B["q_proj"])
