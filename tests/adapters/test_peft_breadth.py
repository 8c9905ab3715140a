"""Weight changes of adapters against PEFT's own, for the kinds of folders that PEFT writes, in both directions."""

import copy
import json
import warnings

import pytest
import torch

from t2l_engine import AdapterStack

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def write(model, folder, **config):
    """A folder written by PEFT, its A and B random; returns PEFT's weight changes."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return deltas_of_peft(adapted)


def read(model, folder):
    """PEFT's weight changes of a folder; a matrix that PEFT misses or has no place for is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        return deltas_of_peft(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))


@torch.no_grad()
def deltas_of_peft(adapted):
    """Path -> weight change ``[out, in]``."""
    layers = {k: m for k, m in adapted.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {
        path: layer.get_delta_weight("default").T if layer.fan_in_fan_out else layer.get_delta_weight("default")
        for path, layer in layers.items()
    }


def deltas_of(stack, index=0):
    found = {}
    for name, path in stack.paths.items():
        for layer, r in enumerate(stack.ranks[name][index].tolist()):
            if r:
                a, b = stack.lora_A[name][index, layer, :r], stack.lora_B[name][index, layer, :, :r]
                found[path.replace("{layer}", str(layer))] = stack.scaling[index] * (b @ a)
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for path in got:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-5, atol=1e-5, msg=lambda text, p=path: f"{p}: {text}")


LLAMA = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "regular expression": {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"},
    "exclude": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7, "model.layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 3, "(k_proj|v_proj)": 5, r".*\.0\.mlp\..*": 9},
    },
    "rslora patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "first pattern wins": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {"(k|q)_proj": 8, "model.layers.0.self_attn.q_proj": 12, "proj": 2},
    },
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1]},
    "layers and a path": {"target_modules": ["model.layers.0.self_attn.q_proj", "q_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]},
    "training": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "lora_dropout": 0.1},
    "velora": {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}},
}
PARTIAL = {"regular expression", "exclude", "layers", "layers and a path", "one layer", "paths"}


@pytest.mark.parametrize("kind", LLAMA)
def test_llama(tiny_model, tmp_path, kind):
    model = tiny_model("Llama", num_hidden_layers=3, tie_word_embeddings=False)
    expected = write(model, tmp_path / "peft", **{"r": 4, "lora_alpha": 6} | LLAMA[kind])
    stack = AdapterStack.from_peft(tmp_path / "peft")
    assert stack.partial is (kind in PARTIAL)
    assert_same(deltas_of(stack), expected)

    stack.save_pretrained(tmp_path / "ours")
    assert_same(read(model, tmp_path / "ours"), expected)
    again = AdapterStack.from_peft(tmp_path / "ours")
    assert again.allclose(stack) and again.partial is stack.partial


GPT2 = {
    "two of one name": ({"target_modules": ["c_attn", "c_proj", "c_fc"]}, {"c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"}),
    "one of them": ({"target_modules": ["attn.c_proj"]}, {"c_proj"}),
    "layers": (
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"attn.c_proj", "mlp.c_proj"},
    ),
    "head": ({"target_modules": ["c_attn", "lm_head"]}, {"c_attn", "lm_head"}),
}


@pytest.mark.parametrize("kind", GPT2)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings=True`")
def test_gpt2(gpt2, tmp_path, kind):
    config, names = GPT2[kind]
    expected = write(gpt2, tmp_path / "peft", r=4, lora_alpha=6, fan_in_fan_out=True, **config)
    stack = AdapterStack.from_peft(tmp_path / "peft")
    assert set(stack.lora_A) == names
    assert stack.partial is (kind == "layers")
    assert_same(deltas_of(stack), expected)
    stack.save_pretrained(tmp_path / "ours")
    assert_same(read(gpt2, tmp_path / "ours"), expected)


def test_folders_of_many_kinds_in_one_stack(tiny_model, tmp_path):
    model = tiny_model("Llama", num_hidden_layers=3, tie_word_embeddings=False)
    expected = [write(model, tmp_path / kind, **{"r": 2 + i, "lora_alpha": 6} | LLAMA[kind]) for i, kind in enumerate(LLAMA)]
    stack = AdapterStack.from_peft([tmp_path / kind for kind in LLAMA])
    assert not stack.partial and stack.lora_A["q_proj"].shape[:2] == (len(LLAMA), 3)
    for i, deltas in enumerate(expected):
        assert_same(deltas_of(stack, i), deltas)


@pytest.mark.parametrize("pattern", ["layers", None])
def test_layers_that_nothing_precedes(make_stack, tiny_model, tmp_path, pattern):
    """``layers.0...``, the paths of a bare decoder, and a decoder that is a list itself."""
    path = "{layer}.self_attn.q_proj" if pattern is None else f"{pattern}.{{layer}}.self_attn.q_proj"
    decoder = tiny_model("Llama", num_hidden_layers=3).model
    model = decoder.layers if pattern is None else decoder
    stack = make_stack({"q_proj": (64, 64)}, num_adapters=1, num_layers=2, paths={"q_proj": path}, partial=True)
    stack.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"task_type": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert ("layers_to_transform" in config) is (pattern is not None)
    assert_same(read(model, tmp_path), deltas_of(stack))
    assert AdapterStack.from_peft(tmp_path).partial


@pytest.mark.parametrize(
    "missing", [(), (("q_proj", 1), ("v_proj", 1)), (("q_proj", 2),)], ids=["none", "layer", "one module"]
)
@pytest.mark.parametrize("partial", [False, True])
def test_layers_written(stack_for, tiny_model, tmp_path, missing, partial):
    """``layers_to_transform`` where it says it all, else full paths; PEFT creates what the adapter has and nothing else."""
    model = tiny_model("Llama", num_hidden_layers=3)
    stack = stack_for(model, ("q_proj", "v_proj"), num_adapters=1, partial=partial)
    for name, layer in missing:
        stack.ranks[name][0, layer] = 0
    stack.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    same_layers = len(missing) != 1
    layers = [layer for layer in range(3) if not missing or layer != missing[0][1]]
    assert config.get("layers_to_transform") == (layers if same_layers and (missing or partial) else None)
    assert config["target_modules"] == ["q_proj", "v_proj"] if same_layers else len(config["target_modules"]) == 5
    assert_same(read(model, tmp_path), deltas_of(stack))
    again = AdapterStack.from_peft(tmp_path)
    assert again.partial is bool(missing or partial) and again.allclose(stack)
