"""LLMEncoder: hidden states of a language model over a description and worked examples, pooled by trained attention."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import t2l_engine as t2l
from t2l_engine import ConfigError, attach
from t2l_engine.hypernetwork import convert
from t2l_engine.text.config import LLMEncoderConfig
from t2l_engine.text.llm_encoder import EPS, AttentionPooling, LLMEncoder, condition_text, pad_states
from t2l_engine.text.prompts import read_examples

CONFIG = LLMEncoderConfig("tiny", layers=(0, 1), queries=3, width=8, heads=2, blocks=2, max_length=128, max_examples=2)
TEXTS = ["Name the capital of a country", "the drugs", "a", "name a drug of the country."]
SHOTS = [("capital", "3"), ("drug", "name")]
HIDDEN = 64
#: A text alone and padded in a batch: products of other shapes round differently.
ROUNDING = 1e-4


def pooling_of(config=CONFIG, hidden=HIDDEN):
    torch.manual_seed(1)
    return AttentionPooling(config, hidden)


@pytest.fixture
def llm_encoder(tiny_model, left_tokenizer):
    """Factory of LLM encoders of one model, with empty caches."""
    model = tiny_model("Llama")

    def make(config=CONFIG, **kwargs):
        return LLMEncoder(model.get_decoder(), left_tokenizer, config, pooling_of(config), **kwargs)

    return make


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@torch.no_grad()
def test_states_are_those_of_the_layers(tiny_model, left_tokenizer, family):
    """Of RMS 1 per token and layer, from the model's own hidden states, without running further layers."""
    model = tiny_model(family)
    made = LLMEncoder(model.get_decoder(), left_tokenizer, CONFIG, pooling_of())
    for text, states in zip(TEXTS, made.states(TEXTS), strict=True):
        ids = left_tokenizer([text], return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert states.shape == (ids.shape[1], 2 * HIDDEN) and states.dtype == torch.bfloat16
        for part, layer in zip(states.split(HIDDEN, dim=1), (0, 1), strict=True):
            expected = hidden[layer][0]
            expected = expected / (expected.square().mean(dim=-1, keepdim=True) + EPS).sqrt()  # a padding token is zero
            torch.testing.assert_close(part.float(), expected, rtol=2**-7, atol=2**-7)
    calls = []
    model.get_decoder().layers[1].register_forward_hook(lambda *_: calls.append(1))
    made.states(TEXTS)
    assert not calls and made.lengths(TEXTS) == [len(s) for s in made.states(TEXTS)]


@torch.no_grad()
def test_pooling_in_plain_terms():
    """One query per head attends to tokens and queries; padding has no weight."""
    pooling = pooling_of(dataclasses.replace(CONFIG, blocks=1))
    states, block = torch.randn(5, 2 * HIDDEN), pooling.blocks[0]
    tokens, queries = pooling.project(states), pooling.queries
    seen = block.norm2(torch.cat((tokens, queries)))
    key, value = block.key_value(seen).split(8, dim=1)
    query = block.query(block.norm1(queries))
    found = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(query[:, head] @ key[:, head].T / 2, dim=1)
        found.append(weights @ value[:, head])
    queries = queries + block.out(torch.cat(found, dim=1))
    queries = queries + block.linear2(torch.nn.functional.silu(block.linear1(block.norm3(queries))))
    expected = pooling.norm(queries).flatten()
    padded, mask = pad_states([states, torch.randn(9, 2 * HIDDEN)])
    torch.testing.assert_close(pooling(padded, mask)[0], expected, rtol=1e-5, atol=1e-5)
    padded[0, 5:] = 1e6
    torch.testing.assert_close(pooling(padded, mask)[0], expected, rtol=1e-5, atol=1e-5)


def test_neighbours_do_not_change_a_vector(llm_encoder):
    together = llm_encoder().encode(TEXTS, examples=[None, SHOTS, SHOTS[:1], []])
    assert together.shape == (4, 24) and together.dtype == torch.float32 and llm_encoder().embed_dim == 24
    for text, shots, vector in zip(TEXTS, [None, SHOTS, SHOTS[:1], []], together, strict=True):
        torch.testing.assert_close(llm_encoder().encode([text], examples=[shots])[0], vector, rtol=ROUNDING, atol=ROUNDING)


def test_every_part_of_the_condition_counts(llm_encoder):
    made = llm_encoder()
    same = made.encode(["the drugs"] * 5, examples=[None, SHOTS, SHOTS[::-1], SHOTS[:1], [("capital", "the")]])
    assert torch.pdist(same).min() > 1e-3
    assert torch.equal(made.encode(["", " the drugs "], examples=[SHOTS, None])[1], same[0])
    assert condition_text(" a b ", [(" x", "y ")]) == "a b\n\nInput: x\nOutput: y"
    assert condition_text("", [("x", "y")])[0] == "I"
    (text,) = made.prepare(["the drugs"], [SHOTS])
    assert made.prepare([text]) == [text] and torch.equal(made.encode([text])[0], same[1])


def test_texts_are_read_once(llm_encoder, monkeypatch):
    made, read = llm_encoder(), []
    monkeypatch.setattr(made, "_states", lambda tokens, plain=made._states: read.append(len(tokens)) or plain(tokens))
    first = made.encode(TEXTS, examples=[SHOTS, None, None, None])
    assert torch.equal(made.encode(TEXTS[::-1], examples=[None, None, None, SHOTS]), first.flip(0)) and read == [4]


def test_another_thread_may_run_the_model(llm_encoder):
    """What a thread reads is its own, while another thread uses the same model."""
    made, expected = llm_encoder(cache_size=0), llm_encoder().encode(TEXTS)
    stop, passes, rounds = threading.Event(), [], 0

    def use():
        while not stop.is_set():
            with torch.no_grad():
                out = made.model(input_ids=torch.arange(5, 25)[None], use_cache=False).last_hidden_state
            assert out.shape == (1, 20, HIDDEN)
            passes.append(1)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(use)
        try:
            while rounds < 20 or not (passes or other.done()):
                torch.testing.assert_close(made.encode(TEXTS), expected, rtol=ROUNDING, atol=ROUNDING)
                rounds += 1
        finally:
            stop.set()
        other.result()
    assert passes and not any(module._forward_hooks for module in made.model.modules())


def test_refuses_adapters_in_use(tiny_model, left_tokenizer, stack_for):
    model = tiny_model("Llama")
    made = LLMEncoder(model.get_decoder(), left_tokenizer, CONFIG, pooling_of())
    lora = attach(model, stack_for(model, ["q_proj", "v_proj"]))
    with lora.use(1), pytest.raises(RuntimeError, match="adapters are in use on this model"):
        made.encode(["the drugs"])


# --- errors ----------------------------------------------------------------------------------------------------------


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
def test_errors_name_the_example(llm_encoder, examples, match):
    with pytest.raises(ValueError, match=match):
        llm_encoder().encode(["the drugs"], examples=examples)


def test_texts_are_checked(llm_encoder):
    with pytest.raises(ValueError, match=r"texts\[0\]: expected a non-empty description"):
        llm_encoder().encode([""])
    made = llm_encoder(dataclasses.replace(CONFIG, max_length=6))
    with pytest.warns(UserWarning, match=r"texts\[0\]: description of .* tokens truncated to 6"):
        made.encode([TEXTS[0]], examples=[SHOTS])


def test_other_encoders_read_no_examples():
    made = t2l.OneHotEncoder(t2l.OneHotConfig(("antonyms",)))
    assert torch.equal(made.encode(["antonyms"], examples=[None]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="examples: expected none, since the encoder of this checkpoint, 'one-hot'"):
        made.encode(["antonyms"], examples=[SHOTS])


def test_model_must_fit(tiny_model, left_tokenizer):
    decoder = tiny_model("Llama").get_decoder()
    deep = dataclasses.replace(CONFIG, layers=(0, 7))
    with pytest.raises(ConfigError, match=r"encoder.layers: expected at most the 2 layers of 'tiny', got \(0, 7\)"):
        LLMEncoder(decoder, left_tokenizer, deep, pooling_of(deep))
    with pytest.raises(ConfigError, match="expected a pooling of hidden states of width 20 as it was trained with, got 128"):
        LLMEncoder(decoder, left_tokenizer, CONFIG, pooling_of(hidden=10))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(2)
    return t2l.HyperNetwork(
        t2l.HyperNetworkConfig(
            variant="L", modules=("q_proj", "v_proj"), in_features=(64, 64), out_features=(64, 32), num_layers=2, rank=4,
            embed_dim=24, latent_size=16, head_in_size=8, lora_alpha=8,
        )
    )  # fmt: skip


@pytest.fixture
def checkpoint(tiny_model, left_tokenizer, tmp_path):
    """A checkpoint with an LLM encoder, and the folder of its language model."""
    model, base = tiny_model("Llama"), tmp_path / "base"
    model.save_pretrained(base)
    left_tokenizer.save_pretrained(base)
    config = dataclasses.replace(CONFIG, name=str(base))
    network().save_pretrained(
        tmp_path / "made", {"encoder": dataclasses.asdict(config), "base_model": str(base)}, pooling_of()
    )
    return tmp_path / "made"


def test_engine_generates_from_examples(checkpoint, tiny_model, tmp_path):
    engine = t2l.TextToLoRA.from_pretrained(checkpoint)
    assert isinstance(engine.encoder, LLMEncoder)
    stack = engine.generate(["the drugs", "the drugs"], [None, SHOTS])
    expected = network().generate(engine.encoder.encode(["the drugs", "the drugs"], examples=[None, SHOTS]))
    for name, A in expected.lora_A.items():
        assert torch.equal(stack.lora_A[name], A) and not torch.equal(A[0], A[1])
    lora = attach(tiny_model("Llama"), slots=3)
    engine.generate_into(lora, 1, ["the drugs"], [SHOTS])
    moved = t2l.TextToLoRA.from_pretrained(checkpoint, encoder=tmp_path / "base")
    assert torch.equal(moved.generate(["a"]).lora_B["v_proj"], engine.generate(["a"]).lora_B["v_proj"])


def test_conversion_keeps_or_refuses_an_llm_encoder(checkpoint, tmp_path):
    convert.convert(checkpoint, tmp_path / "copy", to="native")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    copied, given = (load_file(folder / "hypernet.safetensors") for folder in (tmp_path / "copy", checkpoint))
    assert copied.keys() == given.keys() and all(torch.equal(copied[key], given[key]) for key in given)
    with pytest.raises(t2l.CheckpointError, match="the Sakana format cannot express this checkpoint: it reads tokens"):
        convert.convert(checkpoint, tmp_path / "sakana", to="sakana")


def _edit(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values["encoder"])
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("change, match", [
    (lambda e: e.pop("layers"), "encoder: missing field .layers."),
    (lambda e: e.update(blocks=1), r"unexpected keys \['pooling.blocks.1"),
    (lambda e: e.update(blocks=3), r"missing keys \['pooling.blocks.2"),
    (lambda e: e.update(queries=4), r"pooling.queries: expected shape \(4, 8\), got \(3, 8\)"),
    (lambda e: e.update(layers=[0, 1, 2]), r"pooling.project.weight: expected a matrix with columns for 3 layers"),
    (lambda e: e.update(layers=[0, 5]), r"encoder.layers: expected at most the 2 layers"),
])  # fmt: skip
def test_checkpoint_errors_name_the_key(checkpoint, change, match):
    _edit(checkpoint, change)
    with pytest.raises(ConfigError, match=match):
        t2l.TextToLoRA.from_pretrained(checkpoint)


def test_an_llm_encoder_without_its_pooling(checkpoint, tmp_path):
    path, blocks = checkpoint / "hypernet.safetensors", json.loads((checkpoint / "config.json").read_text())
    before = path.read_bytes()
    with pytest.raises(t2l.CheckpointError, match="expected a trained pooling, as the encoder has layers"):
        network().save_pretrained(checkpoint, {"encoder": blocks["encoder"]})
    assert path.read_bytes() == before
    network().save_pretrained(tmp_path / "without")
    path.write_bytes((tmp_path / "without" / path.name).read_bytes())
    with pytest.raises(t2l.CheckpointError, match="expected a trained pooling, as the encoder has layers"):
        t2l.TextToLoRA.from_pretrained(checkpoint)


def test_the_ways_of_other_encoders(checkpoint):
    for way in (LLMEncoder.from_pretrained, LLMEncoder.from_model):
        with pytest.raises(TypeError, match=r"LLMEncoder: expected from_config\(config, pooling\)"):
            way(CONFIG)
    with pytest.raises(ValueError, match="config: expected an EncoderConfig, got LLMEncoderConfig"):
        t2l.TextEncoder.from_pretrained(CONFIG)
    named = t2l.TextToLoRA.from_pretrained(checkpoint, encoder=str(checkpoint.parent / "base"))
    assert torch.equal(named.encoder.encode(["a"]), t2l.TextToLoRA.from_pretrained(checkpoint).encoder.encode(["a"]))


# --- files of examples -----------------------------------------------------------------------------------------------


def test_examples_file(tmp_path):
    path = tmp_path / "shots.jsonl"
    rows = [
        {"input": "a", "output": "b"},
        {"input": "c", "output": ["d", "e"], "split": "train"},
        {"input": "a", "output": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_examples(path) == [("a", "b"), ("c", "d")]
    for text, match in (
        ("", "expected at least one example, got none"),
        ('{"input": "a"}', r"shots.jsonl:1: output: expected a non-empty text, got None"),
        ('{"input": " ", "output": "b"}', r"shots.jsonl:1: input: expected a non-empty text, got ' '"),
        ('{"input": "a", "output": []}', r"shots.jsonl:1: output: expected a non-empty text, got \[\]"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            read_examples(path)
    with pytest.raises(FileNotFoundError, match="none.jsonl: not found"):
        read_examples(tmp_path / "none.jsonl")
