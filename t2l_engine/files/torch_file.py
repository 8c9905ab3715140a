"""Reads an untrusted ``torch.save`` file.

The file must be what ``torch.save`` writes for a dict of tensors: a zip archive of stored (uncompressed) entries whose
pickle builds only tensors.  This is checked before torch reads the file, because torch inflates compressed entries, does
not verify checksums, and its restricted unpickler still calls a few constructors that allocate as much as the file asks.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine.files.errors import short_repr
from t2l_engine.files.torch_pickle import Refused, check_pickle
from t2l_engine.files.weights import check_weights

#: About 15,000 entries.  Python objects need many times the bytes that describe them.
MAX_DIRECTORY_BYTES = 1 << 20
MAX_PICKLE_BYTES = 1 << 17  # about 800 tensors
#: Entries with tensor data; all others are small.
DATA = re.compile(r"[^/]*/data/", re.IGNORECASE)
FOLDER = 0x10  # DOS attribute of a directory
LOCAL_HEADER = struct.Struct("<4s22xHH")
#: End-of-directory records as torch.save writes them: without a comment, so that zipfile and torch find the same record.
END, END64, LOCATOR64 = struct.Struct("<4s4x2H2IH"), struct.Struct("<4sQ12x4Q"), struct.Struct("<4s4xQ4x")


class _SmallReads(io.FileIO):
    """A file with bounded reads: zipfile reads the directory in one read of the size that the archive states."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise Refused(f"its directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size)


def read_torch_file(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """The dict of contiguous CPU tensors in ``path``; raises ``error`` naming the file and the fault."""
    try:
        _check_archive(path)
        # Without mmap: torch compares the sizes stated by the pickle with the entries only when it copies.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # parsers raise many kinds of errors for a damaged file
        text = str(reason).partition("\n")[0][:200] or type(reason).__name__
        raise error(f"{path}: not a plain tensor file: {text}") from None
    if not isinstance(state, dict) or not all(
        type(key) is str and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise error(f"{path}: expected a state_dict of tensors")
    check_weights_sizes(path, state, error)
    check_weights(path, state, error)
    return _unshared(state)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two indices may address the same memory: a stride within the extent of the smaller strides (0: expanded)."""
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return True
            extent += stride * (size - 1)
    return False


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as contiguous tensors that share no memory, so that training one does not change another."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    unshared = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.itemsize
        alone = users[storage.data_ptr()] == 1
        copied = not (whole and alone)
        unshared[key] = tensor.detach().clone(memory_format=torch.contiguous_format) if copied else tensor.detach()
    return unshared


def check_weights_sizes(path: Path, state: dict[str, Tensor], error: type[ValueError]) -> None:
    """``error`` naming a tensor that is not dense, overlaps itself or, with the others, is larger than the file."""
    total = 0
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise error(f"{path}: {short_repr(key)}: expected a dense tensor, got {tensor.layout} on {tensor.device}")
        if _overlaps(tensor):
            strides = short_repr(tensor.stride())
            raise error(f"{path}: {short_repr(key)}: expected elements that do not overlap in memory, got strides {strides}")
        total += tensor.numel() * tensor.itemsize
        if total > path.stat().st_size:
            raise error(
                f"{path}: {short_repr(key)}: its tensors claim more bytes than the file has; save shared ones as copies"
            )


def _check_archive(path: Path) -> None:
    with _SmallReads(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] != b"PK":
            raise Refused("expected the zip format that torch.save has written since torch 1.6")
        start, count = _directory(data)
        archive = zipfile.ZipFile(file)
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if archive.start_dir != start or len(entries) != count:
            raise Refused("its directory is not where the file says")
        names = {entry.filename.lower() for entry in entries}  # torch looks up entries ignoring case
        if len(names) != len(entries):
            raise Refused("several entries share a name")
        if len({name.partition("/")[0] for name in names}) != 1 or any(".." in n.split("/") or "\\" in n for n in names):
            raise Refused("expected entries in one top folder")
        end = 0
        for entry in entries:
            name = short_repr(entry.filename)
            # torch uses the directory's name (zipfile may take one from an extra field), and does not read folders.
            if entry.filename != entry.orig_filename or entry.filename.endswith("/") or entry.external_attr & FOLDER:
                raise Refused(f"entry {name} is a folder, or has two names")
            if not DATA.match(entry.filename) and entry.file_size > MAX_PICKLE_BYTES:
                raise Refused(f"entry {name} is larger than {MAX_PICKLE_BYTES} bytes")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
                raise Refused(f"entry {name} is compressed or encrypted")
            if entry.header_offset < end:
                raise Refused(f"entry {name} overlaps another")
            header = data[entry.header_offset : entry.header_offset + 30]
            signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
            begin = entry.header_offset + 30 + name_length + extra_length
            end = begin + entry.file_size
            local_name = data[entry.header_offset + 30 : entry.header_offset + 30 + name_length]
            if signature != b"PK\3\4" or local_name != entry.orig_filename.encode() or end > start:
                raise Refused(f"entry {name} has a bad header")
            with memoryview(data) as view, view[begin:end] as content:
                if zlib.crc32(content) != entry.CRC:
                    raise Refused(f"the checksum of entry {name} does not match: the file is damaged")
                if entry.filename.lower().endswith("data.pkl"):
                    check_pickle(bytes(content))


def _directory(data: mmap.mmap) -> tuple[int, int]:
    """Offset and number of entries of the archive's directory; refuses one that zipfile and torch could read differently.

    Python's zipfile takes the directory that ends where its end record begins, torch's reader the one at the offset that
    the record states.  In a file with two directories one would be checked and the other used.
    """
    at = max(len(data) - END.size, 0)
    signature, here, entries, size, offset, comment = END.unpack(data[at : at + END.size].ljust(END.size, b"\0"))
    if signature != b"PK\5\6" or comment:
        raise Refused("expected the end of a zip archive, without a comment")
    stated = here, entries, size, offset
    if at >= LOCATOR64.size and data[at - LOCATOR64.size : at - LOCATOR64.size + 4] == b"PK\6\7":
        _, record = LOCATOR64.unpack(data[at - LOCATOR64.size : at])
        at -= LOCATOR64.size + END64.size
        signature, length, *wide = END64.unpack(data[max(at, 0) : max(at, 0) + END64.size])
        # A field of the 32-bit record must equal the 64-bit one, or be its "see there" value.
        agree = all(a in (b, limit) for a, b, limit in zip(stated, wide, (0xFFFF,) * 2 + (0xFFFFFFFF,) * 2, strict=True))
        if record != at or signature != b"PK\6\6" or length != END64.size - 12 or not agree:
            raise Refused("its directory is not where the file says")
        here, entries, size, offset = wide
    if here != entries or offset + size != at:
        raise Refused("its directory is not where the file says")
    return offset, entries
