import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from t2l_engine import AdapterStack

SHAPES = {"q_proj": (8, 12), "v_proj": (8, 4)}


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


@pytest.mark.parametrize(("changes", "message"), [
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
    ({"paths": {"q_proj": "layers.q_proj"}}, r"paths.*\{layer\}.*q_proj"),
    ({"paths": {"q_proj": "layers.0.{layer}.q_proj"}}, "paths.*names of letters"),
    ({"paths": {"q_proj": "{layer}.{layer}.q_proj"}}, "paths.*one layer index"),
    ({"paths": {"q_proj": "layers.{layer}"}}, "paths.*below the layer index"),
    ({"paths": {"q_proj": "layers.{layer.__class__}.q_proj"}}, "paths.*q_proj"),
    ({"paths": {"q_proj": "layers..{layer}.q_proj"}}, "paths.*names of letters"),
    ({"paths": {"q_proj": "x" * 300 + ".{layer}.q_proj"}}, "paths.*256"),
])  # fmt: skip
def test_construction_errors(changes, message):
    AdapterStack(**arguments())
    with pytest.raises(ValueError, match=message):
        AdapterStack(**arguments(**changes))


def test_paths(make_stack):
    """Known names have places in a decoder; a module outside the layers has one layer, and no two share a place."""
    paths = make_stack({"q_proj": (8, 8), "up_proj": (8, 8)}).paths
    assert paths == {"q_proj": "model.layers.{layer}.self_attn.q_proj", "up_proj": "model.layers.{layer}.mlp.up_proj"}
    with pytest.raises(ValueError, match="paths.*'fc'"):
        make_stack({"fc": (8, 8)})
    with pytest.raises(ValueError, match="paths.*'v_proj'.*of its own"):
        make_stack(SHAPES, paths=dict.fromkeys(SHAPES, "layers.{layer}.x"))
    head = {"shapes": {"lm_head": (8, 97)}, "paths": {"lm_head": "lm_head"}}
    state = make_stack(**head, num_layers=1).state_dict_peft(0)
    assert list(state) == [f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ValueError, match="paths.*lm_head"):
        make_stack(**head, num_layers=2)


def test_indexing(make_stack):
    stack = make_stack(SHAPES)
    for i, one in enumerate(stack):
        assert len(one) == 1 and torch.equal(one.scaling, stack.scaling[i : i + 1])
        assert torch.equal(one.lora_A["q_proj"][0], stack.lora_A["q_proj"][i])
        assert torch.equal(one.lora_B["v_proj"][0], stack.lora_B["v_proj"][i])
    assert_same(stack[-1], stack[2])
    for index in (3, -4, [0, 3]):
        with pytest.raises(IndexError, match=r"3|-4"):
            stack[index]
    for index in (True, 0.0, "0", [True], [0.0], None):
        with pytest.raises(TypeError, match="index"):
            stack[index]


def test_choosing_several(make_stack):
    stack = make_stack(SHAPES, partial=True)
    for index, expected in (
        (slice(1, 3), [1, 2]), (slice(None, None, 2), [0, 2]), ([2, 0, 2], [2, 0, 2]), ((-1,), [2]), (range(2), [0, 1]),
        (slice(3, None), []), ([], []),
    ):  # fmt: skip
        chosen = stack[index]
        assert len(chosen) == len(expected) and chosen.partial and chosen.paths == stack.paths
        for got, i in zip(chosen, expected, strict=True):
            assert_same(got, stack[i])
    assert stack[[0, 2]].lora_B["q_proj"].mT.is_contiguous()  # rank rows stay together, as the kernels like them
    one, part, copied = stack[1], stack[1:], stack[[1]]  # an int or a slice is a view
    stack.lora_A["q_proj"][1] = 7
    assert one.lora_A["q_proj"].eq(7).all() and part.lora_A["q_proj"][0].eq(7).all()
    assert not copied.lora_A["q_proj"].eq(7).any()


