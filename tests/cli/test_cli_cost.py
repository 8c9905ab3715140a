"""``t2l cost``: the library's numbers for what options name, and one line for what cannot be used."""

import cProfile
import dataclasses
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import t2l_command
import t2l_engine as t2l
from t2l_engine.cli import cost_tables
from t2l_engine.hypernetwork import checkpoint as checkpoints
from t2l_engine.research import costs
from t2l_engine.research.costs import known

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 32},
    "qwen2": LLAMA | {"use_sliding_window": False},
    "qwen3": LLAMA | {"head_dim": 24},
    "gemma": LLAMA | {"head_dim": 24},
    "gemma2": LLAMA | {"head_dim": 24, "sliding_window": 32},
    "gemma3_text": LLAMA | {"head_dim": 24, "sliding_window": 32},
    "mixtral": LLAMA | {"num_local_experts": 4},
}
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


def check(about, setup, load=LOAD, questions=100, users=1, tasks=1):
    """Every number of the document beside the library's."""
    made = costs.ways(setup, load)
    kept = made["t2l-task"]
    assert list(about["ways"]) == list(costs.WAYS)
    for name, got in about["ways"].items():
        way = made[name]
        assert got["flop_to_first_token"] == way.first.flops(first_token=True)
        assert got["flop_first_question"] == way.first.flops() and got["flop_later_question"] == way.later.flops()
        assert got["flop_questions"] == way.total(questions)
        assert got["ratio"] == way.total(questions) / kept.total(questions)
        assert got["decode_step_bytes"] == way.step_bytes(setup, users, tasks)
        assert got["memory_bytes"] == way.memory(users, tasks)
        for request, phases in ((way.first, got["first"]), (way.later, got["later"])):
            assert phases == [
                {"name": p.name, "flops": as_in_json(p.flops.to_json()), "bytes": as_in_json(p.bytes.to_json())}
                for p in request.phases
            ]
            assert all(term["source"] for phase in phases for term in (*phase["flops"], *phase["bytes"]))
    for pair in about["questions_won"]:
        expected = costs.questions_won(made[pair["way"]], made[pair["rival"]])
        assert pair["questions"] == as_in_json(expected)
    for rival in ("icl", "icl-cold", "icl-warm"):
        shots = costs.shots_to_win(setup, load, "t2l-task", rival, questions=questions)
        assert about["shots_to_win"][rival] == shots
        assert about["tasks_to_win"][rival] == costs.tasks_to_win(kept, made[rival], Fraction(users, tasks))
    assert about["tokens_of_adapter"] == costs.tokens_of_adapter(setup)
    assert about["generator_bytes"] == setup.generator_bytes
    assert about["workload"] == dataclasses.asdict(load)


