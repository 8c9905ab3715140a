"""What from_peft reads out of a PEFT folder's fields, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2l_engine import AdapterError, AdapterStack

SHAPES = {"q_proj": (8, 12), "v_proj": (8, 4)}
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"


@pytest.fixture
def folder(make_stack, tmp_path):
    """A plain LoRA of rank 4 with lora_alpha 4: scaling 1."""
    stack = make_stack(SHAPES, num_adapters=1)
    stack.scaling.fill_(1.0)
    stack.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(folder, change):
    path = Path(folder) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def delta(stack, name, layer):
    """The weight change of a stack of one adapter."""
    r = int(stack.ranks[name][0, layer])
    return stack.scaling[0] * stack.lora_B[name][0, layer, :, :r] @ stack.lora_A[name][0, layer, :r]


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.5), (True, 5.0), (None, 2.5)])
def test_scaling_follows_use_rslora(folder, rslora, scaling):
    edit_config(folder, lora_alpha=10, use_rslora=rslora)
    assert AdapterStack.from_peft(folder).scaling.tolist() == [scaling]


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ({"q_proj": 8}, {("q_proj", 0), ("q_proj", 1)}),
        ({Q0: 8}, {("q_proj", 0)}),
        ({r".*\.1\.self_attn\..*": 8}, {("q_proj", 1), ("v_proj", 1)}),
        ({"layers.1.self_attn.(q|v)_proj": 8}, {("q_proj", 1), ("v_proj", 1)}),
        ({"proj": 8}, set()),
        ({"q_proj": 8, Q0: 12}, {("q_proj", 0), ("q_proj", 1)}),
    ],
)
def test_alpha_pattern(folder, pattern, hit):
    before = AdapterStack.from_peft(folder)
    edit_config(folder, alpha_pattern=pattern)
    after = AdapterStack.from_peft(folder)
    for name in SHAPES:
        for layer in range(2):
            factor = 2 if (name, layer) in hit else 1
            assert torch.equal(delta(after, name, layer), factor * delta(before, name, layer)), (name, layer)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_pattern(folder, rslora):
    before = AdapterStack.from_peft(folder)

    def narrow(state):
        half = {
            f"base_model.model.{V1}.lora_A.weight": (slice(2),),
            f"base_model.model.{V1}.lora_B.weight": (..., slice(2)),
        }
        return {key: tensor[half[key]].clone() if key in half else tensor for key, tensor in state.items()}

    edit_state(folder, narrow)
    edit_config(folder, rank_pattern={V1: 2}, lora_alpha=4, use_rslora=rslora)
    after = AdapterStack.from_peft(folder)
    assert after.ranks["v_proj"].tolist() == [[4, 2]] and after.ranks["q_proj"].tolist() == [[4, 4]]
    one = 4 / 2**0.5 if rslora else 4 / 2
    expected = one * before.lora_B["v_proj"][0, 1, :, :2] @ before.lora_A["v_proj"][0, 1, :2]
    torch.testing.assert_close(delta(after, "v_proj", 1), expected)
    torch.testing.assert_close(delta(after, "q_proj", 0), delta(before, "q_proj", 0) * (2 if rslora else 1))


def test_layers_and_modules_an_adapter_lacks(folder):
    edit_state(folder, lambda state: {key: tensor for key, tensor in state.items() if Q0 not in key})
    stack = AdapterStack.from_peft(folder)
    assert stack.ranks["q_proj"].tolist() == [[0, 4]] and stack.ranks["v_proj"].tolist() == [[4, 4]]
    assert not any(Q0 in key for key in stack.state_dict_peft(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [3]),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("r", "4"),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj(": 8}),
        ("alpha_pattern", ["q_proj"]),
    ],
)
def test_refused_fields_are_named(folder, field, value):
    AdapterStack.from_peft(folder)
    edit_config(folder, **{field: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json.*{field}"):
        AdapterStack.from_peft(folder)


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_absent_fields_are_named(folder, field):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))
    with pytest.raises(AdapterError, match=rf"adapter_config\.json.*{field}"):
        AdapterStack.from_peft(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "no LoRA matrices"),
        (lambda s: {k: v for k, v in s.items() if k != KEY}, Q0),
        (lambda s: s | {KEY: s[KEY][:3].clone()}, Q0),
        (lambda s: s | {KEY: torch.zeros(4, 9)}, "q_proj"),
        (lambda s: s | {KEY: torch.zeros(4, 8, 1)}, "lora_A"),
        (lambda s: s | {"base_model.model.lm_head.weight": torch.zeros(3, 8)}, "lm_head"),
        (lambda s: s | {f"base_model.model.{Q0}.lora_magnitude_vector": torch.zeros(3)}, "lora_magnitude_vector"),
        (lambda s: s | {KEY.replace("layers.0.", ""): s[KEY].clone()}, "self_attn.q_proj"),
        (
            lambda s: s | {k.replace("self_attn", "cross_attn"): v.clone() for k, v in s.items() if Q0 in k},
            "cross_attn",
        ),
    ],
)
def test_refused_tensors_are_named(folder, change, message):
    edit_state(folder, change)
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors.*{message}"):
        AdapterStack.from_peft(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_broken_files_are_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    for broken in (b"", content[: len(content) // 2], content[:-5], b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(AdapterError, match=name):
            AdapterStack.from_peft(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        AdapterStack.from_peft(folder)


def test_missing_folder_is_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AdapterStack.from_peft([folder, folder.parent / "nowhere"])
