"""Logits of our layers against PEFT's on the same folders, both directions."""

import copy
import warnings

import pytest
import torch

from t2l_engine import AdapterStack, attach
from t2l_engine.testing.numerics import LOGITS_ATOL

peft = pytest.importorskip("peft")

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "Llama": {},
    "Mistral": {"num_hidden_layers": 3, "sliding_window": 4},
    "Qwen3": {"head_dim": 32},  # q out 128, hidden 64
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))


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


@torch.no_grad()
def make_peft_folder(model, folder, **config):
    """A folder written by PEFT, its B random."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("names", [QV, ALL], ids=["qv", "all"])
@families
def test_our_folders_in_peft(tiny_model, stack_for, tmp_path, tokens, family, names):
    model = tiny_model(family, **FAMILIES[family])
    stack = stack_for(model, names, num_adapters=2)
    with torch.no_grad():
        base = model(tokens).logits
    for i in range(2):
        stack.save_pretrained(tmp_path / str(i), adapter=i)
        got = our_logits(model, stack, i, tokens)
        assert_same_logits(got, peft_logits(model, tmp_path / str(i), tokens), base)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@families
def test_peft_folders_here(tiny_model, tmp_path, tokens, family, rslora):
    model = tiny_model(family, **FAMILIES[family])
    folder = make_peft_folder(model, tmp_path, r=4, lora_alpha=6, use_rslora=rslora, target_modules=list(ALL))
    with torch.no_grad():
        base = model(tokens).logits
    got = our_logits(model, AdapterStack.from_peft(folder), 0, tokens)
    assert_same_logits(got, peft_logits(model, folder, tokens), base)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_patterns(tiny_model, tmp_path, tokens, rslora):
    model = tiny_model("Llama")
    folder = make_peft_folder(
        model,
        tmp_path / "peft",
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "model.layers.1.self_attn.q_proj": 8},
        alpha_pattern={"model.layers.0.mlp.down_proj": 20, "q_proj": 3},
    )
    stack = AdapterStack.from_peft(folder)
    stack.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        base = model(tokens).logits
    expected = peft_logits(model, folder, tokens)
    assert_same_logits(our_logits(model, stack, 0, tokens), expected, base)
    assert_same_logits(peft_logits(model, tmp_path / "ours", tokens), expected, base)


def test_mixed_batch_of_peft_folders(tiny_model, tmp_path, tokens):
    """Folders of different ranks, modules and scalings, one a row."""
    model = tiny_model("Llama")
    configs = (
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    )
    folders = [make_peft_folder(model, tmp_path / str(i), **config) for i, config in enumerate(configs)]
    with torch.no_grad():
        base = model(tokens).logits
    got = our_logits(model, AdapterStack.from_peft(folders), [0, 1, -1], tokens)
    for row, folder in enumerate(folders):
        expected = peft_logits(model, folder, tokens)[row : row + 1]
        assert_same_logits(got[row : row + 1], expected, base[row : row + 1])
    assert torch.equal(got[2], base[2])


def test_adapters_of_some_layers_only(tiny_model, tmp_path, tokens):
    model = tiny_model("Llama")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(QV), "layers_to_transform": [1]}
    folder = make_peft_folder(model, tmp_path / "peft", **settings)
    stack = AdapterStack.from_peft(folder)
    stack.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        base = model(tokens).logits
    expected = peft_logits(model, folder, tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT looks for no other layers
        assert_same_logits(peft_logits(model, tmp_path / "ours", tokens), expected, base)
    assert_same_logits(our_logits(model, stack, 0, tokens), expected, base)
