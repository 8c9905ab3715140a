"""The store: folders appear whole, the budget and pruning, with several servers: locks of a process are as those of two."""

import concurrent.futures
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from t2l_engine.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.serving.store import AdapterStore, Unavailable, _size

DAY = 24 * 3600
PEFT = (CONFIG_NAME, WEIGHTS_NAME)
MEMORY = (CONFIG_NAME, "t2l.json", "task_emb.safetensors")


def write(store, *keys, text="any"):
    """The folder of the last of ``keys``."""

    def fill(folder):
        for name in MEMORY if store.memory else PEFT:
            (folder / name).write_text(text)

    return [store.write(key, fill) for key in keys][-1]


@pytest.fixture
def open_store(tmp_path):
    return lambda budget=1 << 20, **options: AdapterStore(tmp_path / "store", budget, **options)


@pytest.fixture
def store(open_store):
    return open_store()


def visible(store):
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


def used(store):
    """The bytes that are counted."""
    return int((store.root / ".used").read_text())


def unused_for(days, folder):
    os.utime(folder, (time.time() - days * DAY,) * 2)
    return folder


def taken(folder):
    """Bytes of a folder's files, of small ones the whole pages."""
    return sum(max(path.stat().st_size, path.stat().st_blocks * 512) for path in folder.iterdir())


def test_small_files_count_as_the_pages_that_they_take(store, monkeypatch):
    folder = write(store, "k")
    assert used(store) == taken(folder) >= sum(path.stat().st_size for path in folder.iterdir())
    files = [SimpleNamespace(st_size=size, st_blocks=8) for size in (3, 4096, 5000)]  # a page each; the last compressed
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda _: [SimpleNamespace(stat=lambda file=file: file) for file in files])
        assert _size(folder) == 2 * 4096 + 5000


def test_locks_are_those_that_nfs_has(open_store, monkeypatch):
    """Its client answers EBADF to an exclusive lock of a file that was opened for reading alone."""
    flock = fcntl.flock

    def nfs(file, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    first, second = open_store(), open_store()
    assert second.find("k") is None and write(first, "k") == second.find("k")


@pytest.mark.parametrize("text", ["", "12x", "\u0663", "-5"])
def test_a_damaged_count_is_made_again(store, text):
    write(store, "k")
    before = used(store)
    (store.root / ".used").write_text(text, encoding="utf-8")
    assert store.find("k") and used(store) == before


def test_a_folder_that_is_gone_is_no_room(store):
    shutil.rmtree(store.root)
    with pytest.raises(Unavailable, match="adapters: their folder cannot be read: No such file or directory"):
        store.find("k")
    with pytest.raises(Unavailable, match="adapters: their folder cannot be written: No such file or directory"):
        write(store, "k")
    held = store._lock
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)


def test_what_another_one_removes_is_left_to_it(store, open_store, monkeypatch):
    for key in ("a", "b"):
        unused_for(8, write(store, key))
    store.close()
    rename = Path.rename

    def raced(path, target):
        if path.name == "a":
            shutil.rmtree(path)
        moved = rename(path, target)
        shutil.rmtree(moved)
        return moved

    monkeypatch.setattr(Path, "rename", raced)
    alone = open_store()
    assert visible(alone) == [] and used(alone) == 0


def test_a_start_that_fails_holds_nothing(store, open_store, monkeypatch):
    store.close()
    flock, calls = fcntl.flock, []

    def out_of_locks(file, operation):
        calls.append(operation)
        if len(calls) == 2:  # that of the server's own file
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", out_of_locks)
    with pytest.raises(OSError, match="No locks available"):
        open_store()
    assert [path.name for path in store.root.iterdir()] == [".used"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, open_store):
    own = tmp_path / "store" / "mine"
    own.mkdir(parents=True)
    os.utime(own, (0, 0))
    with pytest.raises(ValueError, match="store: expected an empty folder or a store, whose old adapters are removed, got "):
        open_store()
    assert own.is_dir() and list(own.parent.iterdir()) == [own]


def test_the_first_adapter_of_a_key_stays(store, open_store):
    folder = write(store, "k", text="first")
    assert store.find("k") == folder and {path.name for path in folder.iterdir()} == set(PEFT)
    assert write(store, "k", text="second") == folder and used(store) == taken(folder) and visible(store) == ["k"]
    assert (folder / WEIGHTS_NAME).read_text() == "first" and folder.stat().st_mode & 0o077 == 0
    assert store.find("other") is None and open_store(memory=True).find("k") is None


