"""Broken safetensors files: ``hypernet.safetensors`` of a native checkpoint and ``adapter_model.safetensors`` of PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load, save

from tests.hostile.folders import Case, Workshop

MIB = 1 << 20
FILES = {"native": "hypernet.safetensors", "adapter": "adapter_model.safetensors"}
KEYS = {"native": "mixer.linear2.bias", "adapter": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"}

State = dict[str, torch.Tensor]


def cases(shop: Workshop) -> Iterator[Case]:
    for base, file in FILES.items():
        whole = shop.read(base, file)

        def case(
            name: str, content: bytes, *mentions: str, harmless: bool = False, base: str = base, file: str = file
        ) -> Case:
            return shop.case(f"{base}-{name}", base, file, content, *mentions, harmless=harmless)

        yield from _headers(case, whole, KEYS[base])
        yield from _tensors(case, load(whole), KEYS[base])


def split(whole: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(header: bytes | dict, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _headers(case: Callable[..., Case], whole: bytes, key: str) -> Iterator[Case]:
    header, data = split(whole)
    for name, length in {
        "zero": 0,
        "one": 1,
        "beyond": len(whole),
        "limit": 100_000_000,
        "2-63": 1 << 63,
        "2-64": (1 << 64) - 1,
    }.items():
        yield case(f"header-length-{name}", struct.pack("<Q", length) + whole[8:])
    for name, raw in {
        "text": b"not json",
        "list": b"[]",
        "null": b"null",
        "empty": b"",
        "object": b"{}",
        "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "deep-list": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "not-utf8": b'{"\xff": {}}',
        "nul": b"{}\0",
        "spaces": b"{}" + b" " * (64 * MIB),
        "many": b"{"
        + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(50_000))
        + b"}",
        "long-name": json.dumps(header | {"x" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(),
    }.items():
        yield case(f"header-{name}", join(raw, b"" if name in ("object", "many") else data))
    text = json.dumps(header)
    first = json.dumps({key: header[key] | {"data_offsets": [0, 128]}})[1:-1]
    yield case("header-duplicate-key", join(b"{" + first.encode() + b"," + text[1:].encode(), data), harmless=True)
    yield case("header-only", join(header, b""))
    yield case("trailing-bytes", whole + bytes(64))
    yield case("trailing-byte", whole + b"\0")
    for name, metadata in {"list": [], "numbers": {"format": 1}, "null": None, "nested": {"format": {}}}.items():
        if metadata is not None:
            yield case(f"metadata-{name}", join(header | {"__metadata__": metadata}, data))
    checksum = {k: v[:-1] + ("0" if v[-1] != "0" else "1") for k, v in header["__metadata__"].items() if k != "format"}
    yield case("checksum", join(header | {"__metadata__": header["__metadata__"] | checksum}, data))

    key = max(header.keys() - {"__metadata__"}, key=lambda k: header[k]["data_offsets"])  # the last one
    entry = header[key]
    start, end = entry["data_offsets"]

    def change(name: str, harmless: bool = False, **fields) -> Case:
        return case(f"entry-{name}", join(header | {key: entry | fields}, data), harmless=harmless)

    yield change("offsets-shifted", data_offsets=[start + 4, end + 4])
    yield change("offsets-overlap", data_offsets=[0, end - start])
    yield change("offsets-reversed", data_offsets=[end, start])
    yield change("offsets-beyond", data_offsets=[len(data), len(data) + end - start])
    yield change("offsets-huge", data_offsets=[start, 1 << 63])
    yield change("offsets-negative", data_offsets=[-4, end])
    yield change("offsets-float", data_offsets=[float(start), float(end)])
    yield change("offsets-text", data_offsets=[str(start), str(end)])
    yield change("offsets-three", data_offsets=[start, end, end])
    yield change("offsets-none", data_offsets=[])
    yield change("offsets-digits", data_offsets=[start, 10**300])
    yield change("shape-larger", shape=[*entry["shape"], 2])
    yield change("shape-2-63", shape=[1 << 63])
    yield change("shape-product-wraps", shape=[1 << 32, 1 << 32])
    yield change("shape-none-of-huge", shape=[0, 1 << 62])
    yield change("shape-negative", shape=[-n for n in entry["shape"]])
    yield change("shape-float", shape=[float(n) for n in entry["shape"]])
    yield change("shape-text", shape="all")
    yield change("shape-many-dimensions", shape=[1] * 100_000 + entry["shape"])
    yield change("dtype-unknown", dtype="F33")
    yield change("dtype-other-width", dtype="F64")
    yield change("dtype-int", dtype="I32")
    yield change("dtype-f4", dtype="F4")
    yield change("dtype-null", dtype=None)
    yield change("dtype-long", dtype="x" * 100_000)
    yield change("surprise", surprise="x", harmless=True)
    yield case("entry-list", join(header | {key: [1, 2, 3]}, data))
    yield case("entry-missing-fields", join(header | {key: {}}, data))


def _tensors(case: Callable[..., Case], state: State, key: str) -> Iterator[Case]:
    tensor = state[key]

    def change(name: str, value: torch.Tensor, *mentions: str) -> Case:
        return case(f"tensor-{name}", save(state | {key: value}), *mentions)

    path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")  # how an adapter's pair is called
    yield case("tensor-missing", save({k: v for k, v in state.items() if k != key}), path)
    yield case("tensor-none", save({}))
    yield case("tensor-surprise", save(state | {"surprise": tensor.clone()}), "surprise")
    yield case("tensor-empty-name", save(state | {"": tensor.clone()}))
    yield case("tensor-long-name", save(state | {"x" * 100_000: tensor.clone()}))
    yield case("tensor-control-name", save(state | {"\x1b[2J\n\0": tensor.clone()}))
    yield case("tensor-10000-surprises", save(state | {f"surprise.{i}": torch.zeros(1) for i in range(10_000)}))
    for name in ("nan", "inf", "-inf"):
        for dtype in (torch.float32, torch.bfloat16):
            wrong = tensor.clone()
            wrong.view(-1)[len(wrong.view(-1)) // 2] = float(name)
            yield change(f"{name}-{str(dtype).removeprefix('torch.')}", wrong.to(dtype), key)
    large = tensor.double().clone()
    large.view(-1)[0] = 1e300  # finite here, not where it is used
    yield change("beyond-float32", large, path)
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        yield change(str(dtype).removeprefix("torch."), tensor.to(dtype), key)
    yield change("wide", tensor[None].clone(), path)
    yield change("scalar", tensor.view(-1)[0].clone(), path)
    yield change("no-rows", tensor[:0].clone(), path)
    yield change("short", tensor[1:].clone(), path)
