"""Our wrapper under vLLM's own LoRA layers, against float64; and vLLM's wrapper, where it is wrong."""

import gc

import pytest
import torch

pytest.importorskip("vllm")

from torch._dynamo.testing import CompileCounterWithBackend
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.version import __version_tuple__

from t2l_engine.serving.vllm import punica
from t2l_engine.serving.vllm.punica import PunicaWrapperT2L
from t2l_engine.testing import numerics
from tests.serving.vllm_layers import DTYPE, HIDDEN, LINEAR, SIZES, VOCABULARY, adapted, random_adapter, single_process

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    with single_process(tmp_path_factory.mktemp("vllm")):
        yield


def inputs(kind, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(VOCABULARY, (rows,), generator=generator)
    return torch.randn(rows, SIZES[kind][0][0], generator=generator).to(DTYPE)


def base_output(made, x):
    """The layer's output without adapters."""
    return made(x, [-1] * len(x)).clone()


def exact(made, x, slots, y):
    """(Result, allowed error) in float64 for the base model's rounded output ``y``."""
    y, start = y.double(), 0
    bound = torch.zeros_like(y)
    for i, (_, out) in enumerate(SIZES[made.kind]):
        for row, slot in enumerate(slots):
            pair = made.adapters[slot][i] if slot >= 0 else None
            if pair is None:
                continue
            a, b = (m.double() for m in pair)
            if made.kind == "embedding":
                a, given = torch.eye(len(a), dtype=torch.float64), a[:, x[row]][None]
            else:
                given = x[row : row + 1].double()
            columns = slice(start, start + out)
            delta = given @ a.T @ b.T
            y[row : row + 1, columns] += delta
            bound[row : row + 1, columns] = numerics.lora_bound(given, a, b, 1.0, y[row : row + 1, columns], delta, DTYPE)
        start += out
    return y, bound


def assert_exact(made, x, slots, before, got):
    """``got`` is the layer's output in float64, to its bound, ``before`` being that without adapters."""
    right, bound = exact(made, x, slots, before)
    assert bool(((got.double() - right).abs() <= bound).all())


#: Rows -> slots: mixed, all of one adapter, runs as in a prefill, a single row, all base.
BATCHES = {
    "mixed": [0, -1, 2, 1, -1, 2, 0, 1],
    "one": [1] * 5,
    "runs": [2] * 7 + [-1] * 3 + [0] * 6 + [2] * 2,
    "row": [2],
    "base": [-1] * 4,
}


@pytest.mark.parametrize("kind, batch, sharded", [
    *((kind, batch, False) for kind in SIZES for batch in BATCHES), *((kind, "mixed", True) for kind in LINEAR),
])  # fmt: skip
def test_equals_float64(kind, batch, sharded):
    made, slots = adapted(kind, PunicaWrapperT2L, fully_sharded=sharded), BATCHES[batch]
    x = inputs(kind, len(slots))
    before = base_output(made, x)
    got = made(x, slots)
    if sharded:  # vLLM's functions round the rank vector to the output's dtype before they multiply by B, and the product
        right, _ = exact(made, x, slots, before)
        assert float((got.double() - right).norm()) <= 4 * numerics.u(DTYPE) * float(right.norm())
    else:
        assert_exact(made, x, slots, before, got)
    rows = [i for i, slot in enumerate(slots) if slot < 0]
    assert torch.equal(got[rows], before[rows])


@pytest.mark.parametrize("kind", ["qkv", "o", "logits"])
@pytest.mark.xfail(__version_tuple__[:2] < (0, 33), strict=True, reason="it gathers index -1, the last slot, for base rows")
def test_stock_leaves_base_rows_alone(kind):
    made, slots = adapted(kind, PunicaWrapperCPU), BATCHES["mixed"]
    x = inputs(kind, len(slots))
    rows = [i for i, slot in enumerate(slots) if slot < 0]
    before = made.base(x)[0] if kind != "logits" else made.layer.base_layer._apply_head(made.base, x, None)
    assert torch.equal(made(x, slots)[rows], before[rows])


@pytest.mark.parametrize("kind", [*LINEAR, "embedding"])
def test_a_compiled_layer_reads_the_batch_when_it_runs(kind):
    """Rows, slots and adapters change and nothing is compiled again; the output is that of the layer as it is."""
    made, compiled = (adapted(kind, PunicaWrapperT2L) for _ in range(2))
    counter = CompileCounterWithBackend("inductor")
    compiled.layer.compile(fullgraph=True, dynamic=True, backend=counter)
    for batch in ("base", "mixed", "one", "runs", "base"):
        x = inputs(kind, len(BATCHES[batch]))
        assert torch.equal(compiled(x, BATCHES[batch]), made(x, BATCHES[batch]))
    for of in (made, compiled):
        of.layer.reset_lora(0)
        of.put(2, random_adapter(kind, [2] * len(SIZES[kind]), 9))
    x = inputs(kind, 8)
    assert torch.equal(compiled(x, BATCHES["mixed"]), made(x, BATCHES["mixed"]))
    assert counter.frame_count == 1


def test_slots_are_filled_again():
    """Ranks follow what vLLM puts into a slot: a narrower adapter, none, another."""
    made = adapted("qkv", PunicaWrapperT2L)
    x, slots = inputs("qkv", 4), [0, 1, 2, -1]
    before = base_output(made, x)
    made.put(2, random_adapter("qkv", [0, 0, 2], 9))
    made.layer.reset_lora(0)
    made.adapters[0] = [None] * 3
    assert_exact(made, x, slots, before, made(x, slots))


@pytest.mark.parametrize("rows", [3, 8, 12])
def test_rows_other_than_the_mapping(rows):
    """A call with fewer or more rows than tokens in the mapping (padding): ids by position, the base model beyond them."""
    made, slots = adapted("o", PunicaWrapperT2L), BATCHES["mixed"]
    x = inputs("o", rows)
    before = base_output(made, x)
    made(inputs("o", len(slots)), slots)  # sets the mapping
    got, _ = made.layer(x)
    padded = (slots + [-1] * rows)[:rows]
    assert_exact(made, x, padded, before, got)


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_rows_of_the_head_other_than_samples(rows):
    """Log-probabilities of a prompt: where all samples have one adapter it is theirs, else nothing says whose they are."""
    made = adapted("logits", PunicaWrapperT2L)
    x, two = inputs("logits", rows), inputs("logits", 2)
    before = base_output(made, x)
    made(two, [1, 1])  # sets the mapping
    with torch.inference_mode():
        got = made.layer._get_logits(x, made.base)
    assert_exact(made, x, [1] * rows, before, got)
    made(two, [1, 0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"expected 2 rows, one a sample, got {rows}"):
        made.layer._get_logits(x, made.base)


def test_slices_without_an_adapter_are_not_bound(monkeypatch):
    layers = []
    init = punica.Layer.__init__
    monkeypatch.setattr(punica.Layer, "__init__", lambda self, *of: (layers.append(self), init(self, *of))[1])
    made = adapted("qkv", PunicaWrapperT2L)
    assert layers[0].bound == [0, 1, 2] and layers[0].ranks[0].tolist() == [4, 7, 16], "true ranks"
    for slot, bound in ((0, [0, 1, 2]), (2, [0]), (1, [])):  # slot 1 has q alone
        made.layer.reset_lora(slot)
        assert layers[0].bound == bound


def test_slots_are_unbound_with_their_layer():
    made, y, x = adapted("o", PunicaWrapperT2L), torch.zeros(1, HIDDEN, dtype=DTYPE), inputs("o", 1)
    add = made.layer._apply_lora_to_output
    add(x, y)
    del made
    gc.collect()
    with pytest.raises(RuntimeError, match="layer: expected a number that is bound"):
        add(x, y)