# --- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", costs.known_setups())
def test_known_models(cost_of, name):
    setup = costs.known_setup(name)
    about = cost_of("--model", name)
    check(about, setup)
    assert about["model"]["parameters"] == setup.decoder.num_parameters and about["model"]["dtype"] == "bfloat16"
    assert about["hypernetwork"]["parameters"] == setup.hypernet.num_parameters
    if name == "mistral-7b":  # the default; by its name on the hub too
        assert about == cost_of() == cost_of("--model", "mistralai/Mistral-7B-Instruct-v0.2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_configuration(cost_of, folder, family):
    path = folder(FAMILIES[family] | {"model_type": family})
    decoder, encoder = costs.Decoder.from_config(path), known.encoder_named("gte-large")
    about = cost_of("--model", path)
    check(about, costs.Setup(decoder, encoder, known.hypernetwork_for(decoder, encoder)))
    assert about["model"]["type"] == family
    about["model"]["name"] = str(path / "config.json")
    assert cost_of("--model", path / "config.json") == about


def test_every_option(cost_of, folder):
    model, encoder = folder(LLAMA), folder(BERT, "encoder")
    about = cost_of(
        "--model", model, "--encoder", encoder, "--variant", "M", "--rank", 2, "--modules", "o_proj, down_proj",
        "--latent-size", 16, "--head-in-size", 24, "--questions", 7, "--shots", 2, "--shot", 9, "--question", 11,
        "--answer", 5, "--description", 6, "--instruction", 3, "--system", 4, "--users", 5, "--tasks", 2,
        "--dtype", "int4", "--cache-dtype", "float8",
    )  # fmt: skip
    decoder, text = costs.Decoder.from_config(model), costs.Encoder.from_config(encoder)
    net = known.hypernetwork_for(
        decoder, text, modules=("o_proj", "down_proj"), rank=2, variant="M", latent_size=16, head_in_size=24
    )
    setup = costs.Setup(decoder, text, net, itemsize=0.5, cache_itemsize=1)
    load = costs.Workload(question=11, answer=5, shots=2, shot=9, description=6, instruction=3, system=4)
    check(about, setup, load, questions=7, users=5, tasks=2)
    assert about["rates"] is None and about["ways"]["icl"]["least_seconds"] is None


def test_language_models_as_encoders(cost_of, folder):
    """The model itself, and another one."""
    decoder = costs.known_setup("gemma-2-2b").decoder
    net = known.hypernetwork_for(decoder, decoder, latent_size=512, head_in_size=2048)
    check(cost_of("--model", "gemma-2-2b", "--encoder", "model"), costs.Setup(decoder, decoder, net, encoder_itemsize=0))
    path = folder(LLAMA | {"model_type": "mistral"})
    decoder, encoder = costs.known_setup("smollm2-135m").decoder, costs.Decoder.from_config(path)
    net = known.hypernetwork_for(decoder, encoder, head_in_size=112)
    check(cost_of("--model", "smollm2-135m", "--encoder", path), costs.Setup(decoder, encoder, net))


@pytest.mark.parametrize(
    ("values", "options", "weights", "cache"),
    [
        ({}, (), "bfloat16", "bfloat16"),
        ({"dtype": "float16"}, (), "float16", "float16"),
        ({"torch_dtype": "float32"}, (), "float32", "float32"),
        ({"torch_dtype": "float32"}, ("--dtype", "float8"), "float8", "bfloat16"),
        ({"torch_dtype": "float32"}, ("--cache-dtype", "int4"), "float32", "int4"),
        ({"quantization_config": {"bits": 4}}, ("--dtype", "int4"), "int4", "bfloat16"),
    ],
)
def test_what_a_value_is_kept_in(cost_of, folder, values, options, weights, cache):
    about = cost_of("--model", folder(LLAMA | values), *options)
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1, "int4": 0.5}
    decoder = costs.Decoder.from_config(LLAMA)
    assert (about["model"]["dtype"], about["model"]["cache_dtype"]) == (weights, cache)
    assert about["model"]["bytes"] == decoder.num_parameters * sizes[weights]
    assert about["model"]["cache_bytes_per_token"] == costs.cache_bytes(decoder, 1, sizes[cache])


def test_least_times(cost_of):
    about = cost_of("--tflops", "1.5", "--gbps", "20", "--questions", "9")
    made = costs.ways(costs.known_setup("mistral-7b"), LOAD)
    rates = 1.5e12, 20e9
    assert about["rates"] == {"flops_per_second": rates[0], "bytes_per_second": rates[1]}
    for name, way in made.items():
        assert about["ways"][name]["least_seconds"] == {
            "first_token": way.first.seconds(*rates, first_token=True),
            "first_question": way.first.seconds(*rates),
            "later_question": way.later.seconds(*rates),
            "questions": way.total(9, lambda request: request.seconds(*rates)),
        }
    for pair in about["questions_won_in_least_time"]:
        won = costs.questions_won(made[pair["way"]], made[pair["rival"]], lambda request: request.seconds(*rates))
        assert pair["questions"] == as_in_json(won)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_bundled_checkpoint_is_the_known_setup(cost_of):
    """A checkpoint names its model and its encoder."""
    about, expected = cost_of("-c", "smollm2-135m"), cost_of("--model", "smollm2-135m")
    check(about, costs.known_setup("smollm2-135m"))
    changed = {"checkpoint": "smollm2-135m", "scaling": "plain"}
    expected["hypernetwork"] |= changed
    assert about == expected


@pytest.fixture
def native(folder):
    """Factory: a checkpoint for the tiny model and MiniLM, its hypernetwork and its blocks changed."""

    def make(hypernetwork=None, **blocks):
        decoder, encoder = costs.Decoder.from_config(LLAMA), known.encoder_named("minilm")
        values = dataclasses.asdict(known.hypernetwork_for(decoder, encoder)) | (hypernetwork or {})
        return folder({"format": checkpoints.FORMAT, "hypernetwork": values} | blocks, "checkpoint")

    return make


