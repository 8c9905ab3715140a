"""Adapters without weight files: the bits of disk mode, whatever made the adapter, and only of the worker's checkpoints."""

import asyncio
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import t2l_engine as t2l
from t2l_engine.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from t2l_engine.serving import checkpoints
from t2l_engine.serving.vllm import memory
from t2l_engine.serving.vllm.generator import Generator
from tests.networks import HyperShape

TEXTS = ["Return the last element of the list.", "Name the antonym of the word.", "Repeat the word twice."]


def folders(settings, texts=TEXTS):
    async def run():
        return await asyncio.gather(*(generator.folder(None, text) for text in texts))

    generator = Generator(settings)
    return asyncio.run(run())


def test_both_modes_give_the_same_bits(settings, loaded):
    """Those of the engine, the scaling in B."""
    on_disk, without = folders(settings()), folders(settings(mode="memory"))
    for text, disk, other in zip(TEXTS, on_disk, without, strict=True):
        assert memory.is_memory(other) and not memory.is_memory(disk) and other.name == disk.name + ".memory"
        assert not (other / WEIGHTS_NAME).exists() and sum(path.stat().st_size for path in other.iterdir()) < 4096
        config = json.loads((other / CONFIG_NAME).read_text())
        assert config == json.loads((disk / CONFIG_NAME).read_text()) and config["lora_alpha"] == config["r"] == 8
        stored = load_file(disk / WEIGHTS_NAME)
        expected = loaded.engine.generate([text]).state_dict_peft(0, dtype=torch.bfloat16, fold=True)
        assert {path.name for path in disk.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME} and stored.keys() == expected.keys()
        assert all(torch.allclose(stored[key], expected[key], rtol=2**-6, atol=1e-5) for key in stored)
        for dtype in (torch.bfloat16, torch.float32):
            made = memory.peft_tensors(other, settings(), dtype)
            assert made.keys() == stored.keys()
            assert all(torch.equal(made[key], stored[key].to(dtype)) and made[key].dtype == dtype for key in stored)


@pytest.mark.parametrize("text, rank", [("drug", 8), ("name the capital of a country .", 16)])
def test_a_document_in_both_modes(settings, reads_documents, text, rank):
    """The bits that the engine makes on one thread; chunks and bias follow each other along the rank."""
    here = settings(checkpoints={"documents": reads_documents})
    (disk,), (other,) = folders(here, [text]), folders(dataclasses.replace(here, mode="memory"), [text])
    config = json.loads((other / CONFIG_NAME).read_text())
    assert config == json.loads((disk / CONFIG_NAME).read_text()) and config["lora_alpha"] == config["r"] == rank
    stored, made = load_file(disk / WEIGHTS_NAME), memory.peft_tensors(other, here, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        stack = t2l.TextToLoRA.from_pretrained(reads_documents).generate([text])
    finally:
        torch.set_num_threads(threads)
    expected = stack.state_dict_peft(0, dtype=torch.bfloat16, fold=True)
    assert stored.keys() == made.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) and torch.equal(made[key], expected[key]) for key in stored)
    save_file({"task_emb": torch.ones(1, 4, 1, 3, 24)}, other / "task_emb.safetensors")
    with pytest.raises(ValueError, match=r"task_emb.safetensors: latents: expected \[chunks, 4, 1, 4, 24\] on cpu, got"):
        memory.peft_tensors(other, here, torch.bfloat16)


def test_each_call_gives_new_tensors(settings, loaded):
    """vLLM multiplies B in place, each time it loads an adapter."""
    (folder,) = folders(settings(mode="memory"), TEXTS[:1])
    first = memory.peft_tensors(folder, settings(), torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in first.items()}
    memory._load.cache_clear()
    with torch.inference_mode():
        again = memory.peft_tensors(folder, settings(), torch.bfloat16)
    for tensor in first.values():
        tensor.zero_()
    for key, tensor in again.items():
        assert torch.equal(tensor, before[key])
        tensor.mul_(2)  # refused for an inference tensor
    assert memory._load.cache_info().currsize == 1


def test_an_adapter_has_the_same_bits_with_any_number_of_threads(monkeypatch):
    """In float32, where no rounding hides a difference of the task encoder, whose product depends on threads.

    vLLM's workers on CPUs replace the function that sets their number.
    """
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("replaced"))
    shape = HyperShape("tiny", 2, 64, 64, 64, embed_dim=384, latent_size=128, head_in_size=32, rank=4)
    net, task_emb = shape.make(), shape.task_embeddings(16)
    threads = torch.get_num_threads()
    encoded, made = [], []
    try:
        for number in (1, 2, 3, 4, 5, 7):
            torch._C.set_num_threads(number)
            encoded.append(torch.cat([net.task_encoder(row[None]) for row in task_emb]))
            made.append([checkpoints.adapter(net, row) for row in task_emb])
            assert torch.get_num_threads() == number
    finally:
        torch._C.set_num_threads(threads)
    for stacks in made[1:]:
        for found, expected in zip(stacks, made[0], strict=True):
            assert torch.equal(found.lora_A["q_proj"], expected.lora_A["q_proj"])
            assert torch.equal(found.lora_B["q_proj"], expected.lora_B["q_proj"])
    if all(torch.equal(z, encoded[0]) for z in encoded):
        pytest.skip("equal as they must be, but torch's product does not depend on threads here")


def test_only_a_checkpoint_of_the_worker_is_used(settings, loaded, changed):
    (folder,) = folders(settings(mode="memory"), TEXTS[:1])
    other = settings(checkpoints={"smollm2-135m-paper": changed})
    with pytest.raises(ValueError, match="checkpoint: expected that of the adapter, sha256 [0-9a-f]{16}, among"):
        memory.peft_tensors(folder, other, torch.bfloat16)
    both = settings(checkpoints={"changed": changed, "here": "smollm2-135m-paper"})
    assert memory.peft_tensors(folder, both, torch.bfloat16), "by its contents, whatever its name"


@pytest.mark.parametrize("content, message", [
    (b"[]", "t2l.json: expected an object with the sha256"),
    (b'{"sha256": 3}', "t2l.json: expected an object with the sha256"),
    (b"{", "t2l.json: not valid JSON"),
    ({"task_emb": torch.ones(3)}, r"task_emb.safetensors: task_emb: expected a tensor \[N, 384\], got shape \(1, 3\)"),
    ({"task_emb": torch.ones(384).double()}, "task_emb.safetensors: expected task_emb in float32"),
    ({"other": torch.ones(384)}, "task_emb.safetensors: expected task_emb in float32"),
    ({"task_emb": torch.full((384,), torch.nan)}, "task_emb.safetensors: .*holds NaN or infinite values"),
])  # fmt: skip
def test_broken_folders_are_refused(settings, loaded, content, message):
    (folder,) = folders(settings(mode="memory"), TEXTS[:1])
    if isinstance(content, bytes):
        (folder / "t2l.json").write_bytes(content)
    else:
        save_file(content, folder / "task_emb.safetensors")
    with pytest.raises(ValueError, match=message):
        memory.peft_tensors(folder, settings(), torch.bfloat16)
