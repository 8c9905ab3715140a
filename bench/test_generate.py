"""Hypernetworks beside their reference and eager torch, over the case table of the tests and the bundled shape.

Verified, then timed.  Compare medians of one run.  Released shapes, rooflines and memory: ``python -m bench generate``.
"""

import copy
import dataclasses
import functools

import pytest
import torch

from bench.harness import OURS
from bench.suites import generate
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import HYPER_CASES
from t2l_engine.testing.models import SHAPES, VARIANTS

HYPER = [c for c in HYPER_CASES if c.name.startswith("smollm2")]


@pytest.mark.parametrize("case", HYPER, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
def test_hypernet_ops(benchmark, case, backend):
    if backend is ops and not ops.NATIVE:
        pytest.skip("no native library")
    benchmark.group = f"hypernet_trunk and hypernet_heads, {case.name}"

    def run(seed):
        trunk, heads = case.make_trunk(seed), case.make_heads(seed)
        return lambda: (backend.hypernet_trunk(**trunk), backend.hypernet_heads(**heads))

    latent, made = run(1)()
    oracle = reference.hypernet_trunk(**case.make_trunk(1, dtype=torch.float64))
    plain = reference.hypernet_trunk(**case.make_trunk(1))
    assert numerics.relative_frobenius(latent, oracle) <= numerics.trunk_bound(oracle, plain, case.dtype)
    exact = reference.hypernet_heads(**case.make_heads(1, dtype=torch.float64))
    if backend is ops:  # all A, all B; of the reference A and B of one module after the other
        exact = exact[::2] + exact[1::2]
        made = made[0] + made[1]
    for got, right in zip(made, exact, strict=True):
        assert numerics.relative_frobenius(got, right) <= numerics.PARITY_FROBENIUS
    benchmark(run(0))


@functools.cache
def verified(variant, dtype, count):
    """Calls of every way to generate ``count`` adapters, verified on other descriptions."""
    shape = dataclasses.replace(SHAPES["smollm2-135m"], variant=variant)
    net = shape.make(seed=1).set_dtype(getattr(torch, dtype))
    functions, skipped, _ = generate.candidates(net, copy.deepcopy(net).set_dtype(torch.float64), shape, count)
    assert not skipped
    return functions


@pytest.mark.parametrize("way", generate.CPU_WAYS, ids=lambda way: "native" if way == OURS else way)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype", generate.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate(benchmark, variant, dtype, count, way):
    if way == OURS and not ops.NATIVE:
        pytest.skip("no native library")
    benchmark.group = f"generate smollm2-135m {variant} {dtype} {count}"
    benchmark(verified(variant, dtype, count)[way])
