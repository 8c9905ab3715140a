"""examples/sglang/load_adapters.py against a stub of SGLang's documented interface: names, folders, refusals."""

import json
import runpy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from t2l_engine import AdapterStack, TextToLoRA

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "sglang" / "load_adapters.py"
TEXTS = ["Return the last element of the list.", "Write the word in capital letters."]


class Handler(BaseHTTPRequestHandler):
    """POST /load_lora_adapter as SGLang answers it: 200, or 400 with the reason; ``server.broken``: a proxy's page."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/load_lora_adapter" and set(body) == {"lora_name", "lora_path", "pinned"}
        name, error = body["lora_name"], ""
        if self.headers["Authorization"] != "Bearer secret":
            error = "Unauthorized"
        elif name in self.server.adapters:
            error = self.server.known.format(name)
        else:
            self.server.adapters[name] = AdapterStack.from_peft(body["lora_path"])
        self.send_response(400 if error else 200)
        self.end_headers()
        answer = json.dumps({"success": not error, "error_message": error})
        self.wfile.write((self.server.broken or answer).encode())


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.adapters, made.broken, made.known = {}, "", ""
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def load(server, bundled, monkeypatch, capsys, tmp_path):
    """Runs the script; the names that it prints."""
    monkeypatch.setattr(TextToLoRA, "from_pretrained", lambda source: bundled.engine)
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*texts, key="secret"):
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        main([*texts, "--url", url, "--store", str(tmp_path / "store"), "--key", key])
        return capsys.readouterr().out.split()

    return run


@pytest.mark.parametrize("known", ["LoRA with name {} already exists.", "LoRA adapter {} because it is already loaded"])
def test_sentences_become_names(load, server, bundled, known):
    """The same ones again, whether the server has them loaded or was restarted."""
    server.known = known
    names = load(*TEXTS)
    assert set(names) == set(server.adapters) and len(set(names)) == 2 and names[0].startswith("t2l-")
    right = bundled.engine.generate(TEXTS[:1])
    assert server.adapters[names[0]].lora_B["q_proj"].equal(2 * right.lora_B["q_proj"]), "the scaling is in B"
    assert load(*TEXTS) == names
    server.adapters.clear()
    assert load(*TEXTS) == names == list(server.adapters)


@pytest.mark.parametrize("broken", ["<html>Bad gateway</html>", "[1]", '{"success": false}'])
def test_what_is_not_loaded_is_an_error(load, server, broken):
    with pytest.raises(RuntimeError, match="is not loaded: .*Unauthorized"):
        load(*TEXTS, key="")
    server.broken = broken
    with pytest.raises(RuntimeError, match="is not loaded: "):
        load(*TEXTS)
