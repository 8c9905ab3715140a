"""torch.compile: whole graphs, and no recompilation when ids, batch content or adapters change."""

import torch

import t2l_engine as t2l
from t2l_engine.testing import numerics


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_no_recompilation_over_ids_and_adapters(tiny_model, stack_for):
    model = tiny_model("Llama")
    lora = t2l.attach(model, stack_for(model, ["q_proj", "v_proj"], num_adapters=4))
    ids = torch.randint(0, 97, (4, 6))
    model_plain = tiny_model("Llama")
    run = compiled(lambda x: model(input_ids=x, use_cache=False).logits)
    lora.set([0, 1, 2, -1])
    with torch.no_grad():
        run(ids)
        with torch.compiler.set_stance("fail_on_recompile"):
            for step, rows in enumerate(([3, 3, 0, -1], [-1, -1, -1, -1], [2, 0, 1, 3])):
                lora.set(rows)
                lora.put(1, stack_for(model_plain, ["q_proj", "v_proj"], num_adapters=1, seed=step))
                assert torch.allclose(run(ids), model(input_ids=ids, use_cache=False).logits, atol=numerics.ROW_ATOL)
    lora.detach()


def graphs(run, cases):
    """How many graphs are compiled for ``cases``, each a function that sets ids and gives the input."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for case in cases:
            x = case()
            assert (compiled(x) - run(x)).abs().max() <= numerics.ROW_ATOL
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_lengths_become_a_variable(tiny_model, stack_for):
    """Prefill of any length, and ragged tokens: one graph for the first length, one for all others."""
    model = tiny_model("Llama", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)

    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def prefill(length):
        lora.set(randint(-1, 4, 3).tolist())
        return randint(0, 97, 3, length)

    def ragged(_):
        lengths = randint(1, 6, 4)
        bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()
        lora.set(t2l.AdapterBatch(bounds, randint(-1, 4, 4).int(), int(lengths.max())))
        return torch.randn(int(bounds[-1]), 64, generator=generator)

    lora = t2l.attach(model, stack_for(model, ["q_proj", "v_proj"], num_adapters=4))
    linear = model.model.layers[0].self_attn.q_proj
    run = lambda x: model(input_ids=x, use_cache=False).logits  # noqa: E731
    assert graphs(run, [lambda n=n: prefill(n) for n in range(4, 14)]) == 2
    assert graphs(linear, [lambda n=n: ragged(n) for n in range(20)]) == 2
