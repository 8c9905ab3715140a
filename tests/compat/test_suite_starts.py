"""The suites of a card start on the machine they are made for: an older torch and transformers, few packages, a library that
came with the tree.  Dry: a card's way on this CPU."""

import os
import subprocess
import sys

import pytest

from tests.compat.environments import ROOT, VERSION, environment, pip_install, torch_environment

pytestmark = pytest.mark.compat

#: What is there beside torch; no pydantic, gguf, accelerate.
PACKAGES = ("transformers==5.17.*", "pyyaml", "rich", "safetensors", "tqdm", "typer")
CODE = """
import importlib, sys
from bench import __main__, harness
from bench.timing import Dry
for name, module in __main__.PLANS.items():
    if name not in ("train", "serving", "levels"):  # of a CPU alone
        made = harness.run(name, importlib.import_module(module).plan, harness.Context.of("tiny", 1, Dry()), command="dry")
        assert all(one["error"]["value"] <= one["error"]["bound"] for one in harness.rows_of(made))
        print(name, made[0]["versions"]["transformers"], len(list(harness.rows_of(made))))
"""


def test_dry_run(package, tmp_path):
    python = environment(tmp_path / "environment", sys.executable, VERSION, torch_environment(sys.executable, VERSION))
    pip_install(python, *PACKAGES)
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "pydantic"], check=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "T2L_"))}
    where = {"PYTHONPATH": f"{package}:{ROOT}", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([python, "-c", CODE], cwd=tmp_path, env=inherited | where, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    done = [line.split() for line in run.stdout.splitlines()]
    suites = ("generate", "apply", "profile", "icl")
    assert [(name, version[:5]) for name, version, _ in done] == [(name, "5.17.") for name in suites]
    assert all(int(rows) > 0 for name, _, rows in done if name != "profile")  # which has counters, and no rows of times
