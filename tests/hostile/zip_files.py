"""Broken zip structure around a good pickle: bombs, lying sizes, names that lead elsewhere."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator

from tests.hostile import Case
from tests.hostile.archive import PREFIX, dumps, entry, pack, parts
from tests.hostile.payloads import RAW

MIB = 1 << 20
_LOCAL, _CENTRAL, _END = "<IHHHHHIIIHH", "<IHHHHHHIIIHHHHHII", "<IHHHHIIH"


class Raw:
    """A zip archive field by field; keywords replace what the headers say."""

    def __init__(self):
        self.body, self.directory, self.count = bytearray(), bytearray(), 0

    def add(
        self, name: bytes, data: bytes, *, at: int | None = None, extra: bytes = b"", local_name: bytes | None = None, **lies
    ) -> Raw:
        """An entry; ``at``: the offset of a local header that is already there."""
        says = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data)} | lies
        attributes = lies.get("attributes", 0)
        local = name if local_name is None else local_name
        if at is None:
            at = len(self.body)
            fields = (says["flags"], says["method"], 0, 0x21, says["crc"], lies.get("local_packed", says["packed"]))
            sizes = (lies.get("local_size", says["size"]), len(local), 0)
            self.body += struct.pack(_LOCAL, 0x04034B50, 20, *fields, *sizes) + local + data
        fields = (says["flags"], says["method"], 0, 0x21, says["crc"], says["packed"], says["size"], len(name), len(extra))
        self.directory += struct.pack(_CENTRAL, 0x02014B50, 20, 20, *fields, 0, 0, 0, attributes, at) + name + extra
        self.count += 1
        return self

    def finish64(self, **lies) -> bytes:
        """With the wide end record and its locator; the small record defers to it."""
        end = len(self.body) + len(self.directory)
        says = {"signature": 0x06064B50, "length": 44, "here": self.count, "count": self.count} | lies
        sizes = (says["here"], says["count"], lies.get("size", len(self.directory)), lies.get("offset", len(self.body)))
        record = struct.pack("<IQHHIIQQQQ", says["signature"], says["length"], 45, 45, 0, 0, *sizes)
        locator = struct.pack("<IIQI", 0x07064B50, 0, lies.get("at", end), 1)
        small = struct.pack(_END, 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        return bytes(self.body + self.directory + record + locator + small)

    def finish(self, **lies) -> bytes:
        count = min(self.count, 0xFFFF)
        says = {"count": count, "size": len(self.directory), "offset": len(self.body), "comment": 0} | lies
        zip64 = self.finish64()[len(self.body) + len(self.directory) : -22] if self.count > 0xFFFF else b""
        end = struct.pack(
            _END, 0x06054B50, 0, 0, says["count"], says["count"], says["size"], says["offset"], says["comment"]
        )
        return bytes(self.body + self.directory + zip64 + end)


def _name(name: str) -> bytes:
    return f"{PREFIX}/{name}".encode()


def _raw(pickled: bytes, records: dict[str, bytes], skip: str = "") -> Raw:
    """A good file, without the entry ``skip``."""
    archive = Raw()
    entries = {"data.pkl": pickled} | {f"data/{k}": v for k, v in records.items()} | {"version": b"3\n"}
    for name, data in entries.items():
        if name != skip:
            archive.add(_name(name), data)
    return archive


def plain_zip(pickled: bytes, records: dict[str, bytes]) -> bytes:
    return _raw(pickled, records).finish()


def wide_zip(pickled: bytes, records: dict[str, bytes]) -> bytes:
    return _raw(pickled, records).finish64()


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
        bodies.add(_name(name), data)
    used.body += bytes(max(0, len(bodies.body) - len(used.body)))  # so that no offset below is negative
    shift, at, directory = len(used.body) - len(bodies.body), 0, Raw()
    for name, data in shown.items():
        directory.add(_name(name), data, at=at + shift)
        at += 30 + len(_name(name)) + len(data)
    assert len(directory.directory) == len(used.directory) and directory.count == used.count
    end = Raw()
    end.body, end.directory, end.count = used.body + used.directory + bodies.body, directory.directory, used.count
    return end.finish(offset=len(used.body))


def cases(case: Callable[..., Case], state: dict) -> Iterator[Case]:
    claims, records = parts(state)
    pickled = dumps(claims)
    entries = {"data.pkl": pickled} | {f"data/{k}": v for k, v in records.items()} | {"version": b"3\n"}

    def raw(skip: str = "") -> Raw:
        return _raw(pickled, records, skip)

    def lie(name: str, **lies) -> bytes:
        return raw(name).add(_name(name), entries[name], **lies).finish()

    # Bombs: the entry, the pickle, the directory.
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = zeros.compress(bytes(256 * MIB)) + zeros.flush()
    bomb = {"method": 8, "size": 256 * MIB, "crc": zlib.crc32(bytes(256 * MIB))}
    yield case("zip-bomb-record", raw("data/0").add(_name("data/0"), packed, **bomb).finish())
    yield case("zip-bomb-unused-record", raw().add(_name("data/surprise"), packed, **bomb).finish())
    yield case("zip-bomb-version", raw("version").add(_name("version"), packed, **bomb).finish())
    yield case("zip-bomb-byteorder", raw().add(_name("byteorder"), packed, **bomb).finish())
    yield case("zip-bomb-pickle", _deflated({"data.pkl": b"\x80\x02" + b"N0" * (48 * MIB)}))
    yield case("zip-long-pickle", pack(b"\x80\x02" + b"N0" * (32 * MIB)))
    many = Raw()
    for i in range(100_000):
        many.add(_name(f"data/{i}"), b"")
    yield case("zip-100000-entries", many.add(_name("data.pkl"), pickled).finish())
    overlapping = raw("data/0")
    for i in range(2000):
        overlapping.add(_name(f"data/x{i}"), records["0"], at=0)
    yield case("zip-overlapping-entries", overlapping.add(_name("data/0"), records["0"], at=0).finish())
    for method, name in ((8, "deflated"), (12, "bzip2"), (14, "lzma")):
        yield case(f"zip-{name}", _deflated(entries, method), harmless=True)

    used = {"pickle": raw("data.pkl").add(_name("data.pkl"), RAW["key-hash-doubling"])}
    used["record"] = raw("data/0").add(_name("data/0"), packed, **bomb)
    for name, archive in used.items():
        content = _two_directories(entries, archive)
        with zipfile.ZipFile(io.BytesIO(content)) as checked:
            assert checked.testzip() is None and checked.read(f"{PREFIX}/data.pkl") == pickled
        yield case(f"zip-two-directories-{name}", content)

    # Names.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate
        yield case("zip-duplicate-pickle", raw().add(_name("data.pkl"), dumps({})).finish())
        yield case("zip-duplicate-record", raw().add(_name("data/0"), bytes(len(records["0"]))).finish())
    shouted = raw().add(_name("DATA.PKL"), dumps({})).add(_name("Data/0"), bytes(len(records["0"])))
    yield case("zip-names-differ-in-case", shouted.finish())
    yield case("zip-two-prefixes", raw().add(b"other/data.pkl", dumps({})).finish())
    yield case("zip-nested-prefix", raw().add(_name(f"{PREFIX}/data.pkl"), dumps({})).finish(), harmless=True)
    yield case("zip-no-prefix", _deflated({"../data.pkl": pickled}))
    for name, bad in {
        "parent": b"hypermod/../../escaped",
        "absolute": b"/tmp/escaped",
        "nul": b"hypermod/data/0\0x",
        "backslash": b"hypermod\\data\\0",
        "long": b"hypermod/" + b"x" * 60_000,
        "empty": b"",
        "not-utf8": b"hypermod/\xff\xfe",
    }.items():
        yield case(f"zip-name-{name}", raw().add(bad, b"x").finish(), harmless=True)
        yield case(f"zip-record-name-{name}", raw("data/0").add(bad, records["0"]).finish())
    yield case("zip-local-name-differs", lie("data/0", local_name=b"hypermod/data/1"), harmless=True)
    yield case("zip-no-pickle", raw("data.pkl").finish())
    yield case("zip-no-records", pack(pickled))
    script = {"constants.pkl": b"\x80\x02).", "code/x.py": b"op_version_set = 1", "code/x.py.debug_pkl": b""}
    yield case("zip-torchscript", pack(pickled, records, script))

    # Fields.
    for target in ("data.pkl", "data/0"):
        kind, size = target.replace("/", "-"), len(entries[target])
        yield case(f"zip-encrypted-{kind}", lie(target, flags=1))
        yield case(f"zip-folder-{kind}", lie(target, attributes=0x10))  # torch then reads nothing into its buffer
        other = struct.pack("<HHBI", 0x7075, 5 + len(_name("note")), 1, zlib.crc32(_name(target))) + _name("note")
        # Pythons from 3.12 on take the name in the extra field.
        yield case(f"zip-renamed-{kind}", lie(target, extra=other), harmless=True)
        yield case(f"zip-strong-encryption-{kind}", lie(target, flags=0x41))
        yield case(f"zip-crc-{kind}", lie(target, crc=0))
        yield case(f"zip-size-larger-{kind}", lie(target, size=1 << 31))
        yield case(f"zip-both-sizes-larger-{kind}", lie(target, size=1 << 31, packed=1 << 31))
        yield case(f"zip-size-smaller-{kind}", lie(target, size=size - 4, packed=size - 4))
        yield case(f"zip-size-zero-{kind}", lie(target, size=0, packed=0))
        yield case(f"zip-local-size-differs-{kind}", lie(target, local_size=7, local_packed=7), harmless=True)
        yield case(f"zip-method-{kind}", lie(target, method=99))
        for name, value in (("60", 1 << 60), ("64", (1 << 64) - 1)):
            extra = struct.pack("<HHQQ", 1, 16, value, value)
            yield case(f"zip64-size-{name}-{kind}", lie(target, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=extra))
        yield case(f"zip64-extra-cut-{kind}", lie(target, size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=b"\1\0\xff\xff"))
        yield case(f"zip-offset-beyond-{kind}", raw(target).add(_name(target), entries[target], at=1 << 31).finish())
        yield case(f"zip-offset-inside-{kind}", raw(target).add(_name(target), entries[target], at=5).finish())
    for name, lies in {
        "count-huge": {"count": 0xFFFE},
        "count-zero": {"count": 0},
        "count-one": {"count": 1},
        "directory-beyond": {"offset": 0xFFFFFFF0},
        "directory-size": {"size": 0x7FFFFFFF},
        "directory-zero": {"offset": 0, "size": 0},
        "comment": {"comment": 0xFFFF},
    }.items():
        yield case(f"zip-end-{name}", raw().finish(**lies), harmless=True)
    for name, lies in {
        "elsewhere": {"at": 0}, "no-record": {"signature": 0}, "count": {"count": 3}, "offset": {"offset": 0},
        "size": {"size": 46}, "disk-count": {"here": 1}, "long": {"length": 1 << 40},
    }.items():  # fmt: skip
        yield case(f"zip64-end-{name}", raw().finish64(**lies))
    yield case("zip-commented", raw().finish(comment=4) + b"PK\5\6")
    yield case("zip-prefixed", b"#!/bin/sh\n" * 10 + raw().finish(), harmless=True)
    yield case("zip-suffixed", raw().finish() + b"x" * 100, harmless=True)
    yield case("zip-byteorder", pack(pickled, records, {"byteorder": b"middle"}))
    yield case("zip-byteorder-large", pack(pickled, records, {"byteorder": "\N{PARTY POPPER}".encode() + b"x" * (48 * MIB)}))
    yield case("zip-byteorder-long", pack(pickled, records, {"byteorder": b"little" * 100_000}))
    for version in (b"0", b"99999999", b"x" * 1000, b"-1", b""):
        content = pack(pickled, records, {"version": version})
        yield case(f"zip-version-{version[:8].decode() or 'empty'}", content, harmless=True)
    yield case("zip-alignment", pack(pickled, records, {".storage_alignment": b"0"}), harmless=True)
    yield case("zip-format-version", pack(pickled, records, {".format_version": b"x" * 1000}), harmless=True)
