"""A training step of eight samples with eight adapters through a tiny model, by every way; verified, then timed.

Compare medians of one run.  A real model, memory, hypernetworks and libraries: ``python -m bench train``.
"""

import pytest
import torch

from bench import train, train_ways
from bench.harness import OURS, Context, admit
from bench.rows import BASE
from bench.train_ways import BMM, SAMPLES, WAYS, Batch
from t2l_engine import ops

TINY = Context.of("tiny", torch.get_num_threads())
NATIVE = pytest.mark.skipif(not ops.NATIVE, reason="no native library")


@pytest.mark.parametrize("case", train_ways.cases(TINY), ids=lambda case: case.name)
@pytest.mark.parametrize("way", [pytest.param(OURS, id="native", marks=NATIVE), *(way for way in WAYS if way != OURS)])
def test_step(benchmark, case, way):
    benchmark.group = f"training step, tiny Llama, {case.name}"
    frozen, single = train.models(TINY, case.dtype)
    stack = train_ways.adapters(frozen.model, case)
    ways = {name: train_ways.BUILDERS[name](frozen.model, stack) for name in {way, BMM}}
    if way != BASE:
        errors = train.step_errors(ways, frozen, single, stack, case)
        _, absent = admit(case.name, {way: None}, errors)
        assert not absent
    timed = Batch.of(frozen, SAMPLES, case.tokens, seed=0)
    benchmark(train_ways.step(ways[way], None if way == BASE else stack, timed))
