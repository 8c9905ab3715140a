"""Token counts of benchmarks, on made-up items and tokenizers whose counts can be seen by eye."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench import lengths, records
from bench.harness import BenchError

ITEMS = [
    {"prompt": "what is {red}", "output": ["a colour", "an adjective"], "split": "test"},
    {"prompt": "what is two plus two", "output": ["four"], "split": "test"},
    {"prompt": "what is a cat", "output": ["an animal"], "split": "train"},
    {"prompt": "unused", "output": ["x"], "split": "val"},
]
DESCRIPTIONS = {"made_up": ["Answer the question", "You answer. " * 100], "lol_1": ["A task."]}


def write(folder, name="made_up", items=ITEMS):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json: a word a token, wherever no special token is; it would cut and pad, and put <s> in front."""
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "<bos>", "<start_of_turn>", "<end_of_turn>"])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(4)
    made.enable_padding(length=7)
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command and gives the result; the folder and the files can be replaced."""

    def of(*places, benchmarks=None, descriptions=DESCRIPTIONS, examples=None):
        file, shown, out = (tmp_path / f"{name}.json" for name in ("descriptions", "examples", "lengths"))
        shown.write_text(json.dumps({"made_up": "one two", "humaneval": ""} if examples is None else examples))
        file.write_text(json.dumps({"eval_ds_info": {task: {"descriptions": x} for task, x in descriptions.items()}}))
        benchmarks = write(tmp_path / "benchmarks") if benchmarks is None else benchmarks
        lengths.command(benchmarks, file, shown, places, out)
        return records.read(out)

    return of


def entry(result, kind, **fields):
    (found,) = [e for e in result.records(kind) if all(e[name] == value for name, value in fields.items())]
    return found


def test_counts_of_a_tokenizer_without_chat_template(run, words):
    result = run(f"mistral-7b={words}", f"gemma-2-2b={words}")
    about = entry(result, "benchmark", benchmark="made_up")
    assert (about["items"], about["train_items"], about["license"]) == (2, 1, None)
    mistral, gemma = (entry(result, "length", model=name) for name in ("mistral-7b", "gemma-2-2b"))
    # <s> [INST] ... [/INST]; <bos> <start_of_turn> user ... <end_of_turn> <start_of_turn> model, though no added tokens
    assert mistral["question"] == {"mean": 7.0, "p5": 6.1, "median": 7.0, "p95": 7.9}
    assert gemma["question"] == {"mean": 10.0, "p5": 9.1, "median": 10.0, "p95": 10.9}
    assert mistral["shot"] == dict.fromkeys(("mean", "p5", "median", "p95"), 6.0)
    assert mistral["examples"]["mean"] == 2 and mistral["answer"]["mean"] == 1.5
    assert result.run["command"].endswith("mistral-7b=tokenizer.json --tokenizer gemma-2-2b=tokenizer.json"), (
        "no place of ours"
    )
    about = entry(result, "tokenizer", name="mistral-7b")
    assert about["vocabulary"] == 5 and "unknown" in about["from"] and len(about["sha256"]) == 64


def test_chat_template_of_a_folder_comes_first(run, words, tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_file=str(words), unk_token="<unk>", bos_token="<s>")
    fast.chat_template = "<s>You are kind . {% for m in messages %}{{ m.content }}{% endfor %} Answer :"
    fast.save_pretrained(tmp_path / "model")
    result = run(f"mistral-7b={tmp_path / 'model'}", f"another={tmp_path / 'model'}")
    one, other = (entry(result, "length", model=name) for name in ("mistral-7b", "another"))
    assert one["question"]["mean"] == 4 + 7 and one == other | {"model": "mistral-7b"}


def test_descriptions_are_counted_as_the_encoder_and_as_a_prompt(run, words):
    one, every = run(f"mistral-7b={words}").records("descriptions")
    assert (one["of"], one["count"], every["of"], every["count"]) == ("made_up", 2, "all tasks", 3)
    # [CLS] answer the question . [SEP], and 100 x "you answer ." uncut
    assert one["encoder"]["mean"] == (6 + 302) / 2
    assert one["mistral-7b"]["mean"] == (3 + 200) / 2 and every["mistral-7b"]["median"] == 3


def test_a_benchmark_known_to_have_no_examples(run, words, tmp_path):
    folder = write(tmp_path / "benchmarks", "humaneval", ITEMS[:2])
    made = run(f"mistral-7b={words}", benchmarks=folder, descriptions={"humaneval": ["Write code."]})
    about, counted = entry(made, "benchmark"), entry(made, "length")
    assert (about["train_items"], about["license"], counted["shot"], counted["examples"]) == (0, "MIT", None, None)


def refused(call, *says):
    with pytest.raises(BenchError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in says), message


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (ITEMS[:2], "no train items"),
        (ITEMS[2:], "no test items"),
        ([*ITEMS, {"prompt": "x", "output": "y", "split": "test"}], "line 5: output"),
        ([{"prompt": "x", "output": [], "split": "test"}], "line 1: output"),
        ([], "line 1: Invalid JSON"),
    ],
)
def test_broken_benchmarks(run, words, tmp_path, items, says):
    folder = write(tmp_path / "benchmarks", items=items)
    refused(lambda: run(f"mistral-7b={words}", benchmarks=folder), "made_up.jsonl", says)


def test_what_is_missing_is_named(run, words, tmp_path):
    refused(lambda: run(f"mistral-7b={words}", benchmarks=tmp_path / "nowhere"), "nowhere: expected a folder")
    refused(lambda: run(f"mistral-7b={tmp_path / 'none.json'}"), "none.json")
    refused(lambda: run(f"mistral-7b={write(tmp_path / 'empty')}"), "empty", "tokenizer.json")
    refused(lambda: run(f"mistral-7b={tmp_path / 'descriptions.json'}"), "descriptions.json: expected a tokenizer.json")
    refused(lambda: run(f"mistral-7b={words}", descriptions={"lol_1": ["A task."]}), "descriptions.json: ", "made_up")
    refused(lambda: run(f"mistral-7b={words}", descriptions={"made_up": []}), "eval_ds_info: made_up: descriptions")
    refused(lambda: run(f"mistral-7b={words}", examples={"other": "x"}), "examples.json: ", "made_up")
    refused(lambda: run(f"another={words}"), "expected a chat template beside it, or a name of mistral-7b", "got another")
    refused(lambda: run(f"llama-3.1-8b={words}"), "expected the tokenizer of llama-3.1-8b", "<|begin_of_text|>")
    refused(lambda: run("mistral-7b"), "expected NAME=PLACE", "mistral-7b")
    refused(lambda: run(f"encoder={words}"), "another name than encoder")


def test_committed_result():
    result = records.read(lengths.FILE)
    models = ["smollm2-135m", "mistral-7b", "llama-3.1-8b", "gemma-2-2b"]
    assert {entry["of"]: entry["text"] for entry in result.records("meaning")} == lengths.KNOWN["meanings"]
    assert [entry["name"] for entry in result.records("tokenizer")] == [lengths.ENCODER, *models]
    assert not any("unknown" in entry["from"] for entry in result.records("tokenizer"))
    assert {entry["benchmark"] for entry in result.records("benchmark")} == set(lengths.KNOWN["licenses"])
    assert [entry["model"] for entry in result.records("length") if entry["benchmark"] == "gsm8k"] == models
