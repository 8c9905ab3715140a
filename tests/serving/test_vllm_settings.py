"""The settings of serving: defaults, names of checkpoints, errors that name the variable."""

import os
import shutil
from pathlib import Path

import pytest

from t2l_engine.hypernetwork.folder import BUNDLED
from t2l_engine.serving.vllm import settings as module
from t2l_engine.serving.vllm.settings import Settings

read = Settings.from_environment


def test_nothing_is_on_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setenv("T2L_CACHE", str(tmp_path))
    found = read({"T2L_VLLM_CHECKPOINT": " ", "PATH": "/bin"})
    assert not found.kernels and not found.warmup and found.checkpoints == {}
    assert (found.mode, found.threads, found.store_bytes, found.max_names) == ("disk", 1, 4 << 30, 100_000)
    assert found.store == tmp_path / "adapters"
    assert read({"T2L_VLLM_CHECKPOINT": "smollm2-135m"}).mode == "memory"


@pytest.mark.parametrize(
    "free, before, shared", [((1 << 30) + 1, False, True), (1 << 30, False, False), (1 << 30, True, True)]
)
def test_the_store_is_in_shared_memory_if_that_has_room_or_a_store(monkeypatch, tmp_path, free, before, shared):
    monkeypatch.setattr(module, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(3 << 30, 0, free))
    own = tmp_path / f"t2l-{os.getuid()}"
    if before:
        own.mkdir()
    found = read({})
    assert (found.store == own) == shared
    assert found.store_bytes == ((3 << 29) if shared else (4 << 30)), "at most half of what other programs need too"
    assert read({"T2L_VLLM_STORE_BYTES": "5"}).store_bytes == 5


def test_checkpoints_have_short_names_in_order(tmp_path):
    shutil.copytree(BUNDLED / "smollm2-135m", tmp_path / "other")
    found = read({"T2L_VLLM_CHECKPOINT": f"{tmp_path}/other/, smollm2-135m"})
    assert list(found.checkpoints.items()) == [("other", f"{tmp_path}/other/"), ("smollm2-135m", "smollm2-135m")]
    assert found.kernels, "kernels follow the checkpoint"
    assert found.checkpoint_name(None) == "other" and found.checkpoint_name("smollm2-135m") == "smollm2-135m"
    with pytest.raises(ValueError, match=r"checkpoint: expected one of \['other', 'smollm2-135m'\], got 'third'"):
        found.checkpoint_name("third")


def test_values_are_read():
    names = ("KERNELS", "MODE", "STORE", "STORE_BYTES", "MAX_NAMES", "THREADS", "WARMUP")
    values = dict(zip(names, ("0", "memory", "/some/where", "5", "6", "2", "1"), strict=True))
    found = read({"T2L_VLLM_CHECKPOINT": "smollm2-135m"} | {f"T2L_VLLM_{name}": text for name, text in values.items()})
    expected = ({"smollm2-135m": "smollm2-135m"}, False, "memory", Path("/some/where"), 5, 6, 2, True)
    assert found == Settings(*expected)


@pytest.mark.parametrize("name, value, message", [
    ("CHECKPOINT", "nowhere", "no such folder"), ("CHECKPOINT", ",", "expected bundled names or folders, got ','"),
    ("CHECKPOINT", "smollm2-135m,smollm2-135m", "different names"), ("KERNELS", "yes", "expected one of 0, 1, got 'yes'"),
    ("MODE", "ram", "expected one of disk, memory, got 'ram'"), ("WARMUP", "2", "expected one of 0, 1, got '2'"),
    ("THREADS", "0", "expected a positive whole number, got '0'"), ("STORE_BYTES", "4GiB", "positive whole number"),
    ("MAX_NAMES", "-1", "positive whole number"), ("CHECKPOINTS", "", "expected one of T2L_VLLM_CHECKPOINT, "),
])  # fmt: skip
def test_errors_name_the_variable(name, value, message):
    with pytest.raises(ValueError, match=f"^T2L_VLLM_{name}: .*{message}"):
        read({f"T2L_VLLM_{name}": value})


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copytree(BUNDLED / "smollm2-135m", tmp_path / "a:b")
    messages = {"file": "expected a folder, got a file", "empty": "holds none of config.json", "a:b": "are without ':'"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"^T2L_VLLM_CHECKPOINT: .*{message}"):
            read({"T2L_VLLM_CHECKPOINT": str(tmp_path / name)})
