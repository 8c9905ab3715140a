"""Torch archives made by hand: pickles whose claims need not fit the records, and directories that need not fit the data."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch

PREFIX = "hypermod"


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


#: Fields of an entry's record in the directory of a zip archive, where sizes and the checksum are taken from.
FIELDS = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I"), "size": (24, "<I"),
          "offset": (42, "<I")}  # fmt: skip


def lying(whole: bytes, name: str, **says: int) -> bytes:
    """The archive ``whole`` with other FIELDS in the directory's record of the entry ``name``."""
    content = bytearray(whole)
    record = whole.rindex(f"{PREFIX}/{name}".encode()) - 46
    for field, value in says.items():
        at, form = FIELDS[field]
        struct.pack_into(form, content, record + at, value)
    return bytes(content)
