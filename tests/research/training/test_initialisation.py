"""Where training starts: B is zero and A is PEFT's draw, for every variant and shape, so that nothing changes at first."""

import peft
import pytest
import torch
from torch import nn

import t2l_engine as t2l
from t2l_engine.hypernetwork.config import VARIANTS
from t2l_engine.research.training.context import Modules
from t2l_engine.research.training.lora import LoRABank
from t2l_engine.testing.numerics import STANDARD_ERRORS

SIZES = {"q_proj": (96, 160), "v_proj": (160, 96), "down_proj": (1, 7)}  # in and out
RANK = 32


def start(variant):
    """Two adapters, of embeddings that differ and are large."""
    n_in, n_out = zip(*SIZES.values(), strict=True)
    if variant == "bank":
        paths = tuple(f"l.{{layer}}.{name}" for name in SIZES)
        with torch.no_grad():
            return LoRABank(Modules(tuple(SIZES), paths, n_in, n_out, 2), 2, RANK, 1.0, seed=1)()
    torch.manual_seed(0)
    net = t2l.HyperNetwork(t2l.HyperNetworkConfig(
        variant=variant, modules=tuple(SIZES), in_features=n_in, out_features=n_out, num_layers=2, rank=RANK, embed_dim=6,
        latent_size=8, head_in_size=5, lora_alpha=8.0,
    ))  # fmt: skip
    return net.bias_hyperinit(torch.Generator().manual_seed(1)).generate(torch.randn(2, 6) * 1e4)


def peft_draw(n_in, n_out):
    torch.manual_seed(3)
    model = nn.ModuleDict({"q_proj": nn.Linear(n_in, n_out)})
    made = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=["q_proj"]), model)["q_proj"]
    assert not made.lora_B["default"].weight.any()
    return made.lora_A["default"].weight.detach()


@pytest.mark.parametrize("variant", [*VARIANTS, "bank"])
def test_the_first_delta_is_zero_and_A_is_drawn_as_in_peft(variant):
    """One draw for every layer and adapter; mean, variance and bound of A beside PEFT's own draw for a layer alike."""
    stack = start(variant)
    for name, (n_in, n_out) in SIZES.items():
        A, B, bound = stack.lora_A[name], stack.lora_B[name], n_in**-0.5
        assert not B.any() and A.any() and A.abs().max() <= bound and torch.equal(A, A[:1, :1].expand_as(A))
        if n_in == 1:
            continue
        ours, theirs = A[0, 0], peft_draw(n_in, n_out)
        assert ours.shape == theirs.shape
        count, error = ours.numel(), (4 / 45 / ours.numel()) ** 0.5 * bound**2  # of the mean square of uniform draws
        for draw in (ours, theirs):
            assert draw.abs().max() <= bound
            assert (draw.abs() > 0.99 * bound).any()
            assert abs(draw.mean()) <= STANDARD_ERRORS * bound * (1 / 3 / count) ** 0.5
            assert abs(draw.square().mean() - bound**2 / 3) <= STANDARD_ERRORS * error
        rows, columns = ours.square().mean(dim=1), ours.square().mean(dim=0)  # no part is drawn otherwise
        for parts, size in ((rows, n_in), (columns, RANK)):
            assert (parts - bound**2 / 3).abs().max() <= STANDARD_ERRORS * error * (count / size) ** 0.5
        assert len(ours.unique()) > 0.99 * count
