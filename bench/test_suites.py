"""Ours beside the usual ways in torch, with pytest-benchmark; everything is verified before it is timed."""

import copy
import dataclasses
import functools

import pytest
import torch

from bench import cases
from bench.cases import Case, Group, Layer, Operands, even, rows
from bench.harness import OURS, Context, verify
from bench.records import BASE
from bench.suites import apply, generate, train
from t2l_engine import ops
from t2l_engine.testing.cases import LORA_CASES
from tests.networks import SHAPES, VARIANTS

LORA = [
    Case(Layer.linear(c.in_features), c.segments, dtype=c.x_dtype, layout=c.b_layout, label=c.name)
    for c in LORA_CASES
    if c.name.startswith(("serve", "prefill"))
]
PACKED = Case(Layer("phi3 qkv", (Group.packed(3072, q=3072, k_=3072, v=3072),)), rows(*range(8)))
BACKWARD = [Case(Layer.linear(n), even(512, 8), dtype=torch.float32, label=f"8x64_{n}") for n in (576, 2048)]
TINY = Context.of("tiny", torch.get_num_threads())
NATIVE = pytest.mark.skipif(not ops.NATIVE, reason="no native library")


def of(table):
    return pytest.mark.parametrize("case", table, ids=lambda c: c.name)


def ways(names):
    """Every one of ``names`` as a parameter, ours under the name "native"."""
    return pytest.mark.parametrize(
        "way", [pytest.param(OURS, id="native", marks=NATIVE) if name == OURS else pytest.param(name) for name in names]
    )


def verified(case, way, build, errors):
    assert not verify(case, {way: build}, errors)[1]


@of([*LORA, PACKED])
@ways(apply.BUILDERS)
def test_lora_add(benchmark, case, way):
    benchmark.group = f"lora_add_ {case.name}"
    build = Operands.grouped if way == OURS else lambda operands: operands.one_by_one(apply.BUILDERS[way])
    verified(case.name, way, build, apply.lora_errors(case, {way: build}, apply.CPU, None))
    call = build(cases.operands(case, apply.CPU, seed=0))
    with torch.inference_mode():
        benchmark(call)


@of(BACKWARD)
@ways(apply.DELTAS)
def test_lora_delta_backward(benchmark, case, way):
    benchmark.group = f"lora_delta, forward and backward, {case.name}"
    verified(case.name, way, None, apply.delta_errors(case))
    benchmark(apply.step(apply.DELTAS[way], cases.operands(case, apply.CPU, seed=0).problems[0]))


@functools.cache
def generators(variant, dtype, count):
    """Verified calls of every way to generate ``count`` adapters."""
    shape = dataclasses.replace(SHAPES["smollm2-135m"], variant=variant)
    net = shape.make(seed=1).set_dtype(getattr(torch, dtype))
    functions, skipped, _ = generate.candidates(net, copy.deepcopy(net).set_dtype(torch.float64), shape, count)
    assert not skipped
    return functions


@ways(generate.CPU_WAYS)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype", generate.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate(benchmark, variant, dtype, count, way):
    benchmark.group = f"generate smollm2-135m {variant} {dtype} {count}"
    benchmark(generators(variant, dtype, count)[way])


@of(train.cases(TINY))
@ways(train.WAYS)
def test_training_step(benchmark, case, way):
    benchmark.group = f"training step, tiny Llama, {case.name}"
    frozen, single = train.both(TINY, case.dtype)
    stack = train.adapters(frozen.model, case)
    made = {name: train.BUILDERS[name](frozen.model, stack) for name in {way, train.BMM}}
    if way != BASE:
        verified(case.name, way, None, train.step_errors(made, frozen, single, stack, case))
    timed = train.Batch.of(frozen, train.SAMPLES, case.tokens, seed=0)
    benchmark(train.step(made[way], None if way == BASE else stack, timed))
