"""From a sentence to answers as on a CPU with AVX2 alone: our kernels, torch's products, the dtype."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from t2l_engine import ops

ROOT = Path(__file__).resolve().parent.parent
#: Of our kernels, of ATen's and of oneDNN's.
LIMITS = {"T2L_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

#: Of the demo: right answers of the base model and of the adapted one.
RIGHT = [0, 5]
TASK, INPUT, ANSWER = "File the sentence under computers, cooking or law.", "Did Nora mention the download?", "computers"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64" or not ops.NATIVE, reason="needs kernels for x86-64"),
]


def output(*command: str, stdin: str = "") -> str:
    told = {"cwd": ROOT, "env": os.environ | LIMITS, "input": stdin, "timeout": 300}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **told)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_info_names_the_kernels_and_float32():
    about = json.loads(output("-m", "t2l_engine", "info", "--json"))
    assert about["instruction_sets"]["chosen"] == "avx2" and about["dtype"] == "float32"
    assert about["matrix_products"]["float32"] > about["matrix_products"]["bfloat16"] > 0


def test_the_demo_answers():
    """Greedy answers of the bundled checkpoint, in float32: those of the documentation's picture."""
    shown = output("examples/demo.py")
    right = re.search(r"base model (\d+) of 12 .* adapted (\d+) of 12", " ".join(shown.split()))
    assert right and [int(count) for count in right.groups()] == RIGHT
    together = shown.partition("3. One batch")[2].partition("4. Times")[0]
    assert len(re.findall(r"│ same +│", together)) == 7, "alone as in a batch"


def test_the_chat_answers():
    said = output("-m", "t2l_engine", "chat", "--task", TASK, "--max-new-tokens", "16", stdin=f"{INPUT}\n")
    assert said == f"{ANSWER}\n"