def test_encoders_of_checkpoints(cost_of, native, folder):
    model = folder(LLAMA)

    def encoder(width, *options, **blocks):
        about = cost_of("-c", native({"embed_dim": width}, **blocks), *options)
        return about["encoder"]["name"], about["encoder"]["bytes_per_value"]

    last = {"name": str(model), "pooling": "last"}
    assert encoder(384, "--model", model) == ("minilm", 2)
    assert encoder(64, base_model=str(model), encoder=last) == ("model", 0)
    gte = {"name": "Alibaba-NLP/gte-large-en-v1.5", "pooling": "cls"}
    assert encoder(1024, base_model=str(model), encoder=gte) == (gte["name"], 2)
    bert = folder(BERT, "bert")
    assert encoder(48, "--encoder", bert, base_model=str(model), encoder=gte) == (str(bert), 2)
    args = {"args": {"emb_model": "thenlper/gte-base"}}
    assert encoder(48, "--encoder", bert, base_model=str(model), reference=args) == (str(bert), 2)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hypernetwork": {"in_features": (32, 64)}}, "q_proj: the model has 64 to 64"),
        ({"hypernetwork": {"modules": ("q_proj", "qkv_proj")}}, "qkv_proj: "),
        ({"hypernetwork": {"num_layers": 3}}, "num_layers: expected 2"),
        ({"hypernetwork": {"embed_dim": 1024}}, "embed_dim: expected 384"),
        ({"hypernetwork": {"rank": 0}}, "config.json: hypernetwork: rank: "),
        ({"format": "another"}, "'another'"),
        ({"base_model": 3}, "base_model: "),
        ({"encoder": {"name": "one-hot", "tasks": ["a"]}}, "one-hot"),
        (
            {"encoder": {"name": "smollm2-135m", "layers": [0, 2], "queries": 4, "width": 96}},
            "got a reader, which is not counted",
        ),
        ({"encoder": {"name": "org/text", "pooling": "cls"}}, "--encoder: 'org/text': "),
        ({"reference": {"args": {"emb_model": "org/text"}}}, "emb_model: "),
    ],
)
def test_a_checkpoint_that_does_not_fit(refused, native, folder, changes, field):
    path = native(**changes)
    refused(1, [field, "--encoder" if "--encoder" in field else str(path)], "--model", folder(LLAMA), "-c", path)


def test_checkpoints_that_are_none(refused, native, folder, golden, tmp_path):
    refused(1, "--model: ", "-c", native())
    refused(1, "t2l convert", "-c", golden / "L-sft")
    refused(1, "bundled checkpoints: ['smollm2-135m', 'smollm2-135m-specs']", "-c", tmp_path / "none")
    refused(1, "config.json", "-c", tmp_path)
    refused(1, "'hypernetwork'", "-c", folder({"format": checkpoints.FORMAT}))


# --- what cannot be used -----------------------------------------------------------------------------------------------


def test_models_that_are_refused(refused, folder, tmp_path):
    """What a configuration may not say, tests/research/costs holds."""
    refused(1, ["--model: 'org/model'", *costs.known_setups()], "--model", "org/model")
    without = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    refused(1, "config.json: vocab_size: ", "--model", folder(without))
    refused(1, ["quantization_config: ", "--dtype"], "--model", folder(LLAMA | {"quantization_config": {"bits": 4}}))
    refused(1, ["dtype: ", "'float4'", "--dtype"], "--model", folder(LLAMA | {"dtype": "float4"}))
    (tmp_path / "empty").mkdir()
    refused(1, "empty/config.json", "--model", tmp_path / "empty")
    (tmp_path / "text").write_text("{")
    refused(1, "text: not valid JSON", "--model", tmp_path / "text")


def test_encoders_and_hypernetworks_that_are_refused(refused, folder):
    refused(1, ["--encoder: 'org/text'", "gte-large, minilm, model"], "--encoder", "org/text")
    for kind in ("t5", ["bert"]):
        refused(1, ["model_type: ", repr(kind)], "--encoder", folder({"model_type": kind}))
    refused(1, "variant: ", "--variant", "XL")
    mixtral = folder(FAMILIES["mixtral"] | {"model_type": "mixtral"})
    refused(1, ["modules: ", "'query'"], "--modules", "q_proj,query")
    refused(1, ["modules: ", "'up_proj'"], "--model", mixtral, "--modules", "up_proj")


@pytest.mark.parametrize("arguments", [
    "--tflops 10", "--gbps 10", "--tflops nan --gbps 10", "--tflops 0 --gbps 10", "--tasks 3 --users 2",
    "--rank 4 -c smollm2-135m", "--head-in-size 4 -c smollm2-135m", "--questions 0", "--answer 0", "--shots -1",
    "--dtype fp64", "--users x",
])  # fmt: skip
def test_wrong_usage(refused, arguments):
    """The message names the first of the options."""
    refused(2, arguments.split()[0], *arguments.split())


# --- what is printed ---------------------------------------------------------------------------------------------------


def printed(run, *arguments):
    code, out, err = run("cost", *arguments)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    return " ".join(out.split())


@pytest.mark.parametrize("name", costs.known_setups())
def test_tables_of_known_models(run, name):
    text = printed(run, "--model", name, "--users", "16", "--tasks", "16", "--tflops", "10", "--gbps", "100")
    assert all(text.count(f"│ {costs.LABELS[way]} │") == 2 for way in costs.WAYS)  # FLOPs, and roofline times
    assert "10.0 TFLOP/s" in text and "100 GB/s" in text


