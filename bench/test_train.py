"""A training step of eight samples with eight adapters through a tiny model, by every way; verified, then timed.

Compare medians of one run.  A real model, memory, hypernetworks and libraries: ``python -m bench train``.
"""

import pytest
import torch

from bench.harness import Context, verify
from bench.records import BASE, OURS
from bench.suites import train
from bench.suites import train_ways as ways
from t2l_engine import ops

TINY = Context.of("tiny", torch.get_num_threads())
NATIVE = pytest.mark.skipif(not ops.NATIVE, reason="no native library")


@pytest.mark.parametrize("case", ways.cases(TINY), ids=lambda case: case.name)
@pytest.mark.parametrize("way", [pytest.param(OURS, id="native", marks=NATIVE), *(way for way in ways.WAYS if way != OURS)])
def test_step(benchmark, case, way):
    benchmark.group = f"training step, tiny Llama, {case.name}"
    frozen, single = train.models(TINY, case.dtype)
    stack = ways.adapters(frozen.model, case)
    made = {name: ways.BUILDERS[name](frozen.model, stack) for name in {way, ways.BMM}}
    if way != BASE:
        _, skipped = verify(case.name, {way: None}, train.step_errors(made, frozen, single, stack, case))
        assert not skipped
    timed = ways.Batch.of(frozen, ways.SAMPLES, case.tokens, seed=0)
    benchmark(ways.step(made[way], None if way == BASE else stack, timed))
