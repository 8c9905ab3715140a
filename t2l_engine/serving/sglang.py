"""Generated adapters in SGLang: by its HTTP server, from folders, or by an engine in this process, as tensors.

Written against SGLang's documented interface and tested against a stub of it; never run against SGLang itself, whose LoRA
needs a GPU.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import TextToLoRA
from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import AdapterStore


class SGLangError(RuntimeError):
    """What a server refused or did not answer; the message is its own."""


class SGLangClient:
    """Has a server of SGLang load the adapters of sentences.

    The server reads folders of ``store``, so it must see them under the same path.  An adapter's name is made of all that
    its weights depend on, so the server's prefix cache stays right.  Beyond --max-loaded-loras SGLang drops those least
    recently used, and reads them again when asked.  Weights never go over HTTP, where SGLang would unpickle them.

    Args:
        url: of the server, ``"http://127.0.0.1:30000"``.
        engine: makes the adapters.
        store: where they are written.
        base: the base model's name for adapter_config.json; None: not stated.
        key: the server's --api-key or --admin-api-key; empty: it has none.
        timeout: seconds for a request.
    """

    def __init__(
        self,
        url: str,
        engine: TextToLoRA,
        store: AdapterStore,
        *,
        base: str | None = None,
        key: str = "",
        timeout: float = 60.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http:// or https://, got {url!r}")
        self._url, self._key, self._timeout, self._store = url.rstrip("/"), key, timeout, store
        self._checkpoint = Checkpoint.of(engine, "sglang", base)
        self._lock = threading.Lock()  # an engine answers one call at a time

    def ensure(self, texts: Sequence[str]) -> list[str]:
        """Names of the adapters of ``texts``, which the server has loaded, also after it was restarted.

        A name is the ``lora_path`` of /generate and, after the base model's and a colon, ``model`` of the OpenAI endpoints.

        Raises ValueError for a text that the encoder refuses, Unavailable where the store has no room, SGLangError.
        """
        with self._lock:
            found = [(names.adapter_id(key), folder) for key, folder in self._checkpoint.folders(texts, self._store)]
            for name, folder in dict(found).items():
                self._load(name, folder)
            return [name for name, _ in found]

    def unload(self, name: str) -> None:
        """Have the server forget the adapter ``name``; its folder stays.  Raises SGLangError."""
        self._post("/unload_lora_adapter", {"lora_name": name})

    def _load(self, name: str, folder: Path) -> None:
        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "pinned": False})
        except SGLangError as error:
            # The same weights: names are made of what they depend on.  Its registry says the first, its backend the second.
            if not any(f"{name} {why}" in str(error) for why in ("already exists", "because it is already loaded")):
                raise

    def _post(self, path: str, body: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers, method="POST")
        try:
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    said = response.read()
            except urllib.error.HTTPError as error:  # 400: refused, with the reason
                said = error.read() or str(error).encode()
        except (OSError, http.client.HTTPException) as error:
            raise SGLangError(f"{self._url}{path}: no answer: {error!r}") from error
        try:
            answer = json.loads(said)
        except ValueError:
            answer = said.decode("utf-8", "replace")
        if not isinstance(answer, dict) or answer.get("success") is not True:
            reason = answer.get("error_message") if isinstance(answer, dict) else answer
            raise SGLangError(f"{self._url}{path}: {reason or answer}")


def load(sglang_engine: Any, stack: AdapterStack, index: int, name: str) -> None:
    """Load adapter ``index`` of ``stack`` into a ``sglang.Engine`` of this process as ``name``, without a folder.

    SGLang cannot read such an adapter again, so it never drops it, and --max-loaded-loras is their most.

    Raises IndexError for another index, and what SGLang raises.
    """
    sglang_engine.load_lora_adapter_from_tensors(
        lora_name=name, tensors=stack.state_dict_peft(index, fold=True), config_dict=stack.peft_config(index, fold=True)
    )
