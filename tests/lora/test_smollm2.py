"""The real language model: SmolLM2-135M, dequantised from its GGUF file, against PEFT, and the programs of the documents."""

import ast
import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import t2l_engine as t2l
from examples import demo
from t2l_engine.testing import numerics
from t2l_engine.text import packaged

# The package is only a carrier of the weights: importing it would need the inference server it is a plugin of.
pytestmark = pytest.mark.skipif(find_spec(packaged.PACKAGE) is None, reason="make setup installs the model package")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smollm():
    return packaged.load(torch.float32)


@pytest.fixture
def run_program(tmp_path, monkeypatch, smollm):
    """Run the program of that name in a document as it is printed, in an empty folder; its names.

    The README's alone loads the language model, which takes seconds; others get a copy.
    """
    model, tokenizer = smollm

    def run(document, name):
        text = (ROOT / document).read_text(encoding="utf-8")
        code = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.S).group(1)
        monkeypatch.chdir(tmp_path)
        if document != "README.md":
            monkeypatch.setattr(packaged, "load", lambda: (copy.deepcopy(model), tokenizer))
        names = {}
        exec(compile(code, f"{document} {name}", "exec"), names)
        return names

    return run


def test_readme_quick_start(run_program, capsys):
    """One mixed batch: the antonym adapter, the verb adapter and the base model side by side."""
    names = run_program("README.md", "quick start")
    assert "late" in capsys.readouterr().out
    printed = re.search(r"^# (\[.*\])$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]
    texts = names["tokenizer"].batch_decode(
        names["out"][:, names["batch"]["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert ast.literal_eval(printed)[:2] == texts[:2] == [" late", " borrowed"]
    assert texts[2] != texts[1]


def test_program_for_assistants(run_program):
    names = run_program("AGENTS.md", "program")
    adapted, base = names["tokenizer"].batch_decode(names["out"][:, names["batch"]["input_ids"].shape[1] :])
    assert "borrowed" in adapted and adapted != base


def test_first_program(run_program, capsys, tmp_path):
    names = run_program("docs/quickstart.md", "first program")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "late" in capsys.readouterr().out and len(names["stack"]) == 1


def test_worked_examples(run_program):
    """The last call: a description alone, examples alone."""
    stack = run_program("docs/generate.md", "worked examples")["stack"]
    assert len(stack) == 2 and not stack[0].allclose(stack[1])


def test_output_written_over(run_program):
    names = run_program("docs/generate.md", "preallocated output")
    stack, again = names["stack"], names["again"]
    assert all(again.lora_A[name].data_ptr() == a.data_ptr() for name, a in stack.lora_A.items())


def test_a_folder_in_peft(run_program, tmp_path, capsys):
    pytest.importorskip("peft")
    run_program("docs/generate.md", "PEFT folder")
    assert "late" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == packaged.BASE_MODEL


def test_peft_in_memory(run_program, smollm, request):
    """The model ends with the second adapter."""
    pytest.importorskip("peft")
    names = run_program("docs/generate.md", "PEFT in memory")
    model, stack = names["model"], names["stack"]
    batch = names["tokenizer"](
        names["engine"].prompt(names["tokenizer"], "borrow"), return_tensors="pt", add_special_tokens=False
    )
    plain, _ = smollm
    lora = t2l.attach(plain, stack)
    request.addfinalizer(lora.detach)
    with torch.no_grad():
        got = model(**batch).logits[:, -1]
        with lora.use(1):
            assert (got - plain(**batch).logits[:, -1]).abs().max() <= numerics.LOGITS_ATOL
        with lora.use(0):
            assert (got - plain(**batch).logits[:, -1]).abs().max() > 1


def test_serving(run_program):
    """Each token has the adapter of its segment."""
    found = run_program("docs/serve.md", "serving")
    model, layer = found["model"], found["layer"]
    x = torch.randn(10, layer.q_proj.in_features, dtype=model.dtype)
    lora = t2l.attach(model, found["stack"])
    with torch.inference_mode():
        base = layer.q_proj(x)
        with lora.use(found["segments"]):
            mixed = layer.q_proj(x)
        for at, slot in ((slice(0, 5), 1), (slice(5, 8), 0)):
            with lora.use(slot):
                assert torch.equal(mixed[at], layer.q_proj(x)[at])
            assert not torch.equal(mixed[at], base[at])
    assert torch.equal(mixed[8:], base[8:]) and found["queries"].shape == base.shape
    lora.detach()


def test_demo(monkeypatch, smollm, tmp_path, capsys):
    """Every section of ``make demo`` runs; what the model says is replaced, since that takes the time."""
    monkeypatch.setattr(demo.packaged, "load", lambda dtype: smollm)
    monkeypatch.setattr(demo, "answer", lambda model, tokenizer, prompts: ["law"] * len(prompts))
    demo.main(tmp_path / "demo.svg", " Say it [/x]. ")
    screen = capsys.readouterr().out
    own = ("Your sentence: 'Say it [/x].'", demo.INPUTS[0], "Answers are not scored", demo.IN_FAMILY, demo.OUT_OF_FAMILY)
    for text in (*own, "adapted 1 of 12", "2. One input", "3. One batch", "4. Times", "embed: ", "generate: "):
        assert text in screen
    picture = (tmp_path / "demo.svg").read_text(encoding="utf-8")
    assert "One&#160;batch" in picture and "@font-face" not in picture
