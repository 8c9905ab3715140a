"""Checkpoints of SakanaAI/doc-to-lora, against the adapters and logits that its own code makes of them."""

import copy
import functools
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import t2l_engine as t2l
from t2l_engine.files.torch_file import read_torch_file, write_torch_file
from t2l_engine.hypernetwork import d2l
from t2l_engine.hypernetwork.checkpoint import read
from t2l_engine.hypernetwork.convert import convert
from t2l_engine.hypernetwork.network import build, load

GOLDEN = Path(__file__).parents[1] / "data" / "doc_to_lora"
#: The layer-to-layer form with shared blocks and bias; the flat form with three modules and no bias.
NAMES = ("mistral-down-shared", "qwen3-early")


class Golden:
    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.case = json.loads((self.folder / "case.json").read_text())
        self.expected = load_file(self.folder / "expected.safetensors")
        self.engine = t2l.TextToLoRA.from_pretrained(self.folder, encoder=self.folder / "base")
        ids, mask = self.expected["ctx_ids"], self.expected["ctx_mask"].bool()
        chunks = iter([row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])
        self.contexts = [[next(chunks) for _ in range(count)] for count in self.case["chunks"]]


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Golden:
    return Golden(request.param)


def adapters_of(engine, contexts):
    """Of token ids, without a tokenizer."""
    return engine.hypernetwork.generate(engine.embed_ids(contexts))


def delta(lora_A, lora_B):
    return torch.einsum("nlor,nlri->nloi", lora_B.double(), lora_A.double())


def encoded(records):
    return d2l._encoded(records, iter(range(d2l.MAX_VALUES)))


def deltas(stack):
    stack = stack.zero_padded()
    return {name: delta(a, stack.lora_B[name]) for name, a in stack.lora_A.items()}


def test_adapters_are_those_of_its_own_code(golden):
    """All contexts in one padded batch, of several chunks each."""
    found = adapters_of(golden.engine, golden.contexts)
    for name, got in deltas(found).items():
        expected = delta(golden.expected[f"A.{name}"], golden.expected[f"B.{name}"].mT)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    config = golden.engine.hypernetwork.config
    ranks = [config.total_rank(count) for count in golden.case["chunks"]]
    assert all(found.ranks[name].tolist() == [[rank] * config.num_layers for rank in ranks] for name in found.ranks)
    assert found.scaling.tolist() == [golden.case["alpha"]] * len(ranks)


def test_logits_are_those_of_its_own_code(golden):
    model = AutoModelForCausalLM.from_pretrained(golden.folder / "base", attn_implementation="eager")
    lora = t2l.attach(model, adapters_of(golden.engine, golden.contexts))
    question = golden.expected["question"]
    with torch.no_grad(), lora.use(list(range(len(question)))):
        found = model(question).logits
    torch.testing.assert_close(found, golden.expected["logits"], atol=1e-4, rtol=0)
    assert (found - golden.expected["logits_base"]).abs().max() > 1


def test_a_context_alone_makes_the_adapter_that_it_makes_among_others(golden):
    """Within rounding: the sizes of matrix products, and so the order of their sums, depend on the batch."""
    together = deltas(adapters_of(golden.engine, golden.contexts))
    for i, context in enumerate(golden.contexts):
        for name, alone in deltas(adapters_of(golden.engine, [context])).items():
            torch.testing.assert_close(alone[0], together[name][i], atol=1e-6, rtol=0)


def test_a_chunk_makes_the_same_bits_beside_longer_ones(golden):
    """From hidden states in bfloat16; float32 products of a few rows, as these ranks are, round by the number of rows."""
    net, lengths = copy.deepcopy(golden.engine.hypernetwork).set_dtype(torch.bfloat16), (9, 150, 37)
    layers = (net.config.num_layers,) * net.config.per_layer
    states = torch.randn(len(lengths), *layers, max(lengths), net.config.feature_size)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        together = net.generate(net.latents(states, mask).split(1))
        for i, n in enumerate(lengths):
            alone = net.generate([net.latents(states[i : i + 1, ..., :n, :], mask[i : i + 1, :n])])
            for name, lora_A in alone.lora_A.items():
                assert torch.equal(lora_A[0], together.lora_A[name][i]), (name, n)
                assert torch.equal(alone.lora_B[name][0], together.lora_B[name][i]), (name, n)


