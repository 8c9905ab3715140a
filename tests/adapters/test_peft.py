"""What from_peft reads out of a PEFT folder's fields, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2l_engine import AdapterError, AdapterStack
from t2l_engine.adapters import peft

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


def refused(folder, match, **config):
    edit_config(folder, **config)
    refused_as_it_is(folder, match)


def refused_as_it_is(folder, match):
    with pytest.raises(AdapterError, match=match) as caught:
        AdapterStack.from_peft(folder)
    assert len(str(caught.value)) < 2000


def rename(state, old, new):
    return {key.replace(old, new): tensor for key, tensor in state.items()}


def test_scalings_that_differ_round_once(folder):
    """In bfloat16 the ratio 1.325 of the scalings goes into B in float32."""
    edit_state(folder, lambda state: {key: tensor.bfloat16() for key, tensor in state.items()})
    before = AdapterStack.from_peft(folder)
    edit_config(folder, alpha_pattern={Q0: 5.3})
    after = AdapterStack.from_peft(folder)
    assert after.dtype == torch.bfloat16 and after.scaling.tolist() == [1.0]
    expected = (before.lora_B["q_proj"][0, 0].float() * 1.325).bfloat16()
    assert torch.equal(after.lora_B["q_proj"][0, 0], expected)
    assert torch.equal(after.lora_B["q_proj"][0, 1], before.lora_B["q_proj"][0, 1])


def test_one_rank_does_not_blow_up_the_others(folder, monkeypatch):
    small = folder.with_name("small")
    shutil.copytree(folder, small)
    edit_state(small, lambda state: {key: (t[:1] if "lora_A" in key else t[:, :1]).clone() for key, t in state.items()})
    edit_config(small, r=1, rank_pattern={})
    with monkeypatch.context() as tight:
        tight.setattr(peft, "MAX_PADDING", 2)
        with pytest.raises(AdapterError, match="expected ranks and layers that fill at least 1/2 of the stack, got "):
            AdapterStack.from_peft([folder, *[small] * 9])
    assert len(AdapterStack.from_peft([folder, *[small] * 9])) == 10
    edit_state(folder, lambda state: {key: tensor for key, tensor in state.items() if Q0 not in key})
    monkeypatch.setattr(peft, "MAX_PADDED", 7)
    with pytest.raises(AdapterError, match="that leave at most 7 values of the stack empty, got "):
        AdapterStack.from_peft(folder)


def test_dtype(folder):
    edit_state(folder, lambda state: {key: t.bfloat16() if "v_proj" in key else t for key, t in state.items()})
    assert AdapterStack.from_peft(folder).dtype == torch.float32  # the widest
    assert AdapterStack.from_peft(folder, dtype=torch.float16).dtype == torch.float16
    other = folder.with_name("bfloat16")
    shutil.copytree(folder, other)
    edit_state(other, lambda state: {key: t.bfloat16() for key, t in state.items()})
    both = AdapterStack.from_peft([other, folder])
    assert both.dtype == torch.float32 and torch.equal(both.lora_A["q_proj"][0].bfloat16().float(), both.lora_A["q_proj"][0])
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ValueError, match=f"dtype: expected .*torch.bfloat16.*, got {dtype!r}"):
            AdapterStack.from_peft(folder, dtype=dtype)


def test_values_beyond_the_dtype(folder):
    """bfloat16 ends before float32, and a scaling that goes into B may be too much for it."""
    edit_state(folder, lambda state: {key: t.fill_(3.4e38) if "lora_B" in key else t for key, t in state.items()})
    AdapterStack.from_peft(folder)
    with pytest.raises(AdapterError, match="values exceed the range of torch.bfloat16"):
        AdapterStack.from_peft(folder, dtype=torch.bfloat16)
    refused(folder, f"{V1}: values exceed the range of torch.float32", alpha_pattern={V1: 8})


@pytest.mark.parametrize(("config", "path"), [
    ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.v_proj"),
    ({"target_modules": ["proj", "layers.0.self_attn.q_proj"]}, "model.layers.0.self_attn.v_proj"),
    ({"target_modules": []}, Q0),
    ({"exclude_modules": ["self_attn.v_proj"]}, "model.layers.0.self_attn.v_proj"),
    ({"layers_to_transform": [0]}, "model.layers.1.self_attn.q_proj"),
    ({"layers_to_transform": 1}, Q0),
])  # fmt: skip
def test_matrices_that_peft_would_not_apply(folder, config, path):
    (field,) = config
    refused(folder, f"{path}': expected no matrices for it, since {field} in adapter_config.json leaves it out", **config)


def test_folders_of_other_depth_share_a_stack_if_partial(folder, make_stack, tmp_path):
    deep = tmp_path / "deep"
    make_stack(SHAPES, num_layers=3, num_adapters=1).save_pretrained(deep)
    with pytest.raises(AdapterError, match="adapter'.*deep'.*2 layers at model.layers.*got 3"):
        AdapterStack.from_peft([folder, deep])
    edit_config(folder, layers_to_transform=[0, 1])
    stack = AdapterStack.from_peft([folder, deep])
    assert not stack.partial and stack.ranks["q_proj"].tolist() == [[4, 4, 0], [4, 4, 4]]


def test_the_same_adapter_is_the_same_content(folder, tmp_path):
    """Safetensors writes metadata in random order: all else is the same bytes."""

    def content(directory):
        raw = (directory / "adapter_model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:end]), raw[end:]

    AdapterStack.from_peft(folder).save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)
    assert sorted(content(folder)[0]["__metadata__"]) == ["format", "t2l_engine.sha256"]


# --- modules -------------------------------------------------------------------------------------------------------


def test_names_are_those_of_all_folders_together(folder, tmp_path, make_stack):
    """An adapter of one c_proj alone does not call it otherwise than one of both."""
    paths = {"a": "h.{layer}.attn.c_proj", "b": "h.{layer}.mlp.c_proj"}
    both = make_stack({"a": (8, 8), "b": (8, 8)}, num_adapters=1, paths=paths)
    both.save_pretrained(tmp_path / "both")
    one = AdapterStack({"a": both.lora_A["a"]}, {"a": both.lora_B["a"]}, both.scaling, paths=paths)
    one.save_pretrained(tmp_path / "one")
    assert list(AdapterStack.from_peft(tmp_path / "one").lora_A) == ["c_proj"]
    stack = AdapterStack.from_peft([tmp_path / "one", tmp_path / "both"])
    assert stack.ranks["attn.c_proj"].tolist() == [[4, 4], [4, 4]]
    assert stack.ranks["mlp.c_proj"].tolist() == [[0, 0], [4, 4]]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_proj"]  # "c_proj" would be the other one too


@pytest.mark.parametrize(("path", "message"), [
    ("model.layers.0.mlp.experts.3.w1", "one layer index"),
    ("model.layers.00.self_attn.q_proj", "layer index below"),
    ("model.layers.4096.self_attn.q_proj", "layer index below 4096"),
    ("model.layers.1000000000.self_attn.q_proj", "layer index below 4096"),
    ("model.layers." + "9" * 5000 + ".self_attn.q_proj", "layer index below 4096"),
    ("model.layers.\u0663.self_attn.q_proj", "layer index below 4096"),
    ("model.layers.0.self_attn.\u00b2", "names of letters"),
    ("model.layers.{layer}.self_attn.q_proj", "no braces"),
    ("model.layers.{layer.__class__}.0.q_proj", "no braces"),
    ("model.layers.0..q_proj", "names of letters"),
    ("../../etc.0.passwd", "names of letters"),
    ("model.layers.0.self attn\n.q_proj", "names of letters"),
    ("model.blocks.0", "below the layer index"),
    ("model." + "x" * 300 + ".0.q_proj", "256"),
])  # fmt: skip
def test_refused_paths(folder, path, message):
    edit_state(folder, lambda state: rename(state, Q0, path))
    refused(folder, rf"adapter_model\.safetensors.*{message}")


def test_padding_is_bounded(folder):
    """One layer of a 128-layer model passes, one value that asks for gigabytes does not."""
    edit_state(folder, lambda state: {key.replace(".0.", ".127."): t for key, t in state.items() if ".0." in key})
    stack = AdapterStack.from_peft(folder)
    assert stack.lora_A["q_proj"].shape[1] == 128 and int(stack.ranks["q_proj"].sum()) == 4
    edit_state(folder, lambda state: rename(state, ".127.", ".4095."))
    refused(folder, "1/128")
    names = [f"base_model.model.layers.0.m{i}.lora_{side}.weight" for i in range(300) for side in "AB"]
    edit_state(folder, lambda state: {name: torch.ones(1, 1) for name in names})
    refused(folder, "64 modules", r=1)


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = {
    "use_dora": [True], "use_qalora": [True], "lora_bias": [True], "use_rslora": ["false"], "fan_in_fan_out": ["yes"],
    "bias": ["lora_only", "all"],
    "modules_to_save": [["lm_head"]],
    "peft_type": ["IA3", None],
    "use_bdlora": [{"nblocks": 2}], "kasa_config": [{}], "monteclora_config": [{}], "arrow_config": [{"top_k": 3}],
    "target_parameters": [["experts.w1"]],
    "megatron_config": [{"size": 1}],
    "trainable_token_indices": [[3]],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[1, 2]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", []],
    "r": [0, "4", 4.0, 10**400],
    "lora_alpha": [None, True, 0, -4, 10**400, 1e-300, float("nan"), float("inf"), {"a": ["b"] * 10_000}],
    "target_modules": [3, [3]],
    "exclude_modules": [{"q_proj": 1}],
    "layers_to_transform": ["0", [0.5], [True], 10**9],
    "rank_pattern": [["q_proj"], {"q_proj": 2.0}, {"q_proj(": 4}],
    "alpha_pattern": [["q_proj"], "q_proj", *({"q_proj": value} for value in ("8", 0, float("nan"), 1e300)), {"q_proj(": 8}],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_refused_fields_are_named(folder, field, value):
    AdapterStack.from_peft(folder)
    refused(folder, rf"adapter_config\.json.*{field}", **{field: value})


@pytest.mark.parametrize(("pattern", "message"), [
    ("(a+)+$", "none on a group"),
    ("(?:a|a)*b", "none on a group"),
    ("(q_proj){2}", "none on a group"),
    (".*a.*b.*c.*", "at most 3 quantifiers"),
    ("a?b?c?d?", "at most 3 quantifiers"),
    ("(?=.*a)b", "no look-around"),
    ("(?P<x>a)", "no look-around"),
    (r"(a)\1", "no look-around or back-reference"),
    ("(a|a)" * 40 + "b", "too much work"),
    ("[z-a]", "not a regular expression"),
    ("a{99999999999999}", "not a regular expression"),
    ("a)", "at 1"),
    ("a" * 257, "256 characters"),
])  # fmt: skip
def test_patterns_that_could_keep_the_matcher_busy(folder, pattern, message):
    for field in ("alpha_pattern", "rank_pattern"):
        edit_config(folder, alpha_pattern={}, rank_pattern={})
        refused(folder, f"adapter_config.json: {field}: .*{message}", **{field: {pattern: 4}})
    refused(folder, "alpha_pattern: expected at most 4096", alpha_pattern={f"a{i}": 1 for i in range(5000)}, rank_pattern={})


@pytest.mark.parametrize("config", [{"r": 8}, {"rank_pattern": {Q0: 8}}])
def test_a_rank_that_the_configuration_contradicts(folder, config):
    refused(folder, rf"adapter_model\.safetensors: '{Q0}': expected rank 8 .*adapter_config\.json", **config)


@pytest.mark.parametrize(
    "field, value",
    [("fan_in_fan_out", True), ("init_lora_weights", "eva"), ("velora_config", {"num_groups": 4}), ("lora_dropout", 0.5),
     ("use_rslora", None), ("layers_to_transform", [])],
)  # fmt: skip
def test_fields_that_change_nothing(folder, field, value):
    before = AdapterStack.from_peft(folder)
    edit_config(folder, **{field: value})
    assert AdapterStack.from_peft(folder).allclose(before) and not before.partial


def test_unknown_fields_are_mentioned(folder):
    edit_config(folder, use_something_new=True, nothing_new=False)
    with pytest.warns(UserWarning, match=r"adapter_config\.json.*'use_something_new'\]"):
        AdapterStack.from_peft(folder)


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_absent_fields_are_named(folder, field):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))
    with pytest.raises(AdapterError, match=rf"adapter_config\.json.*{field}"):
        AdapterStack.from_peft(folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: {}, "no LoRA matrices"),
    (lambda s: {k: v for k, v in s.items() if k != KEY}, Q0),
    (lambda s: s | {KEY: s[KEY][:3].clone()}, Q0),
    (lambda s: s | {KEY: torch.zeros(4, 9)}, "q_proj"),
    (lambda s: s | {KEY: torch.zeros(4, 8, 1)}, "lora_A"),
    (lambda s: s | {"base_model.model.lm_head.weight": torch.zeros(3, 8)}, "lm_head.*save_embedding_layers"),
    (lambda s: s | {"base_model.model.lm_head.base_layer.weight": torch.zeros(3, 8)}, "lm_head.*save_embedding_layers"),
    (lambda s: s | {f"base_model.model.{Q0}.lora_magnitude_vector": torch.zeros(3)}, "lora_magnitude_vector.*DoRA"),
    (lambda s: s | {"base_model.model.wte.lora_embedding_A": torch.zeros(4, 9)}, "lora_embedding_A.*embedding"),
    (lambda s: s | {f"base_model.model.{Q0}.lora_B.bias": torch.zeros(12)}, "lora_B.bias.*biases"),
    (lambda s: s | {f"base_model.model.{Q0}.bias": torch.zeros(12)}, "q_proj.bias.*biases"),
    (lambda s: rename(s, "lora_A.weight", "lora_A.default.weight"), "lora_A.default.weight.*name"),
    (lambda s: rename(s, "base_model.model.", ""), "lora_A.weight.*'base_model.model"),
    (lambda s: s | {KEY: torch.zeros(0, 8)}, "lora_A"),
    (lambda s: s | {KEY: torch.zeros(8)}, "lora_A"),
    (lambda s: s | {KEY: torch.zeros(4, 8, dtype=torch.int32)}, "lora_A"),
    (lambda s: s | {KEY: torch.full((4, 8), float("nan"))}, "lora_A"),
    (lambda s: s | {KEY: torch.full((4, 8), float("-inf"))}, "lora_A"),
    (lambda s: s | {KEY: torch.full((4, 8), -1e39, dtype=torch.float64)}, f"{Q0}: values exceed"),
    (lambda s: s | {"x" * 100_000: torch.zeros(4, 8)}, "x"),
])  # fmt: skip
def test_refused_tensors_are_named(folder, change, message):
    edit_state(folder, change)
    refused(folder, rf"adapter_model\.safetensors.*{message}")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_broken_files_are_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    for broken in (b"", content[: len(content) // 2], content[:-5], b"\xff\xfe", b"[]", b'{"r": 4, "r": 8}', b"[" * 100_000):
        path.write_bytes(broken)
        refused_as_it_is(folder, name)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        AdapterStack.from_peft(folder)
    for make in (os.mkfifo, os.mkdir):
        path.unlink(missing_ok=True)
        make(path)
        refused_as_it_is(folder, f"{name}: expected a regular file")


def test_folders_together(folder, make_stack, tmp_path):
    with pytest.raises(ValueError, match="directories"):
        AdapterStack.from_peft([])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AdapterStack.from_peft([folder, folder.parent / "nowhere"])
    make_stack({"q_proj": (8, 16)}, num_adapters=1).save_pretrained(tmp_path / "wider")
    with pytest.raises(AdapterError, match="adapter.*wider.*q_proj: expected in/out features 8/12"):
        AdapterStack.from_peft([folder, tmp_path / "wider"])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused_as_it_is(folder, r"adapter_model\.bin: a pickle.*safe_serialization")
