"""Calls CMake, which builds; setuptools only packs the result."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = shlex.split(os.environ.get("T2L_CMAKE_ARGS", ""))
#: _C has no Python symbol; _core, and a wheel with it, is for one CPython.
NO_CORE = re.search(r"-D ?T2L_CORE(:\w+)?=(OFF|NO|FALSE|N|0)( |$)", " ".join(OPTIONS), re.IGNORECASE)
NAMES = ("_C",) if NO_CORE else ("_C", "_core")
NO_COMPILER = """t2l_engine: no C++ compiler found: installing without native kernels.
The plain-torch ops give the same results, slower. For the kernels install g++ and
run pip install again, with --no-cache-dir --force-reinstall."""


def find(variable, *names):
    """A compiler as CMake looks for it: what the environment variable names, else the first program; None: there is none."""
    homes = [os.path.join(home, "bin") for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    path = os.pathsep.join([os.environ.get("PATH", ""), *homes])
    return os.environ.get(variable) or next(filter(None, (shutil.which(name, path=path) for name in names)), None)


CXX, NVCC = find("CXX", "c++", "g++", "clang++"), find("CUDACXX", "nvcc")


class CMakeBuild(build_ext):
    def run(self):
        if CXX is None:
            print(NO_COMPILER, file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extensions(self):
        own = [hashlib.sha256(" ".join(OPTIONS).encode()).hexdigest()[:8]] if OPTIONS else []
        build = ROOT / "build" / "-".join(["cmake", sys.implementation.cache_tag, *own])
        ninja = shutil.which("ninja")
        # CMake keeps generator, compilers and their features for the life of a build folder.
        versions = [compiler and subprocess.getoutput(f"{compiler} --version") for compiler in (CXX, NVCC)]
        made_by = json.dumps([CXX, NVCC, *versions, bool(ninja)])
        stamp = build / "made-by.json"
        if not stamp.is_file() or stamp.read_text() != made_by:
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            stamp.write_text(made_by)
        # Ninja may be in a temporary build environment of pip: its path is set on every run.
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        python = f"-DPython_EXECUTABLE={sys.executable}"
        for old in build.glob("_core.*so"):  # which CMake leaves out where there is no pybind11 now
            old.unlink()
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), python, *generator, *OPTIONS])
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        for extension in list(self.extensions):
            name = extension.name.rsplit(".", 1)[-1]
            built = next(build.glob(f"{name}.*so"), None)
            if built is None and name != "_core":
                raise FileNotFoundError(f"cmake built no {name} under {build}")
            if built is None:  # _core is optional
                self.extensions.remove(extension)
                continue
            os.makedirs(os.path.dirname(target := self.get_ext_fullpath(extension.name)), exist_ok=True)
            os.replace(shutil.copy2(built, f"{target}.new"), target)  # a process may have loaded the old one

    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".so" if name.endswith("_C") else super().get_ext_filename(name)


class Wheel(bdist_wheel):
    def get_tag(self):
        *python, platform = super().get_tag()
        return (*python, platform) if "_core" in NAMES else ("py3", "none", platform)


EXTENSIONS = [Extension(f"t2l_engine.{name}", []) for name in NAMES]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
