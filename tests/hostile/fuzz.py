"""Fuzzes everything that reads files: ``python tests/hostile/fuzz.py [--seconds 600] [--seed 0] [--only LOADER ...]``.

Files are mutated as in ``test_hostile`` until the time is over, or one is not read or refused as it should be: then the exit
status is 1 and the folder is kept in ``fuzz-failures``.  A load of more than 10 seconds ends the process.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hostile.folders import LOADERS, Workshop
from tests.hostile.mutations import TARGETS, Mutations

SECONDS_LIMIT = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz everything that reads files.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=sorted(LOADERS), choices=sorted(LOADERS), help="loaders; default: all")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="the folders of a run lie in it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    directory = arguments.failures.absolute() / f"seed-{arguments.seed}-{int(time.time())}"
    directory.mkdir(parents=True)
    os.chdir(directory)
    mutations, draw = Mutations(Workshop(directory)), random.Random(arguments.seed)
    targets = [target for target in TARGETS if target.loader in arguments.only]
    end, runs = time.monotonic() + arguments.seconds, 0
    while time.monotonic() < end:
        target = draw.choice(targets)
        faulthandler.dump_traceback_later(SECONDS_LIMIT, exit=True)
        found = mutations.judge(target, mutations.mutate(draw.choice(mutations.seeds(target)), draw), keep=True)
        faulthandler.cancel_dump_traceback_later()
        runs += 1
        if found:
            print(f"{target}: {'; '.join(found)}", file=sys.stderr)
            return 1
    print(f"{runs} folders read or refused")
    shutil.rmtree(directory)
    with contextlib.suppress(OSError):  # folders of earlier failures
        directory.parent.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
