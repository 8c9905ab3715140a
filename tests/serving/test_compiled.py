"""vLLM compiles a model with our LoRA ops once: batches, slots and adapters change, and answers are right."""

import copy

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.testing import numerics
from tests.serving import vllm_process

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]
MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
    "max_position_embeddings": 256,
}  # fmt: skip
ADAPTERS, SLOTS, TOKENS = 200, 8, 3
ROWS = (1, 64, 5, 64, 33, 64, 2, 48)


def test_nothing_is_compiled_again_while_adapters_come_and_go(tiny_model, stack_for, tmp_path):
    """200 adapters pass 8 slots in batches of 1 to 64 rows, every fifth of the base model, with the prefix cache on."""
    model = tiny_model("Llama", torch.bfloat16, **SIZES, tie_word_embeddings=False, initializer_range=0.1)
    stack = stack_for(model, MODULES, num_adapters=ADAPTERS, rank=8, seed=1).to(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    folders = [str(tmp_path / str(i)) for i in range(ADAPTERS)]
    for i, folder in enumerate(folders):
        stack.save_pretrained(folder, i, dtype=torch.bfloat16)
    numbers = [None if i % 5 == 4 else i % ADAPTERS for i in range(sum(ROWS))]
    calls = [numbers[sum(ROWS[:i]) :][:rows] for i, rows in enumerate(ROWS)]
    prompts = torch.randint(512, (3, 130), generator=torch.Generator().manual_seed(2))  # more than a block of the cache
    prompts = prompts[torch.arange(64) % 3]
    flags = {
        "enable_lora": True, "max_lora_rank": 8, "max_loras": SLOTS, "max_cpu_loras": SLOTS, "lora_target_modules": MODULES,
        "skip_tokenizer_init": True, "enforce_eager": False, "enable_prefix_caching": True, "max_model_len": 256,
    }  # fmt: skip
    plan = {
        "model": str(tmp_path / "model"), "folders": folders, "prompts": prompts.tolist(), "calls": calls, "llm": flags,
        "tokens": TOKENS, "logprobs": 20,
    }  # fmt: skip
    made = vllm_process.llm(plan, {"T2L_VLLM_KERNELS": "1", "VLLM_CACHE_ROOT": str(tmp_path / "cache")})
    assert made["wrapper"] == "PunicaWrapperT2L"
    assert made["frames"][0] > 0 and made["frames"] == made["frames"][:1] * len(ROWS)
    wide = copy.deepcopy(model).double()
    with torch.inference_mode():
        plain = wide(prompts).logits[:, -1].log_softmax(-1)
    for call, shown in zip(calls, made["logprobs"], strict=True):
        found = []
        for one in (model, wide):
            lora = t2l.attach(one, stack.to(dtype=one.dtype))
            with lora.use([-1 if i is None else i for i in call]), torch.inference_mode():
                found.append(one(prompts[: len(call)]).logits[:, -1].double().log_softmax(-1))
            lora.detach()
        for i, got, other, exact, base in zip(call, shown, *found, plain[: len(call)], strict=True):
            at, values = [int(token) for token in got], torch.tensor(list(got.values()), dtype=torch.float64)
            bound = numerics.logits_bound(exact[at], other[at].to(torch.bfloat16))
            assert float((values - exact[at]).norm()) <= bound
            assert i is None or float((values - base[at]).norm()) > bound
