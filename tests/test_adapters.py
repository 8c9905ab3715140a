import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from t2l_engine import AdapterStack

SHAPES = {"q_proj": (8, 12), "v_proj": (8, 4)}
ATTENTION = "base_model.model.model.layers.{}.self_attn."


def assert_same(got, expected):
    """Equal adapters: scaling, and A and B at their true ranks."""
    assert torch.equal(got.scaling, expected.scaling) and len(got) == len(expected)
    for i in range(len(got)):
        a, b = got.state_dict_peft(i), expected.state_dict_peft(i)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


# --- the stack -----------------------------------------------------------------------------------------------------


def arguments(**changes):
    good = {
        "lora_A": {"q_proj": torch.ones(3, 2, 4, 8)},
        "lora_B": {"q_proj": torch.ones(3, 2, 12, 4)},
        "scaling": torch.ones(3),
        "ranks": {"q_proj": torch.full((3, 2), 4, dtype=torch.int32)},
        "paths": {"q_proj": "layers.{layer}.q_proj"},
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_A": {}, "lora_B": {}}, "lora_A, lora_B"),
        ({"lora_B": {"v_proj": torch.ones(3, 2, 12, 4)}}, r"lora_A, lora_B.*q_proj.*v_proj"),
        ({"lora_A": {"q_proj": torch.ones(3, 4, 8)}}, "q_proj: expected lora_A"),
        ({"lora_B": {"q_proj": torch.ones(3, 2, 4, 12)}}, "q_proj: expected lora_A"),
        ({"lora_B": {"q_proj": torch.ones(3, 1, 12, 4)}}, "q_proj: expected lora_A"),
        ({"scaling": torch.ones(2)}, "q_proj: expected 2 adapters"),
        ({"scaling": torch.ones(3, 1)}, "scaling"),
        ({"scaling": torch.ones(3, dtype=torch.float64)}, "scaling"),
        ({"lora_B": {"q_proj": torch.ones(3, 2, 12, 4).bfloat16()}}, "q_proj: expected one floating-point dtype"),
        ({"lora_B": {"q_proj": torch.ones(3, 2, 12, 4, device="meta")}}, "q_proj: .* one device"),
        ({"ranks": {}}, "ranks.*q_proj"),
        ({"ranks": {"q_proj": torch.full((3, 2), 4)}}, "ranks.*q_proj"),
        ({"ranks": {"q_proj": torch.ones(3, 1, dtype=torch.int32)}}, "ranks.*q_proj"),
        ({"ranks": {"q_proj": torch.full((3, 2), 5, dtype=torch.int32)}}, "ranks.*q_proj"),
        ({"ranks": {"q_proj": torch.full((3, 2), -1, dtype=torch.int32)}}, "ranks.*q_proj"),
        ({"paths": {"q_proj": "layers.0.q_proj"}}, "paths.*q_proj"),
    ],
)
def test_construction_errors(changes, message):
    AdapterStack(**arguments())
    with pytest.raises(ValueError, match=message):
        AdapterStack(**arguments(**changes))


def test_paths_have_defaults_for_known_names_only(make_stack):
    paths = make_stack({"q_proj": (8, 8), "up_proj": (8, 8)}).paths
    assert paths == {"q_proj": "model.layers.{layer}.self_attn.q_proj", "up_proj": "model.layers.{layer}.mlp.up_proj"}
    with pytest.raises(ValueError, match="paths.*'fc'"):
        make_stack({"fc": (8, 8)})


def test_indexing(make_stack):
    stack = make_stack(SHAPES)
    for i, one in enumerate(stack):
        assert len(one) == 1 and torch.equal(one.scaling, stack.scaling[i : i + 1])
        assert torch.equal(one.lora_A["q_proj"][0], stack.lora_A["q_proj"][i])
        assert torch.equal(one.lora_B["v_proj"][0], stack.lora_B["v_proj"][i])
    assert_same(stack[-1], stack[2])
    for index in (3, -4):
        with pytest.raises(IndexError, match=str(index)):
            stack[index]
    for index in (True, 0.0, slice(1)):
        with pytest.raises(TypeError, match="index"):
            stack[index]


def test_repr_and_size(make_stack):
    stack = make_stack(SHAPES, dtype=torch.bfloat16)
    text = repr(stack)
    assert "3 adapters" in text and "bfloat16" in text and "q_proj (2, 4, 8)/(12, 4)" in text
    assert stack.dtype == torch.bfloat16
    assert stack.num_parameters == 2 * 4 * (8 + 12 + 8 + 4)


def test_to(make_stack):
    stack = make_stack(SHAPES)
    half = stack.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.lora_B["v_proj"].dtype == torch.bfloat16
    assert half.scaling.dtype == torch.float32 and half.ranks["q_proj"].dtype == torch.int32
    assert half.paths == stack.paths and stack.dtype == torch.float32
    assert torch.equal(half.lora_A["q_proj"], stack.lora_A["q_proj"].bfloat16())
    assert stack.to("meta").lora_A["q_proj"].device.type == "meta"


