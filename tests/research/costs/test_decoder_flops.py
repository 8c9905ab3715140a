"""Closed forms of language models against torch's counter, on every family of transformers models: all of them exact."""

import pytest
import torch
from transformers import DynamicCache

from t2l_engine.research.costs import Decoder, cache_bytes, decoder_flops, encoder_flops
from t2l_engine.testing.counter import counted
from t2l_engine.testing.models import cache_argument
from tests.research.costs import tiny_decoders
from tests.research.costs.tiny_decoders import FAMILIES, WINDOW, prompt

LONG, MORE, STEPS = 17, 5, 3


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model, and its closed forms."""
    model = tiny_decoders.model(request.param)
    return model, Decoder.from_config(model.config)


def test_all_families_are_tried():
    from t2l_engine.research.costs import decoder

    assert FAMILIES.keys() == decoder.FAMILIES.keys()
    windows = {name: Decoder.from_config(tiny_decoders.config(name)).windows for name in FAMILIES}
    full, sliding = {(None, None)}, {(WINDOW, WINDOW)}
    assert {windows[name] for name in ("llama", "gemma")} == full
    assert {windows[name] for name in ("mistral", "ministral3", "mixtral", "qwen3_moe")} == sliding
    assert {windows[name] for name in ("gemma2", "gemma3_text")} == {(WINDOW, None)}
    assert windows["qwen2_moe"] == (WINDOW, None, WINDOW)
    assert {windows[name] for name in ("ministral", "smollm3", "qwen2", "qwen3")} == {(None, WINDOW)}


def test_number_of_parameters(pair):
    model, decoder = pair
    assert decoder.num_parameters == sum(p.numel() for p in model.parameters())  # tied ones once
    assert sum(decoder.parameters.values()) == decoder.num_parameters


def test_prompt(pair):
    model, decoder = pair
    for tokens in (WINDOW - 2, LONG):
        got = counted(lambda tokens=tokens: model(input_ids=prompt(tokens), logits_to_keep=1))
        assert got == decoder_flops(decoder, tokens).total


def test_cached_tokens_then_one_by_one(pair):
    """A prompt after cached tokens, then single tokens: windows pass over what is cached."""
    model, decoder = pair
    ids, cache = prompt(LONG + MORE + STEPS), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :LONG], **cache_argument(model, cache))
    got = counted(lambda: model(input_ids=ids[:, LONG : LONG + MORE], **cache_argument(model, cache), logits_to_keep=1))
    assert got == decoder_flops(decoder, MORE, cached=LONG).total

    def decode():
        for i in range(LONG + MORE, LONG + MORE + STEPS):
            model(input_ids=ids[:, i : i + 1], **cache_argument(model, cache))

    assert counted(decode) == decoder_flops(decoder, STEPS, cached=LONG + MORE, logits=STEPS).total
    # transformers keeps one token less than a window: the next query is the last of its keys.
    windowed = sum(window is not None for window in decoder.windows)
    unit = 2 * decoder.kv_heads * decoder.head_dim * 4
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(decoder, LONG + MORE + STEPS, itemsize=4) == held + windowed * unit


def test_rows_and_all_logits():
    model = tiny_decoders.model("mistral")
    decoder = Decoder.from_config(model.config)
    got = counted(lambda: model(input_ids=prompt(LONG, rows=3)))
    assert got == 3 * decoder_flops(decoder, LONG, logits=LONG).total


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows(left):
    """Attention of a row is that of its text alone, where padding is left of it, as generation has it; projections of
    padding are computed all the same.  Padding on the right sees the text before it."""
    model = tiny_decoders.model("llama")
    decoder, pad = Decoder.from_config(model.config), 4
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, slice(pad) if left else slice(LONG - pad, None)] = 0
    got = counted(lambda: model(input_ids=prompt(LONG, rows=2), attention_mask=mask))
    whole, text = (decoder_flops(decoder, tokens, logits=LONG) for tokens in (LONG, LONG - pad))
    seen_by_padding = 0 if left else 4 * decoder.heads * decoder.head_dim * decoder.layers * pad * (LONG - pad)
    assert got == 2 * whole.total - whole["attention"] + text["attention"] + seen_by_padding


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_eager_attention(family):
    """Plain products form the full square, so the counter takes all of it; Gemma-2 runs so where its softcapping is on."""
    model = tiny_decoders.model(family, attention="eager", attn_logit_softcapping=50.0)
    decoder = Decoder.from_config(model.config)
    got = counted(lambda: model(input_ids=prompt(LONG), logits_to_keep=1))
    kept = sum(sum(min(i + 1, window or LONG) for i in range(LONG)) for window in decoder.windows)
    other_half = 4 * decoder.heads * decoder.head_dim * (decoder.layers * LONG**2 - kept)
    assert got == decoder_flops(decoder, LONG).total + other_half


def test_fused_experts():
    """Grouped products, transformers' own choice for mixtures, for which torch's counter has no formula."""
    model = tiny_decoders.model("qwen3_moe", experts="grouped_mm")
    decoder = Decoder.from_config(model.config)
    assert counted(lambda: model(input_ids=prompt(3), logits_to_keep=1)) == decoder_flops(decoder, 3).total


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_language_model_as_text_encoder(family):
    model = tiny_decoders.model(family)
    decoder = Decoder.from_config(model.config)
    got = counted(lambda: model.model(input_ids=prompt(LONG)))
    assert got == encoder_flops(decoder, LONG).total == decoder_flops(decoder, LONG, logits=0).total
