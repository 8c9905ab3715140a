"""What a question costs by examples in the prompt (in-context learning, ICL) and by a generated adapter (T2L).

Closed forms beside the paper's table (``costs``), a model at given lengths (``first``), answers to tasks (``questions``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Context, Task


def plan(context: Context, folder: Path | None = None) -> list[Task]:
    """``folder``: of tasks, with splits train (for the examples) and test; at size tiny None means those of the demo."""
    import torch  # here: tables and figures read names of this package without it

    from bench.harness import BenchError, Task
    from bench.icl import costs, first, questions

    dtypes = (torch.float32, torch.bfloat16) if context.on_cpu else (torch.bfloat16,)
    tasks = [Task.of(f"first question {dtype}".replace("torch.", ""), first.first, context, dtype) for dtype in dtypes]
    if not context.on_cpu:
        return tasks
    if folder is None and context.full:
        raise BenchError("tasks: expected a task folder (--tasks DIR) at size full, got none")
    counted = [Task("costs", costs.entries), Task("paper", costs.paper)]
    return [*counted, *tasks, Task.of("questions", questions.entries, context, folder)]
