"""Peak memory of one training step, in a process of its own (Linux only).

python -m bench.train_memory "hooks" --modules q,v --tokens 48 --dtype float32 [--size tiny] [--threads 2]

Prints a JSON object.  ``loaded_mib``: resident once packages and the model are; ``peak_mib``: the most during a step after a
first one; ``reset``: whether the system let the peak begin anew before that step, else it is the most since the start.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.harness import BenchError, Context
from bench.source import ROOT
from bench.train_ways import MODULES, PEFT_ABSENT, WAYS, Case, load, stepped

#: The allocator's settings, equal for all ways: what is freed goes back to the system, so that resident is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_a_process(context: Context, case: Case, way: str) -> dict[str, Any]:
    """What the module's docstring lists; BenchError where the process fails."""
    options = {"modules": case.modules, "tokens": case.tokens, "dtype": case.dtype}
    options |= {"size": context.size, "threads": context.threads}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.train_memory", way, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"memory of {case.name}, {way}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(done.stdout)


def measured(context: Context, case: Case, way: str) -> dict[str, Any]:
    """The figures of this process, which should have done nothing else."""
    if not PEFT_ABSENT:
        import peft  # noqa: F401 - before, so that no way is charged for it
    frozen = load(context, case.dtype)
    for tensor in frozen.model.state_dict().values():  # what was mapped from a file is read
        tensor.sum()
    gc.collect()
    loaded = _resident("VmRSS")
    step = stepped(way, frozen, case, seed=0)
    step()
    gc.collect()
    try:
        PEAK.write_text("5")  # the peak begins anew
        reset = True
    except OSError:
        reset = False
    step()
    return {"loaded_mib": loaded, "peak_mib": _resident("VmHWM"), "reset": reset}


def _resident(field: str) -> float:
    """A field of this process's status, in MiB."""
    return round(int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M).group(1)) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_memory", description="Peak memory of one training step.")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--modules", choices=MODULES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    case = Case(given.modules, given.tokens, given.dtype)
    print(json.dumps(measured(Context.of(given.size, given.threads), case, given.way)))


if __name__ == "__main__":
    main()
