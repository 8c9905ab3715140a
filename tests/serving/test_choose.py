"""Probabilities of given answers from an attached model, against scoring every option whole; and what is refused."""

import math
import random

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.serving.choose import Attached, choose, fit_temperature
from t2l_engine.text.prompts import answer_ids, prompt_ids

PROMPT = "name the capital of a country ."
#: One token each; shared first tokens; and one that begins another.
OPTIONS = (["drug", "the"], ["the capital", "the country", "drug"], ["the", "the capital of", "the capital of a"])


@pytest.fixture
def source(tiny_model, stack_for, left_tokenizer):
    model = tiny_model("Llama", vocab_size=len(left_tokenizer))
    lora = t2l.attach(model, stack_for(model, ["q_proj", "down_proj"], num_adapters=2))
    return Attached(lora, model, left_tokenizer)


def whole(source, name, options):
    """Probabilities from a forward pass an option."""
    prompt, scores = prompt_ids(source.tokenizer, [PROMPT])[0], []
    for option in options:
        answer = answer_ids(source.tokenizer, option)
        with source.lora.use(name), torch.inference_mode():
            logits = source.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        scores.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS)
def test_probabilities_are_those_of_whole_options(source, options):
    seen = []
    source.model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    found = {name: choose(source, name, PROMPT, options) for name in (-1, 0, 1)}
    prompts = [ids for ids in seen if ids.shape[1] >= len(prompt_ids(source.tokenizer, [PROMPT])[0])]
    assert len(prompts) == len(found), "the prompt is read once"
    for name, got in found.items():
        scores = whole(source, name, options)
        for temperature, of in ((1, got), (3, choose(source, name, PROMPT, options, temperature=3))):
            expected = (scores / temperature).softmax(0)
            assert [*of] == options and torch.allclose(torch.tensor([*of.values()]).double(), expected, rtol=0, atol=1e-5)
    assert len({tuple(of.values()) for of in found.values()}) == len(found), "adapters differ"


@pytest.mark.parametrize("options, temperature, message", [
    ("drug", 1, "options: expected two or more different texts, got 'drug'"),
    (["drug"], 1, "options: expected two or more"), (["drug", "drug"], 1, "options: expected two or more"),
    (["drug", "drug "], 1, "options: expected different tokens for each"), (["drug", ""], 1, "expected different tokens"),
    (["drug", "the"], 0, "temperature: expected a positive number, got 0"),
    (["drug", "the"], math.nan, "temperature: expected a positive number, got nan"),
])  # fmt: skip
def test_what_is_refused(source, options, temperature, message):
    with pytest.raises(ValueError, match=message):
        choose(source, 0, PROMPT, options, temperature=temperature)


@pytest.mark.parametrize("overconfident", [0.5, 1, 4])
def test_the_temperature_undoes_what_made_probabilities_too_sure(overconfident):
    drawn, labelled = random.Random(0), []
    for _ in range(4000):
        scores = [drawn.gauss(0, 1.5) for _ in range(3)]
        true = torch.tensor(scores).softmax(0).tolist()
        given = (overconfident * torch.tensor(scores).double()).softmax(0).tolist()
        right = drawn.choices("abc", true)[0]
        labelled.append((dict(zip("abc", given, strict=True)), right))
    assert fit_temperature(labelled) == pytest.approx(overconfident, rel=0.08)


def test_a_temperature_needs_labels():
    with pytest.raises(ValueError, match="labelled: expected at least one pair, got none"):
        fit_temperature([])
    with pytest.raises(ValueError, match=r"labelled: expected one of \['a', 'b'\] as the right option, got 'c'"):
        fit_temperature([({"a": 0.5, "b": 0.5}, "c")])
    assert fit_temperature([({"a": 1.0, "b": 0.0}, "a")]) < 0.011 and fit_temperature([({"a": 0.0, "b": 1.0}, "a")]) > 99
