"""Other releases of what the package stands on: headers of torch, and environments with another transformers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
#: Of torch no more than headers is wanted, and its smallest wheel has them all: 80 MB, once.
SMALLEST_WHEEL = ("--platform", "macosx_11_0_arm64", "--platform", "macosx_14_0_arm64", "--python-version", "3.12")


def cache() -> Path:
    """Where downloads are kept: outside of the source tree."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "t2l_engine" / "compat"


def floor(package: str) -> str:
    """The oldest release of ``package`` that pyproject.toml promises, as it stands there: "2.11"."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'"{package}>=([\d.]+)"', text)[1]


def built(processor: str) -> Path:
    """The wheel of make wheel, or make wheel-aarch64."""
    found = list((ROOT / "dist").glob(f"t2l_engine-*_{processor}.whl"))
    if len(found) != 1:
        pytest.fail(f"dist: expected one wheel of {processor}, got {len(found)}; make wheel or make wheel-{processor}")
    return found[0]


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One run at a time makes what is kept."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pip_failed(what: str, said: str) -> None:
    """Fail; without a package index skip, saying so, but not in CI, which must have one."""
    why = f"{what}: {said.strip()[-800:]}"
    if not os.environ.get("CI") and re.search(r"NewConnectionError|name resolution|from versions: none|timed out", said):
        pytest.skip(why)
    pytest.fail(why)


def torch_headers(version: str) -> Path:
    """The include folder of a release of torch, "2.11.0"; downloaded on the first call."""
    folder = cache() / f"torch-{version}"
    with locked():
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *SMALLEST_WHEEL]
            free = os.environ | {"PIP_CONSTRAINT": os.devnull}  # a machine's cap is for what is installed
            run = subprocess.run([*command, "-d", folder, f"torch=={version}"], env=free, capture_output=True, text=True)
            if run.returncode:
                pip_failed(f"headers of torch {version}", run.stderr)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
            wheel.unlink()
            (folder / "done").touch()
    return folder / "torch" / "include"


def torch_environment(program: str, version: str, release: str = "") -> Path:
    """Packages of an environment of ``program``, Python of ``version``, with torch ("==2.11.*"; "": what pip takes, which is
    what runs this); made once and kept."""
    folder = cache() / f"torch-{release.strip('=.*') or torch.__version__}-on-python-{version}"
    with locked():
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([program, "-m", "venv", "--without-pip", folder], check=True)
            pip_install(folder / "bin" / "python", "torch" + (release or f">={floor('torch')}"))
            (folder / "done").touch()
    return folder / "lib" / f"python{version}" / "site-packages"


def environment(folder: Path, program: str, version: str, below: Path) -> Path:
    """The Python of a new environment of ``program`` that has the packages of ``below`` too."""
    subprocess.run([program, "-m", "venv", "--without-pip", folder], check=True)
    (folder / "lib" / f"python{version}" / "site-packages" / "below.pth").write_text(f"{below}\n")
    return folder / "bin" / "python"


def overlay(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment that has these requirements, and everything else from the one that runs now."""
    python = environment(folder, sys.executable, VERSION, Path(sysconfig.get_path("purelib")))
    said = [line for line in pip_install(python, *requirements).splitlines() if "t2l" in line and "requires" in line]
    assert not said, f"pip finds a conflict: {said}"
    return python


def pip_install(python: Path, *arguments: str) -> str:
    """Install into the environment of ``python``; pip's warnings."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pip_failed(f"pip install {' '.join(arguments)}", run.stderr)
    return run.stderr


def inherited() -> dict[str, str]:
    """The environment of a user's process: nothing of this run is passed on."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON", "T2L_", "VIRTUAL_ENV"))}


def run_tests(python: Path, *arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run pytest with ``python``, as a user's process would.  What it printed."""
    command = [str(python), "-m", "pytest", "-q", "-n", "2", *map(str, arguments)]
    run = subprocess.run(command, cwd=cwd, env=inherited() | environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return run.stdout