def test_slots_of_a_model_receive_the_same_adapters(golden):
    model = AutoModelForCausalLM.from_pretrained(golden.folder / "base", attn_implementation="eager")
    stack = adapters_of(golden.engine, golden.contexts)
    lora = t2l.attach(model, stack[0], slots=4, max_rank=16)
    with lora.borrow_slots(1, golden.engine.hypernetwork.meta_stack(golden.case["chunks"])) as out:
        golden.engine.hypernetwork.generate(golden.engine.embed_ids(golden.contexts), out)
    question = golden.expected["question"]
    with torch.no_grad(), lora.use([1 + i for i in range(len(question))]):
        torch.testing.assert_close(model(question).logits, golden.expected["logits"], atol=1e-4, rtol=0)


def test_converting_there_and_back_loses_nothing(golden, tmp_path):
    """The native form makes the same bits."""
    convert(golden.folder, tmp_path / "native")
    again = t2l.TextToLoRA.from_pretrained(tmp_path / "native", encoder=golden.folder / "base")
    first, second = (adapters_of(engine, golden.contexts) for engine in (golden.engine, again))
    assert second.allclose(first, rtol=0, atol=0)
    convert(tmp_path / "native", tmp_path / "back", to="doc-to-lora")
    (tensors, records), (again, records_again) = (
        read_torch_file(folder / d2l.D2L_NAME, t2l.CheckpointError, d2l.KINDS)
        for folder in (golden.folder, tmp_path / "back")
    )
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert encoded(records) == encoded(records_again)


def test_a_checkpoint_of_our_own_is_saved_and_has_no_records(golden, tmp_path):
    golden.engine.save_pretrained(tmp_path / "native", base_model="tiny")
    again = t2l.TextToLoRA.from_pretrained(tmp_path / "native", encoder=golden.folder / "base")
    assert again.hypernetwork.config == golden.engine.hypernetwork.config
    with pytest.raises(t2l.CheckpointError, match="expected a checkpoint that was converted from Doc-to-LoRA's format"):
        convert(tmp_path / "native", tmp_path / "theirs", to="doc-to-lora")


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    return read_torch_file(GOLDEN / NAMES[0] / d2l.D2L_NAME, t2l.CheckpointError, d2l.KINDS)


def without(key):
    return lambda entries: entries.pop(key)


def field(name, value, *path):
    def change(entries):
        record = entries["hypernet_config"]
        for part in path:
            record = record.content[part]
        record.content[name] = value

    return change


def tensor(key, value):
    return lambda entries: entries.update({key: value})


SHARED = "aggregator.perceiver.encoder.layers.4.input_latents_layernorm.weight"
#: 2^64 values, each of whose objects is in the file once.
MANY = functools.reduce(lambda value, _: (value, value), range(64), ())


@pytest.mark.parametrize("change, message", [
    (without("head.weight"), r"missing keys \['head.weight'\]"),
    (tensor("extra.weight", torch.ones(2)), r"unexpected keys \['extra.weight'\]"),
    (tensor("head.weight", torch.ones(2)), r"head.weight: expected shape \(4, 24, 128\), got \(2,\)"),
    (tensor("layers.0.layers.1.bias", torch.ones(1, 4, 1, 96)), r"layers.0.layers.1.bias: expected shape"),
    (tensor("bias_A.down_proj", torch.full((4, 4, 80), torch.nan)), "bias_A.down_proj"),
    (tensor(SHARED, torch.ones(24)), "layer that it shares"),
    (field("extra_modules", ["input_layernorm"]), r"extra_modules: expected none.*got \['input_layernorm'\]"),
    (field("per_rank_gen", False), r"per_rank_gen: expected one of \(True,\), got False"),
    (field("use_dora", True, "lora_config"), "lora_config.use_dora: expected none.* got True"),
    (field("aggregator_type", "pooler", "aggregator_config"), "aggregator_type: expected one of"),
    (field("layer_indices", torch.tensor([0, 2, 1, 3])), r"layer_indices: expected all layers from 0, got \[0, 2, 1, 3\]"),
    (field("feature_sizes", ({"up_proj": 3}, {"up_proj": 3})), "feature_sizes: expected two dicts of the modules"),
    (field("latent_size", "24"), "latent_size: expected a positive integer"),
    (field("feature_sizes", (1, 2)), "feature_sizes: expected two dicts of the modules"),
    (field("latent_size", 2**31 - 1), "latent_size: expected a positive integer of at most 1048576"),
    (field("per_layer_processing", False), r"keys \['layers.0.mlp.0.bias', 'layers.0.mlp.0.weight', 'layers.0.mlp.2.bias'"),
    (field("num_blocks", 129, "aggregator_config"), "num_self_attention: expected at most 256 layers, got 258"),
    (tensor("_orig_mod.head.weight", torch.ones(2)), r"unexpected keys \['_orig_mod.head.weight'\]"),
    (tensor(SHARED, torch.ones(24, dtype=torch.float64)), f"{SHARED}: expected the values of"),
    (field("note", MANY), "expected records of at most 16384 values"),
    (field("note", torch.ones(2)), "expected records with lists of integers as tensors, got torch.float32"),
    (without("ctx_encoder_args"), "expected the entries"),
])  # fmt: skip
def test_contradictions_are_errors_that_name_file_and_key(tmp_path, whole, change, message):
    tensors, records = whole
    entries = tensors | d2l._decoded(encoded(records), lambda kind, content: d2l.MAKERS[kind](content))
    change(entries)
    write_torch_file(tmp_path / d2l.D2L_NAME, entries)
    with pytest.raises(t2l.CheckpointError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path / d2l.D2L_NAME) in str(caught.value)


