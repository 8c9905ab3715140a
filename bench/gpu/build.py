"""The build, in place and with this Python: everything a machine without network needs is looked for first, and named.

The emulator is built beside it, for the step that compares with it.

python -m bench.gpu.build [--dry]
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Compute capability -> what to compile for: only the card that is here, since the build is part of the run.
ARCHITECTURES = {"9.0": "90a-real", "8.0": "80-real"}
#: A process of its own: one that had loaded the library would not survive that the build writes a new one over it.
EMULATOR = (sys.executable, "-c", "from t2l_engine.testing import backends; backends.build_emulator()")


def find_cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: beside CUDACXX, in PATH, in CUDA_HOME, in the packages of this Python."""
    beside = os.path.dirname(os.environ.get("CUDACXX", ""))
    home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    packages = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    places = filter(None, [beside, os.environ.get("PATH"), home, packages])
    return shutil.which(name, path=os.pathsep.join(places))


def search_path() -> str:
    """PATH, with the programs of this Python's packages first: cmake and ninja may be there alone."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


def find(*names: str) -> str | None:
    """The first of these programs that is here."""
    return next(filter(None, (shutil.which(name, path=search_path()) for name in names)), None)


def missing() -> list[str]:
    """What a build needs and is not here."""
    absent = [] if find("cmake") else ["cmake (program)"]
    absent += [] if os.environ.get("CXX") or find("c++", "g++", "clang++") else ["a C++ compiler"]
    absent += [f"{name} (Python package)" for name in ("setuptools", "torch") if importlib.util.find_spec(name) is None]
    return absent + ([] if find_cuda_tool("nvcc") else ["nvcc (program, CUDA toolkit)"])


def compute_capability() -> str | None:
    """Of the current card, as ``9.0``."""
    try:
        import torch
    except ImportError:
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def environment() -> dict[str, str]:
    """What the build is told: CUDA or an error, for the card that is here, on all cores."""
    options = ["-DT2L_CUDA=ON"]
    architecture = ARCHITECTURES.get(compute_capability() or "")
    if architecture:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architecture}")
    told = {"T2L_CMAKE_ARGS": " ".join(options), "MAX_JOBS": str(os.cpu_count() or 1)}
    nvcc = find_cuda_tool("nvcc")
    return told | ({"CUDACXX": nvcc} if nvcc else {})


def main() -> int:
    absent, told = missing(), environment()
    print(f"missing: {', '.join(absent) or 'nothing'}; ninja: {find('ninja') or 'none, make is slower'}")
    print(" ".join(f"{name}={value!r}" for name, value in told.items()), flush=True)
    if "--dry" in sys.argv:
        return 0
    if absent:
        print(f"no build: {', '.join(absent)} missing; steps that need kernels are skipped")
        return 1
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    emulator = subprocess.Popen(EMULATOR, cwd=ROOT, env=os.environ | {"T2L_DISABLE_NATIVE": "1"})
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": search_path()} | told).returncode
    if code:
        emulator.kill()
    elif emulator.wait():
        print("the emulator did not build, which concerns the step 'emulator' alone")
    return code


if __name__ == "__main__":
    sys.exit(main())
