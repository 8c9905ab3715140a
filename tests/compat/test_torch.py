"""Every promised release of torch: the bindings compile against its headers, and ask for nothing that the oldest lacks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import t2l_engine
from tests.compat.environments import ROOT, floor, run_tests, torch_headers

pytestmark = pytest.mark.compat

OLDEST = f"{floor('torch')}.0"
RELEASES = (OLDEST, "2.12.0", "2.13.0", "2.14.1", "2.15.0")
#: What C++ libraries of the machine define, by the version that a symbol carries.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
BINDINGS = ("cpu.cpp", "cuda.cpp")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("binding", BINDINGS)
def test_bindings_compile(release, binding):
    compiler = os.environ.get("CXX", "c++")
    options = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    defined = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = ["-isystem", str(torch_headers(release)), f"-I{ROOT / 'csrc'}"]
    source = ROOT / "csrc" / "torch" / binding
    run = subprocess.run([compiler, *options, *defined, *include, str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def undefined(library: Path) -> set[str]:
    """Symbols that others must define for ``library`` to load, with the versions they carry; weak ones need not be there."""
    run = subprocess.run(["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True)
    found = (line.split() for line in run.stdout.splitlines())
    return {name for kind, name in found if kind == "U"}


def declared(headers: Path) -> set[str]:
    """Names of the C functions that torch's stable ABI has, by its headers."""
    folders = (headers / "torch/csrc/inductor/aoti_torch/c", headers / "torch/csrc/stable/c")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.h")]
    return {name for text in texts for name in re.findall(r"\b(\w+)\s*\(", text)}


@pytest.mark.parametrize("which", ["built against the oldest headers", "as installed here"])
def test_no_symbol_that_the_oldest_torch_lacks(which, request):
    path = Path(t2l_engine.ops.native.library_path())
    if which == "built against the oldest headers":
        path = request.getfixturevalue("library")
    asked, has = undefined(path), declared(torch_headers(OLDEST))
    assert {"torch_call_dispatcher", "aoti_torch_library_init_impl"} <= asked & has  # both lists are of what they say
    assert not {name for name in asked if not RUNTIME.search(name)} - has


def test_no_symbol_younger_than_manylinux_2_28(library):
    versions = {
        tuple(map(int, found[1].split(".")))
        for found in map(re.compile(r"@GLIBC_([\d.]+)").search, undefined(library))
        if found
    }
    assert max(versions) <= (2, 28)
    assert not [name for name in undefined(library) if "@GLIBCXX" in name or "@CXXABI" in name], "libstdc++ is inside"


def test_what_was_built_on_the_oldest_torch_runs_on_this_one(package):
    where = {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    probe = "from t2l_engine import ops; from t2l_engine.ops import native; print(native.library_path(), ops.NATIVE)"
    command, environment = [sys.executable, "-c", probe], os.environ | where
    said = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [str(package / "t2l_engine" / "_C.so"), "True"], said.stderr
    said = run_tests(Path(sys.executable), ROOT / "tests" / "ops", "-c", ROOT / "pyproject.toml", cwd=package, **where)
    assert int(re.search(r"(\d+) passed", said)[1]) > 300
