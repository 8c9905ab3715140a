"""Adapters handed to PEFT and transformers in memory: the values of the folder, and the logits of ``attach``."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from t2l_engine import AdapterStack, attach
from t2l_engine.testing.numerics import LOGITS_ATOL, u
from tests.hypernetwork.test_doc_to_lora import NAMES, Golden, adapters_of

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

QV = ("q_proj", "v_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
folds = pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])


@pytest.fixture
def model(tiny_model):
    return tiny_model("Llama", num_hidden_layers=3)


@pytest.fixture
def stack(stack_for, model):
    """Adapters of scalings 0.7, 1.35 and 2: of rank 8, of rank 3 except for one module of rank 2, of rank 8 for q alone."""
    full = stack_for(model, QV, num_adapters=1, rank=8, seed=1)
    small = stack_for(model, QV, num_adapters=1, rank=3, seed=2)
    small.ranks["v_proj"][0, 1] = 2
    some = stack_for(model, QV[:1], num_adapters=1, rank=8, seed=3)
    stack = AdapterStack.cat([full, small, some])
    stack.scaling.copy_(torch.linspace(0.7, 2.0, 3))
    return stack


@pytest.fixture
def expected(model, stack):
    """Tokens, and their logits with every adapter through ``attach`` and with the base model."""
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    handle = attach(model, stack)
    found = []
    with torch.no_grad():
        for i in range(len(stack)):
            with handle.use(i):
                found.append(model(tokens).logits)
        found.append(model(tokens).logits)
    handle.detach()
    for one in range(4):
        for other in range(one):
            assert (found[one] - found[other]).abs().max() > 1000 * LOGITS_ATOL
    return tokens, found


@torch.no_grad()
def assert_logits(model, expected, index):
    tokens, logits = expected
    assert (model(tokens).logits - logits[index]).abs().max() <= LOGITS_ATOL


# --- values ----------------------------------------------------------------------------------------------------------


@folds
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_memory_and_folder_hold_the_same(stack, tmp_path, dtype, fold):
    for i in range(len(stack)):
        folder = tmp_path / str(i)
        stack.save_pretrained(folder, i, "some/model", dtype=dtype, fold=fold)
        state, stored = stack.state_dict_peft(i, dtype=dtype, fold=fold), load_file(folder / "adapter_model.safetensors")
        assert state.keys() == stored.keys()
        for key, tensor in state.items():
            assert tensor.dtype == stored[key].dtype == (dtype or torch.float32) and torch.equal(tensor, stored[key])
        config = stack.peft_config(i, "some/model", fold=fold)
        assert config == json.loads((folder / "adapter_config.json").read_text())
        ranks = {key.removeprefix("base_model.model."): len(t) for key, t in state.items() if ".lora_A." in key}
        assert config["base_model_name_or_path"] == "some/model" and config["use_rslora"] is False
        assert config["r"] == max(ranks.values()) and bool(config["rank_pattern"]) is (i == 1)
        scaling = 1 if fold else stack.scaling[i].item()
        assert config["lora_alpha"] == scaling * config["r"]
        assert config["alpha_pattern"] == {path: scaling * rank for path, rank in config["rank_pattern"].items()}
        assert AdapterStack.from_peft(folder).scaling.item() == pytest.approx(scaling, rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", [*DTYPES, torch.float64], ids=str)
def test_the_scaling_in_B_is_rounded_once(stack, held, dtype):
    stack = stack.to(dtype=held)
    wide = torch.promote_types(held, torch.float32)
    for i, scaling in enumerate(stack.scaling.tolist()):
        plain = stack.state_dict_peft(i, dtype=torch.float64)
        for key, tensor in stack.state_dict_peft(i, dtype=dtype, fold=True).items():
            if ".lora_A." in key:
                assert torch.equal(tensor, plain[key].to(dtype))
                continue
            assert torch.equal(tensor, (plain[key].to(wide) * scaling).to(dtype))
            exact, smallest = plain[key] * scaling, torch.finfo(dtype).tiny
            assert ((tensor - exact).abs() <= (u(dtype) + 2 * u(torch.float32)) * (exact.abs() + smallest)).all()


def test_keys(stack):
    plain = stack.state_dict_peft(0)
    assert "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight" in plain and len(plain) == 12
    named = stack.state_dict_peft(0, adapter_name="my task", prefix="")
    assert list(named) == [key.removeprefix("base_model.model.").replace(".weight", ".my task.weight") for key in plain]
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), named.values(), strict=True))


@folds
def test_tensors_are_new_and_contiguous(stack, fold):
    """PEFT's hotswap may make them a model's parameters."""
    stack.scaling[0] = 1
    held = {t.untyped_storage().data_ptr() for side in (stack.lora_A, stack.lora_B) for t in side.values()}
    state = stack[0].state_dict_peft(0, fold=fold)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    assert held.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in state.values())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"dtype": torch.int8}, "dtype: expected a floating-point dtype.*torch.int8"),
    ({"dtype": "bfloat16"}, "dtype: expected a floating-point dtype.*'bfloat16'"),
    ({"adapter_name": ""}, "adapter_name: expected a non-empty string without '.', or None, got ''"),
    ({"adapter_name": "a.b"}, "adapter_name: .*got 'a.b'"),
    ({"adapter_name": 3}, "adapter_name: .*got 3"),
    ({"prefix": "model"}, "prefix: expected '' or a path that ends in '.', such as 'base_model.model.', got 'model'"),
    ({"prefix": "."}, "prefix: .*got '.'"),
    ({"prefix": None}, "prefix: .*got None"),
], ids=str)  # fmt: skip
def test_arguments_are_checked(stack, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        stack.state_dict_peft(0, **arguments)
    if "dtype" in arguments:
        with pytest.raises(ValueError, match=message):
            stack.save_pretrained(tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


# --- PEFT and transformers -------------------------------------------------------------------------------------------


@folds
@pytest.mark.parametrize("kind", ["PeftModel", "transformers"])
def test_hotswap(model, stack, expected, tmp_path, kind, fold):
    """To a smaller rank and another scaling, to fewer modules, and back to the first."""

    def config(i):
        return peft.LoraConfig(**stack.peft_config(i, fold=fold))

    prefix = "base_model.model." if kind == "PeftModel" else ""
    if kind == "PeftModel":
        stack.save_pretrained(tmp_path, fold=fold)
        model = peft.PeftModel.from_pretrained(model, tmp_path, adapter_name="task").eval()
    else:
        state = stack.state_dict_peft(0, fold=fold)
        info = model.load_adapter(adapter_name="task", peft_config=config(0), adapter_state_dict=state)
        assert not info.missing_keys and not info.unexpected_keys
    assert_logits(model, expected, 0)
    layers = [m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer) and n.endswith("q_proj")]
    assert len(layers) == 3
    for i in (1, 2, 0):
        state = stack.state_dict_peft(i, adapter_name="task", prefix=prefix, fold=fold)
        hotswap.hotswap_adapter_from_state_dict(model, state, "task", config(i))
        assert_logits(model, expected, i)
        scaling = 1 if fold else stack.scaling[i].item()
        assert all(layer.scaling["task"] == pytest.approx(scaling, rel=1e-7) for layer in layers)


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_documents(tmp_path, name):
    """Each with its own rank, by its chunks, and lora_alpha times as much: the scaling is alpha itself."""
    golden = Golden(name)
    alpha, expected = golden.case["alpha"], golden.expected
    stack, total_rank = adapters_of(golden.engine, golden.contexts), golden.engine.hypernetwork.config.total_rank
    for i, chunks in enumerate(golden.case["chunks"]):
        stack.save_pretrained(tmp_path / str(i), i)
        config, rank = json.loads((tmp_path / str(i) / "adapter_config.json").read_text()), total_rank(chunks)
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, alpha * rank, {})
        base = AutoModelForCausalLM.from_pretrained(golden.folder / "base", attn_implementation="eager")
        adapted, question = peft.PeftModel.from_pretrained(base, tmp_path / str(i)), expected["question"][i : i + 1]
        assert_logits(adapted, (question, expected["logits"][i : i + 1].unsqueeze(0)), 0)
    again = AdapterStack.from_peft([tmp_path / str(i) for i in range(len(stack))])
    assert again.allclose(stack) and again.scaling.tolist() == [alpha] * len(stack)


def test_a_swap_to_a_larger_rank_leaves_the_stack_alone(model, stack, expected):
    """PEFT then makes the tensors its parameters."""
    kept = copy.deepcopy((stack.lora_A, stack.lora_B))
    configs = [peft.LoraConfig(**stack.peft_config(i)) for i in (0, 1)]
    model.load_adapter(adapter_name="task", peft_config=configs[1], adapter_state_dict=stack.state_dict_peft(1))
    state = stack.state_dict_peft(0, adapter_name="task", prefix="")
    hotswap.hotswap_adapter_from_state_dict(model, state, "task", configs[0])
    assert_logits(model, expected, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert_logits(model, expected, 3)
    for before, now in zip(kept, (stack.lora_A, stack.lora_B), strict=True):
        assert all(torch.equal(before[name], now[name]) for name in now)
