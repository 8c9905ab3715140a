"""Has a running SGLang server load the adapters of sentences, and prints their names; see docs/sglang.md.

Written against SGLang's documented HTTP interface and tested against a stub of it: SGLang's LoRA needs a GPU.
"""

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path

import t2l_engine as t2l
from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import AdapterStore

#: Answers of SGLang's registry and backend for a name that is loaded; its weights are the same, as the name is their digest.
LOADED = ("already exists", "because it is already loaded")


def load(url: str, name: str, folder: Path, key: str = "") -> None:
    """Have the server at ``url`` read ``folder`` as the adapter ``name``; RuntimeError with its reason if it refuses.

    ``key``: the server's --api-key or --admin-api-key; empty: it has none.
    """
    body = json.dumps({"lora_name": name, "lora_path": str(folder), "pinned": False}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url.rstrip('/')}/load_lora_adapter", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            reply = response.read()
    except urllib.error.HTTPError as error:  # 400: refused, with the reason in the body
        reply = error.read()
    said = reply.decode("utf-8", "replace")
    try:
        done = json.loads(said)["success"] is True
    except (ValueError, KeyError, TypeError):  # a proxy's page, or another answer
        done = False
    if not done and not any(f"{name} {why}" in said for why in LOADED):
        raise RuntimeError(f"{url}: adapter {name} is not loaded: {said}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sentences", nargs="+", help="task descriptions, one adapter each")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--store", type=Path, required=True, help="adapter store; the server sees it under the same path")
    parser.add_argument("--checkpoint", default="smollm2-135m", help="bundled name or folder")
    parser.add_argument("--gigabytes", type=int, default=10, help="most GB in the adapter store")
    parser.add_argument("--key", default="", help="the server's --api-key")
    given = parser.parse_args(argv)
    checkpoint = Checkpoint.of(t2l.TextToLoRA.from_pretrained(given.checkpoint), "sglang")
    store = AdapterStore(given.store, given.gigabytes * 10**9)
    for key, folder in checkpoint.folders(given.sentences, store):
        name = names.adapter_id(key)
        load(given.url, name, folder, given.key)
        print(name)


if __name__ == "__main__":
    main()
