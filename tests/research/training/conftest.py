"""What the tests of training share: tiny base models on disk and a folder of tasks."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.text import base_model as base_model_loader

TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
WORDS = ("red", "blue", "green", "cat", "dog", "cow")
DESCRIPTIONS = {
    "first": ["Say the first word.", "Repeat the word that comes first"],
    "last": ["Say the last word.", "Repeat the word at the end"],
}
SPECIAL = ("<pad>", "<s>", "</s>", "<user>", "<bot>", "<unk>", ":", "Input", "Output")


def word_tokenizer():
    """One token a word; padding, end and chat template as of :data:`TEMPLATE`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = (text for task in DESCRIPTIONS.values() for text in task)
    words = dict.fromkeys((*SPECIAL, *WORDS, *(word for text in texts for word in text.split())))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def reading_engine(base_model, max_examples=2):
    """Generates adapters of rank 4 for the second layer of the model in ``base_model``; reads so many examples."""
    model, tokenizer = base_model_loader.load(str(base_model), torch.float32)
    reads = t2l.DocumentEncoderConfig(
        str(base_model), "layers", layers=(0, 1), prefix="", suffix="", max_examples=max_examples
    )
    config = t2l.PointerConfig(
        variant="pointer", modules=("o_proj", "down_proj"), in_features=(64, 96), out_features=(64, 64), num_layers=2,
        rank=4, lora_alpha=8.0, feature_size=128, latent_size=16, copied=("down_proj",), first_layer=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return t2l.DocToLoRA(t2l.DocumentEncoder(model, tokenizer, reads), t2l.PointerHyperNetwork(config))


@pytest.fixture(autouse=True)
def one_thread():
    """Products here are tiny: threads that wait for each other are dearer than the products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def saved(folder, model):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def save_model(tiny_model, tmp_path):
    """Factory: the folder of a saved tiny model with :func:`word_tokenizer`; arguments as of ``tiny_model``."""
    return lambda family, **kwargs: saved(tmp_path / f"base-{family}", tiny_model(family, **kwargs))


@pytest.fixture(scope="session")
def base_model(tiny_model, tmp_path_factory):
    """The folder of a saved tiny Llama, which no test changes."""
    return saved(tmp_path_factory.mktemp("models") / "base-Llama", tiny_model("Llama"))


@pytest.fixture
def tasks(tmp_path):
    """The folder of two tasks over pairs of words, two descriptions each: say the first word, say the last word.

    20 examples of split "train" each, 5 of "val" and 5 of "test".
    """
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, pick in (("first", 0), ("last", 1)):
        rows = [
            {"input": f"{a} {b}", "output": [(a, b)[pick]], "split": {"dog": "val", "cow": "test"}.get(a, "train")}
            for a in WORDS
            for b in WORDS
            if a != b
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "descriptions.json").write_text(json.dumps(DESCRIPTIONS))
    return folder
