"""The suite ``icl`` where it computes: what the paper's cells imply, lengths, prefixes, and answers from a cached prefix."""

import json
import re
import types

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import t2l_engine as t2l
from bench import icl
from bench.harness import BenchError, Context
from bench.icl import costs, lengths, paper, questions
from bench.source import ROOT
from bench.timing import Timing
from t2l_engine.research import costs as flops


def test_a_task_folder_is_needed_at_full_size():
    with pytest.raises(BenchError, match="tasks: expected a task folder"):
        icl.plan(Context.of("full", 1))


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_implied_tokens():
    cell = paper.Cell("ten tokens and a half", 10.5e-9, 1e-10)
    assert paper.implied(cell, lambda tokens: 1000 * tokens) == pytest.approx(10.5)


def test_paper_is_consistent():
    entries = list(paper.entries())
    cells = {entry["cell"]: entry for name, entry in entries if name == "paper"}
    hypernet = cells.pop(paper.HYPERNET.name)
    assert all(abs(cell["off_percent"]) < 3 for cell in cells.values())
    assert hypernet["off_percent"] > 70_000  # the one cell that does not fit, whatever the lengths
    (about,) = (entry for name, entry in entries if name == "hypernetwork")
    assert round(about["trunk_of_one_layer_tflop"], 6) == paper.HYPERNET.printed
    (ratio,) = (entry for name, entry in entries if name == "ratio")
    assert ratio["printed"] == pytest.approx(ratio["ours"], rel=0.01)


@pytest.mark.parametrize("model", flops.known_setups())
def test_workloads(model):
    loads = costs.workloads(model)
    assert len(loads) == 11 and costs.MEAN in loads
    assert loads["humaneval"][0].prefix == 0  # T2L's evaluation shows no examples there
    load, instruction = loads["gsm8k"]
    assert load.shots == 3 and load.answer > 100 > instruction > 20


def test_entries_are_json_and_complete():
    made = {}
    for name, entry in costs.entries():
        made.setdefault(name, []).append(entry)
    json.dumps(made, allow_nan=False)
    assert len(made["costs"]) == len(flops.known_setups()) * 12
    assert {term["unit"] for term in made["terms"]} == {"FLOP", "byte"} and all(term["source"] for term in made["terms"])


def test_example_of_the_documentation(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "icl.md").read_text(encoding="utf-8"), re.S)
    exec(compile(code, "docs/icl.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(f"# {line}" in code for line in printed)


def test_without_shots_the_description_is_in_the_prompt():
    setup, load = flops.known_setup("mistral-7b"), costs.PAPER
    first = costs.by_shots("mistral-7b", "paper", setup, load, 35)["questions"]["1"]["icl"][0]
    kept = flops.ways(setup, load)["t2l-task"].total(1)
    assert first == pytest.approx(flops.decoder_flops(setup.decoder, 59 + 35).total / kept, rel=1e-3)


# --- measured --------------------------------------------------------------------------------------------------------


def test_spread_pairs_rounds():
    slow, fast = Timing.of([2.0, 40.0, 6.0]), Timing.of([1.0, 20.0, 3.0])
    assert lengths.spread(slow, fast) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_text_of_a_length():
    encoder = t2l.TextEncoder.from_pretrained("minilm")
    for count in (4, 35):
        prepared = encoder.prepare([lengths.text_of(encoder, count)])[0]
        assert len(encoder.tokenizer(prepared)["input_ids"]) == count
    with pytest.raises(ValueError, match="count"):
        lengths.text_of(encoder, 2)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2, 3], [1, 2]], 1), ([[1, 2], [3, 4]], 0), ([[1, 2], [1, 2]], 1)],
)
def test_common_prefix(prompts, expected):
    assert questions.common_prefix(prompts) == expected


@pytest.fixture(scope="module")
def speaker():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=60, initializer_range=0.3)).eval().requires_grad_(False)
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    return questions.Speaker(model, tokenizer)


def test_a_cached_prefix_gives_the_same_answer_and_stays(speaker):
    prompt = list(range(20))
    whole = speaker.answer(prompt, DynamicCache())
    cache = DynamicCache()
    speaker.read(prompt[:15], cache)
    for _ in range(2):
        rest = speaker.answer(prompt[15:], cache)
        assert (rest.text, rest.tokens) == (whole.text, whole.tokens)
        assert cache.get_seq_length() == 15
    assert 0 < whole.first_us < whole.us


def test_an_answer_ends_with_its_line(speaker):
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: "one" + "\ntwo" * (len(ids) // 3))
    answer = questions.Speaker(speaker.model, tokenizer).answer(list(range(20)), DynamicCache())
    assert (answer.text, answer.tokens) == ("one", 3)


def test_tasks_of_a_folder(tmp_path):
    rows = [
        {"input": f"in {i}", "output": [f"out {i}"], "split": split} for i, split in enumerate(["train"] * 4 + ["test"] * 2)
    ]
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "descriptions.json").write_text(json.dumps({"copy": ["Copy the number.", "Not used."]}))
    (asked,) = questions.tasks(tmp_path, ["copy"])
    assert asked.description == "Copy the number." and asked.trained
    assert asked.shots == (("in 0", "out 0"), ("in 1", "out 1"), ("in 2", "out 2"))
    assert [question.input for question in asked.questions] == ["in 4", "in 5"]
