"""Peak memory of one training step, in a process of its own (Linux only).

``python -m bench.suites.train_memory SIZE THREADS WAY MODULES TOKENS DTYPE`` prints a JSON object.  ``loaded_mib``: resident
once packages and the model are; ``peak_mib``: the most during a step after a first one; ``reset``: whether the system let
the peak begin anew before that step, else it is the most since the start.
"""

from __future__ import annotations

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
from bench.records import BASE
from bench.source import ROOT
from bench.suites import train_ways as ways
from bench.suites.train_ways import Case

#: The allocator's settings, equal for all ways: what is freed goes back to the system, so that resident is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_a_process(context: Context, case: Case, way: str) -> dict[str, Any]:
    """What the module's docstring lists; BenchError where the process fails."""
    words = map(str, (context.size, context.threads, way, case.modules, case.tokens, case.dtype))
    command = [sys.executable, "-m", "bench.suites.train_memory", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"memory of {case.name}, {way}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(done.stdout)


def measured(context: Context, case: Case, way: str) -> dict[str, Any]:
    """The figures of this process, which should have done nothing else."""
    if not ways.SKIPPED:
        import peft  # noqa: F401 - before, so that no way is charged for it
    frozen = ways.load(context, case.dtype)
    for tensor in frozen.model.state_dict().values():  # what was mapped from a file is read
        tensor.sum()
    gc.collect()
    loaded = _resident("VmRSS")
    stack, batch = ways.adapters(frozen.model, case), ways.Batch.of(frozen, ways.SAMPLES, case.tokens, seed=0)
    step = ways.step(ways.BUILDERS[way](frozen.model, stack), None if way == BASE else stack, batch)
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


if __name__ == "__main__":
    size, threads, way, modules, tokens, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measured(Context.of(size, int(threads)), Case(modules, int(tokens), dtype), way)))
