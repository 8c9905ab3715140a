"""Commands with a checkpoint that reads documents; test_chat.py has those of a chat."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import t2l_engine as t2l
from tests.hypernetwork.test_doc_to_lora import GOLDEN, NAMES, TEMPLATE


def test_a_document_becomes_an_adapter(tmp_path, run, left_tokenizer):
    source, base = GOLDEN / NAMES[0], tmp_path / "base"
    shutil.copytree(source / "base", base)
    left_tokenizer.chat_template = TEMPLATE
    left_tokenizer.save_pretrained(base)
    code, out, _ = run("show", source, "--json")
    about = json.loads(out)
    net = t2l.TextToLoRA.from_pretrained(source, encoder=base).hypernetwork
    config, total = net.config, sum(p.numel() for p in net.parameters())
    assert code == 0 and about["form"] == "doc-to-lora" and about["parameters"]["total"] == total
    document, command = tmp_path / "document.txt", ("generate", "-c", source, "--encoder", base, "-o", tmp_path / "out")
    document.write_text("c d e f g")
    code, out, err = run(*command, "--document", document, "--max-chunk-tokens", 4, "--json")
    (written,) = json.loads(out) if code == 0 else [err]
    assert written["description"] == str(document) and written["rank"] == config.total_rank(2)
    stack = t2l.AdapterStack.from_peft(tmp_path / "out")
    assert stack.scaling.tolist() == [16.0] and stack.ranks["down_proj"].unique().tolist() == [config.total_rank(2)]


def test_the_program_of_the_page(tmp_path, monkeypatch, left_tokenizer):
    """The program of docs/generate.md on a golden checkpoint, with a document of one chunk and one of several."""
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- documents -->\n```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / NAMES[0] / "base", "gemma-2-2b-it")
    shutil.copytree(GOLDEN / NAMES[0], "gemma_demo/checkpoint-80000")
    left_tokenizer.chat_template = TEMPLATE
    left_tokenizer.save_pretrained("gemma-2-2b-it")
    model = AutoModelForCausalLM.from_pretrained("gemma-2-2b-it")
    names = {"t2l": t2l, "document": "c d e f g", "another": "d", "model": model}
    exec(compile(code.replace("512", "4"), "docs/generate.md documents", "exec"), names)
    assert [names["engine"].hypernetwork.config.total_rank(count) for count in (2, 1)] == [
        ranks[0].item() for ranks in names["stack"].ranks["down_proj"]
    ]


@pytest.mark.parametrize("command, message", [
    (("export", "{}", "-o", "{}/x.t2l"), "it reads texts token by token"),
    (("cost", "-c", "{}"), "reads documents, whose cost is not counted"),
    (("adapt", "A text.", "--examples", "{}/shots", "-o", "{}/out", "-c", "{}"), "--checkpoint: expected one that reads d"),
])  # fmt: skip
def test_what_is_not_done_for_documents_is_said(expect_error, document_checkpoint, command, message):
    (document_checkpoint / "shots").write_text("".join(f'{{"input": "{i}", "output": "{i}"}}\n' for i in range(4)))
    expect_error(message, *(part.format(document_checkpoint) for part in command))


def test_an_adapter_of_a_text_as_gguf(run, document_checkpoint, tmp_path):
    file = tmp_path / "a.gguf"
    code, _, err = run("export", "one two three", "-c", document_checkpoint, "--max-chunk-tokens", 4, "-o", file)
    assert code == 0 and file.is_file(), err


def test_a_library_needs_an_encoder_of_sentences(document_checkpoint):
    engine = t2l.TextToLoRA.from_pretrained(document_checkpoint)
    with pytest.raises(ValueError, match="encoder: expected one of sentences, such as a TextEncoder, got DocumentEncoder"):
        t2l.AdapterLibrary(engine.generate(["one two"]), {"one": ["one two"]}, engine.encoder)


def test_a_checkpoint_of_descriptions_refuses_documents(tmp_path, run):
    document = tmp_path / "document.txt"
    document.write_text("c d e")
    code, _, err = run("generate", "--document", document, "-o", tmp_path / "out", "-c", "smollm2-135m-paper")
    assert code == 1 and "expected a checkpoint that reads documents" in err
