"""The first answer token of a new task, by every way, on a real small model; verified, then timed.

Compare medians of one run.  Over numbers of examples and on real tasks: ``python -m bench icl``.
"""

import functools

import pytest
import torch

from bench.harness import OURS, Context, admit
from bench.icl import lengths


@functools.cache
def verified():
    """Calls of every way at the paper's lengths, and their errors."""
    served = lengths.Served(Context.of("full", torch.get_num_threads()), torch.bfloat16)
    prompts = served.prompt(0), served.prompt(served.load.shots)
    functions = lengths.functions(served, *prompts)
    return functions, lengths.errors(served, functions, *prompts)


@pytest.mark.parametrize("way", [OURS, *lengths.RIVALS], ids=lambda way: "T2L, new task" if way == OURS else way)
def test_first_question(benchmark, way):
    benchmark.group = "first question of a new task, SmolLM2-135M, bfloat16, the paper's lengths"
    with torch.inference_mode():
        functions, errors = verified()
        _, absent = admit(way, {way: functions[way]}, errors)
        assert not absent
        benchmark(functions[way])
