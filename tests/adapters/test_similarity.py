"""How alike adapters are: inner products of their weight changes, and the map."""

import pytest
import torch

from t2l_engine.adapters.similarity import AdapterMap, inner_products, norms


@pytest.fixture
def stack(make_stack):
    return make_stack({"q_proj": (6, 10), "v_proj": (6, 8)}, num_adapters=5)


def dense(stack):
    """The weight changes of each adapter as one vector, ``[N, entries]``."""
    changes = [(stack.lora_B[name].double() @ stack.lora_A[name].double()).flatten(1) for name in stack.lora_A]
    return stack.scaling.double()[:, None] * torch.cat(changes, dim=1)


def test_inner_products(stack):
    changes = dense(stack)
    torch.testing.assert_close(inner_products(stack, stack[1:3]), changes @ changes[1:3].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms(stack), changes.norm(dim=1), rtol=1e-5, atol=1e-5)
    exact = stack.to(dtype=torch.float64)
    torch.testing.assert_close(inner_products(exact, exact), dense(exact) @ dense(exact).T, rtol=1e-12, atol=1e-12)


def test_other_modules(stack, make_stack):
    for modules in ({"q_proj": (6, 10)}, {"q_proj": (6, 10), "v_proj": (6, 9)}):
        with pytest.raises(ValueError, match=r"b: expected modules of \(layers, in, out\)"):
            inner_products(stack, make_stack(modules, num_adapters=1))


def test_entries_beyond_the_rank_do_not_count(make_stack):
    ranks = {"q_proj": torch.tensor([[2, 4], [3, 1]], dtype=torch.int32)}
    stack = make_stack({"q_proj": (6, 10)}, num_adapters=2, ranks=ranks)
    clean = stack.zero_padded()
    torch.testing.assert_close(inner_products(stack, stack), dense(clean) @ dense(clean).T, rtol=1e-5, atol=1e-5)
    for i in range(2):
        for layer in range(2):
            r = int(ranks["q_proj"][i, layer])
            assert not clean.lora_A["q_proj"][i, layer, r:].any() and not clean.lora_B["q_proj"][i, layer, :, r:].any()
            assert clean.lora_A["q_proj"][i, layer, :r].equal(stack.lora_A["q_proj"][i, layer, :r])


def test_the_map(stack):
    """Distances on it are those of the first two principal coordinates, and a landmark is placed where it lies."""
    found = AdapterMap(stack)
    changes = torch.nn.functional.normalize(dense(stack), dim=1)
    centred = changes - changes.mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    right = torch.cdist((left * sizes)[:, :2], (left * sizes)[:, :2])
    torch.testing.assert_close(torch.cdist(found.coordinates, found.coordinates), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.place(stack[[3, 0]]), found.coordinates[[3, 0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cosines(stack).diagonal(), torch.ones(5, dtype=torch.float64))


def test_landmarks(stack):
    with pytest.raises(ValueError, match="landmarks: expected at least 3 adapters, got 2"):
        AdapterMap(stack[:2])
    nothing = stack[[0]]
    nothing.lora_B["q_proj"].zero_()
    nothing.lora_B["v_proj"].zero_()
    assert AdapterMap(stack[1:]).cosines(nothing).eq(0).all()
