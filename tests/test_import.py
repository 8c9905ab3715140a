"""Importing the package is cheap and pulls in nothing but torch; a library that does not load says why."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import t2l_engine
from t2l_engine.ops import native


@functools.cache
def modules(*statements):
    """Names of all modules that a process has after each of ``statements``."""
    code = "; ".join(["import sys", *(f"{statement}; print(*sys.modules)" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_import_costs_little_more_than_torch():
    before, after = modules("import torch", "import t2l_engine")
    own = {name for name in after - before if name.split(".")[0] == "t2l_engine"}
    tops = {name: name.split(".")[0] for name in after - before - own}
    # The name of the last one goes on with that of the system.
    others = {n for n, top in tops.items() if top not in sys.stdlib_module_names and not top.startswith("_sysconfigdata_")}
    assert len(own) < 60 and {name.split(".")[0] for name in others} <= {"torch", "triton"}
    assert len(others) < 100, "torch's FLOP counter, which brings triton (some 70 modules) where it is installed"
    assert not after & {f"t2l_engine.{room}" for room in ("research", "testing", "cli", "_core")}


def test_an_unused_plugin_of_vllm_imports_nothing(monkeypatch):
    for name in ("T2L_VLLM_CHECKPOINT", "T2L_VLLM_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    before, after = modules("import os", "import t2l_vllm; t2l_vllm.register()")
    assert after - before == {"t2l_vllm"}


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A native library that is none, in place of the package's."""
    monkeypatch.delenv(native.DISABLE_VARIABLE, raising=False)
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "_C.so")
    (tmp_path / "_C.so").write_bytes(b"not a library")
    return tmp_path / "_C.so"


def test_a_broken_native_library_raises(broken, monkeypatch):
    """Present but unloadable: an error, unless the reference was asked for; an absent one is none."""
    with pytest.raises(ImportError, match="is present but does not load: .*file too short"):
        native.load()
    monkeypatch.setenv(native.DISABLE_VARIABLE, "1")
    assert native.load() is False
    monkeypatch.delenv(native.DISABLE_VARIABLE)
    broken.unlink()
    assert native.load() is False


def test_the_command_reports_it_in_a_line(tmp_path):
    package, root = Path(t2l_engine.__file__).parent, Path(__file__).parents[1]
    shutil.copytree(package, tmp_path / "t2l_engine", ignore=shutil.ignore_patterns("*.so", "__pycache__", "checkpoints"))
    library = tmp_path / "t2l_engine" / "_C.so"
    library.write_bytes(b"not a library")
    launch = f"import sys; sys.path.append({str(root)!r}); sys.argv = ['t2l', 'info', '--check']; "
    launch += "import t2l_command as command; command.main()"
    environment = {k: v for k, v in os.environ.items() if k != "T2L_DISABLE_NATIVE"} | {"PYTHONPATH": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", launch], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 1 and told.stdout == "" and told.stderr.count("\n") == 1, "a line, no trace"
    assert told.stderr.startswith(f"t2l: t2l_engine: {library} is present but does not load: ")


def test_an_older_torch_is_the_reason(broken, monkeypatch):
    """Not the symbol that it happens to lack first."""
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(ImportError, match=r"does not load: expected torch 2\.11 or later, got 2\.10\.1\+cu128\n") as caught:
        native.load()
    assert (caught.value.name, caught.value.path) == ("t2l_engine._C", str(broken))


@pytest.mark.skipif(native.about() is None, reason="no native library is loaded")
def test_a_library_may_be_a_link(monkeypatch, tmp_path):
    (tmp_path / "_C.so").symlink_to(native.library_path())
    expected = native.about()
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "_C.so")
    assert native.about() == expected
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "absent.so")
    assert native.about() is None
