"""Adapters on the decoders of transformers, against PEFT on the same folders: every family, dtype, rank and row."""

import copy

import pytest
import torch

from t2l_engine import AdapterStack, LoRALinear, attach
from t2l_engine.lora.locate import PACKED
from t2l_engine.testing.numerics import GRADIENT_RTOL, LOGITS_ATOL, ROW_ATOL, logits_bound
from tests.lora.blocks import leaves
from tests.lora.tiny_llama import assert_untouched, snapshot

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out")

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Sizes, and the linears of a layer in transformers' names: two of them, and all.  Among them are out > in and in > out.
FAMILIES = {
    "Llama": ({}, QV, ALL),
    "Mistral": ({"sliding_window": 4}, QV, ALL),
    "Qwen2": ({}, QV, ALL),  # q, k and v have biases
    "Qwen3": ({"head_dim": 32}, QV, ALL),  # q out 128, hidden 64
    "Gemma2": ({"head_dim": 32, "query_pre_attn_scalar": 32}, QV, ALL),
    "Gemma3": ({"sliding_window": 4}, QV, ALL),
    "Phi3": ({}, ("qkv_proj",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "GPT2": ({}, ("c_attn",), ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")),  # weights are [in, out]
    "OPT": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, QV, (*QV, "k_proj", "out_proj", "fc1", "fc2")),
}
RANKS = (
    {"r": 1, "lora_alpha": 2},
    {"r": 3, "lora_alpha": 3, "use_rslora": True},
    {"r": 8, "lora_alpha": 8},
    {"r": 64, "lora_alpha": 64},
)


@pytest.fixture
def build(tiny_model):
    """Factory of three-layer models of a family, their biases random."""

    def make(family, dtype=torch.float32, **kwargs):
        model = tiny_model(family, **{"num_hidden_layers": 3} | FAMILIES[family][0] | kwargs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.uniform_(-0.5, 0.5)
        return model.to(dtype)

    return make


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))


def settings(family, names, **config):
    """A PEFT configuration for linears of a family."""
    if "layers_to_transform" in config:
        config["layers_pattern"] = "h" if family == "GPT2" else "layers"
    return {"target_modules": list(names), "fan_in_fan_out": family == "GPT2"} | config


@torch.no_grad()
def make_peft(model, folder, seed=3, **config):
    """An adapter made by PEFT, B random, saved to ``folder``; returns PEFT's model."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config), autocast_adapter_dtype=False
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@torch.no_grad()
def peft_logits(model, folder, tokens):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(tokens).logits


@torch.no_grad()
def our_logits(model, stack, ids, tokens):
    handle = attach(model, stack)
    with handle.use(ids):
        logits = model(tokens).logits
    handle.detach()
    return logits


def assert_same_logits(got, expected, base):
    assert (got - expected).abs().max() <= LOGITS_ATOL
    assert (expected - base).abs().amax(dim=(1, 2)).min() > 1000 * LOGITS_ATOL  # the adapter did something to every row


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "which"), [(family, 2) for family in FAMILIES] + [("Llama", 1), ("Phi3", 1)])
def test_mixed_ranks_and_layers(build, tmp_path, tokens, family, which):
    """Folders of four ranks, of the first and of the middle layer alone, and the base model: one a row."""
    model, names = build(family), FAMILIES[family][which]
    layers = ({"r": 8, "lora_alpha": 16, "layers_to_transform": [i]} for i in (0, 1))
    folders, expected = [], []
    for i, config in enumerate((*RANKS, *layers)):
        folders.append(tmp_path / str(i))
        adapted = make_peft(model, folders[-1], seed=i, **settings(family, names, **config))
        with torch.no_grad():
            expected.append(adapted(tokens[:1]).logits)
    stack = AdapterStack.from_peft(folders)
    assert not stack.partial and {n for ranks in stack.ranks.values() for n in ranks.flatten().tolist()} == {0, 1, 3, 8, 64}
    same = tokens[:1].expand(len(folders) + 1, -1)
    with torch.no_grad():
        base = model(same).logits
    got = our_logits(model, stack, [*range(len(folders)), -1], same)
    assert_same_logits(got[:-1], torch.cat(expected), base[:-1])
    assert torch.equal(got[-1], base[-1])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in FAMILIES] + [(family, torch.float16) for family in ("Llama", "GPT2")],
    ids=str,
)
def test_low_precision(build, tmp_path, tokens, family, dtype):
    """Adapted and merged logits: as close to the float64 model as PEFT's; afterwards every bit is what it was."""
    model = build(family, dtype)
    adapted = make_peft(model, tmp_path, **settings(family, FAMILIES[family][2], r=8, lora_alpha=8))
    before = snapshot(model)
    with torch.no_grad():
        base, theirs = model(tokens).logits, adapted(tokens).logits
        exact = copy.deepcopy(adapted).double()(tokens).logits
        their_merged = adapted.merge_and_unload()(tokens).logits
        handle = attach(model, AdapterStack.from_peft(tmp_path))
        with handle.use(0):
            ours = model(tokens).logits
        handle.merge(0)
        our_merged = model(tokens).logits
    assert exact.dtype == torch.float64 and ours.dtype == dtype
    for got, other in ((ours, theirs), (our_merged, their_merged)):
        assert (got.double() - exact).norm() <= logits_bound(exact, other) < (base - exact).norm() / 10
    handle.unmerge()
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before[1].items())
    handle.merge(0)
    handle.detach()
    assert_untouched(model, before)


