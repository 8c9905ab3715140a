"""Broken zip structure around a good pickle: bombs, lying sizes, names that lead elsewhere."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import torch

from tests.hostile.archive import dumps, entry, lying, pack, parts
from tests.hostile.folders import MIB, Case, Workshop

#: Changes that a reader may ignore, by the beginning of the case's name.
HARMLESS = ("bomb-version", "bomb-data/surprise", "surprise-", "torchscript", "prefixed", "suffixed")


def cases(shop: Workshop) -> Iterator[Case]:
    claims, records = parts(torch.load(shop.good["L-sft"] / "hypermod.pt", weights_only=True))
    for group in (_bombs, _entries, _directories):
        for name, content in group(dumps(claims), records):
            yield shop.case(name, "L-sft", "hypermod.pt", content, harmless=name.startswith(HARMLESS))


def _zip(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose last entry is compressed by ``method``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (name, data) in enumerate(entries):
            archive.writestr(entry(name), data, method if i == len(entries) - 1 else zipfile.ZIP_STORED)
    return buffer.getvalue()


def _bombs(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    good = [("data.pkl", pickled), *((f"data/{key}", data) for key, data in records.items())]
    for name in ("data/0", "data/surprise", "version", "byteorder"):
        rest = [pair for pair in good if pair[0] != name]
        yield f"bomb-{name}", _zip([*rest, (name, bytes(256 * MIB))], zipfile.ZIP_DEFLATED)
    yield "bomb-pickle", _zip([("data.pkl", b"\x80\x02" + b"N0" * (48 * MIB))], zipfile.ZIP_DEFLATED)
    yield "long-pickle", pack(b"\x80\x02" + b"N0" * (32 * MIB))
    yield "byteorder-large", pack(pickled, records, {"byteorder": "\N{PARTY POPPER}".encode() + b"x" * (48 * MIB)})
    yield "100000-entries", _zip([*((f"data/{i}", b"") for i in range(100_000)), ("data.pkl", pickled)])
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed-{method}", _zip(good, method)


def _entries(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Entries that are missing, twice there, or have other names."""
    good = pack(pickled, records)
    for name, data in (("data.pkl", dumps({})), ("data/0", bytes(len(records["0"])))):
        buffer = io.BytesIO(good)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(entry(name), data)
        yield f"duplicate-{name}", buffer.getvalue()
    yield "two-folders", _zip([("data.pkl", pickled), ("../other/data.pkl", dumps({}))])
    for name in ("../../escaped", "DATA.PKL", "hypermod/data.pkl", "data\\0", "x" * 60_000):
        yield f"surprise-{name[:20]!r}", pack(pickled, records, {name: b"x"})
        yield (
            f"record-{name[:20]!r}",
            pack(pickled, {key: data for key, data in records.items() if key != "0"}, {name: b"x"}),
        )
    yield "no-pickle", _zip([(f"data/{key}", data) for key, data in records.items()])
    yield "no-records", pack(pickled)
    yield "torchscript", pack(pickled, records, {"constants.pkl": b"\x80\x02).", "code/x.py": b"op_version_set = 1"})
    for order in (b"middle", b"little" * 100_000):
        yield "byteorder", pack(pickled, records, {"byteorder": order})


def _directories(pickled: bytes, records: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """What the directory says of the pickle and of a record, and where it is."""
    good = pack(pickled, records)
    for target, size in (("data.pkl", len(pickled)), ("data/0", len(records["0"]))):
        for name, says in {
            "encrypted": {"flags": 1},
            "method": {"method": 99},
            "crc": {"crc": 0},
            "size-larger": {"size": 1 << 31},
            "both-sizes-larger": {"size": 1 << 31, "packed": 1 << 31},
            "both-sizes-smaller": {"size": size - 4, "packed": size - 4},
            "sizes-elsewhere": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF},
            "size-zero": {"size": 0, "packed": 0},
            "offset-beyond": {"offset": 1 << 31},
            "offset-inside": {"offset": 5},
        }.items():
            yield f"{name}-{target}", lying(good, target, **says)
    yield "prefixed", b"#!/bin/sh\n" * 10 + good
    yield "suffixed", good + b"x" * 100
    yield "cut", good[:-30]
    yield "end-alone", good[-22:]
