"""vLLM's LLM class in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "t2l"}


def llm(plan, environment):
    """What run_llm.py prints for ``plan``."""
    script = Path(__file__).with_name("run_llm.py")
    variables = VARIABLES | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment
    done = subprocess.run(
        [sys.executable, script, json.dumps(plan)], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # vLLM says things too
