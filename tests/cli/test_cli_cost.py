"""``t2l cost``: the library's numbers for what options name, and one line for what cannot be used."""

import dataclasses
import json
import re
from fractions import Fraction

import pytest

import t2l_engine as t2l
from t2l_engine.hypernetwork.network import num_parameters
from t2l_engine.research import costs
from t2l_engine.text.config import EncoderConfig, OneHotConfig

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


def check(about, setup, load=LOAD, questions=100, users=1, tasks=1, rates=None):
    """The document has the library's numbers for this setup."""
    ways, sizes = costs.ways(setup, load), (users, tasks, 1)
    assert about["workload"] == dataclasses.asdict(load) and list(about["ways"]) == list(costs.LABELS)
    assert (about["adapter_bytes"], about["generator_bytes"]) == (setup.adapter_bytes, setup.generator_bytes)
    assert about["cache"]["bytes_per_token"] == setup.kv(1)
    for name, way in ways.items():
        got, won = about["ways"][name], costs.questions_won(ways["t2l-task"], way)
        first, later = way.first.flops(), way.later.flops()
        flops = {"to_first_token": way.first.flops(first_token=True), "later_question": later}
        assert got["flops"] == flops | {"questions": first + (questions - 1) * later}
        assert got["memory_bytes"] == sum(a * b for a, b in zip(way.held, sizes, strict=True))
        step = sum(a * b for a, b in zip(way.step, sizes, strict=True))
        assert got["decode_step_bytes"] == setup.weights(users) + step
        assert got["questions_won"] == (won and list(won))
        assert got["tasks_to_win"] == costs.tasks_to_win(ways["t2l-task"], way, Fraction(users, tasks))
        if rates is None:
            assert got["seconds"] is None
            continue
        first, later = way.first.seconds(*rates), way.later.seconds(*rates)
        seconds = {"to_first_token": way.first.seconds(*rates, first_token=True), "later_question": later}
        assert got["seconds"] == seconds | {"questions": first + (questions - 1) * later}


def test_a_known_model(cost_of):
    """The default is Mistral-7B, which is known by its name on the Hub too."""
    setup, about = costs.known_setup("mistral-7b"), cost_of()
    check(about, setup)
    assert about["model"] == {"name": "mistral-7b", "parameters": setup.model.parameters, "dtype": "bfloat16"}
    assert about["hypernetwork"]["parameters"] == num_parameters(setup.hypernet)
    assert about["ways"] == cost_of("--model", "mistralai/Mistral-7B-Instruct-v0.2")["ways"]


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


@pytest.mark.parametrize("values, options, weights, cache", [
    ({}, (), "bfloat16", "bfloat16"), ({"torch_dtype": "float32"}, (), "float32", "float32"),
    ({"dtype": "float32"}, ("--dtype", "float8"), "float8", "bfloat16"),
    ({"quantization_config": {"bits": 4}}, ("--dtype", "int4", "--cache-dtype", "float8"), "int4", "float8"),
])  # fmt: skip
def test_dtypes(cost_of, folder, values, options, weights, cache):
    about = cost_of("--model", folder(LLAMA | values), *options)
    sizes = {"bfloat16": 2, "float32": 4, "float8": 1}
    assert (about["model"]["dtype"], about["cache"]["dtype"]) == (weights, cache)
    assert about["cache"]["bytes_per_token"] == costs.count(LLAMA).kept(1) * sizes[cache]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_bundled_checkpoint_is_the_known_setup(cost_of):
    """A checkpoint names its model and its encoder; options change its sizes."""
    about, expected = cost_of("-c", "smollm2-135m-paper"), cost_of("--model", "smollm2-135m")
    assert about["ways"] == expected["ways"] and about["hypernetwork"]["scaling"] == "plain"
    other = cost_of("-c", "smollm2-135m-paper", "--rank", 4)
    assert other["adapter_bytes"] == expected["adapter_bytes"] / 2


