"""What every step reads: functions of the seed and the step alone, every task and example equally often."""

import math
import random
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks.folder import Example, Task
from t2l_engine.research.training import context, hypernetwork, sft
from t2l_engine.research.training.hypernetwork import TaskEmbeddings
from t2l_engine.research.training.sampling import Examples, Group, Sample, Shard, Stream, divide, permuted, seeded
from t2l_engine.text.encoder import EncoderConfig
from t2l_engine.text.prompts import prompt_of, raw_prompt
from tests.research.training import small_runs

EXAMPLES = examples(max_examples=25)

# --- streams of tasks ----------------------------------------------------------------------------------------------


def drawn(task, visit):
    return task, visit


def lengths(item):
    return seeded("length", *item) % 100


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(1, 5))


@EXAMPLES
@given(SIZES, st.permutations(range(12)))
def test_a_step_is_a_function_of_seed_and_step(sizes, order):
    """However the steps are asked for, and by whom."""
    num_tasks, per_step, seed, bucket_steps = sizes

    def make():
        return Stream(num_tasks, per_step, seed, drawn, lengths, bucket_steps)

    one = make()
    found = {step: one.step(step) for step in order}
    assert found == {step: make().step(step) for step in range(12)}


@EXAMPLES
@given(SIZES)
def test_every_task_equally_often(sizes):
    """A task's visits are counted from 0 and none is left out or repeated, up to those of the last pool."""
    num_tasks, per_step, seed, bucket_steps = sizes
    stream = Stream(num_tasks, per_step, seed, drawn, lengths, bucket_steps)
    visits = [item for step in range(3 * bucket_steps) for item in stream.step(step)]
    assert len(visits) == 3 * bucket_steps * per_step
    counts = Counter(task for task, _ in visits)
    assert max(counts.values()) - min(counts[task] for task in range(num_tasks)) <= 1
    assert sorted(visits) == sorted((task, visit) for task, count in counts.items() for visit in range(count))


def test_bucketing_cuts_by_length():
    """Groups of a step are alike in length, and steps do not come in order of length."""

    def spread(stream):
        found = [[lengths(item) for item in stream.step(step)] for step in range(160)]
        assert all(sizes == sorted(sizes) for sizes in found)  # within a step too
        return statistics.mean(sizes[-1] - sizes[0] for sizes in found), [sizes[0] for sizes in found]

    plain, _ = spread(Stream(40, 8, 0, drawn, lengths, 1))
    cut, shortest = spread(Stream(40, 8, 0, drawn, lengths, 16))
    assert cut < plain / 8
    first = {shortest[i : i + 16].index(min(shortest[i : i + 16])) for i in range(0, 160, 16)}
    assert len(first) > 3


def test_permuted():
    assert Counter(permuted(7, i, "key") for i in range(70)) == dict.fromkeys(range(7), 10)
    assert [permuted(7, i, "key") for i in range(7)] != [permuted(7, i, "other") for i in range(7)]
    assert [permuted(7, i, "key") for i in range(7)] != [permuted(7, i, "key") for i in range(7, 14)]
    assert {permuted(1, i) for i in range(3)} == {0}
    assert 0 <= seeded("x") < 2**63 and seeded("a", 1) == seeded("a", "1") != seeded("a", 2)


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
def test_division_among_processes(count, per_batch, processes):
    groups = list(range(count))
    whole = divide(groups, per_batch, Shard())
    assert [g for batch in whole for g in batch] == groups
    assert len(whole) == math.ceil(count / per_batch)
    assert max(map(len, whole)) <= per_batch and max(map(len, whole)) - min(map(len, whole)) <= 1
    shards = [Shard(index, processes) for index in range(processes)]
    if min(map(len, whole)) < processes:
        for shard in shards:
            message = f"tasks_per_batch: .* each of {processes} processes.*got one of {min(map(len, whole))}"
            with pytest.raises(ConfigError, match=message):
                divide(groups, per_batch, shard)
        return
    parts = [divide(groups, per_batch, shard) for shard in shards]
    for batch, *own in zip(whole, *parts, strict=True):
        assert sorted(g for part in own for g in part) == list(batch)
        assert max(map(len, own)) - min(map(len, own)) <= 1


# --- examples ------------------------------------------------------------------------------------------------------

COLOURS = ("red", "blue", "green")


