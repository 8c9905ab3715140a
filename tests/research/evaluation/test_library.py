"""A library of adapters: its average, Arrow's prototypes, and the model that Arrow routes, against loops over tokens."""

import itertools

import pytest
import torch
from torch import nn

from t2l_engine import AdapterStack, attach
from t2l_engine.research.evaluation.library import arrow, average, routing_weights
from t2l_engine.research.evaluation.library import prototypes as directions
from t2l_engine.testing.numerics import LOGITS_ATOL, lora_frobenius, relative_frobenius, u
from tests.lora.tiny_llama import NAMES, logits


def blocks(**linears):
    """A model of two layers; ``linears``: name -> (in, out) features."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in linears.items()}) for _ in range(2))


def enter(*arguments, **options):
    with arrow(*arguments, **options):
        pass


def prototypes(stack):
    clean = stack.zero_padded()
    return {name: directions(clean.lora_A[name], clean.lora_B[name].mT) for name in clean.lora_A}


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def with_ranks(stack, ranks, name="q_proj"):
    """``stack`` with the ranks ``[N][n]`` of one module, and values beyond them that must not be used."""
    ranks = torch.tensor(ranks, dtype=torch.int32)
    a, b = stack.lora_A[name].clone(), stack.lora_B[name].clone()
    beyond = torch.arange(a.shape[2]) >= ranks[..., None]
    a[beyond] = torch.nan
    b.mT[beyond] = torch.inf
    return AdapterStack(
        stack.lora_A | {name: a}, stack.lora_B | {name: b}, stack.scaling, stack.ranks | {name: ranks}, stack.paths
    )


def leading(A, B):
    """The right singular vector of ``B A`` with the largest singular value, in float64 and by the definition."""
    return torch.linalg.svd(B.double() @ A.double()).Vh[0]


def naive(base, stack, name, layer, x, top_k):
    """Arrow's layer, a token and an expert at a time, in float64."""
    pairs = []
    for i, rank in enumerate(stack.ranks[name][:, layer].tolist()):
        pairs.append((stack.lora_A[name][i, layer, :rank].double(), stack.lora_B[name][i, layer, :, :rank].double()))
    directions = [leading(A, B) if bool((B @ A).any()) else A.new_zeros(A.shape[1]) for A, B in pairs]
    y = nn.functional.linear(x.double(), base.weight.double(), base.bias.double())
    for place in itertools.product(*map(range, x.shape[:-1])):
        h = x[place].double()
        logits = torch.tensor([abs(float(h @ v)) for v in directions], dtype=torch.float64)
        chosen = logits.argsort(descending=True)[:top_k].tolist()
        for i, share in zip(chosen, logits[chosen].softmax(dim=0).tolist(), strict=True):
            A, B = pairs[i]
            y[place] += share * float(stack.scaling[i]) * (B @ (A @ h))
    return y


# --- average ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_the_mean_of_the_factors(make_stack, dtype):
    stack = make_stack({"q_proj": (16, 12), "v_proj": (16, 8)}, dtype=dtype)
    stack.scaling.fill_(1.5)
    mean = average(stack)
    assert len(mean) == 1 and mean.dtype == dtype and mean.scaling.tolist() == [1.5] and mean.paths == stack.paths
    for name in stack.lora_A:
        assert mean.ranks[name].tolist() == [[4, 4]]
        for got, side in ((mean.lora_A[name], stack.lora_A[name]), (mean.lora_B[name], stack.lora_B[name])):
            expected = sum(adapter.double() for adapter in side) / 3
            assert relative_frobenius(got[0], expected) <= lora_frobenius(dtype)


def test_what_cannot_be_averaged(make_stack):
    stack = make_stack({"q_proj": (16, 12)})
    with pytest.raises(ValueError, match=r"stack: expected one scaling to average, got \[0.5, 1.25, 2.0\]"):
        average(stack)
    stack.scaling.fill_(1.0)
    with pytest.raises(ValueError, match=r"stack: q_proj: layer 1: expected one rank to average, got \[2, 4\]"):
        average(with_ranks(stack, [[3, 4], [3, 2], [3, 4]]))
    average(with_ranks(stack, [[3, 4]] * 3))  # ranks may differ between layers
    with pytest.raises(ValueError, match="stack: expected at least one adapter, got none"):
        average(stack[:0])
    with pytest.raises(ValueError, match="stack: expected an AdapterStack, got list"):
        average([stack])


# --- prototypes and shares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(16, 12), (3, 12), (16, 3)], ids=["usual", "in<rank", "out<rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prototypes_are_leading_right_singular_vectors(make_stack, sizes, dtype):
    stack = make_stack({"q_proj": sizes}, dtype=dtype)
    found = prototypes(stack)["q_proj"]
    assert found.shape == (3, 2, sizes[0]) and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(3):
        for layer in range(2):
            exact = leading(stack.lora_A["q_proj"][i, layer], stack.lora_B["q_proj"][i, layer])
            got = found[i, layer] * torch.sign(found[i, layer].double() @ exact)
            assert relative_frobenius(got, exact) <= u(torch.float32)


def test_logits_of_bfloat16_inputs_are_float32():
    x = torch.tensor([[256.0, 0.5]], dtype=torch.bfloat16)  # logits of 256 and 256.5, which bfloat16 cannot tell apart
    weights = routing_weights(x, torch.tensor([[1.0, 0.0], [-1.0, -1.0], [0.0, 1.0]]), top_k=2)
    expected = [*torch.tensor([256.0, 256.5]).softmax(dim=0).tolist(), 0.0]
    assert weights.dtype == torch.float32 and weights.tolist() == [expected]


