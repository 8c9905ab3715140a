"""Closed forms of text encoders against torch's counter and the parameters of transformers' models: all of them exact."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

from t2l_engine import ConfigError
from t2l_engine.research.costs import Encoder, encoder_flops, known_setup
from t2l_engine.research.costs.encoder import FAMILIES
from t2l_engine.research.costs.known import encoder_named, known_encoders
from t2l_engine.testing.counter import counted

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 50,
}  # fmt: skip
#: What transformers has a class for; "new" is the name that the same model has in its authors' code.
CLASSES = ["bert", "roberta", "xlm-roberta", "gte"]


def config(family, **changes):
    return AutoConfig.for_model(family, **SIZES | changes)


@pytest.fixture(scope="module", params=CLASSES)
def pair(request):
    torch.manual_seed(0)
    model = AutoModel.from_config(config(request.param), add_pooling_layer=False).eval()
    return model, Encoder.from_config(model.config)


def test_number_of_parameters(pair):
    model, encoder = pair
    assert encoder.num_parameters == sum(p.numel() for p in model.parameters())


def test_operations(pair):
    """Alone and in a batch; padding is computed, so a batch costs its longest text a row."""
    model, encoder = pair
    ids = (torch.arange(23) % 90 + 3)[None]
    assert counted(lambda: model(input_ids=ids)) == encoder_flops(encoder, 23).total
    assert counted(lambda: model(input_ids=ids.expand(3, -1))) == 3 * encoder_flops(encoder, 23).total


def test_eager_attention():
    """Nothing is hidden, so plain products are the same."""
    model = AutoModel.from_config(config("bert"), add_pooling_layer=False, attn_implementation="eager").eval()
    encoder = Encoder.from_config(model.config)
    assert counted(lambda: model(input_ids=torch.full((1, 9), 5))) == encoder_flops(encoder, 9).total


@pytest.mark.parametrize("family", CLASSES)
def test_configurations(family, tmp_path):
    """As an object, its values, and the file it saves."""
    made = config(family, type_vocab_size=3)
    made.save_pretrained(tmp_path)
    forms = [made, made.to_dict(), tmp_path, str(tmp_path / "config.json")]
    first, *others = map(Encoder.from_config, forms)
    assert others == [first] * 3 and first.embeddings == 97 + 3 + (50 if FAMILIES[family].positions else 0)


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family):
    """Of a file that says the sizes alone."""
    required = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    made = AutoConfig.for_model(family, **required)
    with torch.device("meta"):
        model = AutoModel.from_config(made, add_pooling_layer=False)
    encoder = Encoder.from_config({"model_type": family, **required})
    assert encoder == Encoder.from_config(made)
    assert encoder.num_parameters == sum(p.numel() for p in model.parameters())


def test_known_encoders():
    assert known_encoders() == ["gte-large", "minilm"]
    gte = encoder_named("gte-large")
    assert round(gte.num_parameters, -6) == 434_000_000
    assert known_setup("mistral-7b").encoder == gte
    with pytest.raises(ConfigError, match=r"encoder: expected one of gte-large, minilm, got 'e5'"):
        encoder_named("e5")


@pytest.mark.skipif(not hasattr(transformers, "GteConfig"), reason="this transformers has no GTE")
def test_gte_has_as_many_parameters_as_in_transformers():
    """By the authors' name; transformers has the same model under another."""
    sizes = {"vocab_size": 30528, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    same = transformers.GteConfig(**sizes, num_attention_heads=16, type_vocab_size=2)
    with torch.device("meta"):
        model = AutoModel.from_config(same, add_pooling_layer=False)
    assert encoder_named("gte-large").num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "distilbert"}, r"config: model_type: expected one of bert, roberta, .*, got 'distilbert'"),
        ({"model_type": ["bert"]}, r"config: model_type: expected one of bert, .*, got \['bert'\]"),
        ({"model_type": None}, "model_type: expected one of .*, got None"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 48, got 5"),
        ({"hidden_size": 0}, "hidden_size: expected an integer from 1 to 2147483648, got 0"),
        ({"vocab_size": None}, "vocab_size: expected an integer from 1 to 2147483648, got None"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers: expected an integer from 1 to 4096, got 4097"),
        ({"type_vocab_size": -1}, "type_vocab_size: expected an integer from 0 to 2147483648, got -1"),
        ({"intermediate_size": True}, "intermediate_size: expected an integer .*, got True"),
    ],
)
def test_refused(changes, message, tmp_path):
    values = {"model_type": "bert", **SIZES} | changes
    with pytest.raises(ConfigError, match=message):
        Encoder.from_config(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message.replace("config: ", r"config\.json: ")):
        Encoder.from_config(tmp_path)