def task(name, inputs, texts=("Say the first word.", "Say the last word.")):
    return Task(name, tuple(texts), tuple(Example(text, (text.split()[0], "other"), "train") for text in inputs))


def many(name, count=6):
    """A task of ``count`` examples of 2 to count + 1 words."""
    return task(name, [f"{COLOURS[i % 3]} " + "cat " * (i + 1) for i in range(count)])


everything = (range(2),) * 3


def words(tokenizer, sample):
    return tokenizer.convert_ids_to_tokens(list(sample.tokens))


def test_prompts(tokenizer):
    """The template around the input, with the description in front of it or without; the first output and the end."""
    one = task("one", ["red cat"])
    plain = Examples([one], tokenizer, 99, with_description=False).sample(0, 0, 1)
    assert words(tokenizer, plain) == ["<user>", "red", "cat", "<bot>", "red", "</s>"] and plain.answer_len == 2
    told = Examples([one], tokenizer, 99, with_description=True)
    assert words(tokenizer, told.sample(0, 0, 0))[:5] == ["<user>", "Say", "the", "first", "word."]
    assert words(tokenizer, told.sample(0, 0, 1))[1:] == ["Say", "the", "last", "word.", *words(tokenizer, plain)[1:]]
    raw = Examples([one], tokenizer, 99, with_description=True, template="raw").sample(0, 0, 0)
    assert list(raw.tokens[:-2]) == tokenizer(raw_prompt("Say the first word.", "red cat"))["input_ids"]
    assert words(tokenizer, raw)[-2:] == ["red", "</s>"] and raw.answer_len == 2
    with pytest.raises(ValueError, match=r"prompt_form: expected one of \('chat', 'raw'\), got 'loud'"):
        prompt_of("loud", tokenizer, "red")
    tokenizer.chat_template = None  # as those of many base models
    assert prompt_of("raw", tokenizer, "red") == raw_prompt("", "red")
    with pytest.raises(ValueError, match="prompt_form: expected 'raw', for the tokenizer has no chat template, got 'chat'"):
        prompt_of("chat", tokenizer, "red")


def test_long_examples_are_left_out(tokenizer):
    made = Examples([many("a"), many("b", 2)], tokenizer, 8, with_description=False)
    assert made.kept[0] == [0, 1, 2] and made.kept[1] == [0, 1]  # 2 words: 6 tokens
    assert made.dropped == 3
    assert made.mean_length(0) == 7 and made.mean_length(1) == 6.5
    assert max(g.longest for g in made.all_groups(1, everything[:2])) == 8
    few = Examples([many("a")], tokenizer, 8, with_description=False, limit=2)
    assert few.kept[0] == [0, 1]
    with pytest.raises(ConfigError, match="max_tokens: no example of task a fits into 5 tokens"):
        Examples([many("a")], tokenizer, 5, with_description=False)
    with pytest.raises(ConfigError, match="max_tokens: .* task a .* 9 tokens"):  # 4 of them the description
        Examples([many("a")], tokenizer, 9, with_description=True)
    empty = Examples([many("a"), many("b")], tokenizer, 5, with_description=False, allow_empty=True)
    assert empty.kept[0] == empty.kept[1] == [] and empty.dropped == 12 and empty.all_groups(3, everything[:2]) == []


def test_a_prompt_with_any_description_fits(tokenizer):
    """The description of the most tokens need not be that of the most letters."""
    texts = ("an_answer_in_a_single_long_word", "a b c d e")
    made = Examples([task("one", ["red cat", "red cat cow dog"], texts)], tokenizer, 11, with_description=True)
    assert all(len(made.sample(0, i, description).tokens) <= 11 for i in made.kept[0] for description in (0, 1))
    assert made.kept[0] == [0]


@pytest.mark.parametrize("per_visit", [1, 2, 4, 9])
def test_every_example_equally_often(tokenizer, per_visit):
    made = Examples([many("a"), many("b")], tokenizer, 99, with_description=False)
    groups = [made.group(1, visit, per_visit, 0, everything) for visit in range(6)]
    assert Counter(s for g in groups for s in g.samples) == {made.sample(1, i, 0): per_visit for i in range(6)}
    assert len({s for g in groups[:1] for s in g.samples}) == min(6, per_visit)  # none twice before all came
    assert {g.task for g in groups} == {1} and len({g.key for g in groups}) == 6


