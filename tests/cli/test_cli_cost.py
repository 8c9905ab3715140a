"""``t2l cost``: the library's numbers for what options name, and one line for what cannot be used."""

import dataclasses
import json
import re

import pytest

from t2l_engine.cli import cost
from t2l_engine.hypernetwork import checkpoint as checkpoints
from t2l_engine.research import costs

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 48, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
LOAD = costs.Workload(question=59, answer=16, shots=3, shot=80, description=35)


@pytest.fixture
def folder(tmp_path):
    """Factory: a folder with a ``config.json`` of these values."""

    def make(values, name="model"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        return tmp_path / name

    return make


@pytest.fixture
def cost_of(run):
    """The document of options."""

    def call(*arguments):
        code, out, err = run("cost", *arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture
def refused(run):
    """Options that fail with ``status`` and a message that holds ``texts``: one line ``t2l: ...`` where the status is 1."""

    def call(status, texts, *arguments):
        code, out, err = run("cost", *arguments)
        assert (code, out) == (status, ""), err
        assert status == 2 or (err.startswith("t2l: ") and err.count("\n") == 1), err
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())  # usage errors are drawn in a box
        assert all(text in words for text in ([texts] if isinstance(texts, str) else texts)), words

    return call


def as_in_json(value):
    return json.loads(json.dumps(value))


def check(about, setup, load=LOAD, questions=100, users=1, tasks=1, rates=None):
    """The document is that of this setup."""
    expected = as_in_json(cost.document(setup, load, questions, users, tasks, rates))
    assert {name: about[name] for name in expected} == expected


# --- what is counted -------------------------------------------------------------------------------------------------


def test_a_known_model(cost_of):
    """The default is Mistral-7B, which is known by its name on the Hub too."""
    setup, about = costs.known_setup("mistral-7b"), cost_of()
    check(about, setup)
    assert about == cost_of("--model", "mistralai/Mistral-7B-Instruct-v0.2")
    assert about["model"]["parameters"] == setup.model.parameters and about["model"]["dtype"] == "bfloat16"
    assert about["hypernetwork"]["parameters"] == setup.hypernet.num_parameters


def test_every_option(cost_of, folder):
    model, encoder = folder(LLAMA) / "config.json", folder(BERT, "encoder")
    about = cost_of(
        "--model", model, "--encoder", encoder, "--variant", "M", "--rank", 2, "--modules", "o_proj, down_proj",
        "--latent-size", 16, "--head-in-size", 24, "--questions", 7, "--shots", 2, "--shot", 9, "--question", 11,
        "--answer", 5, "--description", 6, "--instruction", 3, "--system", 4, "--users", 5, "--tasks", 2,
        "--dtype", "int4", "--cache-dtype", "float8", "--tflops", "1.5", "--gbps", "20",
    )  # fmt: skip
    counted, text = costs.count(model), costs.count(encoder, head=False)
    sizes = {"modules": ("o_proj", "down_proj"), "rank": 2, "variant": "M", "latent_size": 16, "head_in_size": 24}
    setup = costs.Setup(counted, text, costs.hypernetwork_for(counted, text, **sizes), itemsize=0.5, cache_itemsize=1)
    load = costs.Workload(question=11, answer=5, shots=2, shot=9, description=6, instruction=3, system=4)
    check(about, setup, load, questions=7, users=5, tasks=2, rates=(1.5e12, 20e9))


def test_the_document_has_the_numbers_of_the_library():
    setup, rates = costs.known_setup("mistral-7b"), (1e12, 1e10)
    about, made = cost.document(setup, LOAD, 7, 4, 2, rates), costs.ways(setup, LOAD)
    assert list(about["ways"]) == list(costs.WAYS)
    for name, way in made.items():
        got = about["ways"][name]
        assert got["flop_to_first_token"] == way.first.flops(first_token=True)
        assert (got["flop_first_question"], got["flop_later_question"]) == (way.first.flops(), way.later.flops())
        assert (got["flop_questions"], got["ratio"]) == (way.total(7), way.total(7) / made["t2l-task"].total(7))
        assert (got["decode_step_bytes"], got["memory_bytes"]) == (way.step_bytes(setup, 4, 2), way.memory(4, 2))
        assert got["first"] == [dataclasses.asdict(phase) for phase in way.first.phases]
        assert got["least_seconds"] == {
            "first_token": way.first.seconds(*rates, first_token=True),
            "first_question": way.first.seconds(*rates),
            "later_question": way.later.seconds(*rates),
            "questions": way.total(7, lambda request: request.seconds(*rates)),
        }
    for pair in about["questions_won"]:
        assert pair["questions"] == as_in_json(costs.questions_won(made[pair["way"]], made[pair["rival"]]))
    assert about["tasks_to_win"]["icl"] == costs.tasks_to_win(made["t2l-task"], made["icl"], 2)
    assert about["shots_to_win"]["icl"] == costs.shots_to_win(setup, LOAD, "t2l-task", "icl", questions=7)
    assert about["tokens_of_adapter"] == costs.tokens_of_adapter(setup)


@pytest.mark.parametrize("values, options, weights, cache", [
    ({}, (), "bfloat16", "bfloat16"), ({"torch_dtype": "float32"}, (), "float32", "float32"),
    ({"dtype": "float32"}, ("--dtype", "float8"), "float8", "bfloat16"),
    ({"quantization_config": {"bits": 4}}, ("--dtype", "int4", "--cache-dtype", "float8"), "int4", "float8"),
])  # fmt: skip
def test_dtypes(cost_of, folder, values, options, weights, cache):
    about = cost_of("--model", folder(LLAMA | values), *options)["model"]
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1, "int4": 0.5}
    assert (about["dtype"], about["cache_dtype"]) == (weights, cache)
    assert about["bytes"] == about["parameters"] * sizes[weights]
    assert about["cache_bytes_per_token"] == costs.count(LLAMA).kept(1) * sizes[cache]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_bundled_checkpoint_is_the_known_setup(cost_of):
    """A checkpoint names its model and its encoder."""
    about, expected = cost_of("-c", "smollm2-135m"), cost_of("--model", "smollm2-135m")
    expected["hypernetwork"] |= {"checkpoint": "smollm2-135m", "scaling": "plain"}
    assert about == expected


