"""Runs of every kind, as one of several processes: ``accelerate launch launched_process.py FOLDER``.

FOLDER holds what ``test_processes`` put there, ``commands.json``: ``[stop, arguments of python -m t2l_engine]``; the run
fails in step ``stop`` where that is no null.  Each process writes ``changed-<rank>.json``: what it changed in FOLDER/out.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from t2l_engine.research.training import loop

folder, changed = Path(sys.argv[1]), []


def note(event, args):
    """An audit hook: everything of Python's own that changes files."""
    path = args[1] if event == "os.rename" else args[0] if args else ""
    writes = event in ("os.rename", "os.mkdir", "os.remove") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes and str(path).startswith(str(folder / "out")):
        changed.append(f"{event} {path}")


sys.addaudithook(note)
step = loop._Run.step
for stop, command in json.loads((folder / "commands.json").read_text()):

    def stopped(run, number, stop=stop):
        if number == stop:
            raise ZeroDivisionError("for the test")
        return step(run, number)

    loop._Run.step = stopped
    sys.argv = ["t2l", *command]
    try:
        runpy.run_module("t2l_engine", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    except ZeroDivisionError:
        if stop is None:
            raise
(folder / f"changed-{os.environ['RANK']}.json").write_text(json.dumps(changed))