@pytest.mark.parametrize("memory", [False, True])
def test_a_folder_that_lacks_a_file_is_made_again(open_store, memory):
    """As a cleaner of old files leaves it."""
    store = open_store(memory=memory)
    folder = write(store, "k")
    for path in sorted(folder.iterdir()):
        path.unlink()
        assert store.find("k") is None and used(store) == 0 and not visible(store)
        assert write(store, "k") == folder == store.find("k") and used(store) == taken(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device (28)")])
def test_a_failed_write_leaves_nothing(store, error):
    def broken(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(Unavailable, match="cannot be written: No space left on device"):
        store.write("k", broken)
    error = ValueError("of the adapter itself")
    with pytest.raises(ValueError, match="of the adapter itself"):
        store.write("k", broken)
    assert visible(store) == [] and used(store) == 0


def test_writers_of_one_process_number_have_folders_of_their_own(store, open_store):
    """As in two containers: one is finished while the other writes the same key.  Each appears whole."""
    second = open_store()

    def fill(folder):
        (folder / CONFIG_NAME).write_text("late")
        assert store.find("k") is None, "a folder appears whole"
        write(second, "k")

    assert store.write("k", fill) == second.find("k") and visible(store) == ["k"]
    assert (store.find("k") / CONFIG_NAME).read_text() == "any"


def test_the_budget_is_of_all_adapters(store, open_store):
    folder = write(store, "a")
    first, second = (open_store(2 * taken(folder)) for _ in range(2))
    write(second, "b")
    with pytest.raises(Unavailable, match=f"the {first.budget} bytes for them are in use"):
        write(first, "c")
    assert visible(first) == ["a", "b"] and first.find("b"), "what is there can be used"


def test_a_restart_keeps_the_last_used_half_of_the_budget(store, open_store):
    for i, key in enumerate("abcd"):
        unused_for(1 - i / 1000, write(store, key))
    store.find("a")
    budget = used(store)
    store.close()
    again = open_store(budget)
    assert visible(again) == ["a", "d"] and used(again) == budget // 2
    write(again, "e")


def test_two_servers_write_the_same_keys(open_store):
    stores, keys = [open_store(), open_store()], [f"k{i}" for i in range(50)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for made in [pool.submit(write, store, *order) for store, order in zip(stores, (keys, keys[::-1]), strict=True)]:
            made.result()
    for store in stores:
        assert visible(store) == sorted(keys)
        assert used(store) == sum(taken(store.find(key)) for key in keys), "each is whole, and counted once"


def test_what_a_running_server_may_use_stays(store, open_store):
    """One that started two days ago, on its own; then nobody beside."""
    for days, key in ((0, "new"), (1, "used"), (2, "edge"), (3, "older")):
        size = taken(unused_for(days, write(store, key)))
    server = open_store()
    store.close()
    (own,) = store.root.glob(".server-*")
    unused_for(2, own)
    for days in (1, 3):
        (store.root / f"{days}.tmp-x").mkdir()
        unused_for(days, store.root / f"{days}.tmp-x")
    (store.root / ".server-ended").write_text("")
    beside = open_store(2 * size)
    assert visible(beside) == ["1.tmp-x", "edge", "new", "used"] and used(beside) == 3 * size
    assert len(list(store.root.glob(".server-*"))) == 2, "of those that run"
    beside.close()
    server.close()
    alone = open_store(2 * size)
    assert visible(alone) == ["new"] and used(alone) == size


def test_who_starts_alone_removes_what_is_unfinished_or_unused_for_a_week(store, open_store):
    write(store, "new")
    for key in ("old", "found"):
        unused_for(8, write(store, key))
    (store.root / "x.tmp-1-0").mkdir()
    store.find("found")
    store.close()
    alone = open_store()
    assert visible(alone) == ["found", "new"] and used(alone) == sum(map(taken, map(alone.find, ("found", "new"))))


def test_a_folder_that_others_write_to_is_refused(tmp_path, open_store):
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o777)
    with pytest.raises(ValueError, match="expected a folder that only its owner writes to"):
        open_store()
    shutil.rmtree(tmp_path / "store")
    assert open_store().root.stat().st_mode & 0o777 == 0o700
