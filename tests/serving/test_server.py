"""``vllm serve`` with the plugin, over HTTP: a sentence as the model, the endpoint, bad input, restarts."""

import concurrent.futures
import json
import signal

import pytest
import torch

import t2l_engine as t2l
from bench.vllm_server import VllmServer
from t2l_engine.cli import serve_flags
from t2l_engine.serving.choose import Server, choose
from t2l_engine.text import packaged
from t2l_engine.text.prompts import raw_prompt

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]
ANTONYM = "t2l:Give the antonym of the word."
WORD = "early"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Factory of servers, which are ended with the module; ``environment`` replaces variables."""
    store, started = tmp_path_factory.mktemp("store"), []
    log = tmp_path_factory.mktemp("log") / "server.log"

    def make(*flags, **environment):
        variables = {"T2L_VLLM_CHECKPOINT": "smollm2-135m", "T2L_VLLM_STORE": str(store)} | environment
        chosen = serve_flags.collect(variables["T2L_VLLM_CHECKPOINT"].split(","), 2, 4)["flags"]
        # Compiled engines, which start in a minute, have a test of their own.
        server = VllmServer(str(packaged.convert()), [*chosen, "--enforce-eager", *flags], variables, log)
        started.append(server)
        server.store = store
        return server.wait()

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def server(start):
    return start()


def folders(server):
    return {folder.name for folder in server.store.iterdir() if folder.is_dir()}


def test_a_sentence_is_a_model(server):
    """The answer that transformers gives with the same adapter, and not the base model's."""
    engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    model, tokenizer = packaged.load(torch.bfloat16)
    lora = t2l.attach(model, engine.generate([ANTONYM.removeprefix("t2l:")]).to(dtype=torch.bfloat16))
    prompt = tokenizer(engine.prompt(tokenizer, WORD), return_tensors="pt", add_special_tokens=False)
    with lora.use(0), torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    status, answer = server.complete(ANTONYM, WORD)
    assert status == 200 and answer == expected.strip()
    assert server.complete(server.name, WORD)[1] != answer


def test_probabilities_of_given_answers(server):
    """Against the log-probabilities of whole prompts, which the server computes in another batch, in bfloat16."""
    options, prompt = [" late", " early", " lately", " later on"], raw_prompt("", WORD)
    source = Server(f"http://127.0.0.1:{server.port}")
    for model in (ANTONYM, server.name):
        got, scores = choose(source, model, prompt, options), []
        before = len(source.tokens(model, prompt, [])[0])
        for option in options:
            body = {
                "model": model,
                "prompt": prompt + option,
                "max_tokens": 1,
                "echo": True,
                "logprobs": 0,
                "temperature": 0,
            }
            answer = json.loads(server.request("POST", "/v1/completions", body)[1])["choices"][0]["logprobs"]
            scores.append(sum(answer["token_logprobs"][before:-1]))
        assert [*got.values()] == pytest.approx(torch.tensor(scores).softmax(0).tolist(), abs=0.02)
        assert (max(got, key=got.get) == " late") == (model == ANTONYM)
    with pytest.raises(ValueError, match="/tokenize: expected an answer of .*, got status 404"):
        choose(source, "unknown", prompt, options)


def test_many_clients_of_one_sentence_make_one_adapter(server):
    before = folders(server)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: server.complete("t2l:Write the plural of the noun.", "cat", 4), range(64)))
    assert {status for status, _ in answers} == {200} and len({text for _, text in answers}) == 1
    assert len(folders(server) - before) == 1


def test_what_clients_and_metrics_see(server):
    server.complete(ANTONYM, WORD)
    models = json.loads(server.request("GET", "/v1/models")[1])
    assert {card["id"] for card in models["data"]} >= {server.name}
    assert all(len(card["id"]) < 40 for card in models["data"])
    _, metrics = server.request("GET", "/metrics")
    assert "vllm:num_requests_running" in metrics and "antonym" not in metrics
    assert metrics.count("vllm:lora_requests_info{") == 1  # of now, not of every set of adapters that was in use


NAMES = (
    "t2l:\n\t", "t2l:a\0b", "t2l:" + "x" * 4001, "t2l/:x", "t2l/a/b:x", "t2l/..:x", "t2l/nobody:hot", "t2l-0123456789abcdef",
    "t2lq-", "t2l/" + "x" * 500, " t2l:hot", "../..", "t2l\u00e4hot",
)  # fmt: skip
BODIES = (b"", b"null", b"\xff\xfe", b"[" * 5000, b'{"description": 1}', b'{"description": "\\ud800"}')


