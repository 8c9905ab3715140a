"""Reading a ``torch.save`` file that nobody vouches for.

The file must be what ``torch.save`` writes for a dict of tensors: a zip archive of stored (not compressed) entries whose
pickle builds nothing but tensors.  That is checked before torch reads it, because torch inflates compressed entries, does
not verify checksums of mapped files, and its restricted unpickler still calls a few constructors that allocate what they
are told to.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine._files import check_weights
from t2l_engine.config import shown

#: A directory of ~15,000 entries; ~800 tensors.  Python objects cost many times the bytes that describe them.
MAX_DIRECTORY_BYTES = 1 << 20
MAX_PICKLE_BYTES = 1 << 17
#: Objects that a pickle's operations take up, each with everything it refers to written out: what hashing them may cost.
MAX_NODES, MAX_DEPTH = 1_000_000, 50
LOCAL_HEADER = struct.Struct("<4s22xHH")

#: Everything a pickle of plain tensors names.
GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
    | {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")}
)
#: Opcodes that name or call things in other ways; protocol 2, which torch writes, needs none of them.
REFUSED_OPCODES = frozenset(
    {
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "STACK_GLOBAL",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "NEXT_BUFFER",
        "READONLY_BUFFER",
    }
)


class _Refused(Exception):
    """Why a file is no plain tensor file."""


class _SmallReads(io.FileIO):
    """A file whose single reads are bounded: zipfile reads the whole directory at the size the archive claims."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise _Refused(f"its directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size)


def read_torch_file(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """The dict of tensors in ``path``; ``error`` names the file and what is wrong with it."""
    try:
        _check_archive(path)
        # Not mapped: torch compares the sizes that the pickle claims with those of the entries only when it copies.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # whatever parsers trip over in a damaged file
        text = str(reason).partition("\n")[0][:200] or type(reason).__name__
        raise error(f"{path}: not a plain tensor file: {text}") from None
    if not isinstance(state, dict) or not all(
        type(key) is str and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise error(f"{path}: expected a state_dict of tensors")
    check_weights_sizes(path, state, error)
    check_weights(path, state, error)
    return _apart(state)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two indices may share a place: a stride within the reach of the smaller ones (0 where it was expanded)."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none of which shares memory with another: training one would change the other."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    apart = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.itemsize
        alone = users[storage.data_ptr()] == 1
        apart[key] = tensor.detach() if whole and alone else tensor.detach().clone(memory_format=torch.contiguous_format)
    return apart


def check_weights_sizes(path: Path, state: dict[str, Tensor], error: type[ValueError]) -> None:
    """Views may claim more than the file holds (strides of 0, shared storage)."""
    total = 0
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise error(f"{path}: {shown(key)}: expected a dense tensor, got {tensor.layout} on {tensor.device}")
        if _overlaps(tensor):
            strides = shown(tensor.stride())
            raise error(f"{path}: {shown(key)}: expected values that each have a place of their own, got strides {strides}")
        total += tensor.numel() * tensor.itemsize
        if total > path.stat().st_size:
            raise error(f"{path}: {shown(key)}: its tensors claim more bytes than the file has; save shared ones as copies")


def _check_archive(path: Path) -> None:
    with _SmallReads(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] != b"PK":
            raise _Refused("expected the zip form that torch.save has written since torch 1.6")
        archive = zipfile.ZipFile(file)
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        names = {entry.filename.lower() for entry in entries}  # torch looks entries up without regard to case
        if len(names) != len(entries):
            raise _Refused("several entries share a name")
        if len({name.partition("/")[0] for name in names}) != 1 or any(".." in n.split("/") or "\\" in n for n in names):
            raise _Refused("expected entries in one top folder")
        end = 0
        for entry in entries:
            name = shown(entry.filename)
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
                raise _Refused(f"entry {name} is compressed or encrypted")
            if entry.header_offset < end:
                raise _Refused(f"entry {name} overlaps another")
            header = data[entry.header_offset : entry.header_offset + 30]
            signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
            start = entry.header_offset + 30 + name_length + extra_length
            end = start + entry.file_size
            local_name = data[entry.header_offset + 30 : entry.header_offset + 30 + name_length]
            if signature != b"PK\3\4" or local_name != entry.orig_filename.encode() or end > archive.start_dir:
                raise _Refused(f"entry {name} has a bad header")
            with memoryview(data) as view, view[start:end] as content:
                if zlib.crc32(content) != entry.CRC:
                    raise _Refused(f"the checksum of entry {name} does not match: the file is damaged")
                if entry.filename.lower().endswith("data.pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        raise _Refused(f"entry {name} is larger than {MAX_PICKLE_BYTES} bytes")
                    _check_pickle(bytes(content))


def _check_pickle(content: bytes) -> None:
    # Follows what the pickle would build, as (nodes, nesting) of each object on the stack and in the memo: a tuple that
    # holds an earlier one twice, and so on, is short to write and endless to hash.
    stack: list[tuple[int, int] | None] = []  # None: a mark
    memo: dict[int, tuple[int, int]] = {}
    work = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in REFUSED_OPCODES:
            raise _Refused(f"its pickle uses {opcode.name}, which plain tensors do not need")
        if opcode.name == "GLOBAL" and argument not in GLOBALS:
            raise _Refused(f"its pickle names {shown(argument)}, which is no plain tensor")
        if opcode.name == "PROTO" and argument != 2:
            raise _Refused(f"expected pickle protocol 2 as torch.save writes, got {argument}")
        if opcode.name == "MARK":
            stack.append(None)
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        else:
            taken = []
            before = opcode.stack_before
            if pickletools.markobject in before:
                while (item := stack.pop()) is not None:
                    taken.append(item)
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            nodes, depth = 1 + sum(n for n, _ in taken), max((d for _, d in taken), default=0)
            depth += opcode.name.startswith(("TUPLE", "LIST", "APPEND", "DICT", "SETITEM", "REDUCE", "BUILD"))
            work += nodes
            if work > MAX_NODES or depth > MAX_DEPTH:
                raise _Refused("its pickle nests objects without need")
            stack += [(nodes, depth)] * len(opcode.stack_after)