def test_cat_pads_ranks_and_lacking_modules(make_stack):
    parts = [
        make_stack({"q_proj": (8, 12)}, num_adapters=2, rank=2),
        make_stack(SHAPES, num_adapters=1, rank=4, seed=1),
        make_stack({"v_proj": (8, 4)}, num_adapters=1, num_layers=1, rank=3, seed=2),
    ]
    stack = AdapterStack.cat(parts)
    assert len(stack) == 4 and list(stack.lora_A) == ["q_proj", "v_proj"]
    assert stack.lora_A["q_proj"].shape == (4, 2, 4, 8) and stack.lora_B["v_proj"].shape == (4, 2, 4, 4)
    assert stack.ranks["q_proj"].tolist() == [[2, 2], [2, 2], [4, 4], [0, 0]]
    assert stack.ranks["v_proj"].tolist() == [[0, 0], [0, 0], [4, 4], [3, 0]]
    for i, part in enumerate([parts[0][0], parts[0][1], parts[1], parts[2]]):
        assert_same(stack[i], part)


def test_cat_errors(make_stack):
    stack = make_stack(SHAPES)
    with pytest.raises(ValueError, match="stacks"):
        AdapterStack.cat([])
    for other, message in (
        (make_stack({"q_proj": (8, 16)}), "q_proj: expected in/out features 8/12.*got 8/16"),
        (make_stack({"q_proj": (8, 12)}, paths={"q_proj": "layers.{layer}.q_proj"}), "q_proj.*layers.{layer}.q_proj"),
        (stack.to(dtype=torch.bfloat16), "q_proj: expected torch.float32.*bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterStack.cat([stack, other])


# --- PEFT folders --------------------------------------------------------------------------------------------------


def test_peft_names(make_stack):
    stack = make_stack(SHAPES)
    state = stack.state_dict_peft(1)
    layers = [ATTENTION.format(layer) for layer in (0, 1)]
    sides = [f"{name}.lora_{side}.weight" for name in SHAPES for side in "AB"]
    assert sorted(state) == sorted(layer + side for layer in layers for side in sides)
    assert torch.equal(state[layers[1] + "q_proj.lora_B.weight"], stack.lora_B["q_proj"][1, 1])


def test_save_and_load_with_scaling_baked_in(make_stack, tmp_path):
    stack = make_stack(SHAPES)
    for i in range(3):
        stack.save_pretrained(tmp_path / str(i), adapter=i, base_model_name_or_path="some/model")
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == stack.scaling[2].item() * 4 and config["r"] == 4
    assert config["use_rslora"] is False and config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "some/model"
    again = AdapterStack.from_peft([tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    assert_same(again, stack)
    assert again.paths == stack.paths
    assert_same(AdapterStack.from_peft(str(tmp_path / "1")), stack[1])
    assert AdapterStack.from_peft([tmp_path / "1"], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_save_and_load_mixed_ranks_and_lacking_modules(make_stack, tmp_path):
    parts = [make_stack({"q_proj": (8, 12)}, num_adapters=1, rank=2), make_stack(SHAPES, num_adapters=1, seed=1)]
    stack = AdapterStack.cat(parts)
    stack.ranks["v_proj"][1, 0] = 3
    for i in range(2):
        stack.save_pretrained(tmp_path / str(i), adapter=i)
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.0.self_attn.v_proj": 3}
    again = AdapterStack.from_peft([tmp_path / "0", tmp_path / "1"])
    assert again.ranks["q_proj"].tolist() == [[2, 2], [4, 4]]
    assert again.ranks["v_proj"].tolist() == [[0, 0], [3, 4]]
    assert_same(again, stack)


def test_adapter_out_of_range_is_not_written(make_stack, tmp_path):
    with pytest.raises(IndexError):
        make_stack(SHAPES).save_pretrained(tmp_path / "out", adapter=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scaling", [0.0, float("nan"), float("inf")])
def test_scaling_no_consumer_understands_is_not_written(make_stack, tmp_path, scaling):
    stack = make_stack(SHAPES)
    stack.scaling[1] = scaling
    with pytest.raises(ValueError, match="scaling"):
        stack.save_pretrained(tmp_path / "out", adapter=1)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_nothing_is_not_written(make_stack, tmp_path):
    stack = make_stack(SHAPES)
    for ranks in stack.ranks.values():
        ranks[1] = 0
    with pytest.raises(ValueError, match="adapter 1"):
        stack.save_pretrained(tmp_path / "out", adapter=1)
    assert not (tmp_path / "out").exists()


def test_an_adapter_survives_a_failed_write(make_stack, tmp_path, monkeypatch):
    stack = make_stack(SHAPES)
    stack.save_pretrained(tmp_path, adapter=0)

    def full_disk(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            stack.save_pretrained(tmp_path, adapter=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same(AdapterStack.from_peft(tmp_path), stack[0])
    stack.save_pretrained(tmp_path, adapter=1)
    assert_same(AdapterStack.from_peft(tmp_path), stack[1])


def test_a_file_where_the_folder_should_be_stays(make_stack, tmp_path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(OSError):
        make_stack(SHAPES).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "notes"
