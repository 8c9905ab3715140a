"""Broken safetensors files: ``hypernet.safetensors`` of a native checkpoint and ``adapter_model.safetensors`` of PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load, save

from tests.hostile import Case, Workshop

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
        yield from _damage(case, shop, whole)
    yield from _adapter_tensors(shop)


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


def _damage(case: Callable[..., Case], shop: Workshop, whole: bytes) -> Iterator[Case]:
    (length,) = struct.unpack("<Q", whole[:8])
    for n in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, 9 + length, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        yield case(f"cut-{n}", whole[:n])
    yield case("cut-middle", whole[: len(whole) // 2] + whole[len(whole) // 2 + 64 :])
    places = [("length", i) for i in range(8)]
    places += [("header", 8 + i) for i in shop.random.sample(range(length), 30)]
    places += [("tensor", i) for i in shop.random.sample(range(8 + length, len(whole)), 20)]
    for kind, at in places:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << shop.random.randrange(8)
        yield case(f"flip-{kind}-{at}", bytes(flipped), harmless=True)


def _adapter_tensors(shop: Workshop) -> Iterator[Case]:
    """What only a PEFT file can do."""
    file, key = FILES["adapter"], KEYS["adapter"]
    state = load(shop.read("adapter", file))
    where = key.removesuffix(".lora_A.weight")
    path = where.removeprefix("base_model.model.")
    a, b = state[key], state[f"{where}.lora_B.weight"]
    rest = {k: v for k, v in state.items() if not k.startswith(where + ".")}

    def case(name: str, new: State, *mentions: str, base: State = rest) -> Case:
        return shop.case(f"adapter-{name}", "adapter", file, save(base | new), *mentions)

    def moved(where: str) -> State:
        return {f"{where}.lora_A.weight": a.clone(), f"{where}.lora_B.weight": b.clone()}

    yield case("without-B", {key: a}, path)
    yield case("ranks-differ", {key: a, f"{where}.lora_B.weight": b[:, 1:].clone()}, path)
    yield case("features-differ", {key: a[:, 1:].clone(), f"{where}.lora_B.weight": b}, "q_proj")
    yield case("rank-0", {key: a[:0].clone(), f"{where}.lora_B.weight": b[:, :0].clone()}, path)
    yield case("no-features", {key: a[:, :0].clone(), f"{where}.lora_B.weight": b}, "q_proj")
    yield case("A-flat", {key: a.flatten(), f"{where}.lora_B.weight": b}, path)
    yield case("A-of-three", {key: a[..., None].clone(), f"{where}.lora_B.weight": b}, path)
    yield case("B-of-four", {key: a, f"{where}.lora_B.weight": b[..., None, None].clone()}, path)
    yield case("cast-overflows", {key: a.half(), f"{where}.lora_B.weight": b.double() * 1e200}, "q_proj")
    layer = "base_model.model.model.layers.{}.self_attn.q_proj"
    for name, index in {"1e9": 10**9, "2-63": 1 << 63, "5000": 5000, "digits": "9" * 5000}.items():
        yield case(f"layer-{name}", moved(layer.format(index)))
    yield case("layer-superscript", moved(layer.format("\N{SUPERSCRIPT TWO}")))
    yield case("layer-twice", moved(layer.format("00")) | moved(layer.format("0")))
    for name, where in {
        "braces": "base_model.model.model.layers.0.{layer.__class__}.q_proj",
        "placeholder": "base_model.model.model.layers.{layer}.self_attn.q_proj",
        "empty-component": "base_model.model.model..layers.0.self_attn.q_proj",
        "parent": "base_model.model.../../etc/passwd.0.q_proj",
        "newline": "base_model.model.model.layers.0.self_attn.q\nproj",
        "long": "base_model.model.model.layers.0." + "x" * 100_000 + ".q_proj",
        "many-components": "base_model.model." + "x." * 20_000 + "layers.0.q_proj",
        "experts": "base_model.model.model.layers.0.mlp.experts.3.up_proj",
        "no-prefix": "model.layers.0.self_attn.q_proj",
        "empty": "base_model.model.",
    }.items():
        yield case(f"path-{name}", moved(where))
    for name, other in {
        "magnitude": f"{where}.lora_magnitude_vector",
        "embedding": f"{where.replace('q_proj', 'embed_tokens')}.lora_embedding_A",
        "bias": f"{where}.lora_B.bias",
        "adapter-name": f"{where}.lora_A.default.weight",
        "saved-module": "base_model.model.lm_head.modules_to_save.weight",
        "base-bias": f"{where}.base_layer.bias",
    }.items():
        yield case(f"key-{name}", {other: a.clone()}, other, base=state)
    sparse_layers = {k: v for i in range(0, 4000, 999) for k, v in moved(layer.format(i)).items()}
    yield case("layers-far-apart", sparse_layers, base={})
    last = layer.format(127)
    wide = {f"{last}.lora_A.weight": torch.ones(4, 8192)}  # small in the file, large with the layers in front of it
    wide[f"{last}.lora_B.weight"] = torch.full((200_000, 4), 1e39, dtype=torch.float64)
    yield case("beyond-float32-in-the-last-layer", wide, "q_proj", base={})
