"""Finding the linears of a model: shared modules, several towers, linears that are never called, models that do not fit."""

import pytest
import torch
from torch import nn

from t2l_engine import AdapterBatch, AdapterStack, LoRALinear, attach
from t2l_engine.testing.numerics import ROW_ATOL
from tests.lora.blocks import Blocks, by_hand


def wrapped(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def test_ragged_tokens_and_packed_columns(make_stack, x):
    """A stack of one's own whose q and v are one linear, over segments of tokens."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({"in_proj": nn.Linear(16, 40)})
    stack, widths = make_stack({"q_proj": (16, 24), "v_proj": (16, 16)}, num_layers=1), {"q_proj": 24, "v_proj": 16}
    base = layer["in_proj"](x).detach()
    expected, batch = base.clone(), AdapterBatch(torch.tensor([0, 1, 1, 4, 6]).int(), torch.tensor([2, 0, -1, 0]).int(), 3)
    for rows, adapter in ((slice(0, 1), 2), (slice(4, 6), 0)):
        deltas = [x[rows] @ stack.lora_A[name][adapter, 0].mT @ stack.lora_B[name][adapter, 0].mT for name in widths]
        expected[rows] += stack.scaling[adapter] * torch.cat(deltas, dim=1)
    with torch.no_grad(), attach(nn.ModuleList([layer]), stack, packed={"in_proj": widths}).use(batch):
        got = layer["in_proj"](x)
    assert (got - expected).abs().max() <= ROW_ATOL and (got - base).abs().max() > 1000 * ROW_ATOL
    assert torch.equal(got[1:4], base[1:4])


def parent(kind, name):
    """A layer of transformers, as far as attach can tell one, around a linear."""
    return nn.ModuleList([type(kind, (nn.ModuleDict,), {})({name: nn.Linear(16, 16)})])


def encoder():
    """torch's encoder layer reads weights, in eval mode without gradients: adapters would silently do nothing."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def nested():
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})])})


NOT_CALLED = r"{0}: layers\.0\..*{0} cannot be adapted: .* does not call it"
READ = "0.{1} cannot be adapted: {0} reads its weight and does not call it"
#: Model, sizes and paths of the stack's modules, message.
REFUSED = [
    *((encoder, {name: (sizes, f"layers.{{layer}}.{name}")}, NOT_CALLED.format(name))
      for name, sizes in (("linear1", (16, 32)), ("linear2", (32, 16)), ("out_proj", (16, 16)))),
    *((lambda of=of: parent(*of), {of[1]: ((16, 16), "{layer}." + of[1])}, READ.format(*of))
      for of in (("MambaMixer", "dt_proj"), ("Mamba2Mixer", "out_proj"), ("WavLMAttention", "v_proj"))),
    (lambda: nn.ModuleDict({"embed_tokens": nn.Embedding(97, 16)}), {"embed_tokens": ((16, 97), "embed_tokens")},
     "embed_tokens: layer 0 is a Embedding, expected a linear"),
    (nested, {"q_proj": ((8, 8), None), "attn.q_proj": ((8, 8), "blocks.{layer}.attn.q_proj")},
     "attn.q_proj: the model has it and q_proj in the same place"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "modules", "message"), REFUSED)
def test_linears_that_are_refused(make_stack, make, modules, message):
    model, paths = make(), {name: path for name, (_, path) in modules.items() if path}
    layers = 2 if make is encoder else 1
    stack = make_stack({name: sizes for name, (sizes, _) in modules.items()}, num_layers=layers, paths=paths)
    with pytest.raises(ValueError, match=message):
        attach(model, stack)
    assert not wrapped(model)


@pytest.mark.parametrize(("kind", "name"), [
    ("MambaMixer", "in_proj"), ("JambaMambaMixer", "out_proj"), ("Qwen3NextGatedDeltaNet", "out_proj"),
])  # fmt: skip
def test_their_neighbours_are_not(make_stack, kind, name):
    attach(parent(kind, name), make_stack({name: (16, 16)}, num_layers=1, paths={name: "{layer}." + name})).detach()


