"""Native ops beside their plain-torch reference, over the case table of the tests; every case is verified first.

Compare medians of one run: `reference` is a loop over segments with torch's own products, or the eager hypernetwork.
"""

import pytest
import torch

from t2l_engine import ops, reference
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES

BACKENDS = {"native": ops, "reference": reference}
LORA = [c for c in LORA_CASES if c.name.startswith(("serve", "prefill"))]
GROUP = [c for c in GROUP_CASES if c.name.startswith("serve")]
HYPER = [c for c in HYPER_CASES if c.name.startswith("smollm2")]


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    if request.param == "native" and not ops.NATIVE:
        pytest.skip("no native library")
    return BACKENDS[request.param]


@pytest.mark.parametrize("case", LORA, ids=lambda c: c.name)
def test_lora_add(benchmark, backend, case):
    arguments = case.make()
    got, expected = case.make(), case.make()
    backend.lora_add_(**got)
    expected = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in expected.items()}
    reference.lora_add_(**expected)
    assert numerics.relative_frobenius(got["y"], expected["y"]) <= numerics.lora_frobenius(case.x_dtype)
    benchmark(backend.lora_add_, **arguments)


@pytest.mark.parametrize("case", GROUP, ids=lambda c: c.name)
def test_lora_add_group(benchmark, backend, case):
    arguments = case.make()
    got, expected = case.make(), case.make()
    backend.lora_add_group_(**got)
    wide = {k: v for k, v in expected.items() if k not in ("y", "x", "lora_A", "lora_B", "scaling")}
    wide |= {k: [t.double() for t in expected[k]] for k in ("lora_A", "lora_B")}
    y = expected["y"].double()
    reference.lora_add_group_(y, expected["x"].double(), scaling=expected["scaling"].double(), **wide)
    assert numerics.relative_frobenius(got["y"], y) <= numerics.lora_frobenius(case.lora.x_dtype)
    benchmark(backend.lora_add_group_, **arguments)


@pytest.mark.parametrize("case", HYPER, ids=lambda c: c.name)
def test_hypernet(benchmark, backend, case):
    trunk, head = case.make_trunk(), case.make_head()
    order = ("latent", "weight", "bias", "mul_A", "add_A", "mul_B", "add_B", "rank", "in_features", "out_features")

    def run():
        latent = backend.hypernet_trunk(**trunk)
        return latent, [backend.hypernet_head(**{k: head[k] for k in order}) for _ in range(case.modules)]

    latent, outputs = run()
    wide = case.make_trunk(dtype=torch.float64)
    oracle = reference.hypernet_trunk(**wide)
    plain = reference.hypernet_trunk(**trunk)
    assert numerics.relative_frobenius(latent, oracle) <= numerics.trunk_bound(oracle, plain, case.dtype)
    exact = reference.hypernet_head(**case.make_head(dtype=torch.float64))
    assert numerics.relative_frobenius(outputs[0][0], exact[0]) <= numerics.PARITY_FROBENIUS
    benchmark(run)
