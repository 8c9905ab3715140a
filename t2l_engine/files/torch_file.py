"""Reads an untrusted ``torch.save`` file of a dict of tensors, and perhaps of plain records, without ``torch.load``.

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
from collections.abc import Callable, Collection, Mapping, Sequence
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
#: Opcodes that torch.save writes for a dict of tensors.
OPCODES = (
    "PROTO GLOBAL MARK STOP BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT SETITEM SETITEMS BINPERSID REDUCE BUILD "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 NEWTRUE NEWFALSE NONE"
).split()
#: Opcodes of records beside them.
RECORD_OPCODES = "EMPTY_LIST APPEND APPENDS BINFLOAT NEWOBJ".split()


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


class Record:
    """What stands for an object of a class of the file: ``kind``, its name; ``args``, of its constructor; ``fields``."""

    kind = ""

    def __init__(self, *args: Any):
        self.args, self.fields = args, {}

    @classmethod
    def of(cls, kind: str) -> type[Record]:
        return type("Record", (cls,), {"kind": kind})


class Items:
    """What stands for a set: ``items``, the list that it is made of, so that nothing is hashed."""

    def __init__(self, items: Any):
        self.items = items


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

    known = GLOBALS
    records: Sequence[Record] = ()

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

    def load_build(self) -> None:
        """Leaves the attributes of a state_dict away."""
        self.stack.pop()

    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}


class _RecordUnpickler(_Unpickler):
    """Reads objects of the classes ``kinds`` as :class:`Record`, too; nothing of the classes is imported."""

    dispatch = _Dispatch(
        _Unpickler.dispatch
        | {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, n)[0] for n in RECORD_OPCODES)}
    )

    def __init__(self, file: io.BytesIO, kinds: Collection[str]):
        super().__init__(file)
        self.records: list[Record] = []
        self.known = GLOBALS | {"__builtin__.set": Items, "builtins.set": Items} | {kind: Record.of(kind) for kind in kinds}

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, type) and issubclass(kind, Record)) or args != ():
            raise Refused("its pickle makes an object in another way than dataclasses are")
        self.records.append(kind())
        self.append(self.records[-1])

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            if not isinstance(state, _Dict):
                raise Refused("its pickle has an object whose fields are no dict")
            self.stack[-1].fields = state

    dispatch |= {pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build}


def read_torch_file(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory; raises ``error`` naming the file and the fault."""
    return _checked(path, error, None)[0]


def read_torch_records(path: Path, error: type[ValueError], kinds: Collection[str]) -> tuple[dict[str, Tensor], _Dict]:
    """Tensors as :func:`read_torch_file`, and the other entries: plain values, and :class:`Record` of classes ``kinds``.

    Equal tensors under several names are one tensor; a set is :class:`Items`.
    """
    return _checked(path, error, kinds)


def _checked(path: Path, error: type[ValueError], kinds: Collection[str] | None) -> tuple[dict[str, Tensor], _Dict]:
    try:
        state, others = _read(path, kinds)
    except Exception as reason:  # parsers raise many kinds of errors for a damaged file
        text = str(reason).partition("\n")[0][:200]
        text = text if isinstance(reason, Refused) else f"{type(reason).__name__}: {text}"
        raise error(f"{path}: not a plain tensor file: {text}") from None
    check_weights(path, state, error)
    return state, others


def _read(path: Path, kinds: Collection[str] | None) -> tuple[dict[str, Tensor], _Dict]:
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
    content = io.BytesIO(_bytes(data, pickles[0]).numpy().tobytes())
    unpickler = _Unpickler(content) if kinds is None else _RecordUnpickler(content, kinds)
    claims = unpickler.load()
    if not isinstance(claims, _Dict):
        raise Refused("expected a state_dict of tensors")
    tensors = _Tensors(data, named, f"{folder}data/", shared=kinds is not None)
    state, others = {}, _Dict()
    for key, claim in claims.items():
        if kinds is None or isinstance(claim, _Claim):
            state[key] = tensors.take(key, claim)
        else:
            others[key] = claim
    for record in unpickler.records:
        record.fields = {k: tensors.take(k, v) if isinstance(v, _Claim) else v for k, v in record.fields.items()}
    return state, others


class _Tensors:
    """Makes tensors of what a pickle claims; with ``shared`` one tensor for equal claims, else none shares memory."""

    def __init__(self, data: mmap.mmap, entries: Mapping[str, zipfile.ZipInfo], folder: str, shared: bool):
        self._data, self._entries, self._folder, self._shared = data, entries, folder, shared
        self._storages: dict[str, Tensor] = {}
        self._made: dict[tuple, Tensor] = {}
        self._total = 0

    def take(self, key: str, claim: object) -> Tensor:
        match claim:
            case _Claim(_Storage() as storage, int(offset), tuple(size), tuple(stride)) if _is_shape(size):
                same = (storage.key, storage.dtype, offset, size, stride) if _is_shape(stride) and self._shared else None
            case _:
                raise Refused(f"{short_repr(key)}: expected a tensor as torch.save writes one")
        if same in self._made:
            return self._made[same]
        self._total += math.prod(size) * storage.dtype.itemsize
        if self._total > len(self._data):
            raise Refused(f"{short_repr(key)}: its tensors claim more bytes than the file has; save shared ones as copies")
        if storage.key not in self._storages:
            self._storages[storage.key] = _bytes(self._data, self._entries.get(self._folder + storage.key))
        content = self._storages[storage.key]
        if len(content) != storage.numel * storage.dtype.itemsize:
            raise Refused(f"{short_repr(key)}: expected {storage.numel} values of {storage.dtype}, got {len(content)} bytes")
        values = content.view(storage.dtype).as_strided(size, stride, offset)  # refuses what is outside of them
        made = values.clone(memory_format=torch.contiguous_format)
        if same is not None:
            self._made[same] = made
        return made


class _Pickler(pickle._Pickler):
    """Writes a :class:`Record` as the object that it stands for."""

    memo: dict
    memoize: Callable[[object], None]
    write: Callable[[bytes], None]

    def save(self, obj: object, save_persistent_id: bool = True) -> None:
        write = super().save  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(obj, Items):
            obj = set(obj.items)
        if isinstance(obj, _Dict):
            obj = dict(obj)
        if not isinstance(obj, Record) or id(obj) in self.memo:
            write(obj, save_persistent_id)
            return
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.kind.rsplit(".", 1)).encode())
        write(obj.args)
        self.write(pickle.REDUCE if obj.args else pickle.NEWOBJ)
        self.memoize(obj)
        if obj.fields:
            write(obj.fields)
            self.write(pickle.BUILD)


def write_torch_records(path: Path, entries: Mapping[str, object]) -> None:
    """Writes tensors and records as ``torch.save`` writes them and the objects that records stand for."""
    torch.save(dict(entries), path, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))


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
