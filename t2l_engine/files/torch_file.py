"""Reads an untrusted ``torch.save`` file of a dict of tensors, and perhaps of records, without ``torch.load``.

The file must be a zip archive of stored (uncompressed) entries, whose pickle only says where tensors lie in it.
``torch.load`` is not enough: it inflates compressed entries, does not verify checksums, and its restricted unpickler still
copies, hashes and allocates as much as the file asks.
"""

from __future__ import annotations

import copyreg
import functools
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.files.weights import check_weights

#: About 15,000 entries.  Python objects need many times the bytes that describe them.
MAX_DIRECTORY_BYTES = 1 << 20
MAX_PICKLE_BYTES = 1 << 17  # about 800 tensors
MAX_DIMENSIONS = 64  # torch's limit
#: Opcodes that torch.save writes for a dict of tensors and of records.
OPCODES = (
    "PROTO GLOBAL MARK STOP BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT SETITEM SETITEMS BINPERSID REDUCE BUILD "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 NEWTRUE NEWFALSE NONE "
    "EMPTY_LIST APPEND APPENDS BINFLOAT NEWOBJ"
).split()


class Refused(ValueError):
    """The file is not a plain tensor file; the message says why."""


class _SmallReads(io.FileIO):
    """A file with bounded reads: zipfile reads the directory in one read of the size that the archive states."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise Refused(f"its directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size)


class _Dict(dict):
    """A dict of texts: other keys may be expensive to hash.  Made empty, so that no dict is copied."""

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) is not str:
            raise Refused("its pickle has a dict whose keys are no texts")
        super().__setitem__(key, value)


class _Storage(NamedTuple):
    """What a pickle says of an entry: ``numel`` values of ``dtype``."""

    dtype: torch.dtype
    key: str
    numel: int


class _Claim(NamedTuple):
    """What a pickle says of a tensor: the arguments of ``torch._utils._rebuild_tensor_v2``, of any type."""

    storage: object
    offset: object
    size: object
    stride: object
    requires_grad: object
    hooks: object


class Record:
    """What stands for an object of a class of the file: ``content``, its fields, or of an enumeration the value."""

    def __init__(self, content: Any = None):
        self.content = {} if content is None else content

    def __reduce__(self):
        if isinstance(self.content, dict):
            return copyreg.__newobj__, (type(self),), self.content  # pyright: ignore[reportAttributeAccessIssue]
        return type(self), (self.content,)


@functools.cache
def stand_in(kind: str) -> type[Record]:
    """The class that is read and written in place of the class ``kind`` of a file."""
    module, _, name = kind.rpartition(".")
    return type(name, (Record,), {"__module__": module})


def _texts(items: object) -> set[str]:
    if not isinstance(items, list) or not all(type(item) is str for item in items):
        raise Refused("its pickle has a set of other things than texts")
    return set(items)


def _parameter(data: object, requires_grad: object, hooks: object) -> object:
    return data


#: What stands for all globals that a pickle of plain tensors names, and for sets.
GLOBALS = {
    "collections.OrderedDict": _Dict,
    "torch._utils._rebuild_tensor_v2": _Claim,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "__builtin__.set": _texts,
}


class _Dispatch(dict):
    def __missing__(self, code: int) -> None:
        raise Refused(f"its pickle uses opcode {code:#x}, which plain tensors do not need")


class _Unpickler(pickle._Unpickler):
    """Gives dicts of :class:`_Claim` and of records, in time linear in the length of the pickle; all else is refused.

    ``kinds``: classes of records.
    """

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)})
    stack: list
    append: Callable[[object], None]

    def __init__(self, file: io.BytesIO, kinds: Collection[str]):
        super().__init__(file)
        self.known = GLOBALS | {kind: stand_in(kind) for kind in kinds}
        self.fields: dict[int, _Dict] = {}  # of records, by id: many may have the same

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in self.known:
            raise Refused(f"its pickle names {short_repr(f'{module}.{name}')}, which is no plain tensor")
        return self.known[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)):
                return _Storage(dtype, key, numel)
        raise Refused("its pickle names a storage in another way than torch.save does")

    def load_empty_dict(self) -> None:
        self.append(_Dict())

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, type) and issubclass(kind, Record)) or args != ():
            raise Refused("its pickle makes an object in another way than dataclasses are")
        self.append(kind())

    def load_build(self) -> None:
        """Sets the fields of a record; leaves the attributes of a state_dict away."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            if not isinstance(state, _Dict):
                raise Refused("its pickle has an object whose fields are no dict")
            self.stack[-1].content = self.fields[id(state)] = state

    dispatch |= {
        pickle.EMPTY_DICT[0]: load_empty_dict, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
    }  # fmt: skip


