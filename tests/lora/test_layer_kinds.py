"""Layers that are no plain ``nn.Linear``: they are adapted, and merged only where they have a plain weight of their own."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from t2l_engine import attach
from t2l_engine.testing.numerics import ROW_ATOL
from tests.lora.blocks import Blocks, by_hand


class Int8Linear(nn.Module):
    """Weight-only quantisation: no parameter, an int8 buffer and scales."""

    def __init__(self, in_features, out_features):
        super().__init__()
        weight = torch.randn(out_features, in_features)
        scale = weight.abs().amax(dim=1) / 127
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale[:, None]).mT


class Callable(nn.Module):
    """Says nothing of itself."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, x):
        return 2 * x.flip(-1)


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.1, self.bias)


class Float8(nn.Linear):
    """As transformers' FP8Linear: an ``nn.Linear`` by class, whose weight is float8."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Transposed(nn.Module):
    """Says its sizes as Conv1D does, and keeps its weight otherwise."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.nx, self.nf = n_in, n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out))

    def forward(self, x):
        return x @ self.weight / 10


class OwnTensor(torch.Tensor):
    """A tensor that may compute in its own way, as sparse and quantised ones do."""


def own_tensor(*sizes):
    linear = nn.Linear(*sizes)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(OwnTensor))
    return linear


KINDS = {
    "int8": Int8Linear, "callable": Callable, "identity": nn.Identity, "scaled": Scaled, "float8": Float8,
    "transposed": Transposed, "own tensor": own_tensor,
    "dynamic": lambda *sizes: torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(*sizes)), {nn.Linear}, dtype=torch.qint8
    )[0],  # its ``weight`` is a method
    "parametrized": lambda *sizes: parametrizations.weight_norm(nn.Linear(*sizes)),  # its weight is computed when it is read
    "pruned": lambda *sizes: prune.l1_unstructured(nn.Linear(*sizes), "weight", amount=0.5),  # and before every forward pass
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_that_are_no_plain_linear(make_stack, x, kind):
    if kind == "dynamic" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised linears")
    # One layer: dynamic quantisation would turn a difference of one rounding into a whole step in the next.
    blocks, stack = Blocks(KINDS[kind], num_layers=1), make_stack({"q_proj": (16, 16)}, num_layers=1)
    adapters, rows = [0, 2, -1, 1, 1, -1], x.clone()
    with torch.no_grad():
        expected, base = by_hand(blocks, stack, x, adapters), blocks(x)
        handle = attach(blocks, stack)
        with handle.use(adapters):
            got = blocks(x)
    assert torch.equal(x, rows)
    assert (got - expected).abs().max() <= ROW_ATOL and (got[0] - base[0]).abs().max() > 1000 * ROW_ATOL
    assert torch.equal(got[2], base[2])
    with pytest.raises(ValueError, match="merge: layers.0.q_proj is a .* without a plain weight"):
        handle.merge(0)
    handle.detach()
    assert torch.equal(blocks(x), base)


def test_what_a_layer_takes_and_gives(make_stack, x):
    class Two(nn.Linear):
        def forward(self, input, scale=1.0, both=False):
            y = super().forward(input) * scale
            return (y, y) if both else y

    blocks, stack = Blocks(Two, num_layers=1), make_stack({"q_proj": (16, 16)}, num_layers=1)
    with torch.no_grad():
        base = blocks.layers[0]["q_proj"](x, 2.0)
        with attach(blocks, stack).use(0):
            layer = blocks.layers[0]["q_proj"]
            plain = layer(x) - layer.base(x)
            assert torch.equal(layer(input=x, scale=2.0), layer(x, 2.0))
            assert (layer(x, 2.0) - base - plain).abs().max() <= ROW_ATOL
            with pytest.raises(RuntimeError, match="q_proj: expected a layer that returns a tensor, got tuple"):
                layer(x, both=True)


def test_parts_of_a_layer_keep_their_mode(make_stack):
    blocks = Blocks(lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.Dropout().eval()))
    handle = attach(blocks, make_stack({"q_proj": (16, 16)}))
    assert all(layer["q_proj"].training for layer in blocks.layers)
    handle.detach()
    assert not any(layer["q_proj"][1].training for layer in blocks.layers)
