"""Reading documents: hidden states of several layers, and worked examples."""

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.text import packaged


@pytest.fixture(scope="module")
def parts():
    return packaged.load()


def encoder(parts, **changes):
    fields = {"states": "layers", "layers": (0, 2, 5), "prefix": "", "suffix": ""} | changes
    return t2l.DocumentEncoder(*parts, t2l.DocumentEncoderConfig("smollm2-135m", **fields))


def test_states_of_several_layers_are_those_of_the_model_side_by_side_and_of_rms_1(parts):
    reads = encoder(parts)
    contexts = reads.chunks(["It rains.", "The bakery on the corner opens at seven."])
    assert reads.feature_size == 3 * 576 and reads.num_states == 1
    for indices, states, mask in reads.read(contexts):
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
    with pytest.raises(ValueError, match=r"examples\[0\]: expected at most 2, with which this encoder was trained, got 3"):
        reads.chunks(["Give the opposite."], examples=[[("a", "b")] * 3])
    with pytest.raises(ValueError, match="examples"):
        encoder(parts).chunks(["Give the opposite."], examples=[[("a", "b")]])


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