def test_a_module_of_the_first_layers_alone(make_stack, tmp_path, x):
    """A folder of PEFT is filled up to its deepest module, as of a model whose first layer alone is dense."""

    def mixed():
        blocks = Blocks(num_layers=3)
        blocks.layers[0]["gate_proj"] = nn.Linear(16, 8)
        return blocks

    def paths(stack):
        whole = {"q_proj": "layers.{layer}.q_proj", "gate_proj": "layers.{layer}.gate_proj"}
        return AdapterStack(stack.lora_A, stack.lora_B, stack.scaling, stack.ranks, whole)

    made = make_stack({"q_proj": (16, 16), "gate_proj": (16, 8)}, num_layers=3)
    made.ranks["gate_proj"][:, 1:] = 0
    stack, blocks = paths(made), mixed()
    gate = blocks.layers[0]["gate_proj"]
    handle = attach(blocks, stack, slots=4)
    A, B = (side["gate_proj"][1, 0] for side in (stack.lora_A, stack.lora_B))
    with torch.no_grad(), handle.use(1):
        expected = gate(x) + stack.scaling[1] * (x @ A.mT) @ B.mT
        assert (blocks.layers[0]["gate_proj"](x) - expected).abs().max() <= ROW_ATOL
    with handle.borrow_slots(3, stack[1:2]) as out:
        assert out.sizes == stack.sizes
        for written, of in ((out.lora_A, stack.lora_A), (out.lora_B, stack.lora_B), (out.ranks, stack.ranks)):
            for name, tensor in written.items():
                tensor.copy_(of[name][1:2])
        out.scaling.copy_(stack.scaling[1:2])
    with torch.no_grad(), handle.use(3):
        assert (blocks.layers[0]["gate_proj"](x) - expected).abs().max() <= ROW_ATOL
    beyond = make_stack({"q_proj": (16, 16), "gate_proj": (16, 8)}, num_layers=3)
    with pytest.raises(ValueError, match="gate_proj: the adapter has 3 layers, the model has 1"):
        attach(mixed(), paths(beyond))


def test_shared_modules(make_stack, x):
    """A layer in two places is one layer and refused; a linear in two layers is adapted apart, but not merged."""
    stack = make_stack({"q_proj": (16, 16)})
    blocks = Blocks()
    blocks.layers[1] = blocks.layers[0]
    with pytest.raises(ValueError, match="q_proj: layers 0 and 1 of the model are one module"):
        attach(blocks, stack)
    assert not wrapped(blocks)

    blocks = Blocks()
    linear = blocks.layers[1]["q_proj"] = blocks.layers[0]["q_proj"]
    adapters = [0, 2, -1, 1, 1, -1]
    with torch.no_grad():
        expected = by_hand(blocks, stack, x, adapters)
        handle = attach(blocks, stack)
        with handle.use(adapters):
            assert (blocks(x) - expected).abs().max() <= ROW_ATOL
    with pytest.raises(ValueError, match=r"merge: layers.0.q_proj: other modules share its weight"):
        handle.merge(0)
    handle.detach()
    assert blocks.layers[0]["q_proj"] is linear and blocks.layers[1]["q_proj"] is linear

    blocks = Blocks()  # two parameters on one memory: unmerge could not bring back the bits
    first, second = (layer["q_proj"] for layer in blocks.layers)
    second.weight = nn.Parameter(first.weight.data)
    before = first.weight.clone()
    with pytest.raises(ValueError, match="other modules share its weight"):
        attach(blocks, stack).merge(0)
    assert torch.equal(first.weight, before)


