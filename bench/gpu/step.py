"""One step of the suite in a process of its own.

python -m bench.gpu.step MODULE:FUNCTION --part FILE --until T [--dry]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch

from bench.gpu.context import Context, Lost, Part, Skip
from bench.gpu.steps import EXIT_AGAIN, EXIT_SKIPPED, LISTS
from bench.gpu.timing import Cuda, Dry


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.step", description=__doc__)
    parser.add_argument("run", help="module of bench.gpu and its function of a Context, with a colon between")
    parser.add_argument("--part", type=Path, required=True, help="result file of the step; gone on with where it is there")
    parser.add_argument("--until", type=float, required=True, help="on time.monotonic(): leave out what begins later")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on this CPU")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        print("torch sees no GPU")
        return EXIT_SKIPPED
    if arguments.dry:
        torch.set_num_threads(1)  # threads that wait for each other take longer than these sizes
    module, _, function = arguments.run.partition(":")
    do = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    device, part = (Dry() if arguments.dry else Cuda()), Part(arguments.part)
    context = Context(device, part, arguments.until - time.monotonic())
    try:
        do(context)
    except Skip as why:
        print(why)
        return EXIT_SKIPPED
    except Lost as case:
        print(f"{case}: this process cannot go on", flush=True)
        os._exit(EXIT_AGAIN)  # what tidies up would only meet the same error
    return status(part)


def status(part: Part) -> int:
    """What a step that came to its end exits with: not 0 where something failed, or where all was left out."""
    data = part.data
    failed = [f"{entry['case']}: {entry['error']}" for entry in data.get("failed", [])]
    failed += [f"{entry['check']}: {entry['detail']}" for entry in data.get("checks", []) if not entry["passed"]]
    for text in failed:
        print(f"failed: {text}")
    if failed:
        return 1
    left_out = data.get("left_out", [])
    if left_out and not any(data.get(name) for name in LISTS if name != "left_out"):
        print(f"all was left out: {left_out[0]['why']}")
        return EXIT_SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
