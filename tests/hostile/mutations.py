"""Mutations of files: what the property in ``test_hostile`` and ``make fuzz`` put in place of a good file."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import yaml

from tests.hostile.archive import dumps, pack, parts
from tests.hostile.fields import STRUCTURED, VALUES
from tests.hostile.folders import LOADER_OF, Workshop, judge
from tests.hostile.payloads import CALLS, RAW
from tests.hostile.safetensors_files import join, split

MAX_PAYLOAD = 1 << 19


class Target(NamedTuple):
    """A file of a good folder.  ``inside``: the pickle or header inside it is mutated, and checksums are made to fit."""

    base: str
    file: str
    loader: str
    inside: bool = False


TARGETS = [
    *(Target(base, file, loader or LOADER_OF.get(base, "hypernetwork")) for base, file, loader in STRUCTURED),
    *(Target(base, "hypermod.pt", "hypernetwork") for base in ("L-sft", "M-recon-z", "S-pos-sft")),
    Target("L-sft", "hypermod.pt", "hypernetwork", inside=True),
    *(Target("documents", "pytorch_model.bin", "documents", inside) for inside in (False, True)),
    *(Target("native", "hypernet.safetensors", "hypernetwork", inside) for inside in (False, True)),
    *(Target("adapter", "adapter_model.safetensors", "adapters", inside) for inside in (False, True)),
]
#: What is put between bytes.
BYTES = [b"[" * 3000, b"9" * 5000, b"\0", b"\xff", b'"', b"q\x00h\x00\x86", b"&a *a ", b"\n"]
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]


class Mutations:
    """Seeds and mutations of every target, and the verdict on a folder with a mutated file."""

    def __init__(self, shop: Workshop):
        self.shop = shop
        claims, records = parts(torch.load(shop.good["L-sft"] / "hypermod.pt", weights_only=True))
        with zipfile.ZipFile(shop.good["documents"] / "pytorch_model.bin") as archive:
            inside = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        self._document = inside["data.pkl"]
        self._records = {
            "hypermod.pt": records,
            "pytorch_model.bin": {key.removeprefix("data/"): of for key, of in inside.items() if key.startswith("data/")},
        }
        calls = (dumps({"mixer.4.bias": call}) for call in CALLS.values())
        self._pickles = [seed for seed in (dumps(claims), *RAW.values(), *calls) if len(seed) < MAX_PAYLOAD]

    def seeds(self, target: Target) -> list[bytes]:
        """What mutation starts from."""
        if target.inside and target.file in self._records:
            return self._pickles if target.file == "hypermod.pt" else [self._document]
        whole = self.shop.read(target.base, target.file)
        if target.inside:
            return [json.dumps(split(whole)[0]).encode()]
        if target.file.endswith(".yaml"):  # JSON is YAML, and its values can be replaced
            return [whole, json.dumps(yaml.safe_load(whole)).encode()]
        return [whole]

    def mutate(self, payload: bytes, draw: random.Random) -> bytes:
        """``payload`` with a few changes: of values where it is JSON, else of bytes."""
        for _ in range(draw.choice((1, 1, 2, 4))):
            changed = _change_json(payload, draw) if draw.random() < 0.6 else None
            payload = _change_bytes(payload, draw) if changed is None else changed
        return payload[:MAX_PAYLOAD]

    def judge(self, target: Target, payload: bytes) -> list[str]:
        """What is wrong with how a folder with ``payload`` is read or refused; such a folder is kept."""
        whole = self.shop.read(target.base, target.file)
        if target.inside:
            records = self._records.get(target.file)
            payload = pack(payload, records) if records is not None else join(payload, split(whole)[1])
        case = self.shop.case("mutated", target.base, target.file, payload, loader=target.loader, contradiction=True,
                              refusals=(ValueError, FileNotFoundError))  # fmt: skip
        found = judge(case, must_refuse=False)
        if found:
            return [*found, f"the folder is {case.folder}"]
        shutil.rmtree(case.folder)
        return found


def _change_json(payload: bytes, draw: random.Random) -> bytes | None:
    """The JSON in ``payload`` with one value replaced, removed, repeated or renamed; None where it is none."""
    if payload[:1] not in (b"{", b"[") or len(payload) > 1 << 16:
        return None
    try:
        top = json.loads(payload)
        paths = list(places(top))
        if not paths:
            return None
        node, key = _at(top, draw.choice(paths))
        kind = draw.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[draw.choice([value for value in VALUES if isinstance(value, str)])] = node.pop(key)
        elif kind == 2:
            other, place = _at(top, draw.choice(paths))
            node[key] = json.loads(json.dumps(other[place]))
        else:
            node[key] = draw.choice(VALUES)
        return json.dumps(top).encode()
    except (ValueError, RecursionError, KeyError, IndexError):
        return None


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values below ``node``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def _at(top: Any, path: tuple) -> tuple[Any, Any]:
    """The dict or list that holds the value at ``path``, and its key in it."""
    for key in path[:-1]:
        top = top[key]
    return top, path[-1]


def _change_bytes(payload: bytes, draw: random.Random) -> bytes:
    content = bytearray(payload)
    at = draw.randrange(len(content) + 1)
    if draw.random() < 0.5:  # where the structure is: at the ends
        near = draw.randrange(600)
        at = min(at, near) if draw.random() < 0.5 else max(at, len(content) - near)
    size = max(0, min(1 << draw.randrange(8), len(content) - at))
    kind = draw.randrange(6)
    if kind == 0 and size:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        content[at : at + size] = draw.getrandbits(8 * size).to_bytes(size, "little") if size else b""
    elif kind == 2:
        del content[at : at + size]
    elif kind == 3:
        content[at:at] = content[at : at + size] * draw.choice((1, 2, 100))
    elif kind == 4:
        content[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, "little")[: draw.choice((1, 2, 4, 8))]
    else:
        content[at:at] = draw.choice(BYTES)
    return bytes(content)
