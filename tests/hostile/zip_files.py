"""Broken zip structure around a good pickle: bombs, lying sizes, names that lead elsewhere."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import torch

from tests.hostile.archive import PREFIX, Raw, dumps, entry, named, pack, parts, raw
from tests.hostile.folders import MIB, Case, Workshop

#: Changes that a reader may ignore, by the beginning of the case's name.
HARMLESS = (
    "compressed", "name-", "local-", "nested-prefix", "renamed", "end-", "prefixed", "suffixed", "version-", "alignment",
    "bomb-version", "bomb-data/surprise", "differ-in-case", "folder-", "torchscript", "commented", "zip64-end-",
    "record-name-",
)  # fmt: skip


def _compressed(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(entry(name), data, method)
    return buffer.getvalue()


def cases(shop: Workshop) -> Iterator[Case]:
    claims, records = parts(torch.load(shop.good["L-sft"] / "hypermod.pt", weights_only=True))
    for group in (_bombs, _names, _fields, _ends):
        for name, content in group(dumps(claims), records):
            yield shop.case(name, "L-sft", "hypermod.pt", content, harmless=name.startswith(HARMLESS))


def _bombs(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = zeros.compress(bytes(256 * MIB)) + zeros.flush()
    says = {"method": 8, "size": 256 * MIB, "crc": zlib.crc32(bytes(256 * MIB))}
    for name in ("data/0", "data/surprise", "version", "byteorder"):
        yield f"bomb-{name}", raw(pickled, records, name).add(named(name), packed, **says).finish()
    yield "bomb-pickle", _compressed({"data.pkl": b"\x80\x02" + b"N0" * (48 * MIB)})
    yield "long-pickle", pack(b"\x80\x02" + b"N0" * (32 * MIB))
    yield "byteorder-large", pack(pickled, records, {"byteorder": "\N{PARTY POPPER}".encode() + b"x" * (48 * MIB)})
    many = Raw()
    for i in range(100_000):
        many.add(named(f"data/{i}"), b"")
    yield "100000-entries", many.add(named("data.pkl"), pickled).finish()
    overlapping = raw(pickled, records, "data/0")
    for i in range(2000):
        overlapping.add(named(f"data/x{i}"), records["0"], at=0)
    yield "overlapping-entries", overlapping.add(named("data/0"), records["0"], at=0).finish()
    entries = {"data.pkl": pickled} | {f"data/{k}": v for k, v in records.items()} | {"version": b"3\n"}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed-{method}", _compressed(entries, method)


def _names(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    def good(skip: str = "") -> Raw:
        return raw(pickled, records, skip)

    other = bytes(len(records["0"]))
    yield "duplicate-pickle", good().add(named("data.pkl"), dumps({})).finish()
    yield "duplicate-record", good().add(named("data/0"), other).finish()
    yield "differ-in-case", good().add(named("DATA.PKL"), dumps({})).add(named("Data/0"), other).finish()
    yield "two-prefixes", good().add(b"other/data.pkl", dumps({})).finish()
    yield "nested-prefix", good().add(named(f"{PREFIX}/data.pkl"), dumps({})).finish()
    yield "no-prefix", _compressed({"../data.pkl": pickled})
    long = b"hypermod/" + b"x" * 60_000
    for bad in (
        b"hypermod/../../escaped",
        b"/tmp/escaped",
        b"hypermod/data/0\0x",
        b"hypermod\\data\\0",
        b"\xff\xfe",
        b"",
        long,
    ):
        yield f"name-{bad[:20]!r}", good().add(bad, b"x").finish()
        yield f"record-name-{bad[:20]!r}", good("data/0").add(bad, records["0"]).finish()
    yield "local-name", good("data/0").add(named("data/0"), records["0"], local_name=b"hypermod/data/1").finish()
    yield "no-pickle", good("data.pkl").finish()
    yield "no-records", pack(pickled)
    yield "torchscript", pack(pickled, records, {"constants.pkl": b"\x80\x02).", "code/x.py": b"op_version_set = 1"})


def _fields(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """What the headers say of the pickle and of a record."""
    for target, data in (("data.pkl", pickled), ("data/0", records["0"])):
        unicode_name = struct.pack("<HHBI", 0x7075, 5 + len(named("note")), 1, zlib.crc32(named(target))) + named("note")
        wide = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
        for name, lies in {
            "encrypted": {"flags": 1},
            "folder": {"attributes": 0x10},  # torch then reads nothing into its buffer
            "renamed": {"extra": unicode_name},  # Pythons from 3.12 on take the name in the extra field
            "crc": {"crc": 0},
            "size-larger": {"size": 1 << 31},
            "both-sizes-larger": {"size": 1 << 31, "packed": 1 << 31},
            "size-smaller": {"size": len(data) - 4, "packed": len(data) - 4},
            "size-zero": {"size": 0, "packed": 0},
            "local-size": {"local_size": 7, "local_packed": 7},
            "method": {"method": 99},
            "zip64-size": wide | {"extra": struct.pack("<HHQQ", 1, 16, 1 << 60, 1 << 60)},
            "zip64-cut": wide | {"extra": b"\1\0\xff\xff"},
            "offset-beyond": {"at": 1 << 31},
            "offset-inside": {"at": 5},
        }.items():
            yield f"{name}-{target}", raw(pickled, records, target).add(named(target), data, **lies).finish()


def _ends(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for lies in ({"count": 0xFFFE}, {"count": 0}, {"offset": 0xFFFFFFF0}, {"size": 0x7FFFFFFF}, {"offset": 0, "size": 0},
                 {"comment": 0xFFFF}):  # fmt: skip
        yield f"end-{lies}", raw(pickled, records).finish(**lies)
    for lies in ({"at": 0}, {"signature": 0}, {"count": 3}, {"offset": 0}, {"size": 46}, {"here": 1}, {"length": 1 << 40}):
        yield f"zip64-end-{lies}", raw(pickled, records).finish64(**lies)
    yield "commented", raw(pickled, records).finish(comment=4) + b"PK\5\6"
    yield "prefixed", b"#!/bin/sh\n" * 10 + raw(pickled, records).finish()
    yield "suffixed", raw(pickled, records).finish() + b"x" * 100
    for order in (b"middle", b"little" * 100_000):
        yield "byteorder", pack(pickled, records, {"byteorder": order})
    for version in (b"0", b"99999999", b"x" * 1000, b""):
        yield f"version-{version[:8]!r}", pack(pickled, records, {"version": version})
    yield "alignment", pack(pickled, records, {".storage_alignment": b"0", ".format_version": b"x" * 1000})
