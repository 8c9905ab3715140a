"""Adapters in GGUF files, run by llama.cpp: its logits beside transformers with the same adapter attached."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import t2l_engine as t2l
from examples import demo
from t2l_engine.text import packaged
from tests.llamacpp.running import LlamaCpp, write_base

pytestmark = pytest.mark.llama_cpp

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
#: Type of base model -> what its tiny one has beside SIZES.
TYPES = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
}  # fmt: skip


def adapters(model, modules, ranks=(4, 4), seed=0):
    """One adapter; of the layers, the middle one has the second rank."""
    generator = torch.Generator().manual_seed(seed)
    layers, most = model.config.num_hidden_layers, max(ranks)
    A, B, of = {}, {}, {}
    for name in modules:
        linear = next(m for path, m in model.named_modules() if path.endswith(name))
        A[name] = torch.randn(1, layers, most, linear.in_features, generator=generator) / linear.in_features**0.5
        B[name] = torch.randn(1, layers, linear.out_features, most, generator=generator) / most**0.5
        of[name] = torch.tensor([[ranks[layer % 2] for layer in range(layers)]], dtype=torch.int32)
        for layer, rank in enumerate(of[name][0].tolist()):
            A[name][:, layer, rank:], B[name][:, layer, :, rank:] = 0, 0
    return t2l.AdapterStack(A, B, torch.tensor([0.5]), of)


def model_of(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | TYPES[kind], attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    if kind.startswith("qwen"):  # norms and biases that are not 1 and 0
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) / 10)
    return model


@pytest.fixture(params=TYPES)
def both(request, tmp_path):
    """A tiny model in transformers and in llama.cpp."""
    model = model_of(request.param)
    served = LlamaCpp(write_base(model, tmp_path / "base.gguf"))
    yield model, served
    served.close()


def prompts(vocabulary, count=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (5 + i,), generator=generator).tolist() for i in range(count)]


def apart(model, served):
    """Largest difference of logits over the prompts, and the largest logit."""
    errors, size = [], 0.0
    with torch.inference_mode():
        for ids in prompts(model.config.vocab_size):
            expected = model(input_ids=torch.tensor([ids])).logits[0].float()
            errors.append(float((served.logits(ids) - expected).abs().max()))
            size = max(size, float(expected.abs().max()))
    return max(errors), size


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), LINEARS], ids=["q,v", "all linears"])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)], ids=["one rank", "two ranks"])
def test_logits(both, tmp_path, modules, ranks):
    model, served = both
    alone, size = apart(model, served)
    assert alone <= (1e-3 if model.config.model_type == "gemma2" else 1e-4) * size  # its GELU is a table of float16
    stack = adapters(model, modules, ranks)
    stack.save_gguf(tmp_path / "adapter.gguf", config=model.config, description="Do it.")
    handle = t2l.attach(model, stack)
    handle.set(0)
    without, _ = apart(model, served)
    with served.adapted(tmp_path / "adapter.gguf"):
        adapted, _ = apart(model, served)
    assert adapted <= 2 * alone < without / 100


@pytest.fixture
def llama(tmp_path):
    model = model_of("llama")
    served = LlamaCpp(write_base(model, tmp_path / "base.gguf"))
    yield model, served
    served.close()


def test_scale(llama, tmp_path):
    """Half of llama.cpp's scale is half of the scaling."""
    model, served = llama
    alone, _ = apart(model, served)
    stack = adapters(model, LINEARS)
    stack.save_gguf(tmp_path / "adapter.gguf", config=model.config)
    t2l.attach(model, t2l.AdapterStack(stack.lora_A, stack.lora_B, stack.scaling / 2)).set(0)
    with served.adapted(tmp_path / "adapter.gguf", scale=0.5):
        assert apart(model, served)[0] <= 2 * alone


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_16_bit_files(llama, tmp_path, dtype, bits):
    """A and B are rounded; beside the same rounded adapter, llama.cpp rounds what they are multiplied with, too."""
    model, served = llama
    stack = adapters(model, LINEARS)
    stack.save_gguf(tmp_path / "adapter.gguf", config=model.config, dtype=dtype)
    t2l.attach(model, stack.to(dtype=dtype).to(dtype=torch.float32)).set(0)
    with served.adapted(tmp_path / "adapter.gguf"):
        error, size = apart(model, served)
    assert error <= 8 * 2.0**-bits * size


# --- SmolLM2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    model, tokenizer = packaged.load(torch.float32)
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def demos():
    engine = t2l.TextToLoRA.from_pretrained(demo.CHECKPOINT)
    return engine, engine.generate(list(demo.TASKS))


def test_the_demos_answers(smollm, demos, tmp_path):
    """On the packaged 4-bit file: nine tenths of the answers are those of our model of its dequantised weights."""
    (model, tokenizer), (engine, stack) = smollm, demos
    served, handle, same, said = LlamaCpp(packaged.gguf_path()), t2l.attach(model, stack), [], []
    try:
        for i, (description, (_, rows)) in enumerate(demo.TASKS.items()):
            stack.save_gguf(tmp_path / "adapter.gguf", i, config=model.config, description=description)
            prompts = [engine.prompt(tokenizer, question) for question, _ in rows]
            with handle.use(i):
                ours = demo.answer(model, tokenizer, prompts)
            with served.adapted(tmp_path / "adapter.gguf"):
                theirs = [greedy(served, tokenizer, prompt) for prompt in prompts]
            said += zip(ours, theirs, strict=True)
            same += [a == b for a, b in zip(ours, theirs, strict=True)]
    finally:
        handle.detach()
        served.close()
    assert sum(same) >= 0.9 * len(same), said


def greedy(served, tokenizer, prompt, most=14):
    """The first line of the answer."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + most:
        ids.append(int(served.logits(ids)[-1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip().split("\n")[0]
