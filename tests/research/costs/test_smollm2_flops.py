"""The real language model, its text encoder and the bundled checkpoint against torch's counter: exact but for a pooler."""

from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache

import t2l_engine as t2l
from t2l_engine.research.costs import Decoder, Encoder, decoder_flops, encoder_flops, hypernet_flops, known_setup, lora_flops
from t2l_engine.research.costs.known import encoder_named
from t2l_engine.testing.counter import COUNT_RTOL, counted
from t2l_engine.testing.models import cache_argument
from t2l_engine.text import packaged

pytestmark = pytest.mark.skipif(find_spec(packaged.PACKAGE) is None, reason="make setup installs the model package")
TEXTS = ["Return the last element of the comma separated list.", "Answer with the simple past of the given verb."]
LENGTHS, STEPS = (59, 299), 4  # a question alone, and with three examples, in the paper's table of operations


@pytest.fixture(scope="module")
def model():
    return packaged.load(torch.bfloat16)[0]


@pytest.fixture(scope="module")
def engine():
    return t2l.TextToLoRA.from_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def stack(engine):
    return engine.generate(TEXTS)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder.from_config(model.config)


def prompt(tokens, rows=1):
    return (torch.arange(tokens) + 1000).expand(rows, -1)


def prefill(model, tokens, rows=1):
    return counted(lambda: model(input_ids=prompt(tokens, rows), logits_to_keep=1))


def decode(model, tokens):
    """STEPS tokens after so many."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(tokens), **cache_argument(model, cache), logits_to_keep=1)
    ids = prompt(STEPS)

    def steps():
        for i in range(STEPS):
            model(input_ids=ids[:, i : i + 1], **cache_argument(model, cache))

    return counted(steps)


def test_sizes(model, engine, decoder):
    assert decoder == known_setup("smollm2-135m").decoder
    assert decoder.num_parameters == sum(p.numel() for p in model.parameters())
    encoder = Encoder.from_config(engine.encoder.model.config)
    assert encoder == encoder_named("minilm") == known_setup("smollm2-135m").encoder
    pooler = 384 * 385  # not part of what runs
    assert encoder.num_parameters + pooler == sum(p.numel() for p in engine.encoder.model.parameters())


def test_base_model(model, decoder):
    for tokens in LENGTHS:
        assert prefill(model, tokens) == decoder_flops(decoder, tokens).total
    expected = decoder_flops(decoder, STEPS, cached=LENGTHS[0], logits=STEPS).total
    assert decode(model, LENGTHS[0]) == expected


def test_adapters_beside_the_model(model, decoder, engine, stack):
    config = engine.hypernetwork.config
    lora = t2l.attach(model, stack)
    with lora.use(0):
        for tokens in LENGTHS:
            assert prefill(model, tokens) == (decoder_flops(decoder, tokens) + lora_flops(config, tokens)).total
        expected = decoder_flops(decoder, STEPS, cached=LENGTHS[0], logits=STEPS) + lora_flops(config, STEPS)
        assert decode(model, LENGTHS[0]) == expected.total
    with lora.use([0, -1, 1]):  # a row without an adapter costs what the base model does
        assert prefill(model, 20, rows=3) == 3 * decoder_flops(decoder, 20).total + 2 * lora_flops(config, 20).total
    lora.detach()


def test_an_adapter_merged(model, decoder, stack):
    lora = t2l.attach(model, stack)
    lora.merge(1)
    for tokens in LENGTHS:
        assert prefill(model, tokens) == decoder_flops(decoder, tokens).total
    expected = decoder_flops(decoder, STEPS, cached=LENGTHS[0], logits=STEPS).total
    assert decode(model, LENGTHS[0]) == expected
    lora.unmerge()
    lora.detach()


def test_generation_from_a_sentence(engine, stack):
    """The facade: describing and generating; texts that were seen before are not encoded again."""
    config, encoder = engine.hypernetwork.config, Encoder.from_config(engine.encoder.model.config)
    text = "Name the animal in the list"  # ends without a full stop, which the encoder adds
    tokens = len(engine.encoder.tokenizer(text + ".")["input_ids"])
    expected, generation = encoder_flops(encoder, tokens).total, hypernet_flops(config).total
    got = counted(lambda: engine.generate([text])) - generation
    assert got == expected + 2 * 384 * 384  # of a pooler, which runs though nothing reads it; the closed form has none
    assert got == pytest.approx(expected, rel=COUNT_RTOL)
    assert counted(lambda: engine.generate([text])) == generation
    assert counted(lambda: engine.generate([text, *TEXTS])) == 3 * generation == hypernet_flops(config, 3).total
