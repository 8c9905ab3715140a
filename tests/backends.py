"""Backends of the ops in tests and benchmarks: CPU kernels, CUDA kernels on a GPU, or CUDA kernels in the emulator."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from t2l_engine import ops
from t2l_engine.ops import native

NAMES = ("cpu", "cuda", "emu")
ROOT = Path(__file__).resolve().parents[1]


def _path() -> str:
    """Search path for programs: PATH after the folder of this Python, where pip installs cmake and ninja."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def build_emulator(sanitize: str = "") -> Path:
    """Build the CUDA kernels for the emulator and return the library, a replacement of ``_C``; needs the source tree.

    ``sanitize``: "address" (with undefined behaviour), "thread" or "".  Raises RuntimeError without CMake, or with the end
    of the output of a failed build.
    """
    build, path = _emulator_folder(sanitize), _path()
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("the emulator does not build: expected cmake beside python or in PATH, found none")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DT2L_SANITIZE={sanitize}"]
    options += ["-DT2L_EMULATOR=ON", "-DT2L_CUDA=OFF", "-DT2L_CORE=OFF"]
    if ninja := shutil.which("ninja", path=path):  # set on every build: pip's build environments are temporary
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    commands = (["-S", str(ROOT), "-B", str(build), *options], ["--build", str(build), "--target", "_emu", "-j2"])
    for arguments in commands:
        run = subprocess.run([cmake, *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path})
        if run.returncode:
            raise RuntimeError(f"the emulator does not build:\n{(run.stdout + run.stderr)[-3000:]}")
    return emulator_library(sanitize)


def emulator_library(sanitize: str = "") -> Path:
    """Path of the library that :func:`build_emulator` builds."""
    return _emulator_folder(sanitize) / "_emu.so"


def _emulator_folder(sanitize: str) -> Path:
    return ROOT / "build" / "-".join(filter(None, ("emu", sanitize)))


def emulator_compiler(sanitize: str = "") -> str:
    """The C++ compiler that :func:`build_emulator` used."""
    cache = (_emulator_folder(sanitize) / "CMakeCache.txt").read_text()
    return re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)[1]


def no_emulator(sanitize: str = "") -> str | None:
    """The prerequisite of building and running the emulator that this machine lacks; None if there is none."""
    path = _path()
    if platform.machine() != "x86_64":
        return f"the emulator needs x86-64, this is {platform.machine()}"
    if shutil.which("cmake", path=path) is None:
        return "the emulator needs cmake to build"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]  # CMake's order
    compiler = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if compiler is None:
        return "the emulator needs a C++ compiler"
    if not sanitize:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        for command in ([compiler, f"-fsanitize={sanitize}", str(source), "-o", str(program)], [str(program)]):
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                return f"no sanitizer '{sanitize}' here: {(run.stdout + run.stderr)[-300:]}"
    return None


def select(name: str, library: Path | None = None) -> torch.device:
    """Select backend ``name`` for the ops; returns the device of its operands.

    "cpu" and "cuda" use the package's native library, "emu" the emulator's (built where ``library`` is None), with which ops
    on CPU tensors run the CUDA kernels.  ``library`` replaces the package's, which must not be loaded: the process must have
    been started with ``T2L_DISABLE_NATIVE=1``.

    Raises ValueError for another name, RuntimeError if the backend is not available.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, got {name!r}")
    if name == "emu" or library:
        if ops.has_kernel("lora_add_", "CPU"):
            raise RuntimeError(f"backend {name!r}: the CPU kernels are loaded; set {native.DISABLE_VARIABLE}=1")
        torch.ops.load_library(str(library or build_emulator()))
    if name == "cuda" and not (ops.has_kernel("lora_add_", "CUDA") and torch.cuda.is_available()):
        raise RuntimeError("backend 'cuda': expected CUDA kernels and a device; build with nvcc, beside a torch for CUDA")
    return torch.device("cuda" if name == "cuda" else "cpu")
