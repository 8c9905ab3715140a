"""What the tests of evaluations share: a tiny language model, tasks, checkpoints and adapters that fit it, made once."""

import dataclasses
import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.research.tasks.folder import Example, Task, write_tasks
from t2l_engine.text import base_model as loader
from t2l_engine.text.config import EncoderConfig
from tests.cli.conftest import run  # noqa: F401
from tests.lora.conftest import model, tokens  # noqa: F401
from tests.research.training import conftest as training

base_model, one_thread = training.base_model, training.one_thread  # the folder of a tiny Llama, which no test changes
MODULES = {"q_proj": (64, 64), "v_proj": (64, 32)}  # of the tiny model: (in, out) features
DESCRIPTIONS = {
    "again": ["Repeat the word.", "Say the word"],
    "first": ["Say the first word.", "Repeat the word that comes first"],
    "last": ["Say the last word.", "Repeat the word at the end"],
}


def task(name, *examples, descriptions=None):
    return Task(name, tuple(descriptions or DESCRIPTIONS[name]), examples)


def all_tasks(splits=("train", "val", "test")):
    """Three tasks over pairs of words: 4 examples of split "train", 2 of "val" and 3 of "test" each."""
    made = []
    for number, name in enumerate(DESCRIPTIONS):
        pairs = [(a, b) for a in training.WORDS for b in training.WORDS if a != b][number::3][:9]
        examples = []
        for i, (a, b) in enumerate(pairs):
            split = "train" if i < 4 else "val" if i < 6 else "test"
            text, answer = (a, a) if name == "again" else (f"{a} {b}", {"first": a, "last": b}[name])
            if split in splits:
                examples.append(Example(text, (answer,), split))
        made.append(task(name, *examples))
    return made


def save_checkpoint(folder, base_model, *, names=(), seed=0, **training):
    """A random checkpoint whose adapters change what the tiny model says; its encoder: that model, or one-hot ``names``."""
    encoder = EncoderConfig(str(base_model), "last", 64)
    config = t2l.HyperNetworkConfig(
        variant="L", modules=tuple(MODULES), in_features=(64, 64), out_features=(64, 32), num_layers=2, rank=2,
        embed_dim=len(names) or 64, latent_size=16, head_in_size=8, lora_alpha=8.0, scaling="plain",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t2l.HyperNetwork(config).save_pretrained(
            folder,
            {
                "encoder": {"name": "one-hot", "tasks": list(names)} if names else dataclasses.asdict(encoder),
                "base_model": str(base_model),
                "training": training,
            },
        )
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder of all that is made once."""
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def loaded(base_model):
    """(model, tokenizer) as ``t2l evaluate`` loads them; whoever adapts the model undoes it."""
    return loader.load(str(base_model), torch.float32)


@pytest.fixture(scope="session")
def tasks(shared):
    """The folder of :func:`all_tasks`."""
    write_tasks(shared / "tasks", all_tasks())
    return shared / "tasks"


@pytest.fixture(scope="session")
def checkpoint(shared, base_model):
    """A checkpoint that says it was trained on the tasks first and last."""
    return save_checkpoint(shared / "checkpoint", base_model, prompt="input", tasks={"first": {}, "last": {}})


@pytest.fixture(scope="session")
def one_hot(shared, base_model):
    """A checkpoint that knows the tasks first, last and another one by their names."""
    return save_checkpoint(shared / "one-hot", base_model, names=("first", "last", "other"))


@pytest.fixture(scope="session")
def by_input(shared, base_model):
    """A checkpoint of condition "input"."""
    return save_checkpoint(shared / "by-input", base_model, condition="input")


@pytest.fixture(scope="session")
def engine(checkpoint):
    return t2l.TextToLoRA.from_pretrained(checkpoint)


@pytest.fixture
def reading(base_model):
    """An engine whose encoder reads three examples."""
    return training.reading_engine(base_model, 3)


def random_stack(count, seed=0, rank=2):
    """``count`` adapters that change what the tiny model says."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(count, 2, *shape, generator=generator)

    A = {name: randn(rank, n) / n**0.5 for name, (n, _) in MODULES.items()}
    return t2l.AdapterStack(A, {name: randn(n, rank) for name, (_, n) in MODULES.items()}, torch.full((count,), 2.0))


@pytest.fixture(scope="session")
def adapters(shared, base_model):
    """The folder of three PEFT adapters: first, last and other."""
    stack = random_stack(3)
    for i, name in enumerate(("first", "last", "other")):
        stack.save_pretrained(shared / "adapters" / name, adapter=i, base_model_name_or_path=str(base_model))
    texts = {name: DESCRIPTIONS.get(name, ["Say something else."]) for name in ("first", "last", "other")}
    (shared / "adapters" / "descriptions.json").write_text(json.dumps(texts))
    return shared / "adapters"
