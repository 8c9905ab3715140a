"""The Dockerfile without docker: its steps, in order, in a copy of the repository and an environment of their own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.compat.environments import ROOT, inherited, pip_failed

pytestmark = pytest.mark.compat

#: Steps that need to be root of an image.
OF_AN_IMAGE = ("apt-get ", "useradd ")
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def copied(folder):
    """What ``COPY . .`` brings of a clone: its files, but for those of .dockerignore."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.split("/")[0] not in ignored:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


def test_its_steps_make_a_working_installation(tmp_path):
    source, place = tmp_path / "src", tmp_path / "opt" / "t2l"
    source.mkdir()
    path = os.pathsep.join([f"{place}/bin", os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = inherited() | {"PATH": path, "HOME": str(tmp_path)}
    ran, commands = 0, {}
    for name, rest in instructions():
        assert name in KNOWN, name
        if name == "COPY" and rest == ". .":
            copied(source)
        elif name == "RUN" and not rest.startswith(OF_AN_IMAGE):
            command = rest.replace("/opt/t2l", str(place))
            run = subprocess.run(["bash", "-ec", command], cwd=source, env=environment, capture_output=True, text=True)
            if run.returncode and "pip install" in command:
                pip_failed(command, run.stderr)
            assert run.returncode == 0, f"{command}: {run.stdout[-2000:]}{run.stderr[-2000:]}"
            ran += 1
        elif name in ("ENTRYPOINT", "CMD"):
            commands[name] = json.loads(rest)
    assert ran == 5  # environment, build tools, installation, check, model
    command = [*commands["ENTRYPOINT"], *commands["CMD"], "--help"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "--host" in run.stdout, run.stderr
    where = subprocess.run(["bash", "-c", "command -v t2l"], env=environment, capture_output=True, text=True).stdout.strip()
    assert where == f"{place}/bin/t2l"
