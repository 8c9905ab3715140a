"""Closed forms of hypernetworks, adapters and bytes: against torch's counter, brute force and each other."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l_engine import AdapterStack, HyperNetwork, HyperNetworkConfig, attach
from t2l_engine.hypernetwork.config import TASK_ENCODERS, VARIANTS
from t2l_engine.research.costs import (
    Cost,
    Decoder,
    Experts,
    adapter_values,
    cache_bytes,
    decoder_flops,
    hypernet_flops,
    known_setup,
    lora_flops,
    merge_flops,
    merged_values,
    pass_bytes,
    steps_bytes,
)
from t2l_engine.research.costs.counts import pairs
from t2l_engine.research.costs.known import hypernetwork_for
from t2l_engine.research.costs.terms import byte, flop, total
from t2l_engine.testing.counter import COUNT_RTOL, counted
from tests.hypernetwork.plain_network import MODULES
from tests.research.costs import tiny_decoders

tokens, windows = st.integers(0, 40), st.one_of(st.none(), st.integers(1, 30))
PLAIN = Decoder("llama", 48, 80, 3, 4, 2, 20, 97, False, (None,) * 3, (False,) * 3)
MIXED = dataclasses.replace(PLAIN, windows=(7, None, 11), sparse=(False, True, True), experts=Experts(5, 2, 24, shared=36))
decoders = st.sampled_from([PLAIN, MIXED])


# --- hypernetworks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", TASK_ENCODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hypernetworks(variant, encoder):
    """Of every variant and task encoder, as ``generate`` runs: exact, in new memory and in memory used before."""
    config = HyperNetworkConfig(
        variant=variant, task_encoder=encoder, modules=tuple(MODULES), in_features=(24, 24, 41), out_features=(41, 24, 19),
        num_layers=3, rank=4, embed_dim=14, latent_size=128 if encoder == "discrete" else 20, head_in_size=18,
        lora_alpha=8.0,
    )  # fmt: skip
    net, task_emb = HyperNetwork(config), torch.randn(5, 14)
    stack = net.generate(task_emb)  # folds what does not depend on the task
    assert counted(lambda: net.generate(task_emb)) == hypernet_flops(config, 5).total == 5 * hypernet_flops(config).total
    assert counted(lambda: net.generate(task_emb, out=stack)) == hypernet_flops(config, 5).total


def test_gflop_of_the_released_shapes():
    """Of one adapter for Mistral-7B, as computed independently."""
    setup = known_setup("mistral-7b")
    for variant, gflop in {"L": 3.58, "M": 3.64, "S-learnable": 4.23, "S-rotary": 4.50}.items():
        config = hypernetwork_for(setup.decoder, setup.encoder, variant=variant)
        assert hypernet_flops(config).total / 1e9 == pytest.approx(gflop, rel=COUNT_RTOL), variant


# --- adapters --------------------------------------------------------------------------------------------------------

CONFIG = HyperNetworkConfig(
    variant="L", modules=("q_proj", "down_proj"), in_features=(48, 80), out_features=(80, 48), num_layers=2, rank=4,
    embed_dim=14, latent_size=20, head_in_size=18, lora_alpha=8.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def adapted():
    """A tiny language model, adapters attached to it, and these."""
    model = tiny_decoders.model("llama")
    stack = HyperNetwork(CONFIG).generate(torch.randn(2, 14))
    return model, attach(model, stack), stack


def test_applying_adapters(adapted):
    """Beside the base model, a row at a time: rows of adapter -1 cost what the base model does."""
    model, lora, _ = adapted
    decoder, ids = Decoder.from_config(model.config), torch.full((4, 9), 5)
    base = 4 * decoder_flops(decoder, 9).total
    for rows in ([0, 1, 1, 0], [-1, 0, -1, -1], [-1] * 4):
        with lora.use(rows):
            got = counted(lambda: model(input_ids=ids, logits_to_keep=1))
        assert got == base + lora_flops(CONFIG, 9).total * sum(row >= 0 for row in rows)


def test_merging_an_adapter(adapted):
    model, lora, stack = adapted
    decoder, ids = Decoder.from_config(model.config), torch.full((1, 9), 5)
    assert counted(lambda: lora.merge(1)) == merge_flops(CONFIG).total
    assert counted(lambda: model(input_ids=ids, logits_to_keep=1)) == decoder_flops(decoder, 9).total
    lora.unmerge()
    assert adapter_values(CONFIG) == sum(t[0].numel() for side in (stack.lora_A, stack.lora_B) for t in side.values())
    assert merged_values(CONFIG) == 2 * (48 * 80 + 80 * 48)


def test_true_ranks_are_counted(adapted):
    """An adapter of a smaller rank costs less in the same slots."""
    _, _, stack = adapted
    model = tiny_decoders.model("llama")
    decoder, ranks = Decoder.from_config(model.config), {name: torch.ones_like(r) for name, r in stack.ranks.items()}
    lora = attach(model, AdapterStack(stack.lora_A, stack.lora_B, stack.scaling, ranks=ranks, paths=stack.paths))
    with lora.use(0):
        got = counted(lambda: model(input_ids=torch.full((1, 9), 5), logits_to_keep=1))
    assert got - decoder_flops(decoder, 9).total == lora_flops(dataclasses.replace(CONFIG, rank=1), 9).total


# --- attention and bytes, by brute force -----------------------------------------------------------------------------


@given(tokens, tokens, windows)
def test_pairs(count, cached, window):
    """One query at a time: itself and what is before it, at most a window."""
    assert pairs(count, cached, window) == sum(min(cached + i + 1, window or 1000) for i in range(count))


@given(decoders, tokens, tokens, tokens)
def test_a_prompt_in_parts_costs_what_it_costs_whole(decoder, first, second, cached):
    parts = decoder_flops(decoder, first, cached=cached) + decoder_flops(decoder, second, cached=cached + first, logits=0)
    assert parts.total == decoder_flops(decoder, first + second, cached=cached).total


@given(decoders, tokens, tokens, st.integers(0, 5))
def test_more_costs_more(decoder, count, cached, logits):
    def cost(count, cached, logits):
        return decoder_flops(decoder, count, cached=cached, logits=logits).total

    assert cost(count, cached, logits) < cost(count + 1, cached, logits)
    assert cost(count, cached, logits) < cost(count, cached, logits + 1)
    assert cost(count, cached, logits) <= cost(count, cached + 1, logits)
    assert cache_bytes(decoder, count) < cache_bytes(decoder, count + 1)


@given(decoders, st.integers(0, 12), tokens)
def test_bytes_of_steps_are_those_of_their_passes(decoder, steps, cached):
    one_by_one = total(pass_bytes(decoder, [cached + i], 1) for i in range(steps))
    together = steps_bytes(decoder, steps, cached)
    assert {term.name: term.value for term in one_by_one.terms} == {term.name: term.value for term in together.terms}


@given(decoders, st.lists(tokens, min_size=1, max_size=4), st.integers(1, 40))
def test_bytes_of_a_pass(decoder, contexts, new):
    cost = pass_bytes(decoder, contexts, new, itemsize=1, cache_itemsize=0.5)
    unit = 2 * decoder.kv_heads * decoder.head_dim // 2
    kept = [min(n, window or 1000) for n, window in itertools.product(contexts, decoder.windows)]
    written = len(contexts) * sum(min(new, window or 1000) for window in decoder.windows)
    assert (cost["KV cache read"], cost["KV cache written"]) == (unit * sum(kept), unit * written)
    parts = decoder.parameters
    whole = decoder.num_parameters - parts["embeddings"]
    share = 1 if decoder.experts is None else decoder.experts.hit(new * len(contexts)) / decoder.experts.count
    assert cost["weights"] == whole - parts["experts"] + round(parts["experts"] * share)
    tied = dataclasses.replace(decoder, tied=True)
    assert pass_bytes(tied, contexts, new, itemsize=1)["weights"] == cost["weights"]  # one matrix, read for the logits
    for made in (decoder, tied):
        without = pass_bytes(made, contexts, new, itemsize=1, logits=False)["weights"]
        assert without == cost["weights"] - parts["embeddings"]


@settings(max_examples=30)
@given(st.integers(1, 8), st.data())
def test_experts_that_are_hit(count, data):
    """Against all draws of experts, each equally likely."""
    per_token, drawn = data.draw(st.integers(1, min(count, 3))), data.draw(st.integers(0, 2))
    choices = list(itertools.combinations(range(count), per_token))
    sizes = [len({e for choice in draw for e in choice}) for draw in itertools.product(choices, repeat=drawn)]
    assert Experts(count, per_token, 1).hit(drawn) == pytest.approx(sum(sizes) / len(sizes))


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_sums_of_named_terms():
    cost = flop("attention", 12, "first") + flop("MLP", 30, "x") * 2 + flop("attention", 3, "second") + flop("none", 0, "x")
    assert (cost.total, cost["attention"], cost["MLP"], cost["none"], cost.unit) == (75, 15, 60, 0, "FLOP")
    assert [term.name for term in cost.terms] == ["attention", "MLP"]
    assert 3 * cost == cost * 3 == total([cost] * 3) and Cost().unit is None and (Cost() + cost) == cost
    assert cost.to_json()[1] == {"name": "MLP", "value": 60, "unit": "FLOP", "source": "x"}
    with pytest.raises(ValueError, match="cost: expected terms in FLOP, got byte"):
        cost + byte("weights", 1, "x")
    with pytest.raises(TypeError):
        cost + 1


def test_every_term_says_where_it_comes_from():
    setup = known_setup("gemma-2-2b")
    costs = [decoder_flops(MIXED, 5), hypernet_flops(setup.hypernet), lora_flops(setup.hypernet, 3), pass_bytes(MIXED, [4])]
    assert all(term.source and term.value > 0 for cost in costs for term in cost.terms)