@pytest.mark.parametrize("change, message", [
    (lambda blocks: blocks["hypernetwork"].update(lora_alpha=2.0), "hypernetwork: expected .* as reference.doc_to_lora"),
    (lambda blocks: blocks["encoder"].update(name="other"), "encoder: expected .*'base'.* got .*'other'"),
    (lambda blocks: blocks["reference"].update(doc_to_lora=[]), r"doc_to_lora: ConfigError: expected \[class, content"),
    (lambda blocks: blocks["reference"]["doc_to_lora"].update(base_model_name_or_path=["os.system", "x"]), "os.system"),
])  # fmt: skip
def test_a_native_checkpoint_that_its_records_do_not_describe_is_not_converted_back(tmp_path, change, message):
    convert(GOLDEN / NAMES[1], tmp_path / "native")
    config = tmp_path / "native" / "config.json"
    blocks = json.loads(config.read_text())
    change(blocks)
    config.write_text(json.dumps(blocks))
    with pytest.raises(t2l.CheckpointError, match=message):
        convert(tmp_path / "native", tmp_path / "theirs", to="doc-to-lora")


def test_a_deeply_nested_pickle_is_refused(tmp_path):
    content = b"\x80\x02}X\x04\0\0\0deep)" + pickle.TUPLE1 * 20_000 + b"s."
    with zipfile.ZipFile(tmp_path / d2l.D2L_NAME, "w") as archive:
        archive.writestr("pytorch_model/data.pkl", content)
    with pytest.raises(t2l.CheckpointError, match="recursion"):
        d2l.read(tmp_path)


def test_members_of_enumerations_and_bfloat16_are_read_and_written_as_they_are(tmp_path, whole):
    tensors, records = whole
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    records = d2l._decoded(encoded(records), lambda kind, content: d2l.MAKERS[kind](content))
    kind = d2l.MAKERS["ctx_to_lora.modeling.aggregator.AGGREGATOR_TYPE"]
    records["hypernet_config"].content["aggregator_config"].content["aggregator_type"] = kind("perceiver")
    write_torch_file(tmp_path / d2l.D2L_NAME, {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()} | records)
    net = build(read(tmp_path))
    assert net.dtype == torch.bfloat16
    convert(tmp_path, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", to="doc-to-lora")
    again, records_again = read_torch_file(tmp_path / "back" / d2l.D2L_NAME, t2l.CheckpointError, d2l.KINDS)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors) and encoded(records) == encoded(records_again)

    write_torch_file(tmp_path / d2l.D2L_NAME, tensors | {"head.weight": tensors["head.weight"].float()} | records)
    with pytest.raises(t2l.CheckpointError, match="expected matrices of one dtype.*bfloat16.*float32.*pass dtype"):
        load(read(tmp_path))


