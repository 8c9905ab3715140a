"""Broken safetensors files: ``hypernet.safetensors`` of a native checkpoint and ``adapter_model.safetensors`` of PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import torch
from safetensors.torch import load, save

from tests.hostile.folders import MIB, Case, Workshop

FILES = {"native": "hypernet.safetensors", "adapter": "adapter_model.safetensors"}
KEYS = {"native": "mixer.linear2.bias", "adapter": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"}
#: Changes that a reader may ignore.
HARMLESS = {"duplicate-key", "entry-surprise"}


def cases(shop: Workshop) -> Iterator[Case]:
    for base, file in FILES.items():
        whole = shop.read(base, file)
        for name, content in {**_headers(whole, KEYS[base]), **_entries(whole)}.items():
            yield shop.case(f"{base}-{name}", base, file, content, harmless=name in HARMLESS)
        for name, (state, mention) in _tensors(load(whole), KEYS[base]).items():
            yield shop.case(f"{base}-tensor-{name}", base, file, save(state), mention)


def split(whole: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(header: bytes | dict, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _headers(whole: bytes, key: str) -> dict[str, bytes]:
    header, data = split(whole)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    first = json.dumps({key: header[key] | {"data_offsets": [0, 128]}})[1:-1]
    (name,) = header["__metadata__"].keys() - {"format"}
    wrong = header["__metadata__"] | {name: header["__metadata__"][name][::-1]}
    lengths = {f"header-length-{n}": struct.pack("<Q", n) + whole[8:] for n in (0, 1, len(whole), 10**8, 1 << 63)}
    return lengths | {
        "header-text": join(b"not json", data), "header-list": join(b"[]", data), "header-empty": join(b"", data),
        "header-object": join(b"{}", b""), "header-deep": join(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data),
        "header-not-utf8": join(b'{"\xff": {}}', data), "header-nul": join(b"{}\0", data),
        "header-spaces": join(b"{}" + b" " * (64 * MIB), data),
        "header-many": join({f"t{i}": empty for i in range(50_000)}, b""),
        "header-long-name": join(header | {"x" * 100_000: empty}, data),
        "duplicate-key": join(b"{" + first.encode() + b"," + json.dumps(header)[1:].encode(), data),
        "header-only": join(header, b""), "trailing-byte": whole + b"\0",
        "metadata-list": join(header | {"__metadata__": []}, data),
        "metadata-nested": join(header | {"__metadata__": {"format": {}}}, data),
        "checksum": join(header | {"__metadata__": wrong}, data),
    }  # fmt: skip


def _entries(whole: bytes) -> dict[str, bytes]:
    """The entry of the last tensor with other fields."""
    header, data = split(whole)
    key = max(header.keys() - {"__metadata__"}, key=lambda k: header[k]["data_offsets"])
    start, end = header[key]["data_offsets"]
    shape = header[key]["shape"]
    offsets = {
        "shifted": [start + 4, end + 4], "overlap": [0, end - start], "reversed": [end, start], "huge": [start, 1 << 63],
        "negative": [-4, end], "float": [float(start), float(end)], "three": [start, end, end], "digits": [start, 10**300],
    }  # fmt: skip
    shapes = {
        "larger": [*shape, 2], "product-wraps": [1 << 32, 1 << 32], "none-of-huge": [0, 1 << 62], "text": "all",
        "negative": [-n for n in shape], "float": [float(n) for n in shape], "many-dimensions": [1] * 100_000 + shape,
    }  # fmt: skip
    changes = {
        **{f"offsets-{name}": {"data_offsets": value} for name, value in offsets.items()},
        **{f"shape-{name}": {"shape": value} for name, value in shapes.items()},
        **{f"dtype-{str(value)[:5]}": {"dtype": value} for value in ("F33", "F64", "I32", "F4", None, "x" * 100_000)},
        "surprise": {"surprise": "x"},
    }
    found = {f"entry-{name}": join(header | {key: header[key] | fields}, data) for name, fields in changes.items()}
    return found | {f"entry-{value}": join(header | {key: value}, data) for value in ([1, 2, 3], {})}


def _tensors(state: dict[str, torch.Tensor], key: str) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Name -> (tensors, what the message names)."""
    tensor, path = state[key], key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    large = tensor.double().clone()
    large.view(-1)[0] = 1e300  # finite here, not where it is used
    replaced = {
        **{str(value): (torch.full_like(tensor, value), key) for value in (float("nan"), float("-inf"))},
        "nan-bfloat16": (torch.full_like(tensor, float("nan")).bfloat16(), key), "beyond-float32": (large, path),
        **{str(dtype): (tensor.to(dtype), key) for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)},
        "wide": (tensor[None].clone(), path), "scalar": (tensor.view(-1)[0].clone(), path),
        "no-rows": (tensor[:0].clone(), path), "short": (tensor[1:].clone(), path),
    }  # fmt: skip
    names = {"surprise": "surprise", "": "", "x" * 100_000: "x", "\x1b[2J\n\0": ""}
    return {
        "missing": ({k: v for k, v in state.items() if k != key}, path),
        "none": ({}, ""),
        "10000-surprises": (state | {f"surprise.{i}": torch.zeros(1) for i in range(10_000)}, ""),
        **{f"named-{name!r:.9}": (state | {name: tensor.clone()}, mention) for name, mention in names.items()},
        **{name: (state | {key: value}, mention) for name, (value, mention) in replaced.items()},
    }
