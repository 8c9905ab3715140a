"""The oldest promised transformers, what a serving engine pins, and the newest: models, use, PEFT, encoders, engine."""

import importlib.metadata
import re
import subprocess

import pytest

from tests.compat.environments import ROOT, floor, overlay, run_tests

pytestmark = pytest.mark.compat

#: vLLM 0.32 asks for >= 5.16.1 and < 5.20.
RELEASES = (f"=={floor('transformers')}.*", "==5.19.*", "")
#: Tests of what stands on transformers.
TESTS = ("adapters", "lora", "text", "research/costs", "test_engine.py")


@pytest.mark.parametrize("release", RELEASES, ids=lambda text: text.strip("=.*") or "newest")
def test_transformers(release, tmp_path):
    python = overlay(tmp_path / "environment", *(["--upgrade"] if not release else []), f"transformers{release}")
    command = [python, "-c", "import transformers; print(transformers.__version__)"]
    version = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert version.startswith(release.strip("=*"))
    if not release and version == importlib.metadata.version("transformers"):
        print(f"transformers {version}: that of this environment, with which the default tests run")
        return
    said = run_tests(python, *(ROOT / "tests" / name for name in TESTS))
    print(f"transformers {version}: {said.strip().splitlines()[-1]}")
    assert int(re.search(r"(\d+) passed", said)[1]) > 250
