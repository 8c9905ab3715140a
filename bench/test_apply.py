"""The LoRA ops beside their reference and the usual ways in torch, over the case table of the tests; verified, then timed.

Compare medians of one run.  Rooflines, cold caches, PEFT and whole models: ``python -m bench apply``.
"""

import functools

import pytest
import torch

from bench import cases
from bench.cases import Case, Layer, even
from bench.harness import OURS, verify
from bench.suites import apply
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import GROUP_CASES, LORA_CASES

LORA = [
    Case(Layer.linear(c.in_features), c.segments, dtype=c.x_dtype, layout=c.b_layout, label=c.name)
    for c in LORA_CASES
    if c.name.startswith(("serve", "prefill"))
]
GROUP = [c for c in GROUP_CASES if c.name.startswith("serve")]
BACKWARD = [Case(Layer.linear(n), even(512, 8), dtype=torch.float32, label=f"8x64_{n}") for n in (576, 2048)]
CPU = torch.device("cpu")


def ways(table):
    """Every name of ``table`` as a parameter, ours under the name "native"."""
    native = pytest.mark.skipif(not ops.NATIVE, reason="no native library")
    named = [pytest.param(OURS, id="native", marks=native) if n == OURS else pytest.param(n, id=n) for n in table]
    return pytest.mark.parametrize("way", named)


def of(table):
    return pytest.mark.parametrize("case", table, ids=lambda c: c.name)


@of(LORA)
@ways(apply.BUILDERS)
def test_lora_add(benchmark, case, way):
    benchmark.group = f"lora_add_ {case.name}"
    build, skipped = apply.BUILDERS[way], {}
    builders = {way: lambda operands: operands.one_by_one(build)}
    _, wrong = verify(case.name, builders, apply.lora_errors(case, builders, CPU, skipped))
    assert not skipped | wrong
    call = build(cases.operands(case, CPU, seed=0).members[0])
    with torch.inference_mode():
        benchmark(call)


@of(GROUP)
@pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
def test_lora_add_group(benchmark, case, backend):
    if backend is ops and not ops.NATIVE:
        pytest.skip("no native library")
    benchmark.group = f"lora_add_group_ {case.name}"
    arguments, got, expected = (case.make(seed) for seed in (0, 1, 1))
    backend.lora_add_group_(**got)
    wide = {k: v for k, v in expected.items() if k not in ("y", "x", "lora_A", "lora_B", "scaling")}
    wide |= {k: [t.double() for t in expected[k]] for k in ("lora_A", "lora_B")}
    y = expected["y"].double()
    reference.lora_add_group_(y, expected["x"].double(), scaling=expected["scaling"].double(), **wide)
    assert numerics.relative_frobenius(got["y"], y) <= numerics.lora_frobenius(case.lora.x_dtype)
    with torch.inference_mode():
        benchmark(functools.partial(backend.lora_add_group_, **arguments))


@of(BACKWARD)
@ways(apply.DELTAS)
def test_lora_delta_backward(benchmark, case, way):
    benchmark.group = f"lora_delta, forward and backward, {case.name}"
    build = apply.DELTAS[way]
    _, wrong = verify(case.name, {way: build}, {way: apply.delta_errors(case)[way]})
    assert not wrong
    benchmark(apply.step(build, *apply.backward_operands(case, seed=0)))
