"""Pickles that would run code, and pickles that would only cost: bombs, lies about lengths, unknown opcodes."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from functools import partial
from pathlib import Path

import numpy
import torch

from tests.hostile.archive import Call
from tests.hostile.folders import MARKER

COMMAND = f"touch {MARKER}"
CODE = f"open({MARKER!r}, 'w').close()"


def legacy(obj: object) -> bytes:
    """torch's second format: five pickles, one after another."""
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


#: Objects whose unpickling creates MARKER.
CALLS = {
    "os-system": Call(os.system, COMMAND),
    "eval": Call(eval, CODE),
    "path-touch": Call(Path.touch, Path(MARKER)),
    "import-getattr": Call(Call(getattr, Call(__import__, "os"), "system"), COMMAND),
    "partial": Call(partial(os.system, COMMAND)),
    "numpy-object-array": numpy.array([Call(os.system, COMMAND)], dtype=object),
    # The real function of torch that loads bytes without restrictions; a legacy file may call it.
    "torch-load-from-bytes": Call(torch.storage._load_from_bytes, legacy(Call(os.system, COMMAND))),
}


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _dict_key(key: bytes) -> bytes:
    return b"\x80\x02}" + key + b"K\x00s."


_DOUBLED = b"K\x00" + b"q\x00h\x00\x86" * 50  # a tuple of two of the tuple before: 2^50 leaves
#: Integers whose hash is 0: each insertion into a dict of them meets all that are there.
_COLLIDING = b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"K\x00" for i in range(1, 100_000))

_ORDERED = b"ccollections\nOrderedDict\nq\x01"
_FILLED_LATER = b"}q\x00(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(15_000)) + b"u"
_COLLIDE_LATER = b"}q\x00(" + _COLLIDING[:50_000].rpartition(b"K\x00")[0] + b"K\x00u"

#: Pickles written opcode by opcode.
RAW = {
    "global": b"cposix\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.",
    "stack-global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + _text(COMMAND) + b"\x85R.",
    "inst": b"(S'" + COMMAND.encode() + b"'\niposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nS'" + COMMAND.encode() + b"'\no.",
    "newobj": b"\x80\x02csubprocess\nPopen\n(]" + _text("touch") + b"a" + _text(MARKER) + b"at\x85\x81.",
    "build-class": b"\x80\x02ctorch\nTensor\n}" + _text("__reduce__") + b"cposix\nsystem\nsb.",
    "build-dict": b"\x80\x02ccollections\nOrderedDict\n)R}" + _text("items") + b"cposix\nsystem\nsb.",
    "module-unknown": b"\x80\x02cno.such.module\nname\n)R.",
    "module-long-name": b"\x80\x02c" + b"m" * 100_000 + b"\nname\n)R.",
    "key-hash-doubling": _dict_key(_DOUBLED),
    "key-hash-deep": _dict_key(b"K\x00" + b"\x85" * 1_000_000),
    "key-collisions": b"\x80\x02}(" + _COLLIDING + b"u.",
    "value-doubling": b"\x80\x02}" + _text("mixer.4.bias") + _DOUBLED + b"s.",
    "value-deep": b"\x80\x02}" + _text("mixer.4.bias") + b"]" * 200_000 + b"a" * 199_999 + b"s.",
    "top-deep": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "recursive": b"\x80\x02}q\x00" + _text("self") + b"h\x00s.",
    # A dict that is filled after it is named, then copied again and again.
    "dict-copied": b"\x80\x02" + _ORDERED + _FILLED_LATER + b"(" + b"h\x01h\x00\x85R" * 600 + b"t.",
    "dict-copied-colliding": b"\x80\x02" + _ORDERED + _COLLIDE_LATER + b"(" + b"h\x01h\x00\x85R" * 10_000 + b"t.",
    "attributes-copied": b"\x80\x02" + _ORDERED + b")Rq\x02(" + _COLLIDE_LATER + b"h\x02h\x00b" * 6000 + b"t.",
    "attribute-metadata-twice": b"\x80\x02" + _ORDERED + b")R}(" + (_text("_metadata") + b"N") * 2 + b"ub.",
    "tuples-shared": b"\x80\x02" + b"(" * 40_000 + b"K\x00" + b"t" * 40_000 + b".",
    "bytearray-huge": b"\x80\x02cbuiltins\nbytearray\n" + pickle.dumps(1 << 34, 2)[2:-1] + b"\x85R.",
    "int-digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "long1-lie": b"\x80\x02\x8a\xff\x01.",
    "long4-as-value": b"\x80\x02}" + _text("mixer.4.bias") + b"\x8b\0\0\x10\0" + b"\x7f" * (1 << 20) + b"s.",
    "unicode-lie": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "unicode-not-utf8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "bytearray8-lie": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"abc.",
    "memo-index": b"\x80\x02}r\xff\xff\xff\xff.",
    "mark-missing": b"\x80\x02K\x00t.",
    "stack-empty": b"\x80\x02.",
    "protocol": b"\x80\xff}.",
    "opcode-unknown": b"\x80\x02\xfe.",
    "empty": b"",
}


def tar(payload: bytes) -> bytes:
    """torch's oldest format: a tar archive with three pickles."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()
