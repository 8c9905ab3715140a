"""One step of the suite in a process of its own: ``python -m bench.gpu.step NAME --part FILE --seconds N [--dry]``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from bench.gpu.context import Context, Lost, Part, Skip
from bench.gpu.steps import EXIT_AGAIN, EXIT_SKIPPED
from bench.gpu.timing import Cuda, Dry

#: Step -> module and function that do it.
STEPS = {
    "environment": ("environment", "run"),
    "ceilings": ("ceilings", "run"),
    "decode": ("lora", "decode"),
    "prefill": ("lora", "prefill"),
    "linear": ("linear", "run"),
    "generation": ("generation", "run"),
    "compiled": ("generation", "compiled"),
    "model": ("model", "run"),
    "energy": ("energy", "run"),
    "checks": ("checks", "run"),
    "emulator": ("outputs", "run"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.step", description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--part", type=Path, required=True, help="result file of the step; gone on with where it is there")
    parser.add_argument("--seconds", type=float, default=600.0, help="leave out what begins later")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on this CPU")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        print("torch sees no GPU")
        return EXIT_SKIPPED
    if arguments.dry:
        torch.set_num_threads(1)  # threads that wait for each other take longer than these sizes
    context = Context(Dry() if arguments.dry else Cuda(), Part(arguments.part), arguments.seconds)
    module, function = STEPS[arguments.name]
    try:
        getattr(importlib.import_module(f"bench.gpu.{module}"), function)(context)
    except Skip as why:
        print(why)
        return EXIT_SKIPPED
    except Lost as case:
        print(f"{case}: the device is lost to this process", flush=True)
        os._exit(EXIT_AGAIN)  # what tidies up would only meet the same error
    data = context.part.data
    failed = [f"{entry['case']}: {entry['error']}" for entry in data.get("failed", [])]
    failed += [f"{entry['check']}: {entry['detail']}" for entry in data.get("checks", []) if not entry["passed"]]
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
