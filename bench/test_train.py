"""A training step of eight samples with eight adapters through a tiny model, by every way; verified, then timed.

Compare medians of one run.  A real model, memory, hypernetworks and libraries: ``python -m bench train``.
"""

import pytest
import torch

from bench.harness import Context, verify
from bench.records import BASE, OURS
from bench.suites import train
from t2l_engine import ops

TINY = Context.of("tiny", torch.get_num_threads())
NATIVE = pytest.mark.skipif(not ops.NATIVE, reason="no native library")


@pytest.mark.parametrize("case", train.cases(TINY), ids=lambda case: case.name)
@pytest.mark.parametrize("way", [pytest.param(OURS, id="native", marks=NATIVE), *(way for way in train.WAYS if way != OURS)])
def test_step(benchmark, case, way):
    benchmark.group = f"training step, tiny Llama, {case.name}"
    frozen, single = train.both(TINY, case.dtype)
    stack = train.adapters(frozen.model, case)
    made = {name: train.BUILDERS[name](frozen.model, stack) for name in {way, train.BMM}}
    if way != BASE:
        _, skipped = verify(case.name, {way: None}, train.step_errors(made, frozen, single, stack, case))
        assert not skipped
    timed = train.Batch.of(frozen, train.SAMPLES, case.tokens, seed=0)
    benchmark(train.step(made[way], None if way == BASE else stack, timed))
