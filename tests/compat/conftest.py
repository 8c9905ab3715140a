"""What the tests of other releases share."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import t2l_engine
from tests.compat.environments import ROOT, floor, torch_headers


def pytest_ignore_collect(config):
    """What is there (Pythons, releases) is looked for only where these tests are asked for."""
    return None if config.option.markexpr == "compat" else True


@pytest.fixture(scope="session")
def library() -> Path:
    """``_C.so`` compiled against the headers of the oldest torch and linked for the oldest glibc, as wheels are."""
    if platform.machine() != "x86_64":
        pytest.skip(f"wheels are of x86-64, this is {platform.machine()}")
    build = ROOT / "build" / "oldest-torch"
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    headers = torch_headers(f"{floor('torch')}.0")
    options = ["-DT2L_CORE=OFF", "-DT2L_MANYLINUX=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DT2L_TORCH_INCLUDE={headers}", "-DCMAKE_CUDA_ARCHITECTURES=90a-real"]
    commands = (["-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], ["--build", str(build), "--target", "_C"])
    for arguments in commands:
        run = subprocess.run(["cmake", *arguments], env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return build / "_C.so"


@pytest.fixture(scope="session")
def package(library, tmp_path_factory) -> Path:
    """Folder of a copy of the package with that library in place of its own, outside of the source tree."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(t2l_engine.__file__).parent, folder / "t2l_engine", ignore=ignored)
    shutil.copy(library, folder / "t2l_engine" / "_C.so")
    return folder