def read_torch_file(
    path: Path, error: type[ValueError], kinds: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Contiguous CPU tensors that share no memory, and no other entries; raises ``error`` naming the file and the fault.

    ``kinds``: names of classes: other entries are plain values and :class:`Record` of these classes, and entries that are
    the same tensor in the file are one tensor.
    """
    try:
        entries = _read(path, kinds)
    except Exception as reason:  # parsers raise many kinds of errors for a damaged file
        text = str(reason).partition("\n")[0][:200]
        text = text if isinstance(reason, Refused) else f"{type(reason).__name__}: {text}"
        raise error(f"{path}: not a plain tensor file: {text}") from None
    state = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    check_weights(path, state, error)
    return state, {key: value for key, value in entries.items() if key not in state}


def _read(path: Path, kinds: Collection[str] | None) -> _Dict:
    with _SmallReads(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of buffers that cannot be written
        if data[:2] != b"PK":
            raise Refused("expected the zip format that torch.save has written since torch 1.6")
        entries = zipfile.ZipFile(file).infolist()
    named = {entry.filename: entry for entry in entries}
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl") and entry.filename.count("/") == 1]
    if len(pickles) != 1 or len(named) != len(entries):
        raise Refused("expected one folder with one data.pkl, and no name twice")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise Refused(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    folder = pickles[0].filename.removesuffix("data.pkl")
    order = named.get(f"{folder}byteorder")
    if order is not None and bytes(_bytes(data, order)[:7].numpy()) != b"little":
        raise Refused("expected tensors in little-endian byte order")
    unpickler = _Unpickler(io.BytesIO(_bytes(data, pickles[0]).numpy().tobytes()), kinds or ())
    top = unpickler.load()
    if not isinstance(top, _Dict):
        raise Refused("expected a state_dict of tensors")
    storages: dict[str, Tensor] = {}
    made: dict[object, Tensor] = {}
    total = 0
    for fields, key in [(of, key) for of in (top, *unpickler.fields.values()) for key in of]:
        match fields[key]:
            case _Claim(_Storage() as storage, int(offset), tuple(size), tuple(stride)) if _is_shape(size, stride):
                same = key if kinds is None else (storage, offset, size, stride)
            case claim if kinds is None or isinstance(claim, _Claim):
                raise Refused(f"{short_repr(key)}: expected a tensor as torch.save writes one")
            case _:
                continue
        if same not in made:
            total += math.prod(size) * storage.dtype.itemsize
            if total > len(data):
                raise Refused(
                    f"{short_repr(key)}: its tensors claim more bytes than the file has; save shared ones as copies"
                )
            if storage.key not in storages:
                storages[storage.key] = _bytes(data, named.get(f"{folder}data/{storage.key}"))
            content = storages[storage.key]
            if len(content) != storage.numel * storage.dtype.itemsize:
                expected = f"{storage.numel} values of {storage.dtype}"
                raise Refused(f"{short_repr(key)}: expected {expected}, got {len(content)} bytes")
            values = content.view(storage.dtype).as_strided(size, stride, offset)  # refuses what is outside of them
            made[same] = values.clone(memory_format=torch.contiguous_format)
        fields[key] = made[same]
    return top


class _Pickler(pickle._Pickler):
    """Writes a class that stands for another one, which need not be installed, as that."""

    memoize: Callable[[object], None]
    write: Callable[[bytes], None]

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Record):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)  # pyright: ignore[reportAttributeAccessIssue]


def write_torch_file(path: Path, entries: Mapping[str, object]) -> None:
    """Writes tensors and records as ``torch.save`` writes them and the objects that records stand for."""
    torch.save(dict(entries), path, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))


def _is_shape(*of: tuple) -> bool:
    return all(len(size) <= MAX_DIMENSIONS and all(isinstance(n, int) and n >= 0 for n in size) for size in of)


def _bytes(data: mmap.mmap, entry: zipfile.ZipInfo | None) -> Tensor:
    """The bytes of a stored entry, not copied."""
    if entry is None:
        raise Refused("an entry with tensor data is missing")
    name = short_repr(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise Refused(f"entry {name} is compressed or encrypted")
    begin = entry.header_offset + 30 + sum(struct.unpack_from("<HH", data, entry.header_offset + 26))  # its name and extra
    content = memoryview(data)[begin : begin + entry.file_size]
    if len(content) != entry.file_size or zlib.crc32(content) != entry.CRC:
        raise Refused(f"the checksum of entry {name} does not match: the file is damaged")
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