def test_a_group_is_a_function_of_seed_task_and_visit(tokenizer):
    """The other tasks that are there do not matter; the seed does."""
    tasks = [many(name) for name in "abc"]
    everyone = Examples(tasks, tokenizer, 99, with_description=True)
    alone = Examples(tasks[2:], tokenizer, 99, with_description=True)
    draws = []
    for seed in (0, 1):
        ours = [everyone.group(2, visit, 2, seed, everything) for visit in range(12)]
        theirs = [alone.group(0, visit, 2, seed, everything) for visit in random.Random(0).sample(range(12), 12)]
        theirs.sort(key=lambda g: int(g.key.rpartition("/")[2]))
        for g, h in zip(ours, theirs, strict=True):
            assert (g.description, g.samples, g.key) == (h.description, h.samples, h.key)
        assert {g.description for g in ours} == {0, 1}
        draws.append(ours)
    assert draws[0] != draws[1]


# --- task embeddings -----------------------------------------------------------------------------------------------


class Encoder:
    """Stands in for a text encoder: entries of RMS 1 that are a function of the text."""

    embed_dim, config = 16, EncoderConfig(name="stub", pooling="mean")

    @classmethod
    def from_pretrained(cls, name, device):
        assert name == "minilm"
        return cls()

    def encode(self, texts):
        rows = [torch.randn(16, generator=torch.Generator().manual_seed(seeded(text))) for text in texts]
        return torch.stack([row * (4 / row.norm()) for row in rows])


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.setattr(hypernetwork, "TextEncoder", Encoder)
    return Encoder()


TASKS = [Task("a", ("a0", "a1", "a2", "a3"), ()), Task("b", ("b0", "b1", "b2"), ())]


def settings(base_model="x", **changes):
    return small_runs.sft(base_model, **{"encoder": "minilm"} | changes)


def groups_of(pairs):
    return [Group(task, description, (Sample((1,), 1),), f"{i}") for i, (task, description) in enumerate(pairs)]


def test_held_out_descriptions(encoder):
    made = TaskEmbeddings(settings(held_out_descriptions=2), TASKS, torch.device("cpu"))
    assert [list(made.train[i]) for i in (0, 1)] == [[0, 1], [0]]
    assert [list(made.val[i]) for i in (0, 1)] == [[2, 3], [1, 2]]
    exact = made.clean(groups_of([(1, 2), (0, 3)]))
    assert torch.equal(exact, encoder.encode(["b2", "a3"])) and made.embed_dim == 16
    every = TaskEmbeddings(settings(), TASKS, torch.device("cpu"))
    assert list(every.train[0]) == list(every.val[0]) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="held_out_descriptions: expected fewer than the 3 descriptions of task b, got 3"):
        TaskEmbeddings(settings(held_out_descriptions=3), TASKS, torch.device("cpu"))
    with pytest.raises(ConfigError, match="encoder: expected 'minilm', .*'one-hot' or a local .* folder, got 'nowhere'"):
        TaskEmbeddings(settings(encoder="nowhere"), TASKS, torch.device("cpu"))


@pytest.mark.parametrize("prompt", ["input", "description"])
def test_training_never_reads_a_held_out_description(encoder, base_model, tasks, monkeypatch, prompt):
    """Nor validation one that is trained on, neither as an embedding nor in the prompt."""
    s = settings(base_model, held_out_descriptions=1, tasks_per_batch=2, prompt=prompt, validation_samples=2)
    fit = context.TrainingContext(s, tasks, torch.device("cpu"))
    job = sft.SFT(s, fit)
    read = []

    def clean(groups):
        read.extend(groups)
        return encoder.encode(["any"] * len(groups))

    monkeypatch.setattr(job._conditions, "clean", clean)
    job.validate(Shard())
    trained = [g for step in range(10) for batch in job.batches(step, Shard()) for g in batch.groups]
    told = prompt == "description"
    for groups, description, split in ((trained, 0, {"red", "blue", "green", "cat"}), (read, 1, {"dog"})):
        assert {g.description for g in groups} == {description} and {g.task for g in groups} == {0, 1}
        texts = [words(fit.tokenizer, sample) for group in groups for sample in group.samples]
        assert {text[-5] for text in texts} == split  # the first word of the input
        expected = (told and description == 0, told and description == 1)
        for text in texts:  # "Say" begins the first descriptions, "Repeat" the last
            assert ("Say" in text, "Repeat" in text) == expected
    fit.close()
