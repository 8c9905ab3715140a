"""Reading documents: hidden states of several layers, and worked examples."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.text import packaged
from t2l_engine.text.documents import condition_text

SHOTS = [("capital", "3"), ("drug", "name")]


@pytest.fixture(scope="module")
def parts():
    return packaged.load(torch.float32)


def encoder(parts, **changes):
    fields = {"states": "layers", "layers": (0, 2, 5), "prefix": "", "suffix": ""} | changes
    return t2l.DocumentEncoder(*parts, t2l.DocumentEncoderConfig("smollm2-135m", **fields))


def test_states_of_several_layers_are_those_of_the_model_side_by_side_and_of_rms_1(parts):
    reads, further = encoder(parts), []
    hook = reads.model.layers[5].register_forward_hook(lambda *_: further.append(1))
    contexts = reads.chunks(["It rains.", "The bakery on the corner opens at seven."])
    assert reads.feature_size == 3 * 576 and reads.num_states == 1
    batches = list(reads.read(contexts))
    hook.remove()
    assert not further  # layers after the last one that is read do not run
    for indices, states, mask in batches:
        for index, found, kept in zip(indices, states, mask, strict=True):
            ids = torch.tensor(contexts[index])
            with torch.no_grad():
                hidden = parts[0](ids, output_hidden_states=True).hidden_states
            expected = torch.cat([hidden[i][0] / hidden[i][0].square().mean(-1, keepdim=True).sqrt() for i in (0, 2, 5)], -1)
            torch.testing.assert_close(found[kept].float(), expected.float(), rtol=0, atol=0.1)
            assert (found[kept].float() - expected.float()).norm() < 0.01 * expected.float().norm()


def test_worked_examples_follow_the_text(parts):
    reads = encoder(parts, max_examples=2)
    shots = [[("hot", "cold"), ("up", "down")], None]
    (first,), (second,) = reads.chunks(["Give the opposite.", "It rains."], examples=shots)
    text = reads.tokenizer.decode(first)
    assert text.startswith("Give the opposite.") and text.index("hot") < text.index("cold") < text.index("down")
    assert reads.tokenizer.decode(second) == "It rains."
    assert condition_text(" a b ", [(" x", "y ")]) == "a b\n\nInput: x\nOutput: y"
    assert reads.prepare(["", " a "], [SHOTS, None]) == [condition_text("", SHOTS), "a"]
    with pytest.raises(ValueError, match="examples: expected none, since the encoder of this checkpoint, 'smollm2-135m'"):
        encoder(parts).chunks(["Give the opposite."], examples=[[("a", "b")]])


@pytest.mark.parametrize("examples, match", [
    ([None, None], r"examples: expected a list of 1, one entry a text, got 2"),
    ("x", r"examples: expected a list of 1"),
    (["x"], r"examples\[0\]: expected a list of \(input, answer\), got 'x'"),
    ([[("a",)]], r"examples\[0\]\[0\]: expected \(input, answer\), got \('a',\)"),
    ([[("a", " ")]], r"examples\[0\]\[0\]\[1\]: expected a non-empty answer, got ' '"),
    ([[("a", 3)]], r"examples\[0\]\[0\]\[1\]: expected a non-empty answer, got 3"),
    ([[("\ud800", "a")]], r"examples\[0\]\[0\]\[0\]: expected Unicode text"),
    ([SHOTS * 2], r"examples\[0\]: expected at most 2, with which this encoder was trained, got 4"),
])  # fmt: skip
def test_errors_name_the_example(parts, examples, match):
    with pytest.raises(ValueError, match=match):
        encoder(parts, max_examples=2).prepare(["Give the opposite."], examples)


def test_another_thread_may_run_the_model(tiny_model):
    """What a thread reads is its own, while another thread uses the same model."""
    made = t2l.DocumentEncoder(tiny_model("Llama"), None, t2l.DocumentEncoderConfig("tiny", "layers", layers=(0, 1)))
    contexts = [[[5, 6, 7]], [[8, 9, 10]]]
    ((_, expected, _),) = made.read(contexts)
    stop, passes, rounds = threading.Event(), [], 0

    def use():
        while not stop.is_set():
            with torch.no_grad():
                out = made.model(input_ids=torch.arange(5, 25)[None], use_cache=False).last_hidden_state
            assert out.shape == (1, 20, 64)
            passes.append(1)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(use)
        try:
            while rounds < 20 or not (passes or other.done()):
                ((_, found, _),) = made.read(contexts)
                torch.testing.assert_close(found, expected)
                rounds += 1
        finally:
            stop.set()
        other.result()
    assert passes and not any(module._forward_hooks for module in made.model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (2, 0)}, "encoder.layers: expected 1 to 16 increasing numbers from 0"),
        ({"layers": None}, "encoder.layers: expected 1 to 16 increasing numbers from 0"),
        ({"states": "last"}, "encoder.layers: expected null with states 'last'"),
        ({"max_examples": -1}, "encoder.max_examples"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(t2l.ConfigError, match=message):
        t2l.DocumentEncoderConfig("smollm2-135m", **{"states": "layers", "layers": (0, 2)} | changes)


def test_a_layer_that_the_model_lacks(parts):
    with pytest.raises(t2l.ConfigError, match="encoder.layers: expected at most the 30 of 'smollm2-135m'"):
        encoder(parts, layers=(0, 31))
