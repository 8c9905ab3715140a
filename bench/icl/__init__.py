"""What a question costs by examples in the prompt (in-context learning, ICL) and by a generated adapter (T2L).

Closed forms for the models of released checkpoints (:mod:`bench.icl.costs`), the paper's own table beside them
(:mod:`bench.icl.paper`), and a small real model measured: at given lengths (:mod:`bench.icl.lengths`), and answering the
questions of real tasks (:mod:`bench.icl.questions`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Context, Task


def plan(context: Context, folder: Path | None = None) -> list[Task]:
    """``folder``: of tasks, with splits train (for the examples) and test; required at size full.

    At size tiny the tasks are those of the demo, with a question each.
    """
    import torch  # here: tables and figures of this package are made without it

    from bench.harness import BenchError, Task
    from bench.icl import costs, lengths, paper, questions

    if folder is None and context.full:
        raise BenchError("tasks: expected a task folder (--tasks DIR) at size full, got none")
    tasks = [Task("costs", costs.entries), Task("paper", paper.entries)]
    for dtype in ("float32", "bfloat16"):
        run = functools.partial(lengths.entries, context, getattr(torch, dtype))
        tasks.append(Task(f"lengths {dtype}", run))
    return [*tasks, Task("questions", functools.partial(questions.entries, context, folder))]
