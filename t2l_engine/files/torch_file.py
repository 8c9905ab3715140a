"""Reads an untrusted ``torch.save`` file of a dict of tensors, without ``torch.load``.

The file must be a zip archive of stored (uncompressed) entries, whose pickle only says where tensors lie in it.
``torch.load`` is not enough: it inflates compressed entries, does not verify checksums, and its restricted unpickler still
copies, hashes and allocates as much as the file asks.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.files.weights import check_weights

#: About 15,000 entries.  Python objects need many times the bytes that describe them.
MAX_DIRECTORY_BYTES = 1 << 20
MAX_PICKLE_BYTES = 1 << 17  # about 800 tensors
MAX_DIMENSIONS = 64  # torch's limit
#: Opcodes that torch.save writes for a dict of tensors.
OPCODES = (
    "PROTO GLOBAL MARK STOP BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT SETITEM SETITEMS BINPERSID REDUCE BUILD "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 NEWTRUE NEWFALSE NONE"
).split()


class Refused(Exception):
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


def _parameter(data: object, requires_grad: object, hooks: object) -> object:
    return data


#: What stands for all globals that a pickle of plain tensors names.
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
}


class _Dispatch(dict):
    def __missing__(self, code: int) -> None:
        raise Refused(f"its pickle uses opcode {code:#x}, which plain tensors do not need")


class _Unpickler(pickle._Unpickler):
    """Gives dicts of :class:`_Claim`, in time linear in the length of the pickle; everything else is refused."""

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)})
    stack: list
    append: Callable[[object], None]

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in GLOBALS:
            raise Refused(f"its pickle names {short_repr(f'{module}.{name}')}, which is no plain tensor")
        return GLOBALS[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)):
                return _Storage(dtype, key, numel)
        raise Refused("its pickle names a storage in another way than torch.save does")

    def load_empty_dict(self) -> None:
        self.append(_Dict())

    def load_build(self) -> None:
        """Leaves the attributes of a state_dict away."""
        self.stack.pop()

    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}


def read_torch_file(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory; raises ``error`` naming the file and the fault."""
    try:
        state = _read(path)
    except Exception as reason:  # parsers raise many kinds of errors for a damaged file
        text = str(reason).partition("\n")[0][:200]
        text = text if isinstance(reason, Refused) else f"{type(reason).__name__}: {text}"
        raise error(f"{path}: not a plain tensor file: {text}") from None
    check_weights(path, state, error)
    return state


def _read(path: Path) -> dict[str, Tensor]:
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
    claims = _Unpickler(io.BytesIO(_bytes(data, pickles[0]).numpy().tobytes())).load()
    if not isinstance(claims, _Dict):
        raise Refused("expected a state_dict of tensors")
    storages: dict[str, Tensor] = {}
    state, total = {}, 0
    for key, claim in claims.items():
        match claim:
            case _Claim(_Storage() as storage, int(offset), tuple(size), tuple(stride)) if _is_shape(size):
                total += math.prod(size) * storage.dtype.itemsize
            case _:
                raise Refused(f"{short_repr(key)}: expected a tensor as torch.save writes one")
        if total > len(data):
            raise Refused(f"{short_repr(key)}: its tensors claim more bytes than the file has; save shared ones as copies")
        if storage.key not in storages:
            storages[storage.key] = _bytes(data, named.get(f"{folder}data/{storage.key}"))
        content = storages[storage.key]
        if len(content) != storage.numel * storage.dtype.itemsize:
            raise Refused(f"{short_repr(key)}: expected {storage.numel} values of {storage.dtype}, got {len(content)} bytes")
        values = content.view(storage.dtype).as_strided(size, stride, offset)  # refuses what is outside of them
        state[key] = values.clone(memory_format=torch.contiguous_format)
    return state


def _is_shape(size: tuple) -> bool:
    return len(size) <= MAX_DIMENSIONS and all(isinstance(number, int) and number >= 0 for number in size)


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
