"""The store: what its folders hold, that they appear whole, the budget and pruning, with several processes."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2l_engine import AdapterStack
from t2l_engine.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.serving.store import AdapterStore, Unavailable, _size

DAY = 24 * 3600


def stack(seed=0):
    torch.manual_seed(seed)
    a, b = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 8, 4)
    return AdapterStack({"q_proj": a}, {"q_proj": b}, torch.full((1,), 3.0))


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store", 1 << 20)


def visible(store):
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


def taken(folder):
    """Bytes of a folder's files, of small ones the whole pages."""
    return sum(max(path.stat().st_size, path.stat().st_blocks * 512) for path in folder.iterdir())


def test_a_folder_without_weights(store, monkeypatch):
    """Small files count as the pages that they take."""
    folder = store.write_memory("k", torch.arange(3.0), {"r": 4}, {"sha256": "abc"})
    assert store.find("k", memory=True) == folder and store.find("k") is None
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, "t2l.json", "task_emb.safetensors"]
    assert torch.equal(load_file(folder / "task_emb.safetensors")["task_emb"], torch.arange(3.0))
    assert store.used == taken(folder) >= sum(path.stat().st_size for path in folder.iterdir())
    files = [SimpleNamespace(st_size=size, st_blocks=8) for size in (3, 4096, 5000)]  # a page each; the last compressed
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda _: [SimpleNamespace(stat=lambda file=file: file) for file in files])
        assert _size(folder) == 2 * 4096 + 5000


def test_locks_are_those_that_nfs_has(tmp_path, monkeypatch):
    """Its client answers EBADF to an exclusive lock of a file that was opened for reading alone."""
    flock = fcntl.flock

    def nfs(file, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    first = AdapterStore(tmp_path / "store", 1 << 20)
    second = AdapterStore(tmp_path / "store", 1 << 20)
    assert second.find("k") is None and first.write_peft("k", stack()) == second.find("k")


@pytest.mark.parametrize("text", ["", "12x", "\u0663", "-5"])
def test_a_damaged_count_is_made_again(store, text):
    store.write_peft("k", stack())
    used = store.used
    (store.root / ".used").write_text(text, encoding="utf-8")
    assert store.find("k") and store.used == used and (store.root / ".used").read_text() == str(used)


def test_a_folder_that_is_gone_is_no_room(store):
    shutil.rmtree(store.root)
    with pytest.raises(Unavailable, match="adapters: their folder cannot be read: No such file or directory"):
        store.find("k")
    with pytest.raises(Unavailable, match="adapters: their folder cannot be written: No such file or directory"):
        store.write_peft("k", stack())
    held = store._lock
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)


def test_what_another_one_removes_is_left_to_it(tmp_path, monkeypatch):
    first = AdapterStore(tmp_path / "store", 1 << 20)
    for key in ("a", "b"):
        os.utime(first.write_peft(key, stack()), (time.time() - 8 * DAY,) * 2)
    first.close()
    rename = Path.rename

    def raced(path, target):
        if path.name == "a":
            shutil.rmtree(path)
        moved = rename(path, target)
        shutil.rmtree(moved)
        return moved

    monkeypatch.setattr(Path, "rename", raced)
    alone = AdapterStore(tmp_path / "store", 1 << 20)
    assert visible(alone) == [] and alone.used == 0


def test_a_start_that_fails_holds_nothing(tmp_path, monkeypatch):
    AdapterStore(tmp_path / "store", 1 << 20).close()
    flock, calls = fcntl.flock, []

    def out_of_locks(file, operation):
        calls.append(operation)
        if len(calls) == 2:  # that of the server's own file
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", out_of_locks)
    with pytest.raises(OSError, match="No locks available"):
        AdapterStore(tmp_path / "store", 1 << 20)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".used"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    own = tmp_path / "adapters" / "mine"
    own.mkdir(parents=True)
    os.utime(own, (0, 0))
    with pytest.raises(ValueError, match="store: expected an empty folder or a store, whose old adapters are removed, got "):
        AdapterStore(tmp_path / "adapters", 1 << 20)
    assert own.is_dir() and list((tmp_path / "adapters").iterdir()) == [own]


def test_a_folder_is_a_peft_adapter_whose_scaling_is_in_b(store):
    folder = store.write_peft("k", stack(), "base/model")
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, "base/model")
    stored = load_file(folder / WEIGHTS_NAME)
    expected = stack().state_dict_peft(0, dtype=torch.bfloat16, fold=True)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert store.find("k") == folder and store.find("other") is None and store.find("k", memory=True) is None
    assert {WEIGHTS_NAME, CONFIG_NAME} == {path.name for path in folder.iterdir()}
    before, used = (folder / WEIGHTS_NAME).read_bytes(), store.used
    assert store.write_peft("k", stack(1)) == folder, "the first of a key stays"
    assert (folder / WEIGHTS_NAME).read_bytes() == before and store.used == used and visible(store) == ["k"]