def test_bad_input_is_refused_and_the_server_lives(server):
    """A status below 500 with a reason, and no traceback; tests of names and of the endpoint have more."""
    before, message = folders(server), [{"role": "user", "content": "hot"}]
    asked = [("/v1/chat/completions", {"model": name, "messages": message, "max_tokens": 1}) for name in NAMES]
    for path, body in (*asked, *(("/v1/t2l/adapters", body) for body in BODIES)):
        status, text = server.request("POST", path, body)
        assert 400 <= status < 500, (body, status, text)
        assert "Traceback" not in text and json.loads(text)["error"]["message"]
    assert folders(server) == before
    assert server.complete(ANTONYM, WORD)[0] == 200


def test_a_killed_server_answers_the_same_from_its_store(start, server):
    texts = [ANTONYM, "t2l:Answer with the simple past of the given verb.", "t2l:Return the first letter of the word."]
    before = [server.complete(text, "borrow") for text in texts]
    made = folders(server)
    server.stop(signal.SIGKILL)
    again = start("--api-key", "secret")
    for path in ("/v1/completions", "/v1/t2l/adapters", "/tokenize", "/invocations", "/adapters"):  # all make adapters
        assert again.request("POST", path, {"model": "t2l:hot", "prompt": "hot"})[0] == 401, path
    again.headers["Authorization"] = "Bearer secret"
    assert again.request("POST", "/tokenize", {"model": ANTONYM, "prompt": "hot"})[0] == 200
    assert [again.complete(text, "borrow") for text in texts] == before
    assert folders(again) == made


def test_a_document_becomes_a_model(start, tmp_path):
    """In memory mode: the answer of its adapter with transformers; one of a higher rank is refused, and the server lives."""
    config = t2l.PerceiverConfig(
        variant="perceiver-flat", modules=("down_proj",), in_features=(1536,), out_features=(576,), num_layers=30, rank=4,
        lora_alpha=4.0, scaling=4.0, feature_size=576, latent_size=32, num_latents=4, num_blocks=1,
    )  # fmt: skip
    torch.manual_seed(2)  # of an adapter that changes the answer, whose four tokens are not close calls
    network = t2l.PerceiverHyperNetwork(config)
    torch.nn.init.normal_(network.head, std=0.08)
    reader = t2l.DocumentEncoderConfig("smollm2-135m", "last", 2, max_chunk_tokens=16, prefix="", suffix="")
    engine = t2l.DocToLoRA(t2l.DocumentEncoder.from_config(reader), network, "raw")
    engine.save_pretrained(tmp_path / "documents")
    server = start(T2L_VLLM_CHECKPOINT=f"smollm2-135m,{tmp_path / 'documents'}", T2L_VLLM_MODE="memory")
    text, answers = "The code of the door is 7341.", []
    created = server.request("POST", "/v1/t2l/adapters", {"document": text, "checkpoint": "documents"})
    assert created[0] == 200, created
    model, tokenizer = packaged.load(torch.bfloat16)
    lora = t2l.attach(model, engine.generate([text]).to(dtype=torch.bfloat16))
    prompt = tokenizer(raw_prompt("", WORD), return_tensors="pt", add_special_tokens=False)
    for adapter in (0, -1):
        with lora.use(adapter), torch.inference_mode():
            out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        answers.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    name = json.loads(created[1])["id"]
    assert [server.complete(named, WORD, 4)[1] for named in (name, server.name)] == answers and answers[0] != answers[1]
    asked = {"document": text * 9, "checkpoint": "documents"}
    status, refused = server.request("POST", "/v1/t2l/adapters", asked)
    assert status == 400 and "exceeds this server's --max-lora-rank 8" in refused
    assert server.request("POST", "/v1/t2l/adapters", {"document": "x" * (7 << 20)})[0] == 413
    assert server.complete(name, WORD, 4)[1] == answers[0]


@pytest.mark.release  # it starts servers of its own
def test_a_full_store_and_too_many_names_are_503(start, tmp_path):
    """Two adapters have room; a third sentence that was made before has a name left, and a fourth has none."""
    made = tmp_path / "store"
    before = start(T2L_VLLM_STORE=str(made), T2L_VLLM_MODE="disk")
    assert before.complete("t2l:Name 7 things.", "hot", 1)[0] == 200
    before.stop(signal.SIGTERM)
    limits = {"T2L_VLLM_STORE_BYTES": "4000000", "T2L_VLLM_MAX_NAMES": "3"}
    server = start(T2L_VLLM_STORE=str(made), T2L_VLLM_MODE="disk", **limits)
    answers = [server.complete(f"t2l:Name {i} things.", "hot", 1) for i in (0, 1, 2, 3, 7, 4, 0)]
    assert [status for status, _ in answers] == [200, 200, 503, 503, 200, 503, 200]
    assert all("bytes" in answers[i][1] for i in (2, 3)) and "have names" in answers[5][1]
