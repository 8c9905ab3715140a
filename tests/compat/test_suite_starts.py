"""The GPU suite starts on the machine it is made for: an older torch and transformers, few packages, a library that came
with the tree.  A dry run: every step's code, on this CPU."""

import json
import os
import subprocess
import sys

import pytest
from environments import ROOT, VERSION, environment, pip_install, torch_environment

from t2l_engine import ops

pytestmark = pytest.mark.compat

#: What is there beside torch; no pydantic, gguf, accelerate.
PACKAGES = ("transformers==5.17.*", "pytest", "pyyaml", "rich", "safetensors", "tqdm", "typer")


def test_dry_run(package, tmp_path):
    python = environment(tmp_path / "environment", sys.executable, VERSION, torch_environment(sys.executable, VERSION))
    pip_install(python, *PACKAGES)
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "pydantic"], check=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "T2L_"))}
    where = {"PYTHONPATH": f"{package}:{ROOT}", "PYTHONSAFEPATH": "1"}
    command = [python, "-m", "bench.gpu.suite", tmp_path / "out", "--dry"]
    run = subprocess.run(command, cwd=tmp_path, env=inherited | where, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    status = {step["name"]: (step["status"], step["why"]) for step in result["steps"]}
    assert status.pop("tests of training") == ("skipped", "no accelerate, matplotlib, pydantic")
    assert {name for name, (said, _) in status.items() if said == "passed"} == status.keys()
    assert result["versions"]["transformers"].startswith("5.17.")
    if ops.has_kernel("lora_add_", "CUDA"):  # this build has them, so that one has
        assert all(result["kernels"][name] for name in ("lora_add_", "hypernet_heads", "hypernet_trunk"))