@pytest.mark.parametrize("memory", [False, True])
def test_a_folder_that_lacks_a_file_is_made_again(store, memory):
    """As a cleaner of old files leaves it."""
    write = lambda: store.write_memory("k", torch.arange(3.0), {}, {}) if memory else store.write_peft("k", stack())  # noqa: E731
    folder = write()
    for path in sorted(folder.iterdir()):
        path.unlink()
        assert store.find("k", memory=memory) is None and store.used == 0 and not visible(store)
        assert write() == folder == store.find("k", memory=memory) and store.used == taken(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device (28)")])
def test_a_failed_write_leaves_nothing(store, monkeypatch, error):
    def broken(self, directory, *arguments, **keywords):
        (directory / "half").write_text("half")
        raise error

    with monkeypatch.context() as patched, pytest.raises(Unavailable, match="cannot be written: No space left on device"):
        patched.setattr(AdapterStack, "save_pretrained", broken)
        store.write_peft("k", stack())
    assert visible(store) == [] and store.used == 0
    bad = stack()
    bad.lora_A["q_proj"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        store.write_peft("k", bad)
    assert visible(store) == [] and store.used == 0


def test_writers_of_one_process_number_have_folders_of_their_own(tmp_path, monkeypatch):
    """As in two containers: one is finished while the other writes the same key.  Each appears whole."""
    first, second = (AdapterStore(tmp_path / "store", 1 << 20) for _ in range(2))
    save, made = AdapterStack.save_pretrained, []

    def nested(self, directory, *arguments, **keywords):
        if not made:
            made.append(directory)
            assert first.find("k") is None, "a folder appears whole"
            made.append(second.write_peft("k", stack(1)))
        return save(self, directory, *arguments, **keywords)

    monkeypatch.setattr(AdapterStack, "save_pretrained", nested)
    folder = first.write_peft("k", stack(0))
    assert folder == made[1] and visible(first) == ["k"] and len(AdapterStack.from_peft(folder)) == 1
    assert folder.stat().st_mode & 0o077 == 0


def test_the_budget_is_of_all_adapters(tmp_path):
    size = AdapterStore(tmp_path / "measure", 1 << 20)
    size.write_peft("k", stack())
    store, second = (AdapterStore(tmp_path / "store", 2 * size.used) for _ in range(2))
    store.write_peft("a", stack())
    second.write_peft("b", stack())
    with pytest.raises(Unavailable, match=f"the {store.budget} bytes for them are in use"):
        store.write_peft("c", stack())
    assert visible(store) == ["a", "b"] and store.find("b"), "what is there can be used"


def test_a_restart_keeps_the_last_used_half_of_the_budget(tmp_path):
    first = AdapterStore(tmp_path / "store", 1 << 20)
    for i, key in enumerate("abcd"):
        os.utime(first.write_peft(key, stack()), (time.time() - DAY + i,) * 2)
    first.find("a")
    budget = first.used
    first.close()
    again = AdapterStore(tmp_path / "store", budget)
    assert visible(again) == ["a", "d"] and again.used == budget // 2
    again.write_peft("e", stack())


def _write(root, keys, barrier):
    store = AdapterStore(root, 1 << 20)
    barrier.wait()
    for key in keys:
        store.write_peft(key, stack())


@pytest.fixture(scope="module")
def context():
    """Processes that are forked from one which has imported torch."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["t2l_engine.serving.store", "safetensors.torch"])
    return made


def test_two_processes_write_the_same_keys(context, tmp_path):
    barrier, keys = context.Barrier(2), [f"k{i}" for i in range(6)]
    both = [context.Process(target=_write, args=(tmp_path / "store", order, barrier)) for order in (keys, keys[::-1])]
    [process.start() for process in both]
    [process.join() for process in both]
    assert [process.exitcode for process in both] == [0, 0]
    store = AdapterStore(tmp_path / "store", 1 << 20)
    assert visible(store) == sorted(keys)
    for key in keys:
        assert len(AdapterStack.from_peft(store.root / key)) == 1, "whole"


def _hold(root, opened, leave):
    store = AdapterStore(root, 1 << 20)
    opened.set()
    leave.wait()
    store.close()


def test_what_a_running_server_may_use_stays(context, tmp_path):
    """One that started two days ago, on its own; then nobody beside."""
    first = AdapterStore(tmp_path / "store", 1 << 20)
    size = 0
    for days, key in ((0, "new"), (1, "used"), (2, "edge"), (3, "older")):
        folder = first.write_peft(key, stack())
        size = taken(folder)
        os.utime(folder, (time.time() - days * DAY,) * 2)
    opened, leave = context.Event(), context.Event()
    server = context.Process(target=_hold, args=(tmp_path / "store", opened, leave), daemon=True)
    server.start()
    assert opened.wait(60)
    first.close()
    (own,) = first.root.glob(".server-*")
    os.utime(own, (time.time() - 2 * DAY,) * 2)
    for days in (1, 3):
        (first.root / f"{days}.tmp-x").mkdir()
        os.utime(first.root / f"{days}.tmp-x", (time.time() - days * DAY,) * 2)
    (first.root / ".server-ended").write_text("")
    beside = AdapterStore(tmp_path / "store", 2 * size)
    assert visible(beside) == ["1.tmp-x", "edge", "new", "used"] and beside.used == 3 * size
    assert len(list(first.root.glob(".server-*"))) == 2, "of those that run"
    beside.close()
    leave.set()
    server.join()
    alone = AdapterStore(tmp_path / "store", 2 * size)
    assert visible(alone) == ["new"] and alone.used == size


def test_who_starts_alone_removes_what_is_unfinished_or_unused_for_a_week(tmp_path):
    first = AdapterStore(tmp_path / "store", 1 << 20)
    for key in ("old", "found", "new"):
        first.write_peft(key, stack())
    (first.root / "x.tmp-1-0").mkdir()
    for path in ("old", "found"):
        os.utime(first.root / path, (time.time() - 8 * DAY,) * 2)
    first.find("found")
    first.close()
    alone = AdapterStore(tmp_path / "store", 1 << 20)
    assert visible(alone) == ["found", "new"]
    assert alone.used == taken(alone.root / "found") + taken(alone.root / "new")


def test_a_folder_that_others_write_to_is_refused(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o777)
    with pytest.raises(ValueError, match="expected a folder that only its owner writes to"):
        AdapterStore(tmp_path / "store", 1)
    AdapterStore(tmp_path / "own", 1)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
