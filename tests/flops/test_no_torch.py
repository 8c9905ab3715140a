"""What needs configurations alone runs where there is no torch."""

import json
import subprocess
import sys

CODE = """
import importlib.util, json, sys
for name in ("torch", "transformers", "numpy", "safetensors", "yaml"):
    sys.modules[name] = None  # importing it raises ImportError
sys.modules["t2l_engine"] = importlib.util.module_from_spec(importlib.util.find_spec("t2l_engine"))  # not run
from t2l_engine import config, flops
setup = flops.known_setup("mistral-7b")
ways = flops.ways(setup, flops.Workload(question=59, answer=4, shots=3, shot=80, description=35))
print(json.dumps([way.first.flops() for way in ways.values()]))
"""


def test_closed_forms_need_no_torch():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from t2l_engine.research import costs

    load = costs.Workload(question=59, answer=4, shots=3, shot=80, description=35)
    here = costs.ways(costs.known_setup("mistral-7b"), load)
    assert json.loads(run.stdout) == [way.first.flops() for way in here.values()]
