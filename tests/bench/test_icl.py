"""The suite ``icl``: closed forms, what is verified before it is timed, answers from a cached prefix, and its tables."""

import dataclasses
import json
import re
import types

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import t2l_engine as t2l
from bench import icl
from bench.harness import OURS, BenchError, Context, VerificationError
from bench.icl import costs, first, names, questions
from bench.models import Step
from bench.records import ROOT, read
from bench.timing import Dry
from examples import demo
from t2l_engine import ops
from t2l_engine.lora import layer

#: One for each class of CPUs.
RESULTS = sorted((ROOT / "bench" / "results").glob("icl.*.jsonl"))


def test_a_task_folder_is_needed_at_full_size():
    with pytest.raises(BenchError, match="^tasks:"):
        icl.plan(Context.of("full", 1))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_costs_are_what_is_counted_today(path):
    stored, made = read(path), {}
    for entry in (*costs.entries(), *costs.paper()):
        made.setdefault(entry["record"], []).append(json.loads(json.dumps(entry, allow_nan=False)))
    assert len(made) == 4
    for kind, entries in made.items():
        pairs = zip(entries, stored.records(kind), strict=True)
        assert all(of | entry == of for entry, of in pairs), kind  # stored ones have further fields


def test_example_of_the_page(capsys):
    page = ROOT / "docs" / "icl.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    exec(compile(code, page.name, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(f"# {line}" in code for line in printed)


@pytest.fixture
def context():
    return Context.of("tiny", 1, Dry())


@pytest.fixture
def served(context):
    return first.Served(context, torch.bfloat16)


@torch.inference_mode()
def test_a_request_makes_the_adapter_that_it_uses(served):
    calls = served.calls()
    base, made, kept = calls[names.ALONE](), calls[OURS](), calls[names.KEPT]()
    assert torch.equal(made, kept) and not torch.equal(made, base)
    (text,) = served.describe.args
    text.copy_(text.flip(1))
    assert not torch.equal(calls[OURS](), made), "another description, another adapter, in the slots that are used"
    assert torch.equal(calls[names.ALONE](), base), "the base model stays what it is"


@pytest.mark.parametrize("device", ["cpu", "dry"])
def test_every_way_is_verified(context, device):
    if device == "cpu":
        context = dataclasses.replace(Context.of("tiny", 1), rounds=(2, 2), seconds=0.0)
    row, counted = first.first(context, torch.float32)
    rivals = {names.ICL, names.WARM, names.KEPT, names.MERGED, names.ALONE}
    assert row["skipped"] == {} and set(row["times"]) == {OURS, *rivals}
    assert row["error"]["value"] <= row["error"]["bound"] and row["roofline"]["flops"] > 0
    predicted = counted["predicted"]
    assert predicted.keys() == rivals and predicted[names.ICL]["flops"] > predicted[names.ALONE]["flops"]


@pytest.mark.parametrize("broken", ["kernel", "merge", "generation"])
def test_what_is_wrong_is_not_timed(context, monkeypatch, broken):
    changes = {
        "kernel": (layer, "lora_add_op", lambda y, *rest: None),
        "merge": (t2l.LoRAHandle, "merge", lambda self, index: None),
        "generation": (ops, "hypernet_heads_out_", lambda *_, **__: None),
    }
    monkeypatch.setattr(*changes[broken])
    with pytest.raises(VerificationError):
        list(first.first(context, torch.bfloat16))


def test_a_wrong_rival_is_skipped(context, monkeypatch):
    monkeypatch.setattr(Step, "follow", lambda self, other: None)  # random keys and values instead
    row, *_ = first.first(context, torch.bfloat16)
    assert row["skipped"][names.WARM].startswith("wrong: error") and names.WARM not in row["times"]


def test_text_of_a_length():
    encoder = t2l.TextEncoder.from_pretrained("minilm")
    for count in (4, 35):
        assert first.tokens_of(encoder, first.text_of(encoder, count)) == count


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
        assert rest.text == whole.text and cache.get_seq_length() == 15
    assert whole.us > 0


def test_an_answer_ends_with_its_line(speaker):
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: "one" + "\ntwo" * (len(ids) // 3))
    answer = questions.Speaker(speaker.model, tokenizer).answer(list(range(20)), DynamicCache())
    assert answer.text == "one"


def test_tasks_of_a_folder(tmp_path):
    splits = ["train"] * 4 + ["test"] * 2
    rows = [{"input": f"in {i}", "output": [f"out {i}"], "split": split} for i, split in enumerate(splits)]
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "descriptions.json").write_text(json.dumps({"copy": ["Copy the number.", "Not used."]}))
    ((task, shots),) = questions.tasks(tmp_path)
    assert task.descriptions == ("Copy the number.", "Not used.")
    assert shots == [("in 0", "out 0"), ("in 1", "out 1"), ("in 2", "out 2")]
    assert [question.input for question in task.examples] == ["in 4", "in 5"]


def test_tasks_without_a_folder_are_the_demos():
    for task, shots in questions.tasks(None):
        _, rows = demo.TASKS[task.name]
        (question,) = task.examples
        assert task.descriptions == (task.name,)
        assert [*shots, (question.input, *question.outputs)] == rows
