"""Processes of vLLM for tests: its LLM class by run_llm.py, and its HTTP server."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_PLUGINS": "t2l,t2l_http"}


def llm(plan, environment):
    """What run_llm.py prints for ``plan``."""
    script = Path(__file__).with_name("run_llm.py")
    variables = VARIABLES | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "t2l"} | environment
    done = subprocess.run(
        [sys.executable, script, json.dumps(plan)], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # vLLM says things too


class Server:
    """vLLM's HTTP server on a free port of this machine."""

    def __init__(self, model, flags, environment, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.model = log, "base"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
            "--port", str(self.port), "--served-model-name", self.model, "--max-model-len", "512", *flags,
        ]  # fmt: skip
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=os.environ | VARIABLES | environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self):
        """Until it answers; AssertionError with the end of its log if it ends before."""
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                if self.get("/health", parse=False)[0] == 200:
                    return self
            time.sleep(0.5)

    def get(self, path, parse=True):
        """(Status, body) of a GET."""
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"), parse)

    def post(self, path, body, parse=True):
        """(Status, body) of a POST of an object, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers), parse)

    def _open(self, request, parse):
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        return status, (json.loads(text) if parse else text)

    def chat(self, model, content, tokens=8):
        """(Status, answer's text or the error) of a chat at temperature 0."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
        status, answer = self.post("/v1/chat/completions", body)
        return status, answer["choices"][0]["message"]["content"] if status == 200 else answer

    def memory(self):
        """Resident bytes of all its processes."""
        pages = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if folder.name.isdecimal() and os.getsid(int(folder.name)) == self.process.pid:
                    pages += int((folder / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, sign=signal.SIGTERM):
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
