"""The adapter store: a folder of generated adapters that the servers of one user share.

A serving engine reads the folder of an evicted adapter again, so no folder is deleted that a running server may have used.
Each server holds a lock on a file ``.server-*``, modified at its start; an adapter's folder is modified at its last use, the
first request of each server.  A server that starts removes folders that no running server has used: those unused for a
week, and the longest unused beyond half of the budget.  ``.used`` holds the bytes of all adapters, locked for each change.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from t2l_engine.adapters.peft import CONFIG_NAME, WEIGHTS_NAME

DTYPE = torch.bfloat16  # of A and B in the store
NOTE_NAME, EMBEDDING_NAME, EMBEDDING = "t2l.json", "task_emb.safetensors", "task_emb"
_PEFT_FILES, _MEMORY_FILES = (CONFIG_NAME, WEIGHTS_NAME), (CONFIG_NAME, NOTE_NAME, EMBEDDING_NAME)
_UNUSED_SECONDS = 7 * 24 * 3600
_MARGIN_SECONDS = 3600  # difference of clocks that is allowed for
_TEMPORARY, _MEMORY, _USED, _SERVER = ".tmp-", ".memory", ".used", ".server-"


class Unavailable(Exception):
    """Refused for now; the message says what is used up."""


class AdapterStore:
    """Folders of adapters by key; writing is atomic, also between processes.

    ``root`` is created for its owner alone.  ``budget``: most bytes of all adapters.  ``memory``: folders of embeddings, not
    weights, are found and written; both kinds may share ``root``.

    Raises ValueError if others may write into ``root``, or if it holds other files, which pruning would remove; OSError if
    it cannot be used.
    """

    def __init__(self, root: Path, budget: int, memory: bool = False):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root, self.budget, self.memory = root.resolve(), budget, memory
        state = self.root.stat()
        if state.st_uid not in (0, os.getuid()) or state.st_mode & 0o022:
            raise ValueError(f"store: expected a folder that only its owner writes to, got {self.root}")
        if any(self.root.iterdir()) and not (self.root / _USED).exists():
            raise ValueError(f"store: expected an empty folder or a store, whose old adapters are removed, got {self.root}")
        self._lock, self._own = -1, ""
        try:
            with self._count() as count:
                removed = self._prune(self._oldest_server())
                count[0] = self._measure()
                self._lock, self._own = tempfile.mkstemp(prefix=_SERVER, dir=self.root)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError:
            self.close()
            raise
        for folder in removed:
            shutil.rmtree(folder, ignore_errors=True)  # another server that starts may remove it too

    def close(self) -> None:
        """Give up the lock of this server; the adapters stay."""
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):  # the folder may have been removed
                os.unlink(self._own)
            os.close(self._lock)
        self._lock = -1

    def find(self, key: str) -> Path | None:
        """The folder of an adapter, which counts as used now; None if there is none.  One that lacks a file is removed.

        Waits for other processes' reads and changes.  Raises Unavailable if the store cannot be read any more.
        """
        path = self._path(key)
        try:
            with self._count() as count:  # locked: a server that starts could remove it between the check and utime
                if not path.is_dir():
                    return None
                if not all((path / name).is_file() for name in (_MEMORY_FILES if self.memory else _PEFT_FILES)):
                    shutil.rmtree(path)  # left by a cleaner of old files
                    count[0] = self._measure()
                    return None
                os.utime(path)
        except OSError as error:
            raise Unavailable(f"adapters: their folder cannot be read: {error.strerror}") from error
        return path

    def write(self, key: str, fill: Callable[[Path], None]) -> Path:
        """The folder of an adapter whose files ``fill`` writes into the folder that it gets; one that is there stays.

        Raises Unavailable if there is no room, and as ``fill``.
        """
        path = self._path(key)
        try:
            # Created for its owner alone, as mkdtemp does.
            with tempfile.TemporaryDirectory(
                prefix=path.name + _TEMPORARY, dir=self.root, ignore_cleanup_errors=True
            ) as temporary:
                fill(Path(temporary))
                for file in Path(temporary).iterdir():  # complete before the folder has its name, also after a power failure
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                size = _size(Path(temporary))
                with self._count() as count:  # locked, so that no process sees a refused adapter
                    if path.is_dir():  # written by another process, and perhaps in use
                        return path
                    if count[0] + size > self.budget:
                        raise Unavailable(f"adapters: the {self.budget} bytes for them are in use until a restart")
                    os.rename(temporary, path)
                    count[0] += size
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise Unavailable(f"adapters: their folder cannot be written: {why}") from error
        return path

    def _path(self, key: str) -> Path:
        return self.root / (key + _MEMORY if self.memory else key)

    @contextlib.contextmanager
    def _count(self) -> Iterator[list[int]]:
        """A list of one number, the bytes used, under lock; a changed number is stored."""
        with os.fdopen(os.open(self.root / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            count = [int(text) if text.isascii() and text.isdecimal() else self._measure()]
            yield count
            if text != str(count[0]):
                file.seek(0)
                file.truncate()
                file.write(str(count[0]))
                file.flush()

    def _folders(self) -> list[Path]:
        return [Path(entry) for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]

    def _measure(self) -> int:
        return sum(_size(folder) for folder in self._folders() if _TEMPORARY not in folder.name)

    def _oldest_server(self) -> float:
        """Start of the oldest running server, infinity if there is none; removes the files of servers that have ended."""
        oldest = math.inf
        for path in self.root.glob(f"{_SERVER}*"):
            with contextlib.suppress(FileNotFoundError), path.open("r+") as file:  # removed by a server that ends now
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # NFS needs a writable file
                except BlockingIOError:
                    oldest = min(oldest, path.stat().st_mtime)
                else:
                    path.unlink()
        return oldest

    def _prune(self, started: float) -> list[Path]:
        """Rename folders for removal, none that was used since ``started``, and return them; which: see the module."""
        found, removed = [], []
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):  # renamed or removed by another process
                found.append((folder.stat().st_mtime, _size(folder), folder))
        room, oldest = self.budget // 2, time.time() - _UNUSED_SECONDS
        for used, size, folder in sorted(found, reverse=True):
            room -= size
            if (room < 0 or _TEMPORARY in folder.name or used < oldest) and used < started - _MARGIN_SECONDS:
                with contextlib.suppress(FileNotFoundError):  # removed by another server that starts
                    removed.append(folder.rename(f"{folder}{_TEMPORARY}{os.urandom(4).hex()}"))
        return removed


def _size(folder: Path) -> int:
    """Bytes that the files of a folder take; small files take whole pages."""
    stats = [entry.stat() for entry in os.scandir(folder)]
    return sum(max(of.st_size, of.st_blocks * 512) for of in stats)
