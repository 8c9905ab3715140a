"""The first answer token of a new task, by every way, on a real small model; verified, then timed.

Compare medians of one run.  Over numbers of examples and on real tasks: ``python -m bench icl``.
"""

import functools

import pytest
import torch

from bench.harness import OURS, Context, verify
from bench.icl import first


@functools.cache
def verified():
    """Calls of every way at the paper's lengths, and their errors."""
    served = first.Served(Context.of("full", torch.get_num_threads()), torch.bfloat16)
    calls = served.calls()
    return calls, first.errors(served, calls)


@pytest.mark.parametrize("way", [OURS, *first.RIVALS], ids=lambda way: "T2L, new task" if way == OURS else way)
def test_first_question(benchmark, way):
    benchmark.group = "first question of a new task, SmolLM2-135M, bfloat16, the paper's lengths"
    with torch.inference_mode():
        calls, errors = verified()
        _, skipped = verify(way, {way: calls[way]}, errors)
        assert not skipped
        benchmark(calls[way])