@pytest.mark.parametrize(("family", "kwargs", "message"), [
    ("Llama", {"hidden_size": 32, "head_dim": 8}, "q_proj: layer 0: .* 64/64, the model has 32/32"),
    ("Llama", {"num_hidden_layers": 3}, "q_proj: the adapter has 2 layers, the model has 3"),
    ("Llama", {"num_hidden_layers": 1}, "q_proj: the adapter has 2 layers, the model has 1"),
    ("Phi3", {"num_key_value_heads": 4}, "v_proj: layer 0: .* 64/32, the model has 64/64"),
    ("GPT2", {}, "q_proj: the adapter adapts .*, but GPT2LMHeadModel has no such module"),
    ("GPTNeoX", {}, "q_proj: the adapter adapts .*, but GPTNeoXForCausalLM has no such module"),
    # A qkv_proj of Phi-3's sizes with the columns in another order.
    ("CodeGen", {"rotary_dim": 8}, "q_proj: the adapter adapts .*, but CodeGenForCausalLM has no such module"),
])  # fmt: skip
def test_another_base_model(tiny_model, make_stack, family, kwargs, message):
    model = tiny_model(family, **kwargs)
    stack = make_stack({"q_proj": (64, 64), "v_proj": (64, 32)})
    modules = dict(model.named_modules())
    handle = attach(model, slots=2)
    for call in (lambda: attach(model, stack), lambda: handle.put(0, stack[0])):
        with pytest.raises(ValueError, match=message):
            call()
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("part", ["model.layers.1.self_attn.q_proj", "model.layers.0", "model.embed_tokens", ""])
def test_a_model_partly_on_meta(model, stack_for, part):
    stack = stack_for(model, ("q_proj", "v_proj"))
    model.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match="model: .*on the meta device; load"):
        attach(model, stack)
    assert not wrapped(model)


# --- models with several towers --------------------------------------------------------------------------------------


def test_the_decoder_of_a_multimodal_model(make_stack):
    """Vision tower and language model have a q_proj each: the language model's is meant."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 97, "initializer_range": 0.2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    special = {"mm_tokens_per_image": 4, "boi_token_index": 94, "eoi_token_index": 95, "image_token_index": 96}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **special)
    model = transformers.Gemma3ForConditionalGeneration(config)
    paths = {name for name, _ in model.named_modules() if name.endswith("layers.0.self_attn.q_proj")}
    assert len(paths) == 2
    attach(model, make_stack({"q_proj": (64, 64), "v_proj": (64, 64)}))
    assert len(wrapped(model)) == 4 and all("language_model" in name for name in wrapped(model))


class Towers(nn.Module):
    """Two families of modules with the same names."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = (
            nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))})
            for _ in range(2)
        )


def test_two_towers(make_stack):
    model, stack = Towers(), make_stack({"q_proj": (8, 8)})
    message = r"q_proj: .*several modules.*text.layers.\{layer\}.*vision.layers.\{layer\}.q_proj"
    with pytest.raises(ValueError, match=message):
        attach(model, stack)
    assert not wrapped(model)
    for tower in ("vision", "text"):
        named = make_stack({"q_proj": (8, 8)}, paths={"q_proj": f"{tower}.layers.{{layer}}.q_proj"})
        handle = attach(model, named)
        assert wrapped(model) == [f"{tower}.layers.{i}.q_proj" for i in range(2)]
        handle.detach()
    model.get_decoder = lambda: model.text
    attach(model, stack)
    assert wrapped(model) == [f"text.layers.{i}.q_proj" for i in range(2)]


def test_stacks_may_spell_a_place_differently(make_stack):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(16, 16)}) for _ in range(2))
    x = torch.randn(3, 16)
    first = make_stack({"q_proj": (16, 16)}, num_adapters=1)
    other = make_stack({"q_proj": (16, 16)}, num_adapters=1, seed=1, paths={"q_proj": "blocks.{layer}.q_proj"})
    lora = attach(model, first, slots=2)
    lora.put(1, other)
    assert len(lora._slots) == 1
    with torch.no_grad(), lora.use([0, 1, -1]):
        y = model.blocks[1]["q_proj"](x)
    A, B = other.lora_A["q_proj"][0, 1], other.lora_B["q_proj"][0, 1]
    expected = model.blocks[1]["q_proj"].base(x)[1] + other.scaling * (x[1] @ A.mT @ B.mT)
    assert (y[1] - expected).abs().max() <= ROW_ATOL
    with lora.differentiable(other, 0):
        assert (model.blocks[1]["q_proj"](x)[1] - expected).abs().max() <= ROW_ATOL
    lora.detach()
