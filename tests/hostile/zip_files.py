"""Broken zip structure around a good pickle: bombs, lying sizes, names that lead elsewhere."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator

import torch

from tests.hostile.archive import PREFIX, Raw, dumps, entry, named, pack, parts, raw
from tests.hostile.folders import Case, Workshop
from tests.hostile.payloads import RAW

MIB = 1 << 20


def _deflated(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(entry(name), data, method)
    return buffer.getvalue()


def _two_directories(shown: dict[str, bytes], used: Raw) -> bytes:
    """A file in which Python's zipfile sees the entries ``shown`` and torch those of ``used``, which has the same names.

    zipfile takes the directory in front of the end record, torch the one at the offset that this record states.
    """
    bodies = Raw()
    for name, data in shown.items():
        bodies.add(named(name), data)
    used.body += bytes(max(0, len(bodies.body) - len(used.body)))  # so that no offset below is negative
    shift, at, directory = len(used.body) - len(bodies.body), 0, Raw()
    for name, data in shown.items():
        directory.add(named(name), data, at=at + shift)
        at += 30 + len(named(name)) + len(data)
    assert len(directory.directory) == len(used.directory) and directory.count == used.count
    end = Raw()
    end.body, end.directory, end.count = used.body + used.directory + bodies.body, directory.directory, used.count
    return end.finish(offset=len(used.body))


def cases(shop: Workshop) -> Iterator[Case]:
    claims, records = parts(torch.load(shop.good["L-sft"] / "hypermod.pt", weights_only=True))
    pickled = dumps(claims)
    entries = {"data.pkl": pickled} | {f"data/{k}": v for k, v in records.items()} | {"version": b"3\n"}

    def case(name: str, content: bytes, harmless: bool = False) -> Case:
        return shop.case(name, "L-sft", "hypermod.pt", content, harmless=harmless)

    def good(skip: str = "") -> Raw:
        return raw(pickled, records, skip)

    def lie(name: str, **lies) -> bytes:
        return good(name).add(named(name), entries[name], **lies).finish()

    # Bombs: the entry, the pickle, the directory.
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = zeros.compress(bytes(256 * MIB)) + zeros.flush()
    bomb = {"method": 8, "size": 256 * MIB, "crc": zlib.crc32(bytes(256 * MIB))}
    yield case("bomb-record", good("data/0").add(named("data/0"), packed, **bomb).finish())
    yield case("bomb-unused-record", good().add(named("data/surprise"), packed, **bomb).finish())
    yield case("bomb-version", good("version").add(named("version"), packed, **bomb).finish())
    yield case("bomb-byteorder", good().add(named("byteorder"), packed, **bomb).finish())
    yield case("bomb-pickle", _deflated({"data.pkl": b"\x80\x02" + b"N0" * (48 * MIB)}))
    yield case("long-pickle", pack(b"\x80\x02" + b"N0" * (32 * MIB)))
    many = Raw()
    for i in range(100_000):
        many.add(named(f"data/{i}"), b"")
    yield case("100000-entries", many.add(named("data.pkl"), pickled).finish())
    overlapping = good("data/0")
    for i in range(2000):
        overlapping.add(named(f"data/x{i}"), records["0"], at=0)
    yield case("overlapping-entries", overlapping.add(named("data/0"), records["0"], at=0).finish())
    for method, name in ((8, "deflated"), (12, "bzip2"), (14, "lzma")):
        yield case(f"{name}", _deflated(entries, method), harmless=True)

    used = {"pickle": good("data.pkl").add(named("data.pkl"), RAW["key-hash-doubling"])}
    used["record"] = good("data/0").add(named("data/0"), packed, **bomb)
    for name, archive in used.items():
        content = _two_directories(entries, archive)
        with zipfile.ZipFile(io.BytesIO(content)) as checked:
            assert checked.testzip() is None and checked.read(f"{PREFIX}/data.pkl") == pickled
        yield case(f"two-directories-{name}", content)

    # Names.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate
        yield case("duplicate-pickle", good().add(named("data.pkl"), dumps({})).finish())
        yield case("duplicate-record", good().add(named("data/0"), bytes(len(records["0"]))).finish())
    shouted = good().add(named("DATA.PKL"), dumps({})).add(named("Data/0"), bytes(len(records["0"])))
    yield case("names-differ-in-case", shouted.finish())
    yield case("two-prefixes", good().add(b"other/data.pkl", dumps({})).finish())
    yield case("nested-prefix", good().add(named(f"{PREFIX}/data.pkl"), dumps({})).finish(), harmless=True)
    yield case("no-prefix", _deflated({"../data.pkl": pickled}))
    for name, bad in {
        "parent": b"hypermod/../../escaped",
        "absolute": b"/tmp/escaped",
        "nul": b"hypermod/data/0\0x",
        "backslash": b"hypermod\\data\\0",
        "long": b"hypermod/" + b"x" * 60_000,
        "empty": b"",
        "not-utf8": b"hypermod/\xff\xfe",
    }.items():
        yield case(f"name-{name}", good().add(bad, b"x").finish(), harmless=True)
        yield case(f"record-name-{name}", good("data/0").add(bad, records["0"]).finish())
    yield case("local-name-differs", lie("data/0", local_name=b"hypermod/data/1"), harmless=True)
    yield case("no-pickle", good("data.pkl").finish())
    yield case("no-records", pack(pickled))
    script = {"constants.pkl": b"\x80\x02).", "code/x.py": b"op_version_set = 1", "code/x.py.debug_pkl": b""}
    yield case("torchscript", pack(pickled, records, script))

    # Fields.
    for target in ("data.pkl", "data/0"):
        kind, size = target.replace("/", "-"), len(entries[target])
        yield case(f"encrypted-{kind}", lie(target, flags=1))
        yield case(f"folder-{kind}", lie(target, attributes=0x10))  # torch then reads nothing into its buffer
        other = struct.pack("<HHBI", 0x7075, 5 + len(named("note")), 1, zlib.crc32(named(target))) + named("note")
        # Pythons from 3.12 on take the name in the extra field.
        yield case(f"renamed-{kind}", lie(target, extra=other), harmless=True)
        yield case(f"strong-encryption-{kind}", lie(target, flags=0x41))
        yield case(f"crc-{kind}", lie(target, crc=0))
        yield case(f"size-larger-{kind}", lie(target, size=1 << 31))
        yield case(f"both-sizes-larger-{kind}", lie(target, size=1 << 31, packed=1 << 31))
        yield case(f"size-smaller-{kind}", lie(target, size=size - 4, packed=size - 4))
        yield case(f"size-zero-{kind}", lie(target, size=0, packed=0))
        yield case(f"local-size-differs-{kind}", lie(target, local_size=7, local_packed=7), harmless=True)
        yield case(f"method-{kind}", lie(target, method=99))
        for name, value in (("60", 1 << 60), ("64", (1 << 64) - 1)):
            extra = struct.pack("<HHQQ", 1, 16, value, value)
            yield case(f"zip64-size-{name}-{kind}", lie(target, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=extra))
        yield case(f"zip64-extra-cut-{kind}", lie(target, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=b"\1\0\xff\xff"))
        yield case(f"offset-beyond-{kind}", good(target).add(named(target), entries[target], at=1 << 31).finish())
        yield case(f"offset-inside-{kind}", good(target).add(named(target), entries[target], at=5).finish())
    for name, lies in {
        "count-huge": {"count": 0xFFFE},
        "count-zero": {"count": 0},
        "count-one": {"count": 1},
        "directory-beyond": {"offset": 0xFFFFFFF0},
        "directory-size": {"size": 0x7FFFFFFF},
        "directory-zero": {"offset": 0, "size": 0},
        "comment": {"comment": 0xFFFF},
    }.items():
        yield case(f"end-{name}", good().finish(**lies), harmless=True)
    for name, lies in {
        "elsewhere": {"at": 0}, "no-record": {"signature": 0}, "count": {"count": 3}, "offset": {"offset": 0},
        "size": {"size": 46}, "disk-count": {"here": 1}, "long": {"length": 1 << 40},
    }.items():  # fmt: skip
        yield case(f"zip64-end-{name}", good().finish64(**lies))
    yield case("commented", good().finish(comment=4) + b"PK\5\6")
    yield case("prefixed", b"#!/bin/sh\n" * 10 + good().finish(), harmless=True)
    yield case("suffixed", good().finish() + b"x" * 100, harmless=True)
    yield case("byteorder", pack(pickled, records, {"byteorder": b"middle"}))
    yield case("byteorder-large", pack(pickled, records, {"byteorder": "\N{PARTY POPPER}".encode() + b"x" * (48 * MIB)}))
    yield case("byteorder-long", pack(pickled, records, {"byteorder": b"little" * 100_000}))
    for version in (b"0", b"99999999", b"x" * 1000, b"-1", b""):
        content = pack(pickled, records, {"version": version})
        yield case(f"version-{version[:8].decode() or 'empty'}", content, harmless=True)
    yield case("alignment", pack(pickled, records, {".storage_alignment": b"0"}), harmless=True)
    yield case("format-version", pack(pickled, records, {".format_version": b"x" * 1000}), harmless=True)
