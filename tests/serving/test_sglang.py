"""Adapters in SGLang, against a stub of its documented interface: names, folders, refusals; tensors in process."""

import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from t2l_engine import AdapterStack
from t2l_engine.adapters.peft import PREFIX
from t2l_engine.serving.sglang import SGLangClient, SGLangError, load
from t2l_engine.serving.store import AdapterStore

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Return the last element of the list.", "Write the word in capital letters."]


class Stub(ThreadingHTTPServer):
    """POST /load_lora_adapter and /unload_lora_adapter as SGLang answers them: 200, or 400 with the reason."""

    def __init__(self, key=""):
        self.adapters, self.requests, self.key, self.broken = {}, [], key, ""
        self.known = "LoRA with name {} already exists."
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path, body):
        name = body["lora_name"]
        if path == "/unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                return f"LoRA with name {name} does not exist. Loaded LoRAs: {self.adapters.keys()}"
        elif path == "/load_lora_adapter":
            assert set(body) == {"lora_name", "lora_path", "pinned"}
            if name in self.adapters:
                return self.known.format(name)
            self.adapters[name] = AdapterStack.from_peft(body["lora_path"])
        return ""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body["lora_name"]))
        if self.server.broken:
            status, said = 500, self.server.broken
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            status, said = 401, json.dumps({"error": "Unauthorized"})
        else:
            error = self.server.answer(self.path, body)
            loaded = {name: "path" for name in self.server.adapters}
            status, said = (
                400 if error else 200,
                json.dumps({"success": not error, "error_message": error, "loaded_adapters": loaded}),
            )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(said.encode())


@pytest.fixture
def server():
    made = []

    def start(**options):
        made.append(Stub(**options))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store", 1 << 26)


def test_sentences_become_names(server, bundled, store):
    server = server()
    client = SGLangClient(server.url + "/", bundled.engine, store, base="base")
    first, second, again = client.ensure([*TEXTS, TEXTS[0]])
    assert first == again != second and first.startswith("t2l-") and set(server.adapters) == {first, second}
    right = bundled.engine.generate([TEXTS[0]])
    loaded = server.adapters[first]
    for name in right.lora_B:  # the scaling is in B, in bfloat16
        torch.testing.assert_close(loaded.lora_B[name].float(), 2 * right.lora_B[name].float(), rtol=2**-7, atol=1e-6)
    assert loaded.scaling.tolist() == [1.0]
    assert len(server.requests) == 2 and client.ensure(TEXTS) == [first, second]
    server.adapters.clear()  # a restart
    assert client.ensure(TEXTS) == [first, second] and set(server.adapters) == {first, second}


def test_the_page(server, tmp_path):
    """The program of docs/sglang.md."""
    server = server()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8"), re.S)
    found = {"URL": server.url, "FOLDER": str(tmp_path / "store")}
    exec(compile(code, "docs/sglang.md", "exec"), found)
    assert list(server.adapters) == [found["name"]]


@pytest.mark.parametrize(
    "said", ["LoRA with name {} already exists.", "Failed to load LoRA adapter {} because it is already loaded"]
)
def test_another_client_has_it_loaded(server, bundled, store, said):
    """The registry says the first; newer servers ask their backend before, which says the second."""
    server = server()
    server.known = said
    right = SGLangClient(server.url, bundled.engine, store).ensure(TEXTS)
    assert SGLangClient(server.url, bundled.engine, store).ensure(TEXTS) == right and len(server.requests) == 4


def test_unload(server, bundled, store):
    server = server()
    client = SGLangClient(server.url, bundled.engine, store)
    (name,) = client.ensure(TEXTS[:1])
    client.unload(name)
    assert not server.adapters
    assert client.ensure(TEXTS[:1]) == [name] and set(server.adapters) == {name}
    with pytest.raises(SGLangError, match="/unload_lora_adapter: LoRA with name t2l-0 does not exist"):
        client.unload("t2l-0")


def test_a_key(server, bundled, store):
    server = server(key="secret")
    with pytest.raises(SGLangError, match="Unauthorized"):
        SGLangClient(server.url, bundled.engine, store).ensure(TEXTS[:1])
    assert SGLangClient(server.url, bundled.engine, store, key="secret").ensure(TEXTS[:1]) == list(server.adapters)


@pytest.mark.parametrize("said", ["", "<html>Bad gateway</html>", "[1]", '{"success": false}'])
def test_a_server_that_fails(server, bundled, store, said):
    server = server()
    client = SGLangClient(server.url, bundled.engine, store)
    server.broken = said or " "
    with pytest.raises(SGLangError, match=server.url + "/load_lora_adapter: "):
        client.ensure(TEXTS[:1])
    server.broken = ""
    assert client.ensure(TEXTS[:1]) == list(server.adapters)  # what failed was not taken for loaded


def test_no_server(bundled, store):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(SGLangError, match="no answer"):
        SGLangClient(f"http://127.0.0.1:{port}", bundled.engine, store).ensure(TEXTS[:1])
    with pytest.raises(ValueError, match="url: expected http"):
        SGLangClient("127.0.0.1:9", bundled.engine, store)


def test_a_text_is_refused(server, bundled, store):
    server = server()
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        SGLangClient(server.url, bundled.engine, store).ensure([TEXTS[0], " "])
    assert not server.requests


def test_tensors_in_process(bundled):
    class Engine:
        def load_lora_adapter_from_tensors(self, lora_name, tensors, config_dict, load_format=None):
            self.name, self.tensors, self.config = lora_name, tensors, config_dict

    engine, stack = Engine(), bundled.engine.generate(TEXTS)
    load(engine, stack, 1, "capitals")
    key = f"{PREFIX}model.layers.3.self_attn.q_proj.lora_B.weight"
    assert engine.name == "capitals" and engine.config["r"] == engine.config["lora_alpha"] == 8
    assert sorted(engine.config["target_modules"]) == ["q_proj", "v_proj"]
    torch.testing.assert_close(engine.tensors[key], 2 * stack.lora_B["q_proj"][1, 3].float())
    assert len(engine.tensors) == 2 * 2 * 30