def test_the_default_checkpoint(cost_of):
    """SmolLM2 reads the description up to layer 12; adapters are of layers 16 to 29.  Sizes by hand."""
    config = t2l.TextToLoRA.from_pretrained("smollm2-135m").hypernetwork.config
    about = cost_of("-c", "smollm2-135m", "--answer", 4, "--head-in-size", 3)
    setup = costs.known_setup("smollm2-135m", costs.LANGUAGE_MODEL, (0, 6, 12), **vars(config))
    assert setup.hypernet == config
    check(about, setup, dataclasses.replace(LOAD, answer=4))
    layer = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert about["encoder"] == {"name": "model", "parameters": 49152 * 576 + 12 * (layer + 2 * 576) + 576}
    assert setup.encoder.flops(35) == 2 * 35 * 12 * layer + 12 * 4 * 576 * (35 * 36 // 2)
    assert about["adapter_bytes"] == 2 * 14 * 8 * (576 + 576 + 576 + 192 + 576 + 576 + 1536 + 576)


@pytest.fixture
def checkpoint(tmp_path):
    """Factory: the folder of a checkpoint for the tiny model and MiniLM."""

    def make(**blocks):
        model = costs.count(LLAMA)
        net = t2l.HyperNetwork(costs.hypernetwork_for(model, model, latent_size=16, head_in_size=24, rank=2))
        blocks = {name: vars(of) if dataclasses.is_dataclass(of) else of for name, of in blocks.items()}
        net.save_pretrained(tmp_path / "checkpoint", blocks)
        return tmp_path / "checkpoint"

    return make


def test_encoders_of_checkpoints(cost_of, run, checkpoint, folder, tmp_path):
    model, bert = str(folder(LLAMA)), str(folder(BERT, "bert"))

    def encoder(*options, **blocks):
        about = cost_of("-c", checkpoint(**blocks), *options)
        assert about["hypernetwork"]["latent_size"] == 16
        return about["encoder"]["name"]

    assert encoder("--model", model) == "minilm"
    assert encoder(base_model=model, encoder=EncoderConfig(model, pooling="last")) == "model"
    assert encoder(base_model=model, encoder=EncoderConfig(bert, pooling="cls")) == bert
    assert encoder("--encoder", bert, base_model=model, encoder=OneHotConfig(("a", "b"))) == bert
    for message, name in (
        ("one-hot", tmp_path / "checkpoint"), ("bundled checkpoints: ", "none"), ("--model: ", None),
    ):  # fmt: skip
        code, out, err = run("cost", "-c", name or checkpoint())
        assert (code, out) == (1, "") and err.startswith("t2l: ") and message in err and err.count("\n") == 1


# --- what cannot be used, and what is printed ------------------------------------------------------------------------


@pytest.mark.parametrize("texts, option, value", [
    (("--model: 'org/model'", "mistral-7b"), "--model", "org/model"),
    (("dtype: ", "'quantized'", "--dtype"), "--model", LLAMA | {"quantization_config": {"bits": 4}}),
    (("dtype: ", "'float4'", "--dtype"), "--model", LLAMA | {"dtype": "float4"}),
    (("config.json: ", "-64"), "--model", LLAMA | {"hidden_size": -64}),
    (("--encoder: 'org/text'", "gte-large, minilm"), "--encoder", "org/text"),
    (("model_type: ", "'t9'"), "--encoder", {"model_type": "t9"}),
    (("variant: ",), "--variant", "XL"), (("--modules: ", "'query'"), "--modules", "q_proj,query"),
])  # fmt: skip
def test_what_is_refused(run, folder, texts, option, value):
    """tests/research/costs has what a configuration must not hold."""
    code, out, err = run("cost", option, folder(value) if isinstance(value, dict) else value)
    assert (code, out) == (1, "") and err.startswith("t2l: ") and err.count("\n") == 1
    assert all(text in err for text in texts), err


@pytest.mark.parametrize("arguments", [
    "--tflops 10", "--gbps 10", "--tflops nan --gbps 10", "--tasks 3 --users 2", "--questions 0", "--dtype fp64",
    "--answer 0",
])  # fmt: skip
def test_wrong_usage(run, arguments):
    """The message names the first of the options."""
    code, out, err = run("cost", *arguments.split())
    assert (code, out) == (2, "") and arguments.split()[0] in re.sub(r"[│╭╮╰╯─]", " ", err)


def test_tables(run, folder):
    """All ways by FLOPs, bytes and time; names are shown, not obeyed."""
    code, out, err = run("cost", "--model", "mistral-7b", "--tflops", "10", "--gbps", "100")
    text = " ".join(out.split())
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    assert all(text.count(f"│ {label} │") == 3 for label in costs.LABELS.values())
    for fact in (
        "7,242 M parameters", "131.1 kB a token", "shot 80", "│ from 4 │", "│ never │", "│ 1 to 21 │", "│ from 40 │",
    ):  # fmt: skip
        assert fact in text
    out = run("cost", "--model", folder(LLAMA, "[red]\x1b[31mbase"))[1]
    assert "[red]" in out and "\x1b" not in out and "roofline" not in out
