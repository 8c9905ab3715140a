"""The build, in place and with this Python: everything a machine without network needs is looked for first, and named.

A library that was built elsewhere and came with the tree is used where it loads here, has kernels for this card and is of
these sources: nothing is built then.  Else the emulator is built beside it, for the step that compares with it.

python -m bench.gpu.build [--dry]
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
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


#: Prints what the library in the tree says of itself; a process of its own, since a build may replace it afterwards.
PROBE = (sys.executable, "-c", "import json; from t2l_engine import _native; print(json.dumps(_native.about()))")
DIGEST = (sys.executable, str(ROOT / "cmake" / "source_digest.py"))


def unusable() -> str | None:
    """Why the library that came with the tree cannot be measured; None where it can."""
    if not (ROOT / "t2l_engine" / "_C.so").exists():
        return "no t2l_engine/_C.so"
    said = subprocess.run(PROBE, cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        lines = said.stderr.strip().splitlines() or [f"a process that loads it ends with status {said.returncode}"]
        return lines[-1][:300]
    about = json.loads(said.stdout)
    if about is None:
        return "it is not loaded, as T2L_DISABLE_NATIVE asks"
    if not of_these_sources(ROOT / "t2l_engine" / "_C.so"):
        return "it is of other sources"
    cuda, card = about["build"]["cuda"], compute_capability()
    return None if covers(cuda, card) else f"its CUDA kernels ({cuda}) are not for this card ({card or 'none'})"


def of_these_sources(library: Path) -> bool:
    """Whether ``library`` was built from the sources of this tree, wherever that was."""
    digest = subprocess.run(DIGEST, capture_output=True, text=True, check=True).stdout.strip()
    return f"t2l_sources:{digest}".encode() in library.read_bytes()


def covers(built: str, card: str | None) -> bool:
    """Whether kernels run on a card of compute capability ``card``; ``built``: "nvcc 13.0.88, 80-real 90-virtual"."""
    if card is None:
        return False
    major, minor = map(int, card.split("."))
    for number, own, kind in re.findall(r"(\d+)(a?)(-real|-virtual)?\b", built.partition(",")[2]):
        at = divmod(int(number), 10)
        exact, later = at == (major, minor), at <= (major, minor)
        if exact or (not own and later and (kind != "-real" or at[0] == major)):
            return True
    return False


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
    why_not = unusable()
    if why_not is None:
        print("t2l_engine/_C.so came with the tree and is used: nothing is built")
        return 0
    print(f"to be built, since of the tree: {why_not}")
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
