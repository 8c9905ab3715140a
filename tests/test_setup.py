"""setup.py: CMake's folder is kept for as long as compilers and generator are the same."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
SETUP = Path(__file__).parents[1] / "setup.py"


def test_the_build_folder_of_another_compiler_is_cleared(monkeypatch, tmp_path):
    """Of another version too; other options have a folder of their own."""
    versions, build = {"c++": "13"}, tmp_path / "build" / f"cmake-{sys.implementation.cache_tag}"
    shutil.copy(SETUP, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "T2L_CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "build_ext", "--build-lib", "lib"])
    monkeypatch.setattr(subprocess, "getoutput", lambda command: versions[command.split()[0]])
    monkeypatch.setattr(subprocess, "check_call", lambda command: (Path(command[command.index("-B") + 1]) / "_C.so").touch()
                        if "-B" in command else None)  # fmt: skip

    def kept():
        """Whether a build went on in the folder of the last one."""
        runpy.run_path(str(tmp_path / "setup.py"), run_name="__main__")
        found = (build / "marker").exists()
        (build / "marker").touch()
        return found

    assert [kept(), kept()] == [False, True]
    versions["c++"] = "14"
    assert [kept(), kept()] == [False, True]
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/usr/bin/ninja" if name == "ninja" else None)
    assert [kept(), kept()] == [False, True]
    monkeypatch.setenv("T2L_CMAKE_ARGS", "-DX=1")
    assert kept() and len(list((tmp_path / "build").iterdir())) == 2
