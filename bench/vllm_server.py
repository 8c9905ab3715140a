"""vLLM's HTTP server as a process on this machine, and a client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.ceilings import resident_bytes
from t2l_engine.text.prompts import raw_prompt

VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "t2l,t2l_http", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


class VllmServer:
    """The server of ``model`` on a free port of the loopback device, as the model "base"; what it prints goes to ``log``."""

    name = "base"

    def __init__(self, model: str, flags: Sequence[str], environment: Mapping[str, str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.headers = log, {"Content-Type": "application/json"}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
            "--port", str(self.port), "--served-model-name", self.name, "--max-model-len", "512", *flags,
        ]  # fmt: skip
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, env={**os.environ, **VARIABLES, **environment}, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self) -> VllmServer:
        """Until it answers; RuntimeError with the end of its log if it ends before."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}: {self.log.read_text()[-4000:]}")
            with contextlib.suppress(OSError):
                if self.request("GET", "/health")[0] == 200:
                    return self
            time.sleep(0.5)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """(Status, text) of an answer; ``body``: an object to be sent as JSON, or bytes."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), self.headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    def complete(self, model: str, text: str, tokens: int = 8) -> tuple[int, str]:
        """(Status, answer or the error's body) for ``text`` in a raw prompt, at temperature 0."""
        body = {"model": model, "prompt": raw_prompt("", text), "max_tokens": tokens, "temperature": 0}
        status, answer = self.request("POST", "/v1/completions", body)
        return status, json.loads(answer)["choices"][0]["text"].strip() if status == 200 else answer

    def chat(self, model: str, content: str, tokens: int = 8, **fields: Any) -> tuple[int, Any]:
        """(Status, body of the answer) of a chat at temperature 0."""
        status, text = self.request("POST", "/v1/chat/completions", _chat(model, content, tokens) | fields)
        return status, json.loads(text)

    def first_token(self, model: str, content: str) -> float:
        """Seconds from a request to the first piece of its answer, which vLLM sends with the first token."""
        body = _chat(model, content, 4) | {"stream": True}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            start = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self.headers)
            answer = connection.getresponse()
            for line in answer:
                if line.startswith(b"data: {"):
                    seconds = time.perf_counter() - start
                    answer.read()
                    return seconds
            raise RuntimeError(f"status {answer.status}: no token for model {model!r}")

    def memory(self) -> dict[str, int]:
        """Resident bytes by process title, of all its processes."""
        found: dict[str, int] = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if folder.name.isdecimal() and os.getsid(int(folder.name)) == self.process.pid:
                    title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                    title = title if title.startswith("VLLM") else "API server"
                    found[title] = found.get(title, 0) + resident_bytes("VmRSS", folder.name)
        return found

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _chat(model: str, content: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
