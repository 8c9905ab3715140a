"""``t2l show`` and ``t2l generate --document`` with a checkpoint that reads documents."""

import json
import shutil

import t2l_engine as t2l
from tests.hypernetwork.test_doc_to_lora import GOLDEN, NAMES, TEMPLATE


def test_a_document_becomes_an_adapter(tmp_path, run, left_tokenizer):
    source, base = GOLDEN / NAMES[0], tmp_path / "base"
    shutil.copytree(source / "base", base)
    left_tokenizer.chat_template = TEMPLATE
    left_tokenizer.save_pretrained(base)
    code, out, _ = run("show", source, "--json")
    about = json.loads(out)
    config = t2l.TextToLoRA.from_pretrained(source, encoder=base).hypernetwork.config
    assert code == 0 and about["form"] == "doc-to-lora" and about["parameters"]["total"] == config.num_parameters
    document, command = tmp_path / "document.txt", ("generate", "-c", source, "--encoder", base, "-o", tmp_path / "out")
    document.write_text("c d e f g")
    code, out, err = run(*command, "--document", document, "--max-chunk-tokens", 4, "--json")
    (written,) = json.loads(out) if code == 0 else [err]
    assert written["description"] == str(document) and written["rank"] == config.total_rank(2)
    stack = t2l.AdapterStack.from_peft(tmp_path / "out")
    assert stack.scaling.tolist() == [16.0] and stack.ranks["down_proj"].unique().tolist() == [config.total_rank(2)]


def test_a_checkpoint_of_descriptions_refuses_documents(tmp_path, run):
    document = tmp_path / "document.txt"
    document.write_text("c d e")
    code, _, err = run("generate", "--document", document, "-o", tmp_path / "out")
    assert code == 1 and "expected a checkpoint that reads documents" in err
