"""The wheel of AArch64 in an emulator, with Debian's Python and torch's own wheel of that processor."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.environments import built, cache, floor, inherited, locked, pip_failed

pytestmark = [pytest.mark.compat, pytest.mark.timeout(3600)]

#: Releases of glibc whose wheels Debian's Python may load.
GLIBC = range(17, 35)


def apt(folder: Path, *command: str) -> None:
    """apt-get as on a bare machine of AArch64, without touching this one's lists and packages."""
    (folder / "status").touch()
    options = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State::status": folder / "status"}
    options |= {"Dir::State": folder / "state", "Dir::Cache": folder / "cache", "APT::Sandbox::User": "root"}
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    run = subprocess.run(["apt-get", "-q", "-y", *given, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def root() -> Path:
    """Debian's Python of AArch64, and in site/ torch; downloaded once, some 2 GB, and kept."""
    for program, package in (("apt-get", "apt"), ("qemu-aarch64", "qemu-user")):
        if not shutil.which(program):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {program} (Debian's {package})")
    folder = cache() / "aarch64"
    with locked():
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            apt(folder, "update")
            apt(folder, "install", "--download-only", "--no-install-recommends", "python3", "libstdc++6", "libgomp1")
            for package in (folder / "cache" / "archives").glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
            (folder / "lib").is_symlink() or (folder / "lib").symlink_to("usr/lib")
            shutil.rmtree(folder / "cache")
            pip_install(folder, f"torch>={floor('torch')}")
            (folder / "done").touch()
    return folder


def interpreter(root: Path) -> Path:
    return (root / "usr" / "bin" / "python3").resolve()


def pip_install(root: Path, *requirements: str, target: str | Path = "site") -> None:
    version = re.search(r"3\.\d+", interpreter(root).name)[0]
    platforms = [f"--platform=manylinux{of}_aarch64" for of in ("2014", *(f"_2_{minor}" for minor in GLIBC))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:", *platforms]
    command += ["--python-version", version, "--target", root / target, *requirements]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pip_failed(f"pip install {' '.join(requirements)}", run.stderr)


@pytest.fixture(scope="module")
def packages(root, tmp_path_factory) -> str:
    """PYTHONPATH with the wheel and what it needs."""
    needed = [of for of in importlib.metadata.requires("t2l_engine") if "extra ==" not in of and not of.startswith("torch")]
    folder = tmp_path_factory.mktemp("wheel")
    pip_install(root, *needed, target=folder)
    pip_install(root, "--no-deps", str(built("aarch64")), target=folder)
    return f"{folder}:{root / 'site'}"


@pytest.mark.parametrize("isa", ["neon", "neon_bf16"])
def test_self_check(root, packages, tmp_path, isa):
    """Every op on its cases, and an adapter of a bundled checkpoint."""
    where = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": packages, "T2L_ISA": isa}
    command = ["qemu-aarch64", "-L", root, interpreter(root), "-m", "t2l_engine.testing.selfcheck"]
    done = subprocess.run(command, cwd=tmp_path, env=inherited() | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {result["where"] for result in results} == {f"CPU {isa}"}
    assert not [failed for result in results for failed in result["failed"]]
    assert sum(result["cases"] for result in results) > 100
