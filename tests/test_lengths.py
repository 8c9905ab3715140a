"""Token counts of benchmarks, on made-up items and tokenizers whose counts can be seen by eye."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench import lengths

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
        arguments = [
            "--benchmarks",
            benchmarks,
            "--descriptions",
            file,
            "--examples",
            shown,
            "--out",
            out,
            "--tokenizer",
            *places,
        ]
        lengths.main([str(argument) for argument in arguments])
        return json.loads(out.read_text())

    return of


def test_counts_of_a_tokenizer_without_chat_template(run, words):
    result = run(f"mistral-7b={words}", f"gemma-2-2b={words}")
    made = result["benchmarks"]["made_up"]
    assert {key: made[key] for key in ("items", "train_items", "license")} == {"items": 2, "train_items": 1, "license": None}
    # <s> [INST] ... [/INST]; <bos> <start_of_turn> user ... <end_of_turn> <start_of_turn> model, though no added tokens
    assert made["mistral-7b"]["question"] == {"mean": 7.0, "p5": 6.1, "median": 7.0, "p95": 7.9}
    assert made["gemma-2-2b"]["question"] == {"mean": 10.0, "p5": 9.1, "median": 10.0, "p95": 10.9}
    assert made["mistral-7b"]["shot"] == dict.fromkeys(("mean", "p5", "median", "p95"), 6.0)
    assert made["mistral-7b"]["examples"]["mean"] == 2 and made["mistral-7b"]["answer"]["mean"] == 1.5
    assert result["command"].endswith(
        "FILE --examples EXAMPLES --tokenizer mistral-7b=tokenizer.json gemma-2-2b=tokenizer.json"
    )
    about = result["tokenizers"]["mistral-7b"]
    assert about["vocabulary"] == 5 and "unknown" in about["from"] and len(about["sha256"]) == 64


def test_chat_template_of_a_folder_comes_first(run, words, tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_file=str(words), unk_token="<unk>", bos_token="<s>")
    fast.chat_template = "<s>You are kind . {% for m in messages %}{{ m.content }}{% endfor %} Answer :"
    fast.save_pretrained(tmp_path / "model")
    result = run(f"mistral-7b={tmp_path / 'model'}", f"another={tmp_path / 'model'}")
    assert result["benchmarks"]["made_up"]["another"]["question"]["mean"] == 4 + 7
    assert result["benchmarks"]["made_up"]["mistral-7b"] == result["benchmarks"]["made_up"]["another"]


def test_descriptions_are_counted_as_the_encoder_and_as_a_prompt(run, words):
    made = run(f"mistral-7b={words}")["descriptions"]
    assert [made[task]["count"] for task in made] == [2, 3] and list(made) == ["made_up", "all tasks"]
    # [CLS] answer the question . [SEP], and 100 x "you answer ." uncut
    assert made["made_up"]["encoder"]["mean"] == (6 + 302) / 2
    assert made["made_up"]["mistral-7b"]["mean"] == (3 + 200) / 2
    assert made["all tasks"]["mistral-7b"]["median"] == 3


def test_a_benchmark_known_to_have_no_examples(run, words, tmp_path):
    folder = write(tmp_path / "benchmarks", "humaneval", ITEMS[:2])
    made = run(f"mistral-7b={words}", benchmarks=folder, descriptions={"humaneval": ["Write code."]})
    assert made["benchmarks"]["humaneval"]["train_items"] == 0
    assert made["benchmarks"]["humaneval"]["mistral-7b"]["shot"] is None
    assert made["benchmarks"]["humaneval"]["mistral-7b"]["examples"] is None
    assert made["benchmarks"]["humaneval"]["license"] == "MIT"


def refused(call, *says):
    with pytest.raises(SystemExit) as error:
        call()
    message = str(error.value)
    assert message.startswith("python -m bench.lengths: ") and "\n" not in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (ITEMS[:2], "no train items"),
        (ITEMS[2:], "no test items"),
        ([*ITEMS, {"prompt": "x", "output": "y", "split": "test"}], "line 5: expected"),
        ([{"prompt": "x", "output": [], "split": "test"}], "line 1: expected"),
        ([], "line 1: expected"),
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
    refused(lambda: run(f"mistral-7b={words}", descriptions={"lol_1": ["A task."]}), "no descriptions of made_up")
    refused(lambda: run(f"mistral-7b={words}", descriptions={"made_up": []}), "descriptions of every task")
    refused(lambda: run(f"mistral-7b={words}", examples={"other": "x"}), "examples.json: expected a text", "made_up")
    refused(lambda: run(f"another={words}"), "expected a chat template beside it, or a name of mistral-7b", "got another")
    refused(lambda: run(f"llama-3.1-8b={words}"), "expected the tokenizer of llama-3.1-8b", "<|begin_of_text|>")
    refused(lambda: run("mistral-7b"), "expected NAME=PLACE", "mistral-7b")
    refused(lambda: run(f"encoder={words}"), "another name than encoder")


def test_committed_result():
    result = json.loads(lengths.FILE.read_text(encoding="utf-8"))
    models = ["smollm2-135m", "mistral-7b", "llama-3.1-8b", "gemma-2-2b"]
    assert result["meaning"] == lengths.MEANING
    assert set(lengths.MEANING) == {"question", "shot", "examples", "answer", "descriptions"}
    assert list(result["tokenizers"]) == [lengths.ENCODER, *models]
    assert not any("unknown" in about["from"] for about in result["tokenizers"].values())
    assert set(result["benchmarks"]) == set(lengths.LICENSES) and set(models) <= set(result["benchmarks"]["gsm8k"])
    assert result["command"].startswith(
        "python -m bench.lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES --tokenizer smollm2"
    )