@pytest.fixture
def native(folder):
    """Factory: a checkpoint for the tiny model and MiniLM, its hypernetwork and its blocks changed."""

    def make(hypernetwork=None, **blocks):
        net = costs.hypernetwork_for(costs.count(LLAMA), costs.known_encoder("minilm"))
        values = dataclasses.asdict(net) | (hypernetwork or {})
        return folder({"format": checkpoints.FORMAT, "hypernetwork": values} | blocks, "checkpoint")

    return make


def test_encoders_of_checkpoints(cost_of, native, folder):
    model = folder(LLAMA)

    def encoder(width, *options, **blocks):
        about = cost_of("-c", native({"embed_dim": width}, **blocks), *options)
        return about["encoder"]["name"], about["encoder"]["bytes_per_value"]

    assert encoder(384, "--model", model) == ("minilm", 2)
    last = {"name": str(model), "pooling": "last"}
    assert encoder(64, base_model=str(model), encoder=last) == ("model", 0)
    gte = {"name": "Alibaba-NLP/gte-large-en-v1.5", "pooling": "cls"}
    assert encoder(1024, base_model=str(model), encoder=gte) == (gte["name"], 2)
    bert = folder(BERT, "bert")
    assert encoder(48, "--encoder", bert, base_model=str(model), encoder=gte) == (str(bert), 2)


