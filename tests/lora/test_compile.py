"""torch.compile and torch.export: whole graphs that see new ids, adapters and lengths without compiling again."""

import io

import pytest
import torch

from t2l_engine import AdapterBatch, attach
from t2l_engine.testing.numerics import LOGITS_ATOL, ROW_ATOL
from tests.lora.tiny_llama import NAMES, logits


def graphs(run, cases):
    """How many graphs are compiled for ``cases``, each a function that sets ids and gives the input."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for case in cases:
            x = case()
            assert (compiled(x) - run(x)).abs().max() <= ROW_ATOL
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_lengths_become_a_variable(make_stack):
    """Rows of any length, and ragged tokens: one graph for the first length, one for all others."""
    model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 8)})])
    lora = attach(model, make_stack({"q_proj": (16, 8)}, num_adapters=4, num_layers=1))
    generator = torch.Generator().manual_seed(0)

    def rows(length):
        lora.set(torch.randint(-1, 4, (3,), generator=generator).tolist())
        return torch.randn(3, length, 16, generator=generator)

    def ragged(_):
        lengths, adapters = (torch.randint(low, high, (4,), generator=generator) for low, high in ((1, 6), (-1, 4)))
        bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()
        lora.set(AdapterBatch(bounds, adapters.int(), int(lengths.max())))
        return torch.randn(int(bounds[-1]), 16, generator=generator)

    assert graphs(model[0]["q_proj"], [lambda n=n: rows(n) for n in range(4, 12)]) == 2
    assert graphs(model[0]["q_proj"], [lambda n=n: ragged(n) for n in range(12)]) == 2


@pytest.mark.parametrize("model", [1], indirect=True)
def test_compiled_decode_step(model, handle, stack_for, tokens):
    """One decode step on a static cache: no recompilation over ids in any form, tokens or adapters."""
    from transformers import StaticCache

    torch._dynamo.reset()

    def step(token, cache, position):
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    def caches():
        made = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        handle.set([0, 1, 2, -1])
        for cache in made:
            model(tokens, past_key_values=cache, use_cache=True)
        return made

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    adapters = _adapters(model, stack_for)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        ours, theirs = caches()
        position = torch.full((4, 1), 7)
        token = torch.randint(3, 97, (4, 1), generator=generator)
        compiled(token, ours, position)
        step(token, theirs, position)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in range(20):
                ids = [int(a) - 1 for a in torch.randint(0, 5, (4,), generator=generator)]
                form = (ids, torch.tensor(ids), tuple(ids), torch.tensor(ids, dtype=torch.int32), ids[0])[i % 5]
                handle.set(form)
                if i % 4 == 3:
                    handle.put(i % 3, adapters[i // 4])
                token = torch.randint(3, 97, (4, 1), generator=generator)
                position = torch.full((4, 1), 8 + i)
                assert (compiled(token, ours, position) - step(token, theirs, position)).abs().max() <= LOGITS_ATOL


def _adapters(model, stack_for):
    """Five stacks of one adapter; the fourth lacks a module, the fifth has a smaller rank."""
    shapes = [{"names": NAMES, "seed": i} for i in range(3)]
    shapes += [{"names": ("q_proj",), "seed": 3}, {"names": NAMES, "seed": 4, "rank": 2}]
    return [stack_for(model, num_adapters=1, **kwargs) for kwargs in shapes]


@pytest.mark.parametrize("model", [1], indirect=True)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(model, handle, stack_for, tokens, strict):
    """An exported program reads ids and slots where they were at export: as long as their number of rows stays, it sees
    new ones, whatever was in use meanwhile.  A saved program keeps those of the moment it is saved."""
    handle.set([2, 0, -1, 3])
    program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=strict)

    @torch.no_grad()
    def run(exported):
        return exported.module()(tokens, use_cache=False).logits

    first = logits(model, tokens)
    assert (run(program) - first).abs().max() <= ROW_ATOL
    saved = io.BytesIO()
    torch.export.save(program, saved)
    logits(model, tokens[:2], handle, [1, 1])
    handle.merge(0)
    handle.unmerge()
    logits(model, tokens, handle, AdapterBatch.from_rows([0, 0, 0, 0], tokens.shape[1]))
    handle.set([1, -1, 0, 0])
    handle.put(0, stack_for(model, NAMES, num_adapters=1, seed=7))
    second = logits(model, tokens)
    assert (run(program) - second).abs().max() <= ROW_ATOL
    assert (second - first).abs().amax(dim=(1, 2)).min() > 1000 * ROW_ATOL
    saved.seek(0)
    assert (run(torch.export.load(saved)) - first).abs().max() <= ROW_ATOL
