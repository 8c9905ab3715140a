"""transformers' ``generate`` with an adapter per row: a row gets what it gets with its adapter alone."""

import pytest
import torch

from t2l_engine.testing.numerics import LOGITS_ATOL
from tests.lora.tiny_llama import generate, logits

ORDER = [2, 0, -1, 3]


@pytest.mark.parametrize("kwargs", [
    {},
    {"cache_implementation": "static", "disable_compile": True},
    {"do_sample": True},
    {"do_sample": True, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 2},
], ids=["greedy", "static cache", "sampling", "several", "sampled beams", "beams"])  # fmt: skip
def test_rows(model, handle, tokens, kwargs):
    copies = kwargs.get("num_return_sequences", 1)

    def draw(ids):
        torch.manual_seed(5)
        with handle.use(ids):
            return generate(model, tokens, **kwargs).unflatten(0, (4, copies))

    mixed, base = draw(ORDER), draw(-1)
    for row, adapter in enumerate(ORDER):
        # Sampled beams of all rows are drawn from one stream, but each from the scores of its own row.
        assert torch.equal(mixed[row], draw(adapter)[row])
        assert torch.equal(mixed[row], base[row]) == (adapter == -1)


def test_left_padding(model, handle, tokens):
    mask = (torch.arange(7) >= torch.arange(4)[:, None]).long()
    with handle.use(ORDER):
        padded = generate(model, tokens * mask, attention_mask=mask)
    for row, adapter in enumerate(ORDER):
        with handle.use(adapter):
            alone = generate(model, tokens[row : row + 1, row:])
        assert torch.equal(padded[row, row:], alone[0])


def test_right_padding(model, handle, tokens):
    mask = (torch.arange(7) < 7 - torch.arange(4)[:, None]).long()
    padded = logits(model, tokens * mask, handle, ORDER, attention_mask=mask)
    for row, adapter in enumerate(ORDER):
        alone = logits(model, tokens[row : row + 1, : 7 - row], handle, adapter)
        assert (padded[row, : 7 - row] - alone[0]).abs().max() <= LOGITS_ATOL


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "early exit"])
@pytest.mark.filterwarnings("ignore")
def test_assisted_generation(tiny_model, model, handle, tokens, kind):
    """Drafts of any origin change the number of steps, not the tokens: the adapted model checks them."""
    draft = {
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
        "assistant": lambda: {"assistant_model": tiny_model("Llama", num_hidden_layers=1)},
        "early exit": lambda: {"assistant_early_exit": 1},
    }[kind]()
    one = tokens[:1].repeat(1, 3)  # a prompt with something to look up
    outputs = []
    for adapter in (1, 3, -1):
        with handle.use([adapter]):
            outputs.append(generate(model, one, max_new_tokens=16))
            assert torch.equal(generate(model, one, max_new_tokens=16, **draft), outputs[-1])
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
