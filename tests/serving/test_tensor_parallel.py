"""Two ranks, each with its share of every linear, give one rank's answers: whole and fully sharded LoRA, adapters of files
and adapters that every rank makes, more of them than slots, and after adapters that are refused."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2l_engine as t2l
from t2l_engine.adapters.paths import DEFAULT_PATHS
from t2l_engine.testing import numerics
from tests.serving import vllm_process

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CALLS = [[0, None, 1, None], [2, 3, None, 4]]
TEXTS = ["Name the antonym.", "Count the words.", "Repeat the word."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(Folder of a random model whose heads two ranks can share, the model in bfloat16)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """(Stack of two random adapters of all linears, of ranks 8 and 4; their PEFT folders)."""
    torch.manual_seed(1)
    linears = dict(model[1].named_modules())
    stacks = []
    for rank in (8, 4):
        lora_A, lora_B = {}, {}
        for name in MODULES:
            linear = linears[DEFAULT_PATHS[name].format(layer=0)]
            lora_A[name] = torch.randn(1, 3, rank, linear.in_features) * linear.in_features**-0.5
            lora_B[name] = torch.randn(1, 3, linear.out_features, rank) * 0.1
        stacks.append(t2l.AdapterStack(lora_A, lora_B, torch.ones(1)))
    stack = t2l.AdapterStack.cat(stacks).to(dtype=torch.bfloat16)
    folders = [tmp_path_factory.mktemp("adapter") for _ in stacks]
    for i, folder in enumerate(folders):
        stack.save_pretrained(folder, i, dtype=torch.bfloat16)
    return stack, [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """(Folder of a random checkpoint for the model, the adapters of TEXTS.)"""
    torch.manual_seed(3)
    config = t2l.HyperNetworkConfig(
        variant="L", modules=("q_proj", "v_proj"), in_features=(128, 128), out_features=(128, 64), num_layers=3, rank=4,
        embed_dim=384, latent_size=16, head_in_size=8, lora_alpha=8.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    t2l.HyperNetwork(config).save_pretrained(folder)
    return folder, t2l.TextToLoRA.from_pretrained(folder).generate(TEXTS).to(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def misfit(tmp_path_factory):
    """The PEFT folder of an adapter of another model: q_proj has half of the outputs."""
    folder = tmp_path_factory.mktemp("misfit")
    t2l.AdapterStack(
        {"q_proj": torch.ones(1, 3, 4, 128)}, {"q_proj": torch.ones(1, 3, 64, 4)}, torch.ones(1)
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks(sharded, model, adapters, checkpoint, misfit, tmp_path):
    (folder, small), (stack, folders), (made_by, generated) = model, adapters, checkpoint
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in (5, 9, 16, 7)]
    flags = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2, "skip_tokenizer_init": True}
    plan = {
        "model": str(folder), "folders": folders, "prompts": prompts, "calls": CALLS, "tokens": 1, "logprobs": 20,
        "llm": flags | {"tensor_parallel_size": 2, "fully_sharded_loras": sharded},
        "checkpoint": str(made_by), "texts": TEXTS, "refused": [misfit] * 12,  # more than vLLM's queues hold
    }  # fmt: skip
    environment = {
        "T2L_VLLM_KERNELS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "T2L_VLLM_CHECKPOINT": str(made_by),
        "T2L_VLLM_MODE": "memory", "T2L_VLLM_STORE": str(tmp_path),
    }  # fmt: skip
    made = vllm_process.llm(plan, environment)
    assert made["wrapper"] == "PunicaWrapperT2L"
    assert len(made["refused"]) == 12
    assert all("q_proj: expected 128 -> 128 features" in text and text.endswith("got 128 -> 64") for text in made["refused"])
    wide = LlamaForCausalLM(small.config).double().eval()
    wide.load_state_dict({name: value.double() for name, value in small.state_dict().items()})
    for call, row in itertools.product(range(len(CALLS)), range(len(prompts))):
        adapter, shown = CALLS[call][row], made["logprobs"][call][row]
        of, first = (stack, 0) if adapter is None or adapter < len(stack) else (generated, len(stack))
        found = []
        for dtype, one in ((torch.bfloat16, small), (torch.float64, wide)):
            lora = t2l.attach(one, of.to(dtype=dtype))
            with lora.use([-1 if adapter is None else adapter - first]), torch.inference_mode():
                logits = one(torch.tensor([prompts[row]])).logits[0, -1].double()
            lora.detach()
            found.append(logits.log_softmax(-1)[[int(token) for token in shown]])
        other, exact = found
        got = torch.tensor(list(shown.values()), dtype=torch.float64)
        assert float((got - exact).norm()) <= numerics.logits_bound(exact, other.to(torch.bfloat16))