def test_the_table_says_what_the_library_says(run):
    text = printed(run)
    made = costs.ways(costs.known_setup("mistral-7b"), LOAD)
    for name, way in made.items():
        first, later = way.first.flops(first_token=True) / 1e12, way.later.flops() / 1e12
        row = re.search(rf"│ {costs.LABELS[name]} │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │", text)
        values = (first, later, way.total(100) / 1e12, way.total(100) / made["t2l-task"].total(100))
        assert list(map(float, row.groups())) == pytest.approx(values, rel=5.1e-3)
    for fact in ("mistral-7b", "7.24 billion", "14.5 GB", "131 kB", "55.4 million", "shots of 80", "question 59"):
        assert fact in text


def test_break_even_points_in_words(run):
    """The numbers, and another sentence for every kind of answer: always, from n on, never, up to n."""
    setup = costs.known_setup("mistral-7b")
    made, text = costs.ways(setup, LOAD), printed(run)
    start, end = costs.questions_won(made["t2l-task"], made["icl-warm"])
    tasks = costs.tasks_to_win(made["t2l-task"], made["icl-cold"])
    assert start > 1 and end is None and tasks > 1  # or the sentences are others
    for fact in ("at every number of questions", f"from {start} questions on", f"{costs.tokens_of_adapter(setup)} tokens",
                 f"from {tasks} tasks at a time on", "979 MB"):  # fmt: skip
        assert fact in text
    text = printed(run, "--shots", "0")
    assert "at no number of tasks" in text and "979 MB" not in text
    # A large hypernetwork for one question: no number of short examples pays it back.
    few = printed(run, "--model", "smollm2-135m", "--questions", "1", "--shot", "0", "--instruction", "1")
    assert "no number of shots up to 1,024" in few


def test_a_win_that_ends():
    pair = {"way": "t2l-request", "rival": "icl", "questions": [1, 3]}
    assert "up to 3 questions" in cost_tables._won(pair)


def test_numbers_as_text():
    assert [cost_tables.digits(x) for x in (0, 123456, 1234567, 0.000012345, 9.996)] == [
        "0", "123,000", "1.23e+06", "0.0000123", "10.0",
    ]  # fmt: skip
    assert cost_tables.amount(0.4, "B") == "0.400 B"
    assert cost_tables.amount(999.96e3, "B") == "1.00 MB"


def test_names_of_files_are_shown_not_obeyed(run, folder):
    text = run("cost", "--model", folder(LLAMA, "[red]\x1b[31mbase"))[1]
    assert "[red]" in text and "\x1b" not in text


# --- the entry point ---------------------------------------------------------------------------------------------------


def launch(*arguments, **options):
    command = [sys.executable, "-c", "import t2l_command; t2l_command.main()", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, **({"capture_output": True} | options))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--version", 0, ""),
        ("cost --json -c smollm2-135m --tflops 1 --gbps 1", 0, ""),
        ("cost --help", 0, ""),
        ("cost --model org/model", 1, "t2l: --model: 'org/model': "),
        ("cost --tflops 1", 2, "Usage: "),
    ],
)
def test_the_entry_point(arguments, status, message, monkeypatch, capsys):
    """What a process prints and its status; one is started where an error ends it, and for the version."""
    if arguments == "--version" or status == 1:
        done = launch(*arguments.split())
        returned, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["t2l", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            t2l_command.main()
        returned, (out, err) = ended.value.code or 0, capsys.readouterr()
    assert returned == status and message in err
    assert status or not err
    if "--json" in arguments:
        json.loads(out)
    elif "--help" in arguments:
        assert all(f"--{name}" in out for name in ("model", "cache-dtype", "tflops", "json"))
    elif "--version" in arguments:
        assert out == f"t2l_engine {t2l.__version__}\n"


def test_large_numbers_take_little_work(run):
    """Closed forms: nothing is done once a token or a user, and a few calls of functions for every task at a time."""
    tasks = 1 << 13

    def calls(*arguments):
        with cProfile.Profile() as work:
            assert run("cost", *map(str, arguments))[0] == 0
        return sum(entry.callcount for entry in work.getstats())

    calls()  # imports
    usual = calls()
    assert calls("--answer", 1 << 20, "--users", 1 << 16) < 2 * usual
    assert calls("--answer", 1 << 20, "--users", tasks, "--tasks", tasks) < 2 * usual + 32 * tasks


def test_a_closed_pipe_is_quiet():
    for arguments in (("cost",), ("cost", "--json")):
        reader, writer = os.pipe()
        os.close(reader)
        done = launch(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert done.returncode == 1 and not done.stderr
