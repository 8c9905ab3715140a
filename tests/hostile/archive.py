"""Torch archives made by hand: pickles whose claims need not fit the records, and zip headers that need not fit the data."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict

import torch

PREFIX = "hypermod"
LOCAL, CENTRAL, END = "<IHHHHHIIIHH", "<IHHHHHHIIIHHHHHII", "<IHHHHIIH"  # headers of zip


class Persistent:
    """Pickled as a persistent id, which is how torch names a storage."""

    def __init__(self, value: object):
        self.value = value


class Stored:
    """A tensor as a file claims it: ``rebuild(storage, offset, size, stride, False, {})`` over the record ``key``."""

    def __init__(self, key, numel, size, stride=None, offset=0, kind=torch.FloatStorage, location="cpu"):
        if stride is None and size is not None:
            stride = torch.empty(size, device="meta").stride()
        self.storage = Persistent(("storage", kind, key, location, numel))
        self.args = (offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.args)


class Call:
    """Pickled as ``function(*args)``."""

    def __init__(self, function: object, *args: object):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):  # a call may be the function of another
        raise NotImplementedError


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.value if isinstance(obj, Persistent) else None


def dumps(obj: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(obj)
    return buffer.getvalue()


def entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{PREFIX}/{name}")  # its date is fixed


def pack(pickled: bytes, records: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None) -> bytes:
    """An archive of a pickle and its tensor records; ``extra`` adds or replaces entries."""
    entries = {"data.pkl": pickled, "byteorder": b"little"}
    entries |= {f"data/{key}": value for key, value in (records or {}).items()} | {"version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (entries | (extra or {})).items():
            archive.writestr(entry(name), content)
    return buffer.getvalue()


def save(obj: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def parts(state: dict[str, torch.Tensor]) -> tuple[dict[str, Stored], dict[str, bytes]]:
    """``state`` as claims and records, which :func:`pack` takes."""
    claims = {k: Stored(str(i), t.numel(), tuple(t.shape)) for i, (k, t) in enumerate(state.items())}
    return claims, {str(i): t.contiguous().numpy().tobytes() for i, t in enumerate(state.values())}


class Raw:
    """A zip archive field by field; keywords replace what the headers say."""

    def __init__(self):
        self.body, self.directory, self.count = bytearray(), bytearray(), 0

    def add(self, name: bytes, data: bytes, *, at=None, extra: bytes = b"", local_name: bytes | None = None, **lies) -> Raw:
        """An entry; ``at``: the offset of a local header that is already there."""
        says = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data)} | lies
        attributes = lies.get("attributes", 0)
        local = name if local_name is None else local_name
        if at is None:
            at = len(self.body)
            fields = (says["flags"], says["method"], 0, 0x21, says["crc"], lies.get("local_packed", says["packed"]))
            sizes = (lies.get("local_size", says["size"]), len(local), 0)
            self.body += struct.pack(LOCAL, 0x04034B50, 20, *fields, *sizes) + local + data
        fields = (says["flags"], says["method"], 0, 0x21, says["crc"], says["packed"], says["size"], len(name), len(extra))
        self.directory += struct.pack(CENTRAL, 0x02014B50, 20, 20, *fields, 0, 0, 0, attributes, at) + name + extra
        self.count += 1
        return self

    def finish64(self, **lies) -> bytes:
        """With the wide end record and its locator; the small record defers to it."""
        says = {"signature": 0x06064B50, "length": 44, "here": self.count, "count": self.count, "size": len(self.directory),
                "offset": len(self.body), "at": len(self.body) + len(self.directory)} | lies  # fmt: skip
        sizes = (says[name] for name in ("here", "count", "size", "offset"))
        record = struct.pack("<IQHHIIQQQQ", says["signature"], says["length"], 45, 45, 0, 0, *sizes)
        locator = struct.pack("<IIQI", 0x07064B50, 0, says["at"], 1)
        small = struct.pack(END, 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        return bytes(self.body + self.directory + record + locator + small)

    def finish(self, **lies) -> bytes:
        count = min(self.count, 0xFFFF)
        says = {"count": count, "size": len(self.directory), "offset": len(self.body), "comment": 0} | lies
        zip64 = self.finish64()[len(self.body) + len(self.directory) : -22] if self.count > 0xFFFF else b""
        end = struct.pack(END, 0x06054B50, 0, 0, says["count"], says["count"], says["size"], says["offset"], says["comment"])
        return bytes(self.body + self.directory + zip64 + end)


def named(name: str) -> bytes:
    """The full name of an entry."""
    return f"{PREFIX}/{name}".encode()


def raw(pickled: bytes, records: dict[str, bytes], skip: str = "") -> Raw:
    """A good archive, without the entry ``skip``."""
    archive = Raw()
    entries = {"data.pkl": pickled} | {f"data/{k}": v for k, v in records.items()} | {"version": b"3\n"}
    for name, data in entries.items():
        if name != skip:
            archive.add(named(name), data)
    return archive