@pytest.mark.parametrize("changes, message", [
    *(({"hypernetwork": changes}, message) for changes, message in (
        ({"in_features": (32, 64)}, "q_proj: the model has 64 to 64"), ({"modules": ("q_proj", "qkv_proj")}, "qkv_proj: "),
        ({"num_layers": 3}, "num_layers: expected 2"), ({"embed_dim": 1024}, "embed_dim: expected 384"),
        ({"rank": 0}, "config.json: hypernetwork: rank: "))),
    ({"encoder": {"name": "one-hot", "tasks": ["a"]}}, "one-hot"),
    ({"encoder": {"name": "smollm2-135m", "layers": [0, 2], "queries": 4, "width": 96}}, "attention pooling"),
    ({"encoder": {"name": "org/text", "pooling": "cls"}}, "--encoder: 'org/text': "),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit(refused, native, folder, changes, message):
    path = native(**changes)
    refused(1, [message, "--encoder" if "--encoder" in message else str(path)], "--model", folder(LLAMA), "-c", path)


def test_checkpoints_that_are_none(refused, native, golden, tmp_path):
    refused(1, "--model: ", "-c", native())
    refused(1, "t2l convert", "-c", golden / "L-sft")
    refused(1, "bundled checkpoints: ", "-c", tmp_path / "none")


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_what_is_refused(refused, folder):
    """tests/research/costs has what a configuration must not hold."""
    for texts, option, value in (
        (["--model: 'org/model'", "mistral-7b"], "--model", "org/model"),
        (["quantization_config: ", "--dtype"], "--model", folder(LLAMA | {"quantization_config": {"bits": 4}}, "a")),
        (["dtype: ", "'float4'", "--dtype"], "--model", folder(LLAMA | {"dtype": "float4"}, "b")),
        ("config.json: hidden_size: ", "--model", folder(LLAMA | {"hidden_size": -1}, "c")),
        (["--encoder: 'org/text'", "gte-large, minilm, model"], "--encoder", "org/text"),
        (["model_type: ", "'t9'"], "--encoder", folder({"model_type": "t9"}, "d")),
        ("variant: ", "--variant", "XL"), (["modules: ", "'query'"], "--modules", "q_proj,query"),
    ):  # fmt: skip
        refused(1, texts, option, value)


@pytest.mark.parametrize("arguments", [
    "--tflops 10", "--gbps 10", "--tflops nan --gbps 10", "--tasks 3 --users 2", "--rank 4 -c smollm2-135m",
    "--head-in-size 4 -c smollm2-135m", "--questions 0", "--dtype fp64",
])  # fmt: skip
def test_wrong_usage(refused, arguments):
    """The message names the first of the options."""
    refused(2, arguments.split()[0], *arguments.split())


# --- what is printed -------------------------------------------------------------------------------------------------


def test_tables(run, folder):
    """All ways twice, by FLOPs and by time; break-even points; names are shown, not obeyed."""
    code, out, err = run("cost", "--model", "mistral-7b", "--tflops", "10", "--gbps", "100")
    text = " ".join(out.split())
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    assert all(text.count(f"│ {costs.LABELS[way]} │") == 2 for way in costs.WAYS)
    made = costs.ways(costs.known_setup("mistral-7b"), LOAD)
    assert f"T2L per task │ {made['t2l-task'].first.flops(first_token=True) / 1e9:.0f} G" in text
    start, end = costs.questions_won(made["t2l-task"], made["icl-warm"])
    assert end is None and f"T2L per task costs less than ICL, warm cache │ from {start} questions │" in text
    for fact in ("7.24 G parameters", "131 kB a token", "shot 80", "never", "always", "from 53 tokens"):
        assert fact in text
    few = run("cost", "--model", "smollm2-135m", "--questions", 1, "--shot", 0, "--instruction", 1)[1]
    assert "never up to 1,024 shots" in few
    text = run("cost", "--model", folder(LLAMA, "[red]\x1b[31mbase"))[1]
    assert "[red]" in text and "\x1b" not in text
