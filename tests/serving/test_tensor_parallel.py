"""Two ranks, each with its share of every linear, give one rank's answers.

Whole LoRA, compiled, and fully sharded, which vLLM does not compile; adapters of files and adapters that every rank makes,
more of them than slots, and after adapters that are refused.
"""

import copy
import itertools

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.testing import numerics
from tests.networks import HyperShape
from tests.serving import vllm_process

pytestmark = [pytest.mark.serving, pytest.mark.release, pytest.mark.timeout(0)]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
CALLS = [[0, None, 1, None], [2, 3, None, 4]]
TEXTS = ["Name the antonym.", "Count the words.", "Repeat the word."]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks(sharded, tiny_model, stack_for, make_stack, tmp_path):
    model = tiny_model("Llama", torch.bfloat16, **SIZES, tie_word_embeddings=False, initializer_range=0.1)
    ranks = [stack_for(model, MODULES, num_adapters=1, rank=rank, seed=rank) for rank in (8, 4)]
    stack = t2l.AdapterStack.cat(ranks).to(dtype=torch.bfloat16)
    folder = {name: str(tmp_path / name) for name in ("model", "checkpoint", "misfit", "0", "1")}
    model.save_pretrained(folder["model"])
    network = HyperShape("", 3, 128, 128, 64, embed_dim=384, latent_size=16, head_in_size=8).make()
    network.save_pretrained(folder["checkpoint"])
    make_stack({"q_proj": (128, 64)}, num_layers=3).save_pretrained(folder["misfit"])
    for i in range(2):
        stack.save_pretrained(folder[str(i)], i, dtype=torch.bfloat16)
    generated = t2l.TextToLoRA.from_pretrained(folder["checkpoint"]).generate(TEXTS).to(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in (5, 9, 16, 7)]
    flags = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2, "skip_tokenizer_init": True}
    flags["enforce_eager"] = sharded
    plan = {
        "model": folder["model"], "folders": [folder["0"], folder["1"]], "prompts": prompts, "calls": CALLS, "tokens": 1,
        "logprobs": 20, "llm": flags | {"tensor_parallel_size": 2, "fully_sharded_loras": sharded},
        "checkpoint": folder["checkpoint"], "texts": TEXTS, "refused": [folder["misfit"]] * 12,  # vLLM's queues hold less
    }  # fmt: skip
    made = vllm_process.llm(plan, {
        "T2L_VLLM_KERNELS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "T2L_VLLM_CHECKPOINT": folder["checkpoint"],
        "T2L_VLLM_MODE": "memory", "T2L_VLLM_STORE": str(tmp_path / "store"),
    })  # fmt: skip
    assert made["wrapper"] == "PunicaWrapperT2L" and len(made["refused"]) == 12
    assert all("q_proj: expected 128 -> 128 features" in text and text.endswith("got 128 -> 64") for text in made["refused"])
    models = {torch.bfloat16: model, torch.float64: copy.deepcopy(model).double()}
    for call, row in itertools.product(range(len(CALLS)), range(len(prompts))):
        adapter, shown = CALLS[call][row], made["logprobs"][call][row]
        of, first = (stack, 0) if adapter is None or adapter < len(stack) else (generated, len(stack))
        found = []
        for dtype, one in models.items():
            lora = t2l.attach(one, of.to(dtype=dtype))
            with lora.use([-1 if adapter is None else adapter - first]), torch.inference_mode():
                logits = one(torch.tensor([prompts[row]])).logits[0, -1].double()
            lora.detach()
            found.append(logits.log_softmax(-1)[[int(token) for token in shown]])
        other, exact = found
        got = torch.tensor(list(shown.values()), dtype=torch.float64)
        assert float((got - exact).norm()) <= numerics.logits_bound(exact, other.to(torch.bfloat16))
