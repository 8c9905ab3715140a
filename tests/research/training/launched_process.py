"""Runs of every kind, as one of several processes: ``accelerate launch launched_process.py FOLDER``.

FOLDER holds what ``test_processes`` put there, ``commands.json``: ``[stop, arguments of python -m t2l_engine]``; the run
fails in step ``stop`` where that is no null.
"""

import json
import runpy
import sys
from pathlib import Path

from t2l_engine.research.training import loop

step = loop._Run.step
for stop, command in json.loads((Path(sys.argv[1]) / "commands.json").read_text()):

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