def test_contexts_that_cannot_be_read_are_errors():
    engine = Golden("qwen3-early").engine
    for contexts, message in (
        ([[]], r"contexts\[0\]: expected one or more chunks"),
        ([[[1, 2]], [[]]], r"contexts\[1\]: expected one or more chunks"),
        ([[1, 2]], r"contexts\[0\]: expected one or more chunks"),
        ([[torch.tensor([1, 2])]], r"contexts\[0\]: expected one or more chunks"),
        ([[[1] * 200]], "at most the 128 tokens.*got 200; cut it: max_chunk_tokens=64"),
        ([], "contexts: expected one or more"),
        ([[[1, 96]]], r"contexts\[0\]: expected token ids below 96"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.embed_ids(contexts)
    with pytest.raises(ValueError, match="expected files of a tokenizer; give ids to embed_ids"):
        engine.generate(["a text"])


# --- texts -----------------------------------------------------------------------------------------------------------

#: Of a system message and a user's: "? <system> a <text> b".
TEMPLATE = "a {% for m in messages %}{{ m.content }}{% endfor %} b"


@pytest.fixture
def reader(left_tokenizer):
    left_tokenizer.chat_template = TEMPLATE
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / NAMES[1] / "base")
    config = t2l.DocumentEncoderConfig("tiny", states="last", num_layers=2)
    return t2l.DocumentEncoder(base, left_tokenizer, config)


def test_a_long_text_is_cut_into_chunks_of_equal_length_with_prefix_and_suffix(reader):
    """As doc-to-lora: the ids of the whole prompt are cut; a first chunk lacks the suffix, a last one the prefix."""
    words = ["c", "d", "e", "f", "g"]
    ids = lambda text: reader.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    (whole,) = reader.chunks([" " + " ".join(words) + "\n"])
    assert whole == [ids("a c d e f g b")]
    (cut,) = reader.chunks([" ".join(words)], max_chunk_tokens=3)
    assert cut == [ids("a c d b"), ids("a e f g b"), ids("a b")]  # 7 ids: 3, 3 and 1
    for texts, message in (
        ([], "texts: expected one or more"),
        (["  "], r"texts\[0\]: expected a non-empty text"),
        ("a", "texts: "),
    ):
        with pytest.raises(ValueError, match=message):
            reader.chunks(texts)


def test_documents_in_batches_are_read_as_one_by_one(reader, monkeypatch):
    """Within rounding; batches are of chunks of like length within the bytes that are allowed."""
    from t2l_engine.text import documents

    contexts = [[[2, 3, 4], [5]], [[6, 7]], [[8, 9, 10, 11]]]
    monkeypatch.setattr(documents, "READ_BYTES", 3 * 2 * reader.feature_size * 4)
    batches = list(reader.read(contexts))
    assert [indices for indices, _, _ in batches] == [[1, 2, 0], [3]] or [i for i, _, _ in batches] == [[1, 2], [0], [3]]
    alone = [next(reader.read([[chunk]]))[1][0] for context in contexts for chunk in context]
    for indices, states, mask in batches:
        for i, row, kept in zip(indices, states, mask, strict=True):
            torch.testing.assert_close(row[kept], alone[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, options", [(Gemma2Config, {"sliding_window": 4}), (LlamaConfig, {})])
@pytest.mark.parametrize("states, count", [("all", None), ("all", 2), ("last", 2), ("last", 4), ("embeddings", None)])
def test_states_are_those_of_the_whole_model_which_stays_as_it_is(kind, options, states, count):
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "head_dim": 12}
    config = kind(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager", **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    encoder = t2l.DocumentEncoder(model, None, t2l.DocumentEncoderConfig("tiny", states, count))
    with torch.no_grad():
        ((_, found, _),) = encoder.read([[list(range(3, 20))]])
        whole = model(torch.arange(3, 20)[None], output_hidden_states=True).hidden_states
        assert len(whole) == 5  # not twice as many: reading leaves no hooks of transformers behind
        read = count or 3
        normed = [*whole[:read], whole[4] if read == 4 else model.model.norm(whole[read])]
    expected = {"all": torch.stack(normed, dim=1), "last": normed[-1], "embeddings": whole[0]}[states]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    A, B = {"down_proj": torch.zeros(1, 4, 2, 80)}, {"down_proj": torch.zeros(1, 4, 48, 2)}
    lora = t2l.attach(model, t2l.AdapterStack(A, B, torch.ones(1)))
    with lora.use(0), pytest.raises(RuntimeError, match="adapters are in use on this model"):
        next(encoder.read([[[3, 4]]]))


def test_an_encoder_that_does_not_fit_is_refused(reader):
    engine = Golden(NAMES[0]).engine
    with pytest.raises(ValueError, match="hidden states of width 48 of 4 layers.*got width 48 of 1 from 'tiny'"):
        t2l.DocToLoRA(reader, engine.hypernetwork)
    with pytest.raises(t2l.CheckpointError, match="it reads texts token by token; load it with TextToLoRA"):
        t2l.HyperNetwork.from_pretrained(GOLDEN / NAMES[0])