def test_encoder_and_decoder(tmp_path, tokens):
    """Adapters in both halves of BART: modules of one name get names that reach above the layer."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=97, init_std=0.3, **sizes, **heads, **special)).eval()
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        adapted.save_pretrained(tmp_path)
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
        expected, base = adapted.eval()(**inputs).logits, model(**inputs).logits
        stack = AdapterStack.from_peft(tmp_path)
        assert "encoder.layers.{layer}.self_attn.q_proj" in stack.lora_A and len(stack.lora_A) == 6
        handle = attach(model, stack)
        with handle.use([0, -1, 0]):
            got = model(**inputs).logits
    assert_same_logits(got[[0, 2]], expected[[0, 2]], base[[0, 2]])
    assert torch.equal(got[1], base[1])


@pytest.mark.parametrize(("family", "tied"), [("Llama", False), ("Llama", True), ("Gemma2", True), ("GPT2", True)], ids=str)
def test_lm_head(build, tmp_path, tokens, family, tied):
    model = build(family, tie_word_embeddings=tied)
    adapted = make_peft(model, tmp_path, **settings(family, (*FAMILIES[family][1], "lm_head"), r=4, lora_alpha=8))
    before = snapshot(model)
    stack = AdapterStack.from_peft(tmp_path)
    with torch.no_grad():
        base, expected = model(tokens).logits, adapted(tokens).logits
        assert_same_logits(our_logits(model, stack, 0, tokens), expected, base)
        handle = attach(model, stack)
        assert isinstance(model.get_output_embeddings(), LoRALinear)
        if tied:  # the embedding would change too
            with pytest.raises(ValueError, match="lm_head: other modules share its weight"):
                handle.merge(0)
            with handle.use(0):
                assert_same_logits(model(tokens).logits, expected, base)
        else:
            handle.merge(0)
            assert_same_logits(model(tokens).logits, expected, base)
    handle.detach()
    assert_untouched(model, before)


# --- packed projections ----------------------------------------------------------------------------------------------

WIDTHS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
SLICED = {name: (64, width) for name, width in WIDTHS.items()} | {"o_proj": (64, 64), "down_proj": (96, 64)}


def pack(stack):
    """The same adapters on the packed projections: A of the linears one after the other, B zero outside its columns."""
    lora_A, lora_B = dict(stack.lora_A), dict(stack.lora_B)
    for host, linears in PACKED.items():
        present = [name for name in linears if name in lora_A]
        rows = [lora_A.pop(name) for name in present]
        first = {name: sum(a.shape[2] for a in rows[:i]) for i, name in enumerate(present)}
        A = torch.cat(rows, dim=2)
        B = A.new_zeros(*A.shape[:2], sum(WIDTHS[name] for name in linears), A.shape[2])
        column = 0
        for name in linears:
            if name in first:
                b = lora_B.pop(name)
                B[:, :, column : column + WIDTHS[name], first[name] : first[name] + b.shape[3]] = b
            column += WIDTHS[name]
        lora_A[host], lora_B[host] = A, B
    return AdapterStack(lora_A, lora_B, stack.scaling)


@pytest.fixture
def sliced(make_stack):
    """Adapters of rank 1, 3 and 64 of all modules, and one of k_proj and up_proj alone."""
    stacks = [make_stack(SLICED, num_adapters=1, num_layers=3, rank=r, seed=r) for r in (1, 3, 64)]
    some = {name: SLICED[name] for name in ("k_proj", "up_proj")}
    return AdapterStack.cat([*stacks, make_stack(some, num_adapters=1, num_layers=3, rank=8, seed=9)])


def test_modules_inside_packed_projections(build, sliced, tmp_path, tokens):
    """Against PEFT on the packed projections with the equivalent matrices."""
    model = build("Phi3")
    same, packed = tokens[:1].expand(5, -1), pack(sliced)
    with torch.no_grad():
        base = model(same).logits
    got = our_logits(model, sliced, [0, 1, 2, 3, -1], same)
    assert torch.equal(got[4], base[4])
    for i in range(4):
        packed.save_pretrained(tmp_path / str(i), adapter=i)
        assert_same_logits(got[i : i + 1], peft_logits(model, tmp_path / str(i), tokens[:1]), base[:1])
    state = {k: t.clone() for k, t in model.state_dict().items()}
    handle = attach(model, sliced)
    wrapped = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    members = {name: len(module.extra_repr().split(", ")) for name, module in wrapped.items()}
    assert members == {"qkv_proj": 3, "gate_up_proj": 2, "o_proj": 1, "down_proj": 1}
    handle.merge(1)
    with torch.no_grad():
        assert_same_logits(model(same).logits[:1], got[1:2], base[:1])
    handle.detach()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_a_packed_projection_and_modules_inside_it(build, make_stack, sliced, tokens):
    """One adapter on qkv_proj itself, one on q_proj and v_proj, in one batch."""
    model = build("Phi3")
    whole = make_stack({"qkv_proj": (64, 128)}, num_adapters=1, num_layers=3, rank=5, seed=5)
    with torch.no_grad():
        base = model(tokens).logits
    expected = [our_logits(model, stack, 0, tokens) for stack in (whole, sliced[0])]
    for stack in (AdapterStack.cat([whole, sliced[0]]), AdapterStack.cat([sliced[0], whole])):
        ids = [0, 1, -1] if "qkv_proj" == next(iter(stack.lora_A)) else [1, 0, -1]
        got = our_logits(model, stack, ids, tokens)
        for row in range(2):
            assert (got[row] - expected[row][row]).abs().max() <= ROW_ATOL
            assert (got[row] - base[row]).abs().max() > 1000 * ROW_ATOL
        assert torch.equal(got[2], base[2])


def test_gradients_inside_packed_projections(build, sliced, tokens):
    model = build("Phi3").requires_grad_(False)
    weight = torch.randn(3, 9, 97, generator=torch.Generator().manual_seed(2))
    results = []
    for prepare in (lambda stack: stack, pack):
        own, tensors = leaves(sliced)
        stack = prepare(own)
        handle = attach(model, stack)
        with handle.differentiable(stack, [2, 0, -1]):
            logits = model(tokens).logits
        handle.detach()
        (logits * weight).sum().backward()
        results.append((logits.detach(), [leaf.grad for leaf in tensors]))
    (got, grads), (expected, expected_grads) = results
    assert (got - expected).abs().max() <= LOGITS_ATOL
    for a, b in zip(grads, expected_grads, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= GRADIENT_RTOL * b.abs().max()


@pytest.mark.parametrize(("packed", "message"), [
    ({"qkv_proj": {"q_proj": 64, "k_proj": 32}}, "packed: qkv_proj: expected 96 columns .*qkv_proj has 128"),
    ({"qkv_proj": {"q_proj": 64, "k_proj": 64, "v_proj": 64}}, "packed: qkv_proj: expected 192 columns .* has 128"),
    ({"qkv_proj": {"q_proj": 32, "k_proj": 64, "v_proj": 32}}, "q_proj: layer 0: .* 64/64, the model has 64/32"),
    ({"qkv_proj": {"q_proj": 0}}, "packed: qkv_proj: q_proj: expected a positive number of columns, got 0"),
    ({"qkv_proj": ["q_proj"]}, "packed: expected linear -> module -> number of columns, got"),
    (["qkv_proj"], "packed: expected linear -> module -> number of columns, got"),
    ({"other": {"q_proj": 64}}, "q_proj: the adapter adapts .*, but Phi3ForCausalLM has no such module"),
])  # fmt: skip
def test_wrong_columns(build, make_stack, packed, message):
    model = build("Phi3")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        attach(model, make_stack({"q_proj": (64, 64)}, num_layers=3), packed=packed)
    assert dict(model.named_modules()) == modules