def test_copies(make_stack):
    stack = make_stack(SHAPES, partial=True)
    for again in (copy.copy(stack), copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert again.partial and again.paths == stack.paths and again.allclose(stack)
        assert again.lora_B["q_proj"].stride() == stack.lora_B["q_proj"].stride()
    half = stack.to(dtype=torch.bfloat16)
    assert half.partial and half.paths == stack.paths and half.dtype == torch.bfloat16 and stack.dtype == torch.float32
    assert half.scaling.dtype == torch.float32 and half.ranks["q_proj"].dtype == torch.int32
    assert torch.equal(half.lora_A["q_proj"], stack.lora_A["q_proj"].bfloat16())
    assert stack.to("meta").lora_A["q_proj"].device.type == "meta"


def test_repr_and_size(make_stack):
    stack = make_stack(SHAPES, dtype=torch.bfloat16)
    stack.ranks["v_proj"][0, 0] = 2
    text = repr(stack)
    assert text == (
        "AdapterStack(3 adapters, rank 2 to 4, scaling 0.5 to 2, bfloat16, cpu; "
        "modules in->out x layers: q_proj 8->12 x2, v_proj 8->4 x2)"
    )
    assert stack.dtype == torch.bfloat16
    assert stack.num_parameters == 2 * 4 * (8 + 12 + 8 + 4)
    assert "meta" in repr(stack.to("meta")) and "0 adapters" in repr(stack[:0])
    many = {f"m{i}": (8, 8) for i in range(50)}
    text = repr(make_stack(many, paths={name: f"layers.{{layer}}.{name}" for name in many}, partial=True))
    assert "partial" in text and "42 more" in text and len(text) < 400


def test_cat_pads_ranks_and_lacking_modules(make_stack):
    parts = [
        make_stack({"q_proj": (8, 12)}, num_adapters=2, rank=2),
        make_stack(SHAPES, num_adapters=1, rank=4, seed=1),
        make_stack({"v_proj": (8, 4)}, num_adapters=1, num_layers=1, rank=3, seed=2, partial=True),
    ]
    stack = AdapterStack.cat(parts)
    assert not stack.partial
    assert len(stack) == 4 and list(stack.lora_A) == ["q_proj", "v_proj"]
    assert stack.lora_A["q_proj"].shape == (4, 2, 4, 8) and stack.lora_B["v_proj"].shape == (4, 2, 4, 4)
    assert stack.ranks["q_proj"].tolist() == [[2, 2], [2, 2], [4, 4], [0, 0]]
    assert stack.ranks["v_proj"].tolist() == [[0, 0], [0, 0], [4, 4], [3, 0]]
    for i, part in enumerate([parts[0][0], parts[0][1], parts[1], parts[2]]):
        assert_same(stack[i], part)


def test_cat_knows_how_deep_the_model_is(make_stack):
    def stack(num_layers, partial, seed=0):
        return make_stack({"q_proj": (8, 12)}, num_adapters=1, num_layers=num_layers, partial=partial, seed=seed)

    both = AdapterStack.cat([stack(1, True), stack(3, True)])
    assert both.partial and both.lora_A["q_proj"].shape[1] == 3
    mixed = AdapterStack.cat([stack(1, True), stack(3, False)])
    assert not mixed.partial and mixed.ranks["q_proj"].tolist() == [[4, 0, 0], [4, 4, 4]]
    for parts in ((stack(2, False), stack(3, False)), (stack(3, True), stack(2, False))):
        for order in (parts, parts[::-1]):
            with pytest.raises(ValueError, match=r"stacks: expected . layers at model\.layers\.\{layer\}, got"):
                AdapterStack.cat(order)
    # Other modules of a complete stack reach its depth too, and another list of layers has its own.
    other = make_stack({"v_proj": (8, 4)}, num_adapters=1, num_layers=3)
    assert AdapterStack.cat([stack(1, True), other]).lora_A["q_proj"].shape[1] == 3
    tower = make_stack({"fc": (8, 4)}, num_adapters=1, num_layers=5, paths={"fc": "vision.blocks.{layer}.fc"})
    head = make_stack({"lm_head": (8, 9)}, num_adapters=1, num_layers=1, paths={"lm_head": "lm_head"})
    wide = AdapterStack.cat([other, tower, head])
    assert {name: a.shape[1] for name, a in wide.lora_A.items()} == {"v_proj": 3, "fc": 5, "lm_head": 1}


def test_allclose_compares_what_adapters_mean(make_stack):
    stack = make_stack(SHAPES)
    padding = make_stack({"o_proj": (8, 8)}, num_adapters=1, num_layers=3, rank=6, partial=False)
    padded = AdapterStack.cat([*(make_stack(SHAPES, partial=True)), padding, make_stack(SHAPES, num_layers=3, rank=6)])[:3]
    assert padded.lora_A["q_proj"].shape == (3, 3, 6, 8)
    padded.lora_A["q_proj"][:, :, 4:] = float("nan")  # beyond the rank: means nothing
    padded.lora_B["q_proj"][:, 2] = float("nan")
    assert stack.allclose(padded) and padded.allclose(stack)
    assert stack.allclose(stack.to(dtype=torch.float64))
    assert not stack.allclose(stack.to(dtype=torch.bfloat16)) and stack.allclose(stack.to(dtype=torch.bfloat16), rtol=0.01)
    assert not stack.allclose(stack[:2]) and not stack.allclose(stack[[0, 2, 1]])


def test_allclose_knows_modules_by_their_paths(make_stack):
    """A module's name depends on what else was read with it (GPT-2 has two c_proj)."""
    path = "transformer.h.{layer}.attn.c_proj"
    short, long = (make_stack({name: (8, 8)}, paths={name: path}) for name in ("c_proj", "attn.c_proj"))
    other = make_stack({"c_proj": (8, 8)}, paths={"c_proj": "transformer.h.{layer}.mlp.c_proj"})
    assert short.allclose(long) and long.allclose(short)
    assert not short.allclose(other) and not other.allclose(long)
    both = make_stack(SHAPES)
    for shapes in ({"q_proj": (8, 12)}, {"q_proj": (8, 12), "v_proj": (9, 4)}, {"q_proj": (8, 12), "k_proj": (8, 4)}):
        assert not both.allclose(make_stack(shapes)) and not make_stack(shapes).allclose(both)


@pytest.mark.parametrize("change", [
    lambda s: s.scaling.mul_(1.001),
    lambda s: s.lora_A["q_proj"][1, 1, 3, 7].add_(0.001),
    lambda s: s.lora_B["v_proj"][2, 0, 3, 3].add_(0.001),
    lambda s: s.ranks["q_proj"][0, 1].fill_(3),
    lambda s: s.ranks["v_proj"].fill_(0),
    lambda s: s.paths.update(q_proj="layers.{layer}.q_proj"),
])  # fmt: skip
def test_allclose_sees_every_difference(make_stack, change):
    stack, other = make_stack(SHAPES), make_stack(SHAPES)
    assert stack.allclose(other)
    change(other)
    assert not stack.allclose(other) and not other.allclose(stack)


def test_zero_padded(make_stack):
    ranks = {"q_proj": torch.tensor([[2, 4], [3, 1]], dtype=torch.int32)}
    stack = make_stack({"q_proj": (6, 10)}, num_adapters=2, ranks=ranks)
    clean = stack.zero_padded()
    assert clean.allclose(stack)
    for i, layer in itertools.product(range(2), range(2)):
        r = int(ranks["q_proj"][i, layer])
        assert not clean.lora_A["q_proj"][i, layer, r:].any() and not clean.lora_B["q_proj"][i, layer, :, r:].any()


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


def set_ranks(stack):
    for ranks in stack.ranks.values():
        ranks[1] = 0


@pytest.mark.parametrize("change, message", [
    (set_ranks, "adapter 1: expected one that adapts a module"),
    (lambda s: s.scaling.fill_(0.0), "scaling: expected a positive number"),
    (lambda s: s.scaling.fill_(float("nan")), "scaling: expected a positive number|NaN or infinite"),
    (lambda s: s.scaling.fill_(float("inf")), "scaling: expected a positive number|NaN or infinite"),
    (lambda s: s.lora_B["v_proj"][1, 0, 0, 0].fill_(float("nan")), r"layers\.0\.self_attn\.v_proj.*NaN"),
    (lambda s: s.lora_B["v_proj"][1, 1].fill_(2e5), r"layers\.1\.self_attn\.v_proj\.lora_B.*range of torch.float16"),
])  # fmt: skip
def test_what_no_reader_understands_is_not_written(make_stack, tmp_path, change, message):
    stack = make_stack(SHAPES)
    stack.save_pretrained(tmp_path / "good", adapter=1, dtype=torch.float16)
    change(stack)
    for fold in (False, True):
        with pytest.raises(ValueError, match=message):
            stack.save_pretrained(tmp_path / "out", adapter=1, dtype=torch.float16, fold=fold)
    assert not (tmp_path / "out").exists()


def test_adapter_out_of_range_is_not_written(make_stack, tmp_path):
    stack = make_stack(SHAPES)
    for write in (lambda: stack.save_pretrained(tmp_path / "out", adapter=3), lambda: stack.peft_config(3)):
        with pytest.raises(IndexError):
            write()
    with pytest.raises(TypeError, match="index"):
        stack.state_dict_peft(slice(2))
    (tmp_path / "file").write_text("notes")
    with pytest.raises(OSError):
        stack.save_pretrained(tmp_path / "file")
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "notes"


def test_an_adapter_survives_a_failed_write(make_stack, tmp_path, monkeypatch):
    stack = make_stack(SHAPES)
    stack.save_pretrained(tmp_path, adapter=0)

    def full_disk(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="cannot be written: I/O error: No space left on device"):
            stack.save_pretrained(tmp_path, adapter=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same(AdapterStack.from_peft(tmp_path), stack[0])
    stack.save_pretrained(tmp_path, adapter=1)
    assert_same(AdapterStack.from_peft(tmp_path), stack[1])