# --- routed layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 16), (7, 16), (2, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@torch.no_grad()
def test_layers_equal_a_loop_over_tokens(make_stack, top_k, shape):
    bare, stack, x = blocks(q_proj=(16, 12)), make_stack({"q_proj": (16, 12)}), inputs(*shape)
    stack = with_ranks(stack, [[4, 2], [1, 4], [3, 3]])
    with arrow(bare, stack, top_k):
        for layer, block in enumerate(bare):
            got, base = block["q_proj"](x), nn.functional.linear(x, block["q_proj"].weight, block["q_proj"].bias)
            expected = naive(block["q_proj"], stack, "q_proj", layer, x, top_k)
            assert got.dtype == torch.float32 and not torch.equal(got, base)
            assert relative_frobenius(got, expected) <= lora_frobenius(torch.float32)


@torch.no_grad()
def test_experts_that_add_nothing(make_stack):
    """Adapters with B A = 0; no tokens at all."""
    bare, stack, x = blocks(q_proj=(16, 12)), make_stack({"q_proj": (16, 12)}), inputs(2, 5, 16)
    stack.lora_B["q_proj"][1:] = 0
    with arrow(bare, stack, top_k=3):  # two shares of nothing
        assert bare[0]["q_proj"](inputs(0, 5, 16)).shape == (0, 5, 12)
        expected = naive(bare[0]["q_proj"], stack, "q_proj", 0, x, 3)
        assert relative_frobenius(bare[0]["q_proj"](x), expected) <= lora_frobenius(torch.float32)
    base = bare[0]["q_proj"](x)
    with arrow(bare, stack[1:], top_k=2):
        assert torch.equal(bare[0]["q_proj"](x), base)
    with arrow(bare, with_ranks(stack, [[0, 4], [0, 4], [0, 4]]), top_k=2):  # no adapter has the layer
        assert torch.equal(bare[0]["q_proj"](x), base)


@torch.no_grad()
def test_packed_projections(make_stack):
    """Every module is routed alone, and adds to its own columns."""
    bare, x = blocks(qkv=(16, 20)), inputs(2, 5, 16)
    stack = make_stack({"v_proj": (16, 4), "q_proj": (16, 12)})
    packed = {"qkv": {"q_proj": 12, "k_proj": 4, "v_proj": 4}}
    base = bare[1]["qkv"](x)
    with arrow(bare, stack, top_k=2, packed=packed):
        got = bare[1]["qkv"](x)
    assert torch.equal(got[..., 12:16], base[..., 12:16])
    for name, start, width in (("q_proj", 0, 12), ("v_proj", 16, 4)):
        part = nn.Linear(16, width)
        part.weight, part.bias = (
            nn.Parameter(p[start : start + width]) for p in (bare[1]["qkv"].weight, bare[1]["qkv"].bias)
        )
        expected = naive(part, stack, name, 1, x, 2)
        assert relative_frobenius(got[..., start : start + width], expected) <= lora_frobenius(torch.float32)
    with pytest.raises(ValueError, match="v_proj: .*ModuleList has no such module"):
        enter(bare, stack, top_k=2)


# --- routed models ---------------------------------------------------------------------------------------------------


def test_a_library_of_one_is_that_adapter(model, stack_for, tokens):
    stack = stack_for(model, NAMES, num_adapters=1)
    base = logits(model, tokens)
    handle = attach(model, stack)
    with handle.use(0):
        expected = logits(model, tokens)
    handle.detach()
    with arrow(model, stack):  # its four experts are one
        got = logits(model, tokens)
    assert (got - expected).abs().max() <= LOGITS_ATOL < 1000 * LOGITS_ATOL < (got - base).abs().max()


def test_the_end_leaves_the_model_as_it_was(model, stack_for, tokens):
    stack = stack_for(model, NAMES)
    modules, state = dict(model.named_modules()), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = logits(model, tokens)
    with arrow(model, stack, top_k=2):
        assert not torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), base)
    assert dict(model.named_modules()) == modules and not any(module._forward_hooks for module in modules.values())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(KeyError), arrow(model, stack, top_k=2):
        raise KeyError
    assert torch.equal(logits(model, tokens), base)
    with arrow(model, stack, top_k=2):
        before = logits(model, tokens)
        for tensor in (*stack.lora_A.values(), *stack.lora_B.values(), stack.scaling):
            tensor.zero_()  # the library was copied
        assert torch.equal(logits(model, tokens), before)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_other_models_and_stacks_are_refused(model, make_stack, stack_for):
    stack, bare, broken = stack_for(model, NAMES), blocks(q_proj=(16, 12)), make_stack({"q_proj": (16, 12)})
    broken.lora_A["q_proj"][0, 1] = torch.nan
    tied = blocks(q_proj=(16, 12))
    tied[1]["q_proj"] = tied[0]["q_proj"]
    for target, library, message in (
        ("model", stack, "model: expected a torch module, got str"),
        (model, "folder", "stack: expected an AdapterStack, got str; read a folder"),
        (model, stack[:0], "stack: expected at least one adapter, got none"),
        (model, make_stack({"q_proj": (64, 65)}), "q_proj: layer 0: .* 64/65, the model has 64/128"),
        (bare, broken, "non-finite"),
        (tied, make_stack({"q_proj": (16, 12)}), "0.q_proj and 1.q_proj are one linear; they cannot be routed apart"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            enter(target, library, top_k=1)
    with attach(model, stack).use(0) as handle, pytest.raises(ValueError, match="model: adapters are attached already"):
        enter(model, stack, top_k=1)
    handle.detach()
    assert not any(module._forward_hooks for of in (model, bare, tied) for module in of.modules())
