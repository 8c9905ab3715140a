"""Adapters as GGUF files: what is in them, in which order, and what is refused; tests/llamacpp has llama.cpp run them."""

import re
import types

import gguf
import numpy as np
import pytest
import torch

import t2l_engine as t2l
from bench.records import ROOT

CONFIG = types.SimpleNamespace(
    model_type="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32
)
SHAPES = {"q_proj": (32, 32), "k_proj": (32, 16), "down_proj": (48, 32)}


def config(**changes):
    return types.SimpleNamespace(**vars(CONFIG) | changes)


def read(file):
    """Fields by name, and tensors as float32 by name."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors
    }
    return fields, tensors


@pytest.fixture
def stack(make_stack):
    return make_stack(SHAPES, num_adapters=2, num_layers=2, rank=4)


def test_what_is_in_a_file(stack, tmp_path):
    file = tmp_path / "new" / "a.gguf"
    stack.save_gguf(file, 1, config=CONFIG, description="Say \u201ehallo\u201c.", prompt_prefix="P ")
    fields, tensors = read(file)
    known = {name: value for name, value in fields.items() if not name.startswith("GGUF.")}
    assert known == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "general.file_type": 0,
        "adapter.lora.alpha": pytest.approx(4 * float(stack.scaling[1])), "general.name": "Say \u201ehallo\u201c.",
        "adapter.lora.task_name": "Say \u201ehallo\u201c.", "adapter.lora.prompt_prefix": "P ",
    }  # fmt: skip
    paths = {"attn_q": "q_proj", "attn_k": "k_proj", "ffn_down": "down_proj"}
    names = {f"blk.{layer}.{path}.weight.lora_{side}" for layer in range(2) for path in paths for side in "ab"}
    assert set(tensors) == names
    for layer in range(2):
        for path, module in paths.items():
            A, B = (tensors[f"blk.{layer}.{path}.weight.lora_{side}"] for side in "ab")
            assert torch.equal(A, stack.lora_A[module][1, layer])
            rows = torch.arange(len(B))
            heads = {"attn_q": 4, "attn_k": 2}.get(path)
            if heads:  # row 2i + s of a head is row s * size / 2 + i of ours
                size = len(B) // heads
                head, within = rows // size, rows % size
                rows = head * size + within % 2 * (size // 2) + within // 2
            assert torch.equal(B, stack.lora_B[module][1, layer][rows])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2"])
def test_other_architectures_keep_their_rows(stack, tmp_path, kind):
    stack.save_gguf(tmp_path / "a.gguf", config=config(model_type=kind))
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.architecture"] == kind and "adapter.lora.task_name" not in fields
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_b"], stack.lora_B["q_proj"][0, 1])


def test_ranks_that_differ_have_one_alpha(make_stack, tmp_path):
    """A reader scales each tensor by alpha over its own rank, which may be below that of the stack."""
    small, large = make_stack({"v_proj": (8, 6)}, num_layers=2, rank=2), make_stack({"o_proj": (6, 8)}, num_layers=2, rank=4)
    stack = t2l.AdapterStack(
        small.lora_A | large.lora_A, small.lora_B | large.lora_B, small.scaling, small.ranks | large.ranks
    )
    wider = make_stack({"v_proj": (8, 6), "o_proj": (6, 8)}, num_adapters=1, num_layers=2, rank=6)
    t2l.AdapterStack.cat([stack, wider]).save_gguf(tmp_path / "a.gguf", config=CONFIG)
    fields, tensors = read(tmp_path / "a.gguf")
    for name, module, rank in (("attn_v", "v_proj", 2), ("attn_output", "o_proj", 4)):
        A, B = (tensors[f"blk.0.{name}.weight.lora_{side}"] for side in "ab")
        assert A.shape[0] == B.shape[1] == rank
        expected = float(stack.scaling[0]) * stack.lora_B[module][0, 0] @ stack.lora_A[module][0, 0]
        torch.testing.assert_close(fields["adapter.lora.alpha"] / rank * B @ A, expected)


@pytest.mark.parametrize("dtype, file_type", [(torch.float16, 1), (torch.bfloat16, 32)])
def test_16_bits(stack, tmp_path, dtype, file_type):
    stack.save_gguf(tmp_path / "a.gguf", config=CONFIG, dtype=dtype)
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.file_type"] == file_type
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], stack.lora_B["down_proj"][0, 0].to(dtype).float())


@pytest.mark.parametrize("changes, match", [
    ({"config": config(model_type="gpt2")}, "config: expected a base model of type llama, .*, got 'gpt2'"),
    ({"config": types.SimpleNamespace()}, "config: expected a base model of type llama"),
    ({"config": config(head_dim=4)}, "q_proj': expected 4 heads of 4 rows, got 32 rows"),
    ({"config": config(num_hidden_layers=1)}, "'model.layers.1.self_attn.q_proj': no tensor of GGUF files of architecture"),
    ({"dtype": torch.float64}, "dtype: expected one of .*, got torch.float64"),
])  # fmt: skip
def test_what_is_refused(stack, tmp_path, changes, match):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match=match):
        stack.save_gguf(file, **{"config": CONFIG} | changes)
    assert file.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("scaling", [0.0, float("inf"), float("nan")])
def test_scalings_that_readers_would_take_for_another(stack, tmp_path, scaling):
    """An alpha of 0 means a scale of 1 to llama.cpp."""
    stack.scaling[0] = scaling
    with pytest.raises(ValueError, match="scaling: expected a positive number"):
        stack.save_gguf(tmp_path / "a.gguf", config=CONFIG)


def test_an_output_layer_that_the_file_lacks(tmp_path):
    """Tied to the embedding, it is no tensor of its own."""
    A, B = torch.ones(1, 1, 2, 32), torch.ones(1, 1, 9, 2)
    stack = t2l.AdapterStack({"lm_head": A}, {"lm_head": B}, torch.ones(1), paths={"lm_head": "lm_head"})
    stack.save_gguf(tmp_path / "a.gguf", config=config(tie_word_embeddings=False))
    assert set(read(tmp_path / "a.gguf")[1]) == {"output.weight.lora_a", "output.weight.lora_b"}
    with pytest.raises(ValueError, match="'lm_head': no tensor of GGUF files"):
        stack.save_gguf(tmp_path / "a.gguf", config=config(tie_word_embeddings=True))


@pytest.mark.parametrize("value, what", [(1e6, "exceed the range of"), (1e-8, "are too small for")])
def test_values_that_float16_does_not_hold(stack, tmp_path, value, what):
    """Values that are too small would leave an adapter that does nothing; bfloat16 holds all of these."""
    stack.lora_B["q_proj"].fill_(value)
    with pytest.raises(ValueError, match=f"blk.0.attn_q.weight.lora_b: holds values that {what} torch.float16"):
        stack.save_gguf(tmp_path / "a.gguf", config=CONFIG, dtype=torch.float16)
    stack.save_gguf(tmp_path / "a.gguf", config=CONFIG, dtype=torch.bfloat16)
    stack.lora_B["q_proj"].zero_()
    stack.save_gguf(tmp_path / "a.gguf", config=CONFIG, dtype=torch.float16)


def test_the_program_of_llama_cpp_md(stack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "llama-cpp.md").read_text(encoding="utf-8"), re.S)
    exec(program, {"stack": stack, "model": types.SimpleNamespace(config=CONFIG)})
    assert read(tmp_path / "antonym.gguf")[0]["adapter.lora.task_name"] == "Give the antonym of the word."


def test_without_the_package(stack, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="gguf"):
        stack.save_gguf(tmp_path / "a.gguf", config=CONFIG)
